"""Train the compressed student as scripts/run_distillation.py does, from cached logits; what is missing is made first.

    python tools/compat/run_distillation.py
    python tools/compat/run_distillation.py distillation.training.num_train_epochs=1 model.name=path/to/a/teacher
    torchrun --nproc_per_node=8 tools/compat/run_distillation.py

It runs what the run lacks of `megakd tokenize`, `compress`, `generate-logits`, `train` and `export`; the student is
RUN/export. By torchrun it trains on all ranks, with ZeRO in the place of FSDP (engine.config), and expects the rest to
be there. The configuration is conf/config.yaml of the working directory; which run, and what may change later:
tools/compat/run_from_conf.py.
"""

from run_from_conf import build_parser, finish, open_run
from run_from_flags import one_line

from megakd.cli import run_verb
from megakd.errors import UserError
from megakd.finish import lacks, steps_of
from megakd.run import Run
from megakd.serve.export import export, last_weights
from megakd.system.launcher import read_launcher
from megakd.system.terminal import accept_any_encoding

VERBS = ("tokenize", "compress", "generate-logits", "train", "export")


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    with one_line("run_distillation"):
        launched = read_launcher()
        run = open_run(build_parser(__doc__).parse_intermixed_args(argv), makes=launched.size == 1)
        if launched.size == 1:
            finish(run, VERBS)
        else:
            train_together(run)
        if launched.rank == 0:
            if launched.size > 1:
                export(run, last_weights(run), out=None, dense=False, force=False)  # the verb wants to be alone
            print(f"student: {run.path('export')}")


def train_together(run: Run) -> None:
    """`megakd train` as one rank of a launcher's; UserError where something is not there that it reads."""
    for step in steps_of(run, "generate-logits"):
        if why := lacks(run, step.verb):
            raise UserError(
                f"{run.folder}: {why}; make it first: python tools/compat/generate_teacher_logits.py, and "
                "tools/compat/run_compression.py where the student is a compressed teacher"
            )
    run_verb(["train", str(run.folder)])


if __name__ == "__main__":
    main()
