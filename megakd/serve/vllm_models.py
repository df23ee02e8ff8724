# pyright: reportMissingImports=false
"""Students as models of vLLM: its own class of the family, with shared-core experts in the layers that have them."""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import ModelRegistry
from vllm.model_executor.models.utils import extract_layer_index

from megakd.errors import UserError
from megakd.models.codes import restored
from megakd.models.hub import model_of
from megakd.models.sources import as_stored, by_layer
from megakd.models.student import stock_config
from megakd.serve.vllm_experts import SharedCoreLayer, StockLayer
from megakd.serve.vllm_plugin import FAMILIES, architecture_of

# a tensor that takes the place of an expert's matrices
OWN = re.compile(r"model\.layers\.(\d+)\.(?:.+\.)?((?:experts|shared_core|dense_experts)\..+)")


class ServedModel:
    """What a student adds to the class that vLLM has of its family."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        config = vllm_config.model_config.hf_text_config
        with shared_core_layers(sys.modules[type(self).__mro__[2].__module__], config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.student_config, self.student_dtype = config, vllm_config.model_config.dtype

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a student's tensors; the names of all parameters that were loaded."""
        model: Any = self
        layers = {
            extract_layer_index(name): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, SharedCoreLayer)
        }
        loaded, others = set(), {}
        for name, tensor in restored(weights, self.student_dtype):
            own = OWN.fullmatch(name)
            if own is not None and int(own[1]) in layers:
                layers[int(own[1])][1].load(own[2], tensor)
            else:
                others[name] = tensor
        for name, layer in layers.values():
            if layer.missing:
                raise UserError(f"{name}: tensors are missing, the first is {min(layer.missing)}")
            loaded |= {f"{name}.{own}" for own in layer.stored}
        return loaded | super().load_weights(stock_tensors(self.student_config, others))  # type: ignore[misc]


@contextmanager
def shared_core_layers(module: ModuleType, config: Any) -> Iterator[None]:
    """Within it, the blocks of vLLM's `module` get shared-core experts in the layers that have them in `config`."""
    stock = getattr(module, "FusedMoEFactory", None)
    if stock is None or "routed_experts_cls" not in inspect.signature(stock).parameters:
        raise UserError(f"{module.__name__}: builds its experts in another way than MegaKD knows; export with --dense")

    def factory(*args: Any, prefix: str = "", **settings: Any) -> Any:
        kind = SharedCoreLayer if config.forms(extract_layer_index(prefix)) else StockLayer
        return stock(*args, prefix=prefix, routed_experts_cls=kind, **settings)

    module.FusedMoEFactory = factory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.FusedMoEFactory = stock  # type: ignore[attr-defined]


def stock_tensors(config: Any, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A student's tensors besides its shared cores by the names of the hub, which vLLM's loaders expect."""
    model = model_of(stock_config(config), "the student's family")
    for names in by_layer(tensors):
        yield from as_stored(model, {name: tensors[name] for name in names}).items()


@cache
def served_class(family: str) -> type[Any]:
    """The class of a family's students."""
    stock = ModelRegistry.models[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]].load_model_cls()
    return type(stock)(architecture_of(family), (ServedModel, stock), {"__module__": __name__})


def __getattr__(name: str) -> type[Any]:
    """The classes by their names, as vLLM imports them."""
    family = next((family for family in FAMILIES if architecture_of(family) == name), None)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served_class(family)
