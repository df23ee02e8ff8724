"""The command line: a verb, a run folder, overrides; verbs are imported when asked for."""

import argparse
import gc
import importlib
import os
import sys
from types import ModuleType

from megakd.errors import UserError
from megakd.system.files import CANNOT_WRITE
from megakd.system.launcher import read_launcher
from megakd.system.signals import USER_ERROR, end_on_stop_signals, ignore_stop_signals, leave_code
from megakd.system.terminal import accept_any_encoding, leave_closed_pipe
from megakd.system.version import library_versions, version_line

# verb → (one line, does it open a run)
VERBS = {
    "new": ("make a run folder from a recipe", False),
    "config": ("every field of a configuration, its values, default and meaning", False),
    "plan": ("parameters, bytes and steps of a run; starts nothing", True),
    "run": ("bring a run to its end: every verb whose result is missing", False),
    "compress": ("teacher experts → shared core and wrappers: RUN/student-0", True),
    "tokenize": ("text → packed windows: RUN/data/tokens", True),
    "generate-logits": ("teacher targets next to the tokens: RUN/data/logits", True),
    "train": ("distil, stage by stage; resumes by itself", True),
    "evaluate": ("held-out perplexity, KL to the teacher, agreement, size, speed; lm-eval tasks", True),
    "watch": ("evaluate checkpoints while they appear, keep the best", True),
    "export": ("a Hugging Face folder: compact, or --dense for the stock architecture", True),
    "serve": ("start vLLM, or transformers' own server, on an export", True),
    "inspect": ("explain a run, a folder of shards, a shard or a checkpoint", False),
    "report": ("one self-contained HTML page: RUN/report.html", True),
    "doctor": ("examine machine, libraries, folder, hosts and Slurm; a remedy for each fault", False),
    "demo": ("all of it on a small teacher that ships with MegaKD, in minutes", False),
}

SHARED = ("compress", "doctor", "generate-logits", "train", "watch")  # verbs that several processes may do together

DESCRIPTION = "Distil a large Mixture-of-Experts teacher into a small student."

EXAMPLES = """\
examples:
  megakd demo                                            the whole path, no network, no GPU
  megakd new runs/a --from qwen3-30b-a3b-r64             a run from a shipped recipe
  megakd new runs/b --from runs/a objective.alpha=0.9    a sibling; what is unchanged is shared
  megakd run runs/a                                      all that is missing, in order; the same again goes on
  megakd train runs/a optim.micro_batch=2                mutable settings may change later

`megakd VERB --help` explains a verb; `megakd --version` prints the versions of MegaKD and of its main libraries.
Exit codes: 0 fine, 2 a user error, 1 a bug, 85 stopped by SIGTERM or SIGUSR1: what is finished is saved.
"""


class ShowVersion(argparse.Action):
    """Print MegaKD's version and commit, and the versions of the libraries next to it; then exit."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        sys.stdout.write("\n".join([version_line(), *library_versions()]) + "\n")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of verbs alone; each verb adds its own arguments when it is imported."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb.ljust(width)}  {line}" for verb, (line, _) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="megakd",
        usage="megakd VERB RUN [section.key=value ...]",
        description=f"{DESCRIPTION}\n\nverbs:\n{verbs}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help=argparse.SUPPRESS)
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    return parser


def run_verb(argv: list[str]) -> None:
    """Run one command line; raises UserError for a user's mistake, and where files cannot be written."""
    try:
        _run_verb(argv)
    except OSError as error:
        if error.errno not in CANNOT_WRITE or not error.filename:
            raise
        raise UserError(f"{error.filename}: {(error.strerror or 'cannot be written').lower()}") from error


def _run_verb(argv: list[str]) -> None:
    verb = build_parser().parse_args(argv[:1] or ["--help"]).verb
    line, opens_run = VERBS[verb]
    command = _module(verb)
    parser = argparse.ArgumentParser(
        prog=f"megakd {verb}",
        description=command.__doc__ or line,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=_sections(getattr(command, "SECTIONS", ())),
    )
    if opens_run:
        parser.add_argument("run", metavar="RUN", help="a run folder, made by `megakd new`")
    if hasattr(command, "arguments"):
        command.arguments(parser)
    if opens_run:
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of mutable settings")
    own, further = argv[1:], []
    if "--" in own and getattr(command, "PASSES_ON", False):
        own, further = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_intermixed_args(own)
    args.further = further
    if verb not in SHARED:
        _refuse_ranks(verb)
    if not opens_run:
        command.main(args)
        return
    from megakd.run import Run

    command.main(Run.open(args.run, args.overrides), args)


def _refuse_ranks(verb: str) -> None:
    """Ranks that each did the same work would write the same files."""
    launched = read_launcher()
    if launched.size > 1:
        raise UserError(
            f"{verb}: started as rank {launched.rank} of {launched.size} by {launched.by}; it is one process: start it "
            "once"
        )


def _sections(names: tuple[str, ...]) -> str | None:
    """Which sections of the configuration a verb reads."""
    return f"reads the sections {', '.join(names)} of RUN/config.json; see: megakd config SECTION" if names else None


def main() -> None:
    """Entry point of a process: `run_command_line`, from the first line to the last with an answer to stop signals."""
    end_on_stop_signals()  # before a verb's libraries are imported, which takes seconds
    try:
        run_command_line()
    finally:
        ignore_stop_signals()


def run_command_line() -> None:
    """Run sys.argv: exit 0 fine, 2 a user's mistake in one line, 1 a bug with its traceback, 85 after a stop signal."""
    accept_any_encoding()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        # launchers put --local_rank=N before the verb; LOCAL_RANK in the environment says the same
        argv = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank=")]
        _load(argv[:1])
        run_verb(argv)
        sys.stdout.flush()  # here, where a closed pipe is no traceback, and not when the interpreter ends
    except UserError as error:
        sys.stderr.write(f"megakd{_rank()}: {error}\n")
        leave_code(USER_ERROR)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("megakd: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        leave_closed_pipe()
        raise
    except Exception:
        leave_code(1)
        raise


def _load(verb: list[str]) -> None:
    """Import a verb without looking for garbage: what imports make stays, and no later collection looks at it again."""
    if verb and verb[0] in VERBS:
        gc.disable()
        _module(verb[0])
        gc.freeze()
        gc.enable()


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"megakd.commands.{verb.replace('-', '_')}")


def _rank() -> str:
    """ " (rank 3)" where there are several; what is wrong with a launcher's variables is the error itself."""
    try:
        launched = read_launcher()
    except UserError:
        return ""
    return f" (rank {launched.rank})" if launched.size > 1 else ""


if __name__ == "__main__":
    main()
