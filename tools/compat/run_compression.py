"""Compress a Mixture-of-Experts teacher as scripts/run_compression.py does: RUN/student-0, a Hugging Face folder.

    python tools/compat/run_compression.py
    python tools/compat/run_compression.py compression.rank=32 model.name=path/to/a/teacher

It runs `megakd tokenize`, for the experts are measured on text, and `megakd compress`. The configuration is
conf/config.yaml of the working directory; which run, and what may change later: tools/compat/run_from_conf.py.
"""

from run_from_conf import build_parser, finish, open_run
from run_from_flags import one_line

from megakd.system.terminal import accept_any_encoding


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    with one_line("run_compression"):
        run = open_run(build_parser(__doc__).parse_intermixed_args(argv))
        finish(run, ("tokenize", "compress"))
        print(f"student: {run.path('student-0')}")


if __name__ == "__main__":
    main()
