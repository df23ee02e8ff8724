"""Checkpoint watcher: pin a checkpoint by hard links, lock it, evaluate, append a line to evals.jsonl, unpin.

RUN/watch/   held/STAGE/step-N/checkpoint/   weights/ and progress.json, kept from rotation until the line is written,
                                             and the routers of a teacher that learns too (auxiliary.safetensors)
             held/STAGE/step-N/*.json        what is finished of the measuring: the validation set, each task
             best/STAGE/step-N/              the same of the best checkpoint, which checkpoints/best.json names
             locks/                          of living processes; a killed process releases its lock

Any number of processes, on any machines that see the run, work on it at once. A kill at any place loses and repeats no
line: the line's presence decides, and what comes after it (curves, the pin) is done again until the folder is gone.
"""

import glob
import os
import re
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megakd.engine.checkpoint import auxiliary_file, best_file, checksum
from megakd.errors import UserError
from megakd.evals.measure import (
    Meter,
    Unmeasured,
    Unusable,
    checkpoint_subject,
    failures,
    measure_of,
    numbers,
    rank,
)
from megakd.identity import sampled_files
from megakd.run import Run
from megakd.system.files import (
    append_json,
    digest,
    link_file,
    locked,
    read_json,
    read_json_lines,
    remove,
    settle,
    sha256,
    write_json,
)
from megakd.system.logging import say
from megakd.system.tasks import claimed
from megakd.system.text import clock
from megakd.tracking import log_evaluation

STEP = re.compile(r"step-\d+")


