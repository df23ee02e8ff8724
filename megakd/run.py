"""A run is a folder with one frozen config.json; every verb opens it and reads nothing else."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from megakd.config.checks import check
from megakd.config.effects import idle_fields
from megakd.config.parsing import apply_overrides, in_our_keys, load_recipe, parse, parse_frozen
from megakd.config.products import PRODUCTS, STUDENT, differences
from megakd.config.run import RunConfig, flatten, is_mutable
from megakd.errors import UserError
from megakd.names import expand, find_recipe, may_be_hub_id, resolve
from megakd.system.files import (
    append_json,
    link_file,
    publishing,
    read_json,
    read_json_lines,
    settle,
    write_json,
)
from megakd.system.launcher import read_launcher
from megakd.system.version import made_with


class Frozen(UserError):
    """A frozen field of a run would change; `path` names it, `config` is the configuration with all changes."""

    def __init__(self, message: str, path: str, config: RunConfig):
        super().__init__(message)
        self.path, self.config = path, config


class Run:
    """RUN/ config.json history.jsonl metrics.jsonl evals.jsonl student-0/ data/ checkpoints/ export/ report.html"""

    def __init__(self, folder: Path, config: RunConfig):
        self.folder = folder
        self.config = config

    @classmethod
    def create(cls, recipe: str | Path, overrides: Iterable[str], folder: str | Path) -> "Run":
        """Resolve a recipe (a file, the name of a shipped one, or a run's folder) once and freeze it in `folder`.

        From a run's folder, the student and data that do not depend on what changed are linked (config/products.py).
        From a checkpoint's, RUN/checkpoints/STAGE/step-N, it is linked as well: training goes on from it.
        """
        folder, overrides = expand(folder), list(overrides)
        if (folder / "config.json").exists():
            raise UserError(f"{folder}: already a run; choose another folder or open it with any other verb")
        source = find_recipe(recipe)
        config = load_recipe(source, overrides)
        check(config, str(source))
        run = cls(folder, config)
        if (checkpoint := expand(recipe)).joinpath("progress.json").is_file():
            run._take_checkpoint(checkpoint, cls.open(source.parent))
        write_json(folder / "config.json", run.config.model_dump(mode="json"))
        fingerprint = run.config.fingerprint()
        run.record(
            "new",
            recipe=str(recipe),
            overrides=overrides,
            fingerprint=fingerprint,
            mark=secrets.token_hex(4),
            megakd=made_with(),
        )
        run._set_mark()
        if source.name == "config.json":
            run.link_from(cls.open(source.parent))
        return run

    @classmethod
    def open(cls, folder: str | Path, overrides: Iterable[str] = ()) -> "Run":
        """Open a run; overrides may touch mutable settings only and are recorded (by rank 0)."""
        folder, given = expand(folder), list(overrides)
        settle(folder)  # like a student or an export that a killed verb was about to replace
        file = folder / "config.json"
        if not file.exists():
            raise UserError(f"{folder}: no run here (no config.json); make one with: megakd new {folder} --from RECIPE")
        raw = read_json(file)
        config = parse_frozen(raw, str(file))
        run = cls(folder, config)
        run._set_mark()
        if not given:
            return run
        now, overrides = in_our_keys(config.model_dump(mode="json"), given, str(file))
        changed = parse(apply_overrides(now, overrides), f"{file} with overrides")
        before, after = dict(flatten(config.model_dump(mode="json"))), dict(flatten(changed.model_dump(mode="json")))
        changes = {
            k: [before.get(k), after.get(k)] for k in before.keys() | after.keys() if before.get(k) != after.get(k)
        }
        for path in sorted(changes):
            if not is_mutable(path):
                raise Frozen(
                    f"{folder}: {path} is frozen; make a sibling run: "
                    f"megakd new {folder}-2 --from {folder} {' '.join(given)}",
                    path,
                    changed,
                )
        for idle in idle_fields(changed):
            if idle.path in changes and not idle.replaced:
                raise UserError(f"{folder}: {idle}")
        run.config = changed
        run._set_mark()
        if changes and read_launcher().rank == 0:
            write_json(file, changed.model_dump(mode="json"))
            run.record("change", fields=changes)
        return run

    def _set_mark(self) -> None:
        """Give the configuration the mark of this folder; it moves and is copied with the folder."""
        vars(self.config)["mark"] = next((event.get("mark", "") for event in self.events("new")), "")

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def record(self, event: str, **facts: Any) -> None:
        """Append an event to history.jsonl."""
        append_json(
            self.path("history.jsonl"), {"time": time.strftime("%FT%TZ", time.gmtime()), "event": event, **facts}
        )

    def events(self, event: str) -> list[dict[str, Any]]:
        """What `record` wrote of one kind of event, oldest first."""
        return [row for row in read_json_lines(self.path("history.jsonl"), "event") if row["event"] == event]

    @cached_property
    def student_folder(self) -> Path:
        """Where training starts: the student that was given, else the one `compress` makes."""
        student = self.config.model.student
        if not student:
            return self.path("student-0")
        revision = self.config.model.student_revision
        return resolve(student, revision) if may_be_hub_id(student) else expand(student)

    def _take_checkpoint(self, checkpoint: Path, other: "Run") -> None:
        """Begin with a checkpoint of another run and its metrics; UserError where that would not train alike."""
        before, now = (dict(flatten(run.config.model_dump(mode="json"))) for run in (other, self))
        changed = [key for key in now if now[key] != before.get(key) and key != "name" and not is_mutable(key)]
        if changed:
            raise UserError(
                f"{checkpoint}: a run that goes on from a checkpoint keeps its configuration but for mutable settings, "
                f"and {', '.join(changed)} would change; begin a training anew with --from {other.folder}"
            )
        with publishing(self.path("checkpoints", checkpoint.parent.name, checkpoint.name)) as temporary:
            shutil.copytree(checkpoint, temporary, copy_function=link_file)
        step = read_json(checkpoint / "progress.json")["step"]
        rows = [row for row in read_json_lines(other.path("metrics.jsonl"), "step") if row["step"] <= step]
        with publishing(self.path("metrics.jsonl")) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def link_from(self, other: "Run") -> None:
        """Link what `other` has and this run would make alike; what is not linked is recorded with the reason."""
        linked, left = [], {}
        for name in PRODUCTS:
            theirs = other.path(name)
            if name == STUDENT and self.config.model.student:
                continue  # compress makes none
            if not theirs.exists():
                left[name] = "there is none"
            elif different := differences(name, self.config, other.config):
                left[name] = ", ".join(different)
            else:
                self.path(name).parent.mkdir(parents=True, exist_ok=True)
                self.path(name).symlink_to(os.path.relpath(theirs.resolve(), self.path(name).parent.resolve()))
                linked.append(name)
        self.record("link", run=str(other.folder), linked=linked, not_linked=left)
