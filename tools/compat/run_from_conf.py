"""What the scripts of a Hydra tree share: the first one makes a run of conf/config.yaml, the others go on with it.

The run is in --output_dir, else where output.dir (or training.output_dir) of the configuration says. Its configuration
is frozen: a later script, or a file that was edited meanwhile, may change mutable settings; other changes are refused,
unless the run has nothing but its configuration, as where the first script did not find its teacher: it is made anew.
Without conf/config.yaml in the working directory tools/compat/conf/config.yaml is read. Where teacher.cache_dir is the
folder of another run, its tokens and logits are linked.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from run_from_flags import Parser

from megakd.commands.new import say_links
from megakd.config import hydra, originals
from megakd.config.parsing import apply_overrides, load_recipe, parse, read_tree
from megakd.config.products import LOGITS, differences
from megakd.config.run import RunConfig, flatten, is_mutable
from megakd.data.documents import source_files
from megakd.errors import UserError, listed
from megakd.finish import to_the_end
from megakd.names import expand, holds_run
from megakd.outputs import RUN_PARTS
from megakd.run import Frozen, Run
from megakd.system.files import locked, read_json, remove, write_json
from megakd.system.launcher import read_launcher
from megakd.system.logging import say
from megakd.system.verbs import VerbFailed, to_go_on

CONF = Path("conf") / "config.yaml"
SHIPPED = Path(__file__).parent / CONF
WRITTEN = "conf.json"  # in the run's folder: the file, the tree in it, the command line's words, and what came of them
FOLDERS = ("output_dir", "output.dir", "output.output_dir", "training.output_dir")
SOURCES, SUBSETS = ("dataset.name", "dataset.path", "data.source"), ("dataset.config", "dataset.config_name")
OF_THE_HUB = dict.fromkeys(SUBSETS) | {"dataset.streaming": True, "dataset.split": "train"}  # → as files are read


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
    tree = _tree(path, overrides)
    folder = args.output_dir or expand(_first(tree, FOLDERS) or "outputs/distillation")
    if (folder / "config.json").exists():
        try:
            return _go_on(folder, path, args.config is not None, tree, overrides)
        except OtherRun as other:
            if not makes or not _is_unused(folder, path):
                raise UserError(f"{folder}: {other}; for a run of its own: {other.place(folder)}") from None
            say(f"{folder}: {other}; the run is made anew, for it has no data yet")
        with _set_aside(folder) as before:
            return _make(folder, path, [*before, *overrides])
    if not makes:
        raise UserError(f"{folder}: no run here; another script of tools/compat makes it, or name its --output_dir")
    return _make(folder, path, overrides)


def _tree(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The file's tree with overrides, each where the file has its key."""
    tree, left = read_tree(path, overrides)
    old, ours = originals.sort_out(left, tree)
    return hydra.resolve(apply_overrides(tree, [*old, *ours]))


def finish(run: Run, verbs: Collection[str]) -> None:
    """Run the verbs whose result is missing; ends the process where one fails."""
    try:
        to_the_end(run, verbs=verbs)
    except VerbFailed as failed:
        say(f"{failed}; {to_go_on(failed.code)}")
        sys.exit(failed.code)


class OtherRun(Exception):
    """What is asked for is not the run that the folder holds; `config` is what is asked for."""

    def __init__(self, why: str, config: RunConfig):
        super().__init__(why)
        self.config = config

    def place(self, folder: Path) -> str:
        """The words that make a run of it, with the tokens and logits of the one in `folder` where they are alike."""
        words = f"--output_dir {folder}-2"
        if differences(LOGITS, self.config, Run.open(folder).config):
            return words
        return f"{words} teacher.cache_dir={folder}, which shares what the change does not concern"


def _go_on(folder: Path, path: Path, given: bool, tree: dict[str, Any], overrides: list[str]) -> Run:
    """The run in `folder` with what may change; OtherRun for the rest."""
    _check_chosen(folder, path, overrides)
    needed = _of_data(tree, overrides, Run.open(folder).config)
    words = [*_edited(folder, path, given), *read_tree(path, overrides)[1], *needed]
    try:
        return Run.open(folder, words)
    except Frozen as error:
        raise OtherRun(f"{error.path} is frozen", error.config) from None


