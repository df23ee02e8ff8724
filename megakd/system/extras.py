"""Libraries that only some installs bring: a missing one is one line that says how to get it."""

from importlib.util import find_spec

from megakd.errors import UserError

# module → (its distribution, the extra of MegaKD that brings it); pyproject.toml holds the same (test_packaging)
EXTRAS = {
    "deepspeed": ("deepspeed", "deepspeed"),
    "lm_eval": ("lm-eval", "eval"),
    "tenacity": ("tenacity", "eval"),
    "fastapi": ("fastapi", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "openai": ("openai", "serve"),
    "h5py": ("h5py", "convert"),
    "tensorboard": ("tensorboard", "log"),
    "wandb": ("wandb", "log"),
}


def require(module: str, place: str, remedy: str = "") -> None:
    """UserError `PLACE: needs LIBRARY: pip install 'megakd[EXTRA]'` when a module of an extra is not installed.

    place: the setting or verb that asks for it; remedy: what else the user can do.
    """
    library, extra = EXTRAS[module]
    try:
        missing = find_spec(module) is None
    except ValueError:  # sys.modules says that it must not be imported
        missing = True
    if missing:
        alternative = f", or {remedy}" if remedy else ""
        raise UserError(f"{place}: needs {library}: pip install 'megakd[{extra}]'{alternative}")
