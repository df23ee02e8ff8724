"""What a run still lacks of each verb's result, and bringing it to its end: `megakd run`, the demo, tools/compat."""

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from megakd.data.shards import unfinished
from megakd.engine.checkpoint import published
from megakd.errors import UserError, listed
from megakd.evals.evaluate import unmeasured
from megakd.models.checks import caches_logits
from megakd.outputs import MARKER
from megakd.run import Run
from megakd.serve.export import last_weights, weights_name
from megakd.system.files import locked, read_json
from megakd.system.logging import say
from megakd.system.text import clock, table
from megakd.system.verbs import VerbFailed, Verbs, VerbsHere
from megakd.tracking import check_tracking
from megakd.train.checks import open_dataset, reached_end


class Step(NamedTuple):
    """A verb of a run: whether the run has it, and what is missing of its result (None: nothing)."""

    verb: str
    belongs: Callable[[Run], bool]
    missing: Callable[[Run], str | None]


def to_the_end(
    run: Run,
    until: str | None = None,
    here: Callable[[list[str]], None] | None = None,
    verbs: Collection[str] = (),
    student: Path | None = None,
) -> None:
    """Run each verb whose result is missing, up to `until`; VerbFailed where one does not end well.

    here: what runs a verb in this process (`VerbsHere`); None: each has a process of its own. verbs: these alone.
    student: where export writes, instead of RUN/export.
    """
    check_tracking(run.config.log)  # what train would refuse hours later
    steps, rows, failed = [step for step in steps_of(run, until) if step.verb in (verbs or VERBS)], [], None
    begin = time.perf_counter()
    alone = locked(run.path("run.lock"), "is being brought to its end by another process; wait for it or stop it")
    apart = run.config.engine.kind != "local"
    with alone, Verbs.listening() if here is None else nullcontext(VerbsHere(here, apart)) as started:
        for number, step in enumerate(steps, start=1):
            started.check_stopped(step.verb)
            why = lacks(run, step.verb, student)
            title = f"run: {number} of {len(steps)}: {step.verb}"
            if why is None:
                say(f"{title}: finished already")
                rows.append([step.verb, "finished already"])
                continue
            say(f"{title}: {why}")
            start = time.perf_counter()
            place = ["--out", str(student)] if student and step.verb == "export" else []
            code = started.run(step.verb, str(run.folder), *place)
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


def lacks(run: Run, verb: str, student: Path | None = None) -> str | None:
    """What is missing of a verb's result; None where it is finished. student: where export writes."""
    try:
        if student and verb == "export":
            return missing_export(run, student)
        return STEPS[VERBS.index(verb)].missing(run)
    except UserError as error:  # what it reads is missing or damaged; the verb says what to do
        return str(error)


def missing_tokens(run: Run) -> str | None:
    """What is missing of the token shards, as their readers find it."""
    return unfinished(run.path("data", "tokens", part) for part in ("holdout", "train"))


def missing_student(run: Run) -> str | None:
    """What is missing of the compressed teacher."""
    report = run.path("student-0", "compress.json")
    return None if report.exists() else f"no {report}"


def missing_logits(run: Run) -> str | None:
    """What is missing of the teacher's logits, as their readers find it.

    A capture that --max-tokens ended is finished: a training may have begun on it.
    """
    parts = ("holdout",) if run.config.objective.live else ("holdout", "train")
    return unfinished(run.path("data", "logits", part) for part in parts)


def missing_training(run: Run) -> str | None:
    """What is missing of the training; None where the last stage is at its end."""
    saved = next(reversed(published(run.path("checkpoints"))), None)
    if saved is None:
        return "no checkpoint yet"
    return None if reached_end(run.config, saved, open_dataset(run)) else f"the last checkpoint is {saved.folder}"


def record_failure(folder: str, code: str, job: str) -> None:
    """Record in a run's history, for `megakd watch`, that its training failed and is not started again by itself.

    Nothing is recorded of a training that is finished. code: its exit code; job: its Slurm job, or "".
    """
    run = Run.open(folder)
    try:
        lacks = missing_training(run) is not None
    except UserError:  # what it would train with is damaged
        lacks = True
    if lacks:
        run.record("train failed", code=int(code), job=job)


def missing_evaluation(run: Run) -> str | None:
    """Which models have no line in evals.jsonl yet."""
    names = unmeasured(run)
    return f"no line yet of {listed(names, 3)}" if names else None


def missing_export(run: Run, folder: Path | None = None) -> str | None:
    """Why the folder (RUN/export) is not the student as it is now."""
    source, folder = last_weights(run), folder or run.path("export")
    if not (folder / MARKER).exists():
        return f"no {folder}"
    if gone := [name for name in read_json(folder / MARKER)["files"] if not (folder / name).exists()]:
        return f"no {folder / gone[0]}"
    done = [event["source"] for event in run.events("export") if Path(event["folder"]).name == folder.name]
    if not done or weights_name(Path(done[-1])) != weights_name(source):
        return f"{folder} is not of {source}"
    return None


def missing_report(run: Run) -> str | None:
    """What RUN/report.html does not show yet; None where nothing came after it."""
    page = run.path("report.html")
    if not page.exists():
        return f"no {page}"
    drawn = [run.path(name) for name in ("metrics.jsonl", "evals.jsonl", "student-0/compress.json")]
    newer = [path for path in drawn if path.exists() and path.stat().st_mtime_ns > page.stat().st_mtime_ns]
    return f"{newer[0]} came after {page}" if newer else None


def _always(run: Run) -> bool:
    return True


def _compresses(run: Run) -> bool:
    return run.config.model.student is None


def _caches_logits(run: Run) -> bool:
    return caches_logits(run.config)


# tokenize first: compress measures the experts' inputs on the run's tokens
STEPS = (
    Step("tokenize", _always, missing_tokens),
    Step("compress", _compresses, missing_student),
    Step("generate-logits", _caches_logits, missing_logits),
    Step("train", _always, missing_training),
    Step("evaluate", _always, missing_evaluation),
    Step("export", _always, missing_export),
    Step("report", _always, missing_report),
)
VERBS = [step.verb for step in STEPS]