class Follower:
    """Finds a run's checkpoints, keeps them, measures them; `name` is STAGE/step-N everywhere.

    watching: say what rotation took too early, and pin the best; `evaluate` does neither.
    """

    def __init__(self, run: Run, meter: Meter, watching: bool):
        self.best = meter.best if watching else "kl"  # refused before anything is measured
        self.run, self.meter, self.watching = run, meter, watching
        self.folder = run.path("watch")
        self.locks = self.folder / "locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        self.fingerprints: dict[tuple[str, int], str] = {}
        self.unmeasured: dict[str, str] = {}  # the checkpoints that this process leaves to a later one, and why
        self.said = False

    def scan(self) -> None:
        """Hold every published checkpoint that has no line yet; quick, so that rotation does not come first.

        One process at a time: the one that has the lock does it for all, and the others return.
        """
        with claimed(self.locks / "scan.lock") as mine:
            if not mine:
                return
            for pattern in ("held/*/step-*.done", "held/*/*/checkpoint.tmp-*"):
                # of killed processes: finished, or half linked by the lock's last holder. Path.glob would raise where a
                # folder goes meanwhile
                for path in glob.glob(pattern, root_dir=self.folder):
                    _let_go(self.folder / path)
            # in this order: what was recorded was there, so it is there still, or held, or has its line, or is lost
            recorded = {_name(self.run.path(event["folder"])) for event in self.run.events("checkpoint")}
            published = self.published()
            lines = self.lines()
            for name, path in published.items():
                held = self.held(name) / "checkpoint"
                if name in lines or held.exists():
                    continue
                # asked again: a checkpoint that was released since got its line, or its record, before that
                if name not in self.lines() and not self.is_bad(name, path):
                    held.parent.mkdir(parents=True, exist_ok=True)
                    if not hold(path, held):
                        with suppress(OSError):
                            held.parent.rmdir()
            if self.watching:
                self._name_lost(recorded - published.keys() - self.pending().keys())

    def _name_lost(self, names: set[str]) -> None:
        """Say and record, once, which checkpoints are gone without a line."""
        lost = sorted(names - self.lines().keys() - self.settled(), key=_step)
        if lost:
            shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
            keep = self.run.config.checkpoint.keep
            say(f"watch: gone before it was seen, so without a line: {shown} (checkpoint.keep={keep})")
            self.run.record("evaluation_lost", checkpoints=lost)

    def published(self) -> dict[str, Path]:
        """Existing checkpoints, oldest first."""
        found = _steps(self.run.path("checkpoints"))
        return {_name(p): p for p in sorted(found, key=lambda p: _step(_name(p))) if (p / "progress.json").exists()}

    def pending(self) -> dict[str, Path]:
        """Checkpoints that are held, oldest first: those to measure, and those that a kill left with their line."""
        found = _steps(self.folder / "held")
        lines = self.lines() if found else {}
        names = sorted((_name(p) for p in found if (p / "checkpoint").exists() or _name(p) in lines), key=_step)
        return {name: self.held(name) for name in names if name not in self.unmeasured}

    def lines(self) -> dict[str, dict[str, Any]]:
        """The last line of each checkpoint in evals.jsonl; but one that lacks what can be measured by now is none."""
        rows = read_json_lines(self.run.path("evals.jsonl"), "model", "step")
        found = {row["model"]: row for row in rows if row.get("stage") is not None}
        return {name: row for name, row in found.items() if not (self.meter.lacks(row) and self._is_there(name))}

    def _is_there(self, name: str) -> bool:
        folders = self.run.path("checkpoints", name), self.held(name) / "checkpoint"
        return any((folder / "progress.json").exists() for folder in folders)

    def settled(self) -> set[str]:
        """Checkpoints that will have no line: recorded as bad or as gone, or left to a later process."""
        lost = {name for event in self.run.events("evaluation_lost") for name in event["checkpoints"]}
        bad = {event["checkpoint"] for event in self.run.events("bad_checkpoint")}
        return lost | bad | self.unmeasured.keys()

    def failures(self) -> list[str]:
        """What could not be measured of the checkpoints, and why: whole ones, and single measures of a line."""
        lines = self.lines()
        bad = {event["checkpoint"]: event["reason"] for event in self.run.events("bad_checkpoint")} | self.unmeasured
        whole = {name: f"{name}: {reason}" for name, reason in bad.items() if name not in lines}
        single = [(name, reason) for name, row in lines.items() for reason in failures(row)]
        return [reason for _, reason in sorted([*whole.items(), *single], key=lambda pair: _step(pair[0]))]

    def held(self, name: str) -> Path:
        return self.folder / "held" / name

    def is_bad(self, name: str, checkpoint: Path) -> bool:
        """Whether just this content could not be measured before."""
        known = {event["content"] for event in self.run.events("bad_checkpoint") if event["checkpoint"] == name}
        return bool(known) and self._content(name, checkpoint) in known

    def _content(self, name: str, checkpoint: Path) -> str:
        """A hash of a checkpoint's weights (`sampled_files`, for damaged ones too) and of the small files in it."""
        with suppress(OSError):  # gone meanwhile
            key = (name, checkpoint.stat().st_mtime_ns)
            if key not in self.fingerprints:
                files = [*checkpoint.glob("weights/*"), *checkpoint.glob("checksums/*"), checkpoint / "progress.json"]
                small = {p.name: sha256(p) for p in sorted(files) if p.suffix != ".safetensors"}
                auxiliary = auxiliary_file(checkpoint)
                small |= {auxiliary.name: sha256(auxiliary)} if auxiliary.exists() else {}
                self.fingerprints[key] = digest([sampled_files(checkpoint / "weights"), small])
            return self.fingerprints[key]
        return ""

    def take(self, name: str) -> bool:
        """Measure a held checkpoint and write its line, unless another process is at it; whether this one did."""
        held = self.held(name)
        # next to the folder, not in it: where files are on NFS, a folder with an open file cannot be deleted
        with claimed(self.locks / f"{name.replace('/', '--')}.lock") as mine:
            if not mine or not held.exists():  # another process has it, or had
                return False
            row = self.lines().get(name)
            if row is None and not self.is_bad(name, held / "checkpoint"):
                row = self._measure(name, held)
            if name in self.unmeasured:  # held, with what is finished, for a later process
                return True
            if row is not None:
                log_evaluation(self.run.folder, self.run.config, row["step"], numbers(row))
                if self.watching:
                    self.pin(name)
            _let_go(held)
        return True

    def _measure(self, name: str, held: Path) -> dict[str, Any] | None:
        """The line, written; None for an unmeasured checkpoint, and for a bad one, recorded in history.jsonl."""
        start = time.perf_counter()
        try:
            check_weights(held / "checkpoint")
            row = self.meter.row(checkpoint_subject(self.run, held / "checkpoint", name), held)
        except Unusable as error:
            reason = str(error).replace(f"{held / 'checkpoint'}", str(self.run.path("checkpoints", name)))
            say(f"{name} cannot be evaluated and is skipped: {reason}")
            content = self._content(name, held / "checkpoint")
            self.run.record("bad_checkpoint", checkpoint=name, content=content, reason=reason)
            return None
        except Unmeasured as error:
            self.unmeasured[name] = str(error)
            say(f"{name} is left to a later evaluate or watch: {error}")
            return None
        append_json(self.run.path("evals.jsonl"), row)
        for reason in failures(row):
            say(reason)
        say(f"{name}: {summary(row, self.best)} in {clock(time.perf_counter() - start)}")
        return row

    def pin(self, name: str | None = None) -> None:
        """Keep the weights of the best checkpoint of all lines, where they are to be had, and name it in best.json.

        name: one that is held. `rotate` spares the checkpoint that best.json names; its weights stay here all the same,
        for rotation may have been faster.
        """
        metric, kept = self.best, self.folder / "best"
        settle(self.run.path("checkpoints"))
        with locked(self.locks / "best.lock"):
            lines, published = self.lines(), self.published()
            ranks = {model: key for model, row in lines.items() if (key := rank(row, metric)) is not None}
            if lines and not ranks and not self.said:
                self.said = True
                say(f"watch: eval.best: no line has {metric}, so no checkpoint is kept from rotation")
            for model in sorted(ranks, key=lambda model: (ranks[model], _step(model))):
                target = kept / model
                target.parent.mkdir(parents=True, exist_ok=True)
                held = self.held(model) / "checkpoint"
                if model == name and held.exists() and not target.exists():
                    os.rename(held, target)
                if target.exists() or (model in published and hold(published[model], target)):
                    break
            else:
                return
            best = {
                "model": model,
                "step": lines[model]["step"],
                "metric": metric,
                "value": measure_of(lines[model], metric)[0],
            }
            weights = str((target / "weights").relative_to(self.run.folder))
            write_json(
                best_file(self.run.path("checkpoints")),
                {**best, "checkpoint": f"checkpoints/{model}", "weights": weights},
            )
            for path in kept.glob("*/step-*"):
                if path != target:
                    _let_go(path)


