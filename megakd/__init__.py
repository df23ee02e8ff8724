"""MegaKD. Importing it is enough for transformers' Auto classes to know compressed students, whichever comes first.

This imports neither torch nor transformers: the students are registered when AutoConfig.from_pretrained, through which
every Auto class goes, is called for the first time. Not when transformers is imported: its modules import one another
through the Auto classes, and are half there at that time.

Why a finder: transformers has no entry points, and to register in its tables takes importing them, with torch 4 s where
`megakd --help` takes 0.2 s. The finder waits for one module, and leaves sys.meta_path when that is loaded. `register()`
does it at once.
"""

import functools
import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from megakd.system.version import VERSION as __version__

__all__ = ["__version__", "register"]
AUTO = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Make compressed students known to transformers' Auto classes now; imports torch and transformers."""
    importlib.import_module("megakd.models.student")


def _register_on_first_use(module: ModuleType) -> None:
    config: Any = module.AutoConfig
    original = config.__dict__["from_pretrained"]  # the classmethod, not bound

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config.from_pretrained = original
        register()
        return cls.from_pretrained(*args, **kwargs)

    config.from_pretrained = classmethod(from_pretrained)


class _AfterAuto:
    """A finder of the module of AutoConfig alone, which does the above once it is there."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                if _AfterAuto in sys.meta_path:
                    sys.meta_path.remove(_AfterAuto)  # type: ignore[arg-type]
                _register_on_first_use(module)

            spec.loader.exec_module = execute_and_change
        return spec


if AUTO in sys.modules:
    _register_on_first_use(sys.modules[AUTO])
else:
    sys.meta_path.insert(0, _AfterAuto)  # type: ignore[arg-type]
