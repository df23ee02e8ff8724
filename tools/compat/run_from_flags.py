"""What tools that start a run from flags share: numbers, errors of one line, the run of a recipe, its verbs to the end.

The run lies in --output_dir and is made from --output_dir/recipe.json. The same flags again resume it. mutable settings
may change, others are refused once there is data. The student ends in --output_dir/student; of a teacher whose routers
learned (objective.kind=sar) they lie in --output_dir/router_update.safetensors, .pt and .json.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import installed  # noqa: F401

from megakd import finish
from megakd.cli import run_verb
from megakd.config.checks import check
from megakd.config.effects import idle_fields
from megakd.config.parsing import apply_overrides, parse
from megakd.config.run import flatten, is_mutable
from megakd.data.documents import source_files
from megakd.errors import UserError
from megakd.models.router_update import UPDATE
from megakd.names import expand, model_folder, resolve
from megakd.outputs import RUN_PARTS, check_folder
from megakd.run import Run
from megakd.serve.export import MARK as EXPORTED
from megakd.system.files import publishing, read_json, remove, write_json
from megakd.system.logging import say
from megakd.system.terminal import one_line_errors
from megakd.system.verbs import VerbFailed, to_go_on

RECIPE, STUDENT = "recipe.json", "student"
TEACHER_MODEL, STUDENT_MODEL = "huihui-ai/Huihui-MoE-1B-A0.6B", "HuggingFaceTB/SmolLM-135M"
DATASET, DATASET_CONFIG = "wikitext", "wikitext-103-raw-v1"
DATASET_CONFIGS = {DATASET: DATASET_CONFIG, "c4": "en"}  # of data sets that the hub gives by configuration alone
# of the documents: a small data set must have one to hold out
HOLDOUT = {"holdout_fraction": 0.05, "holdout_tokens": 100000}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line without the usage, which has tens of flags here."""

    def __init__(self, description: str | None, **more: Any):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def read(self, argv: Sequence[str] | None, greedy: str) -> argparse.Namespace:
        """The arguments, flags and overrides in any order; greedy: the flag that takes every word up to the next."""
        args = self.parse_intermixed_args(argv)
        words = getattr(args, greedy) or []
        setattr(args, greedy, [word for word in words if not OVERRIDE.match(word)])
        args.overrides = [*args.overrides, *(word for word in words if OVERRIDE.match(word))]
        return args


OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")