def hold(checkpoint: Path, target: Path) -> bool:
    """Link what is measured of a published checkpoint, checksums and progress.json at `target`, which appears whole.

    Copies where there can be no hard links. False when rotation took the checkpoint meanwhile.
    """
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(6)}")
    remove(temporary)
    try:
        before = checkpoint.stat()
        inside = [path for part in ("weights", "checksums") for path in (checkpoint / part).rglob("*")]
        auxiliary = auxiliary_file(checkpoint)
        for path in [*inside, *([auxiliary] if auxiliary.exists() else []), checkpoint / "progress.json"]:
            if not path.is_dir():
                place = temporary / path.relative_to(checkpoint)
                place.parent.mkdir(parents=True, exist_ok=True)
                link_file(path, place)
        after = checkpoint.stat()  # the folder lost its name before its first file: there still, it was whole
        if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
            raise FileNotFoundError(checkpoint)
    except FileNotFoundError:
        remove(temporary)
        return False
    os.rename(temporary, target)
    return True


def check_weights(checkpoint: Path) -> None:
    """Unusable when weights, or a teacher's routers, are not what training wrote, as far as it left checksums."""
    try:
        known = {
            name: value for file in (checkpoint / "checksums").glob("*.json") for name, value in read_json(file).items()
        }
        for name in sorted(
            name for name in known if name.startswith("weights/") or name == auxiliary_file(checkpoint).name
        ):
            if checksum(checkpoint / name) != known[name]:
                raise Unusable(f"{checkpoint / name}: not what was written (it was {known[name][0]:,} bytes)")
    except (UserError, OSError, AttributeError) as error:
        raise Unusable(str(error)) from error


def _let_go(folder: Path) -> None:
    """Delete a folder out of sight: a kill half way leaves STEP.done, which the next scan deletes."""
    aside = folder if folder.suffix else folder.with_name(f"{folder.name}.{time.time_ns()}.done")
    with suppress(OSError):  # on NFS what another still has open stays until it is closed
        if aside != folder:
            os.rename(folder, aside)
        remove(aside)


def summary(row: dict[str, Any], best: str) -> str:
    """The few numbers of a line that one wants to see pass by."""
    found = numbers(row)
    ours = [best, "kl", "perplexity", "teacher_perplexity", "teacher_kl"]
    shown = dict.fromkeys([*ours, *(name for name in found if "/" in name)])
    return "  ".join(f"{name} {found[name]:.4g}" for name in shown if name in found)


def _steps(folder: Path) -> list[Path]:
    """STAGE/step-N below a folder; Path.glob would raise where a temporary name goes meanwhile."""
    found = [folder / path for path in glob.glob("*/step-*", root_dir=folder)]
    return [path for path in found if STEP.fullmatch(path.name)]


def _name(checkpoint: Path) -> str:
    return f"{checkpoint.parent.name}/{checkpoint.name}"


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])
