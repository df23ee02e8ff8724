"""Evaluate checkpoints while training publishes them, as scripts/run_async_eval.py does: RUN/evals.jsonl.

    CUDA_VISIBLE_DEVICES=7 python tools/compat/run_async_eval.py
    python tools/compat/run_async_eval.py evaluation.tasks=hellaswag,piqa evaluation.limit=500

It is `megakd watch`: it ends with the training. The configuration is conf/config.yaml of the working directory;
evaluation.* may change at any time. Which run: tools/compat/run_from_conf.py.
"""

from run_from_conf import build_parser, open_run
from run_from_flags import one_line

from megakd.cli import run_verb
from megakd.system.terminal import accept_any_encoding


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    with one_line("run_async_eval"):
        run = open_run(build_parser(__doc__).parse_intermixed_args(argv), makes=False)
        run_verb(["watch", str(run.folder)])


if __name__ == "__main__":
    main()