@contextmanager
def one_line(tool: str) -> Iterator[None]:
    """A user's mistake ends the process with one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with one_line_errors(tool):
        yield


def _number(kind: Callable[[str], Any], holds: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not holds(value):  # as every comparison with NaN
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return check


def _integer(text: str) -> int:
    """2e9 is how people write token counts."""
    value = float(text)
    if not value.is_integer():
        raise ValueError
    return int(text) if text.strip("+-").isdigit() else int(value)


count = _number(_integer, lambda value: value >= 1, "a whole number from 1 on")
whole = _number(_integer, lambda value: value >= 0, "a whole number from 0 on")
positive = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
weight = _number(float, lambda value: 0 <= value < math.inf, "a number from 0 on")


def say_unused(names: Sequence[str]) -> None:
    """One line that names what was asked for in vain."""
    if names:
        say(f"no effect here: {', '.join(names)}; --help says why")


def settled(value: dict[str, Any], overrides: Sequence[str], kind: str, source: str) -> dict[str, Any]:
    """A recipe with overrides, models and files by their whole path: the run may go on from anywhere.

    Fields that flags gave and that have no effect are named and skipped; of overrides `new` refuses them.
    source: what an error names. UserError where values do not fit, or a model is missing.
    """
    value = apply_overrides(value, overrides)
    if value["engine"]["kind"] != "local" or value["objective"]["kind"] != kind:
        raise UserError(
            f"engine.kind and objective.kind: are local and {kind} here; megakd new makes a run of another kind"
        )
    config = parse(value, source)
    for idle in idle_fields(config):
        if not idle.replaced and not any(item.startswith(f"{idle.path}=") for item in overrides):
            say(str(idle))
            section, key = idle.path.split(".")
            del value[section][key]
    value["model"]["teacher"] = model_place(config.model.teacher, "teacher_model")
    value["model"]["student"] = model_place(str(config.model.student), "student_model", found=True)
    value["data"]["source"] = data_place(config.data.source)
    check(parse(value, source), source)  # as `new` does, before anything is written
    return value


def model_place(name: str, label: str, found: bool = False) -> str:
    """A model as a run names it: a folder by its whole path, else its hub id; found: the folder of a hub id too."""
    try:
        folder = resolve(name, weights=found)
    except UserError as error:
        raise UserError(f"{label} {error}") from error
    local = model_folder(name)
    return str(folder.resolve()) if found or (local is not None and local == expand(name)) else name


def data_place(name: str) -> str:
    """A data set as a run names it: files by their whole path."""
    return str(expand(name).absolute()) if source_files(name) else name


def subset_of(name: str, given: str | None = None) -> str | None:
    """The configuration of a data set: what was given, else that of DATASET_CONFIGS; files have none."""
    if source_files(name):
        return None
    return given or DATASET_CONFIGS.get(name.rpartition("/")[2])


def open_run(folder: Path, value: dict[str, Any]) -> Run:
    """The run of a recipe in `folder`: made, or opened again with what may change; UserError for another run's."""
    file = folder / RECIPE
    if (folder / "config.json").exists():
        if not file.exists():
            raise UserError(f"{folder}: holds a config.json that this tool did not make; name another --output_dir")
        before, now = (dict(flatten(parse(v, str(file)).model_dump(mode="json"))) for v in (read_json(file), value))
        changes = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if any((folder / made).exists() for made in ("data", "checkpoints")):
            for key in changes:
                if not is_mutable(key):
                    was, asked = (json.dumps(values.get(key)) for values in (before, now))
                    raise UserError(
                        f"{folder}: {key} of the existing run is {was}, asked for is {asked}; name another "
                        "--output_dir, or ask for what it was made with"
                    )
            run = Run.open(folder, [f"{key}={json.dumps(now[key])}" for key in changes])
            write_json(file, value)
            return run
        if not changes:
            return Run.open(folder)
        remove(folder / "config.json")  # nothing was made of it yet
    else:
        _check_foreign(folder, value)
    write_json(file, value)
    return Run.create(file, [], folder)


def _check_foreign(folder: Path, value: dict[str, Any]) -> None:
    """UserError where a new run would write over files that are none of its recipe's."""
    taken = [name for name in (*sorted(RUN_PARTS), STUDENT) if (folder / name).exists()]
    if (folder / RECIPE).exists() and read_json(folder / RECIPE) != value:
        taken.append(RECIPE)
    if taken:
        raise UserError(f"{folder}: holds {taken[0]}, which this tool did not write; name another --output_dir")


def to_the_end(run: Run, evaluate: bool = True) -> None:
    """The verbs of `megakd run` up to the export, which is the student; ends the process where one fails.

    evaluate: False, end with the training and its export. A model that could not be measured does not stop the export.
    """
    student = run.path(STUDENT)
    check_folder(student, EXPORTED)
    verbs = ["tokenize", "train", "export", *(["generate-logits", "evaluate"] if evaluate else [])]
    until, export = "evaluate" if evaluate else "train", shlex.join(["megakd", "export", str(run.folder)])
    print(f"recipe: {run.path(RECIPE)}", flush=True)
    print(
        f"to go on by hand: megakd run {shlex.quote(str(run.folder))} --until {until} && {export} --out "
        f"{shlex.quote(str(student))}",
        flush=True,
    )
    code = 0
    try:
        finish.to_the_end(run, "export", run_verb, verbs, student)
    except VerbFailed as failed:
        say(f"{failed}; {to_go_on(failed.code)}")
        code = failed.code
    if run.config.objective.trains_routers and run.path(STUDENT, UPDATE).exists():
        publish_routers(run)
    if code:
        sys.exit(code)
    print(f"student: {student}")


def publish_routers(run: Run) -> None:
    """Copies of the exported routers together with the student's folder."""
    for suffix in (".safetensors", ".json", ".pt"):
        with publishing(run.path(UPDATE + suffix)) as temporary:
            shutil.copyfile(run.path(STUDENT, UPDATE, UPDATE + suffix), temporary)