def _is_unused(folder: Path, path: Path) -> bool:
    """Whether a run of this file has nothing but its configuration."""
    made = RUN_PARTS - {"config.json", "history.jsonl"}
    return read_json(folder / WRITTEN)["file"] == str(path.resolve()) and not any((folder / m).exists() for m in made)


@contextmanager
def _set_aside(folder: Path) -> Iterator[list[str]]:
    """Take the configuration out of a run, back in where the block fails; gives the words that it was made with."""
    with locked(folder / "run.lock", "is being brought to its end by another process; wait for it or stop it"):
        words = read_json(folder / WRITTEN).get("words", [])
        kept = {folder / name: (folder / name).read_bytes() for name in ("config.json", "history.jsonl")}
        for file in kept:
            remove(file)
        try:
            yield words
        except BaseException:
            for file, content in kept.items():
                file.write_bytes(content)
            raise


def _make(folder: Path, path: Path, overrides: list[str]) -> Run:
    tree = _tree(path, overrides)
    run = Run.create(path, [*overrides, *_of_data(tree, overrides)], folder)
    cache = _first(tree, ["teacher.cache_dir"])
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
    _write(run.folder, path, run.config, overrides)
    say(f"{folder}: a new run of {path}; scripts go on with its frozen configuration")
    say_links(run)
    return run


def _check_chosen(folder: Path, path: Path, overrides: list[str]) -> None:
    """OtherRun for a choice of a Hydra group that the run was not made with."""
    left = read_tree(path, overrides)[1]
    chosen = [item for item in overrides if item not in left]
    if not chosen:
        return
    before = Run.open(folder).events("new")[-1]["overrides"]
    made = hydra.groups(path) | _pairs(before)
    if other := [f"{group}={name}" for group, name in _pairs(chosen).items() if made[group] != name]:
        raise OtherRun(f"made without {', '.join(other)}", load_recipe(path, [*before, *overrides]))


def _pairs(overrides: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (item.lstrip("+").partition("=") for item in overrides)}


def _write(folder: Path, path: Path, config: RunConfig, words: list[str]) -> None:
    facts = {"file": str(path.resolve()), "tree": _plain(path), "config": config.model_dump(mode="json")}
    write_json(folder / WRITTEN, {**facts, "words": words})


def _plain(path: Path) -> Any:
    return json.loads(json.dumps(read_tree(path, [])[0], default=str))


def _edited(folder: Path, path: Path, given: bool) -> list[str]:
    """Overrides for mutable settings that changed in the file since the run was made; OtherRun for frozen ones.

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
        raise OtherRun(f"{path} was edited since the run was made: {listed(frozen, 3)}", now)
    if read_launcher().rank == 0:
        _write(folder, path, now, before.get("words", []))
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def _of_data(tree: dict[str, Any], overrides: Sequence[str], made: RunConfig | None = None) -> list[str]:
    """Overrides that a data set on the command line needs: the file's subset and streaming belong to another one.

    made: of the run, where there is one; else what the file says in vain is named too, not words alone.
    """
    asked = {item.lstrip("+").partition("=")[0].removeprefix("distillation.") for item in overrides}
    source = made.data.source if made and not asked & set(SOURCES) else _first(tree, SOURCES)
    if source and source_files(source):
        said = [name for name, value in OF_THE_HUB.items() if not made and _first(tree, [name]) not in (None, value)]
        if idle := [name for name in OF_THE_HUB if name in said or name in asked]:
            effect = f"{' and '.join(idle)} {'have' if idle[1:] else 'has'} no effect"
            say(f"{source}: files of this machine, where {effect}")
        return ["data.subset=null", "data.streaming=true", "data.split=train"]
    return ["data.subset=null"] if asked & set(SOURCES) and not asked & {*SUBSETS, "data.subset"} else []


def _first(tree: dict[str, Any], names: Sequence[str]) -> Any:
    """The value of the first key that has one, also below distillation."""
    values = dict(flatten(tree))
    found = (values.get(f"{group}{name}") for name in names for group in ("distillation.", ""))
    return next((value for value in found if value is not None and not isinstance(value, hydra.Unresolved)), None)
