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
import importlib
import sys
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import NamedTuple

from megakd.errors import UserError
from megakd.run import Run
from megakd.system.files import locked
from megakd.system.launcher import read_launcher
from megakd.system.logging import say
from megakd.system.text import clock, table
from megakd.system.verbs import VerbFailed, Verbs, VerbsHere


class Step(NamedTuple):
    """A verb of the way to the end, and whether a run has it."""

    verb: str
    belongs: Callable[[Run], bool]


def _always(run: Run) -> bool:
    return True


def _compresses(run: Run) -> bool:
    return run.config.model.student is None


def _stores_targets(run: Run) -> bool:
    """Training reads the teacher's targets, or those of the validation set can be compared."""
    from megakd.models.checks import one_tokenizer

    return not run.config.objective.live or one_tokenizer(run.config)


# tokenize first: compress measures the experts' inputs on the run's tokens
STEPS = (
    Step("tokenize", _always),
    Step("compress", _compresses),
    Step("generate-logits", _stores_targets),
    Step("train", _always),
    Step("evaluate", _always),
    Step("export", _always),
    Step("report", _always),
)
VERBS = [step.verb for step in STEPS]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, made by `megakd new`")
    parser.add_argument("--until", metavar="VERB", choices=VERBS, help="end after this verb")
    parser.add_argument("--dry-run", action="store_true", help="say which verbs would run, and why; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of mutable settings")


def main(args: argparse.Namespace) -> None:
    launched = read_launcher()
    if launched.size > 1:
        raise UserError(
            f"run: started as rank {launched.rank} of {launched.size} by {launched.by}; it starts ranks itself: start "
            "it once, or start the verbs by launch/*.sbatch"
        )
    if args.dry_run:
        if args.overrides:
            raise UserError("run: --dry-run changes nothing: give no section.key=value")
        plan(Run.open(args.run), args.until)
        return
    try:
        to_the_end(Run.open(args.run, args.overrides), args.until)
    except VerbFailed as failed:
        say(f"run: {failed}; to go on: megakd run {args.run}")
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


def to_the_end(
    run: Run,
    until: str | None = None,
    here: Callable[[list[str]], None] | None = None,
    verbs: Collection[str] = (),
) -> None:
    """Run each verb whose result is missing, up to `until`; VerbFailed where one does not end well.

    here: what runs a verb in this process (`VerbsHere`); None: each has a process of its own. verbs: these alone.
    """
    from megakd.tracking import check_tracking

    check_tracking(run.config.log)  # what train would refuse hours later
    steps, rows, failed = [step for step in steps_of(run, until) if step.verb in (verbs or VERBS)], [], None
    begin = time.perf_counter()
    alone = locked(run.path("run.lock"), "is being brought to its end by another process; wait for it or stop it")
    with alone, Verbs.listening() if here is None else nullcontext(VerbsHere(here)) as started:
        for number, step in enumerate(steps, start=1):
            started.check_stopped(step.verb)
            why = lacks(run, step.verb)
            title = f"run: {number} of {len(steps)}: {step.verb}"
            if why is None:
                say(f"{title}: finished already")
                rows.append([step.verb, "finished already"])
                continue
            say(f"{title}: {why}")
            start = time.perf_counter()
            code = started.run(step.verb, str(run.folder))
            rows.append([step.verb, clock(time.perf_counter() - start)])
            if code and (step.verb, code) != ("evaluate", 2):
                raise VerbFailed(step.verb, code)
            failed = failed or (VerbFailed(step.verb, code) if code else None)
    rows.append(["in all", clock(time.perf_counter() - begin)])
    say(table([str(run.folder), "time"], rows))
    if failed:
        raise failed


def steps_of(run: Run, until: str | None = None) -> list[Step]:
    """The verbs of a run, up to `until`; UserError where the run has no such verb."""
    steps = [step for step in STEPS if step.belongs(run)]
    if until is None:
        return steps
    if until not in [step.verb for step in steps]:
        raise UserError(f"{run.folder}: --until {until}: this run has no {until}")
    return [step for step in steps if VERBS.index(step.verb) <= VERBS.index(until)]


def lacks(run: Run, verb: str) -> str | None:
    """What is missing of a verb's result, as the verb itself says; None where it is finished."""
    module = importlib.import_module(f"megakd.commands.{verb.replace('-', '_')}")
    try:
        return module.missing(run)
    except UserError as error:  # what it reads is missing or damaged; the verb says what to do
        return str(error)
