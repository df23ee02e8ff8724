"""What the scripts of a Hydra tree share: the first one makes a run of conf/config.yaml, the others go on with it.

The run is in --output_dir, else where output.dir (or training.output_dir) of the configuration says. Its configuration
is frozen: a later script, or a file that was edited meanwhile, may change mutable settings; other changes are refused.
Without conf/config.yaml in the working directory tools/compat/conf/config.yaml is read. Where teacher.cache_dir is the
folder of another run, its tokens and logits are linked.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from run_from_flags import Parser

from megakd.commands.new import say_links
from megakd.config import hydra
from megakd.config.parsing import apply_overrides, load_recipe, parse, read_tree
from megakd.config.products import LOGITS, differences
from megakd.config.run import RunConfig, flatten, is_mutable
from megakd.data.documents import source_files
from megakd.errors import UserError, listed
from megakd.finish import to_the_end
from megakd.names import expand, holds_run
from megakd.run import Run
from megakd.system.files import read_json, remove, write_json
from megakd.system.launcher import read_launcher
from megakd.system.logging import say
from megakd.system.verbs import VerbFailed, to_go_on

CONF = Path("conf") / "config.yaml"
SHIPPED = Path(__file__).parent / CONF
WRITTEN = "conf.json"  # in the run's folder: the file, the tree in it, and the configuration that it gave
FOLDERS = ("output_dir", "output.dir", "output.output_dir", "training.output_dir")
SOURCES, SUBSETS = ("dataset.name", "dataset.path", "data.source"), ("dataset.config", "dataset.config_name")
OF_THE_HUB = (*SUBSETS, "dataset.streaming", "dataset.split")


def build_parser(doc: str | None) -> Parser:
    parser = Parser(doc)
    add = parser.add_argument
    add("--config", type=expand, metavar="FILE", help=f"YAML or JSON (default: {CONF}, else {CONF} of tools/compat)")
    add("--output_dir", type=expand, metavar="DIR", help="the run's folder (default: output.dir of the configuration)")
    add("overrides", nargs="*", metavar="key=value", help="keys of the file, of MegaKD, or GROUP=NAME of Hydra")
    return parser


def open_run(args: argparse.Namespace, flags: Sequence[str] = (), makes: bool = True) -> Run:
    """The run of a command line, with `flags` as overrides before the others; makes: whether this script begins one."""
    path = args.config or (CONF if CONF.exists() else SHIPPED)
    overrides = [*flags, *args.overrides]
    tree, left = read_tree(path, overrides)
    tree = hydra.resolve(apply_overrides(tree, [item.lstrip("+") for item in left]))
    folder = args.output_dir or expand(_first(tree, FOLDERS) or "outputs/distillation")
    needed = _of_data(tree, overrides)
    if (folder / "config.json").exists():
        _check_chosen(folder, [item for item in overrides if item not in left])
        return Run.open(folder, [*_edited(folder, path, args.config is not None), *left, *needed])
    overrides += needed
    if not makes:
        raise UserError(f"{folder}: no run here; another script of tools/compat makes it, or name its --output_dir")
    return _make(folder, path, overrides, _first(tree, ["teacher.cache_dir"]))


def finish(run: Run, verbs: Collection[str]) -> None:
    """Run the verbs whose result is missing; ends the process where one fails."""
    try:
        to_the_end(run, verbs=verbs)
    except VerbFailed as failed:
        say(f"{failed}; {to_go_on(failed.code)}")
        sys.exit(failed.code)


def _make(folder: Path, path: Path, overrides: list[str], cache: str | None) -> Run:
    run = Run.create(path, overrides, folder)
    other = expand(cache) if cache else folder
    if holds_run(other) and other.resolve() != folder.resolve():
        shared = Run.open(other)
        if (shared.path(LOGITS)).exists() and (different := differences(LOGITS, run.config, shared.config)):
            for name in ("config.json", "history.jsonl"):
                remove(run.path(name))
            raise UserError(
                f"{path}: teacher.cache_dir={cache}: its logits are of another configuration: {'; '.join(different)}; "
                "give the values of then, or teacher.cache_dir=null to capture anew"
            )
        run.link_from(shared)
    _write(run.folder, path, run.config)
    say(f"{folder}: a new run of {path}; scripts go on with its frozen configuration")
    say_links(run)
    return run


def _check_chosen(folder: Path, choices: list[str]) -> None:
    """UserError for a choice of a Hydra group that the run was not made with."""
    made = Run.open(folder).events("new")[-1]["overrides"]
    if other := [item for item in choices if item not in made]:
        raise UserError(
            f"{folder}: made without {', '.join(other)}; for a run of its own: --output_dir {folder}-2 "
            f"teacher.cache_dir={folder}, which shares what the change does not concern"
        )


def _write(folder: Path, path: Path, config: RunConfig) -> None:
    facts = {"file": str(path.resolve()), "tree": _plain(path), "config": config.model_dump(mode="json")}
    write_json(folder / WRITTEN, facts)


def _plain(path: Path) -> Any:
    return json.loads(json.dumps(read_tree(path, [])[0], default=str))


def _edited(folder: Path, path: Path, given: bool) -> list[str]:
    """Overrides for mutable settings that changed in the file since the run was made; UserError for frozen ones.

    given: whether the command line names the file.
    """
    file = folder / WRITTEN
    if not file.exists():
        raise UserError(f"{folder}: a run that no script of tools/compat made; use: megakd run {folder}")
    before = read_json(file)
    if not given and before["file"] != str(path.resolve()):
        say(f"{folder}: made from {before['file']}, and keeps that configuration; {path} is not read")
        return []
    if before["tree"] == _plain(path):
        return []
    now = load_recipe(path, Run.open(folder).events("new")[-1]["overrides"])
    was = dict(flatten(parse(before["config"], str(file)).model_dump(mode="json")))
    changes = {key: value for key, value in flatten(now.model_dump(mode="json")) if was.get(key) != value}
    frozen = [
        f"{key} is {json.dumps(value)} now, was {json.dumps(was.get(key))}"
        for key, value in changes.items()
        if not is_mutable(key)
    ]
    if frozen:
        raise UserError(
            f"{folder}: {path} was edited since the run was made: {listed(frozen, 3)}; for a run of its own: "
            f"--output_dir {folder}-2 teacher.cache_dir={folder}, which shares what the change does not concern"
        )
    if read_launcher().rank == 0:
        _write(folder, path, now)
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _of_data(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Overrides that a data set on the command line needs: the file's subset and streaming belong to another one."""
    asked = {item.lstrip("+").partition("=")[0].removeprefix("distillation.") for item in overrides}
    source = _first(tree, SOURCES)
    if source and source_files(source):
        if idle := [name for name in OF_THE_HUB if name in asked]:
            say(
                f"{source}: files of this machine, where {' and '.join(idle)} {'have' if idle[1:] else 'has'} no effect"
            )
        return ["data.subset=null", "data.streaming=true", "data.split=train"]
    return ["data.subset=null"] if asked & set(SOURCES) and not asked & {*SUBSETS, "data.subset"} else []


def _first(tree: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the first key that has one, also below distillation."""
    values = dict(flatten(tree))
    found = (values.get(f"{group}{name}") for name in names for group in ("distillation.", ""))
    return next((value for value in found if value is not None and not isinstance(value, hydra.Unresolved)), None)
