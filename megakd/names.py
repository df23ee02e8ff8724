"""Names against paths: one rule for everything that is given by name or by path.

A bare name has no "/" and does not begin with "." or "~". It means what MegaKD ships under this name, if there is such
a recipe, DeepSpeed file, model or text: `demo` is the shipped one, whatever lies in the working directory; `./demo`
is the folder. A name that is not shipped, and everything with a "/", is a local file or folder, if it can be what is
asked for; else a model or data set is an id of the hub. A leading "~" is the home folder. A `Path` is a path.
Where only a place can be meant (RUN, --out), nothing is looked up by name. A data set whose name a folder without text
has is refused: the library that reads the hub would read that folder.
"""

import json
from pathlib import Path

from megakd.errors import UserError
from megakd.system.files import settle


def is_bare(text: str | Path) -> bool:
    """Whether `text` may be the name of something shipped."""
    return isinstance(text, str) and "/" not in text and not text.startswith((".", "~")) and text != ""


def as_text(place: str | Path) -> str:
    """What means the same in a configuration: a path of one part, `demo`, is `./demo` there, for it is no name."""
    return f"./{place}" if isinstance(place, Path) and is_bare(str(place)) else str(place)


def expand(text: str | Path) -> Path:
    """The path that `text` names, a leading ~ as the home folder; UserError when there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}; write the folder's whole path") from error


def shipped(kind: str, name: str) -> Path:
    """A file that comes with MegaKD: `ds_configs/zero3.json`, `launch/recipes/demo.json`, …

    In a checkout these folders stand next to the package, in an installed wheel inside it.
    """
    package = Path(__file__).parent
    inside, beside = package / kind / name, package.parent / kind / name
    return inside if inside.exists() else beside


def shipped_json(kind: str, text: str | Path) -> Path | None:
    """The shipped file `kind`/`text`.json that a bare name means; None when it means none."""
    path = shipped(kind, f"{text}.json")
    return path if is_bare(text) and path.is_file() else None


def shipped_names(kind: str) -> str:
    """The names that `shipped_json` knows, as a list in words."""
    return ", ".join(sorted(path.stem for path in shipped(kind, "").glob("*.json")))


def find_recipe(text: str | Path) -> Path:
    """The file of a recipe: shipped, a file, or the config.json of a run, or of a checkpoint's run; else UserError."""
    if found := shipped_json("launch/recipes", text):
        return found
    path = expand(text)
    if path.is_file():
        return path
    if holds_run(path):
        return path / "config.json"
    run = path.absolute().parent.parent.parent  # of RUN/checkpoints/STAGE/step-N
    if (path / "progress.json").is_file() and holds_run(run):
        return run / "config.json"
    why = f"the folder {path} holds no run (no config.json of one)" if path.is_dir() else "no such recipe"
    raise UserError(
        f"{text}: {why}; give a JSON or YAML file, a run's folder, or one of {shipped_names('launch/recipes')}"
    )


def find_deepspeed(text: str, folder: Path, key: str) -> Path:
    """The DeepSpeed file that the field `key` names: shipped, a file, or one below `folder`, where the recipe lies."""
    if found := shipped_json("ds_configs", text):
        return found
    path = expand(text)
    for each in (path, folder / path):
        if each.is_file():
            return each
    raise UserError(f"{key}: {text!r} is neither a file nor one of {shipped_names('ds_configs')}")


def model_folder(text: str | Path) -> Path | None:
    """The folder of a model that is shipped (`demo`) or local; None when `text` can only be an id of the hub."""
    if is_bare(text) and text == "demo":
        return shipped("assets", "demo-teacher")
    path = expand(text)
    return path if text != "" and holds_model(path) else None


def may_be_hub_id(text: str | Path) -> bool:
    """Whether `text` has the form of a hub id: name, or owner/name."""
    return isinstance(text, str) and text.count("/") <= 1 and not text.startswith(("/", ".", "~")) and text != ""


def holds_run(folder: Path) -> bool:
    """Whether a folder is a run: its config.json has a run's sections, or a history lies next to it."""
    return "stages" in _config(folder) or all((folder / name).is_file() for name in ("config.json", "history.jsonl"))


def holds_model(folder: Path) -> bool:
    """Whether a folder can be a model: it has a config.json, which is no run's."""
    return (folder / "config.json").is_file() and not holds_run(folder)


def _config(folder: Path) -> dict[str, object]:
    """The object in a folder's config.json; empty where there is none, or no JSON object."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def resolve(name: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model: shipped, local, or a download of a hub id, as `megakd.names` tells them apart.

    UserError when it is none. weights: False downloads configuration and tokenizer alone.
    """
    path = expand(name)
    if model_folder(name) is None and not path.exists():
        settle(path.parent, path.name)
    if (folder := model_folder(name)) is not None:
        return folder
    why = f"the folder {path} holds a run, no model" if holds_run(path) else "not a model folder (no config.json)"
    if not may_be_hub_id(name):
        raise UserError(f"{name}: {why}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's errors are many; each means that this model cannot be had
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        also = f"; locally: {why}" if path.exists() else ""
        if isinstance(error, LocalEntryNotFoundError):  # the hub was not asked, or did not answer
            also += "; without a network: the path of a model folder"
        raise UserError(f"{name}: neither a folder nor a model the hub gives: {reason}{also}") from error
