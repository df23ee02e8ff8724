"""Bring a run to its end: every verb whose result is missing, in order, each in a process of its own.

tokenize → compress (where the student is a compressed teacher) → generate-logits → train → evaluate → export → report.
With a live teacher generate-logits captures the validation set alone, and is skipped where teacher and student have two
tokenizers. Started again after a kill or a signal, it says what is finished and goes on with the rest. SIGTERM,
SIGUSR1 and Ctrl-C go to the verb that runs. The exit code is that of the verb that failed: 85 after a stop signal, 2
for a user error. A model that evaluate cannot measure does not stop export and report; the exit code is 2 all the same.

examples:
  megakd run runs/a
  megakd run runs/a optim.micro_batch=2             mutable settings may change, as behind any verb
  megakd run runs/a --until generate-logits         then sbatch launch/train.sbatch runs/a, and: megakd run runs/a
  megakd run runs/a --dry-run                       which verbs would run, and why; starts nothing
"""

import argparse
import sys

from megakd.errors import UserError
from megakd.finish import VERBS, lacks, steps_of, to_the_end
from megakd.run import Run
from megakd.system.logging import say
from megakd.system.text import table
from megakd.system.verbs import VerbFailed, to_go_on


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, made by `megakd new`")
    parser.add_argument("--until", metavar="VERB", choices=VERBS, help="end after this verb")
    parser.add_argument("--dry-run", action="store_true", help="say which verbs would run, and why; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of mutable settings")


def main(args: argparse.Namespace) -> None:
    if args.dry_run:
        if args.overrides:
            raise UserError("run: --dry-run changes nothing: give no section.key=value")
        plan(Run.open(args.run), args.until)
        return
    try:
        to_the_end(Run.open(args.run, args.overrides), args.until)
    except VerbFailed as failed:
        say(f"run: {failed}; {to_go_on(failed.code, f'megakd run {args.run}')}")
        sys.exit(failed.code)


def plan(run: Run, until: str | None = None) -> None:
    """Print which verbs `to_the_end` would run, and why."""
    rows, begun = [], False
    for step in steps_of(run, until):
        why = lacks(run, step.verb)
        begun = begun or why is not None
        rows.append([step.verb, "finished" if why is None else "runs", why or ""])
        if why is None and begun:
            rows[-1] = [step.verb, "finished", "as long as the verbs before it change nothing"]
    print(table(["verb", "", "why"], rows, left=True))
