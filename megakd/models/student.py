"""The compressed student as a Hugging Face model: the family's own, with shared-core experts in its MoE blocks.

Router, auxiliary loss, shared experts, attention: all else is the family's. `from_pretrained`, `save_pretrained` and
`generate` work as for any transformers model. This file and those that it imports are in every model folder, so that
`trust_remote_code=True` loads it where MegaKD is not installed: hence the relative imports.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .codes import restored
from .shared_core import PROJECTIONS, DenseExperts, Form, SharedCoreExperts, core_shape

PREFIX = "SharedCore"
SUFFIX = "_shared_core"
PRECISION = "precision"
VLLM_BACKEND = ("vllm", "vllm_mla")  # attention that vLLM sets before it makes a model of transformers its own


class SharedCoreConfig:
    """What a student's config adds to its family's.

    shared_core: {"layers": {"0": {"gate": {"shape", "input_rank", "output_rank", "groups"}, "up": …, "down": …}, …},
    "dense_experts": {"0": [17, …], …}}; layers that are not named stay the family's. Where weights are stored in few
    bits (codes.py): "precision": {"core": "int4", "factors": "int8", …}, in each form too: code that knows of no codes
    then refuses the form.
    """

    shared_core: dict[str, Any] | None = None

    def forms(self, layer: int) -> dict[str, Form] | None:
        """The form of each projection of a layer; None where the layer has no shared core."""
        layers = (self.shared_core or {}).get("layers", {})
        found = layers.get(str(layer))
        if found is None:
            return None
        return {p: Form(**{name: value for name, value in found[p].items() if name != PRECISION}) for p in PROJECTIONS}

    def dense_experts(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that are kept as they are."""
        return tuple((self.shared_core or {}).get("dense_experts", {}).get(str(layer), ()))

    def precision(self) -> dict[str, str]:
        """Of the parts whose weights the folder stores in few bits: {part: name}."""
        return dict((self.shared_core or {}).get(PRECISION, {}))

    def with_precision(self, precision: Mapping[str, str]) -> dict[str, Any]:
        """shared_core for a folder with these; with none, of one that stores every weight as it is."""

        def said(values: Mapping[str, Any]) -> dict[str, Any]:
            rest = {name: value for name, value in values.items() if name != PRECISION}
            return rest | ({PRECISION: dict(precision)} if precision else {})

        shared = said(self.shared_core or {})
        layers = {i: {p: said(form) for p, form in forms.items()} for i, forms in shared.get("layers", {}).items()}
        return shared | {"layers": layers}


class SharedCoreModel:
    """Puts the shared-core experts of the config into the family's blocks."""

    def __init__(self, config: Any):
        if getattr(config, "_attn_implementation", None) in VLLM_BACKEND:
            raise ValueError(
                "vLLM's backend for transformers models would take the factors of shared-core experts for dense "
                "experts; install MegaKD in vLLM's environment and serve without --model-impl transformers"
            )
        super().__init__(config)
        model: Any = self
        for index, layer in enumerate(model.model.layers):
            forms = config.forms(index)
            if forms is not None:
                share_core(expert_block(layer), forms, config.dense_experts(index))
        model.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As of any model; weights that are stored in few bits are dequantised once, to the model's type."""
        loaded = super().from_pretrained(*args, **options)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.precision():
            if not vars(model).pop("_dequantized", False):
                raise ValueError("this version of transformers loads weights in another way; transformers 5.22 does it")
            model.config.shared_core = model.config.with_precision({})  # which save_pretrained writes
        return loaded

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: list[str] | None, *others: Any, **options: Any
    ) -> Any:
        """What transformers calls with the files that it found, on a disk or a hub."""
        if model.config.precision() and state_dict is None and checkpoint_files:
            state_dict, checkpoint_files = dict(restored(_tensors(checkpoint_files), model.dtype)), None
            model._dequantized = True
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *others, **options)


def _tensors(files: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of files of safetensors, by name."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def expert_block(layer: nn.Module) -> Any:
    """The module of a layer that has experts: its MLP in most families, the layer itself in some; None without."""
    blocks = (module for module in layer.modules() if isinstance(module._modules.get("experts"), nn.Module))
    return next(blocks, None)


def share_core(block: Any, forms: Mapping[str, Form], exempt: tuple[int, ...]) -> None:
    """Replace a family block's experts by shared-core ones, in place."""
    stock = block.experts
    experts, hidden, expert_hidden = getattr(stock.down_proj, "ds_shape", stock.down_proj.shape)  # ZeRO-3 has cut it
    act_fn = getattr(stock.act_fn, "forward", stock.act_fn)
    shapes = {p: core_shape(form, p, hidden, expert_hidden) for p, form in forms.items()}
    core = nn.ModuleDict({f"{p}_proj": nn.Linear(d_in, d_out, bias=False) for p, (d_out, d_in) in shapes.items()})
    kept = DenseExperts(exempt, hidden, expert_hidden, act_fn) if exempt else None
    block.shared_core = core
    block.experts = SharedCoreExperts(experts, hidden, expert_hidden, forms, act_fn, core, kept)
    if kept is not None:
        block.dense_experts = kept


@cache
def student_class(family: str) -> type[Any]:
    """The student of a family (a model_type), whose config_class is its config; registered with transformers."""
    stock = CONFIG_MAPPING[family]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock]
    config = type(PREFIX + stock.__name__, (SharedCoreConfig, stock), {"model_type": family + SUFFIX})
    made: Any = type(PREFIX + model.__name__, (SharedCoreModel, model), {"config_class": config})
    # save_pretrained writes this code next to the weights
    config.register_for_auto_class("AutoConfig")
    made.register_for_auto_class("AutoModelForCausalLM")
    if __package__ == "megakd.models":  # not for the copy in a model's folder, next to which MegaKD may be installed
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, made)
    return made


class Students(dict[str, Any]):
    """What transformers knows besides its own configs: those of students, made when one is asked for."""

    def __missing__(self, model_type: str) -> Any:
        if model_type not in self:
            raise KeyError(model_type)
        return student_class(model_type.removesuffix(SUFFIX)).config_class

    def __contains__(self, model_type: object) -> bool:
        family = str(model_type).removesuffix(SUFFIX)
        return super().__contains__(model_type) or (family != model_type and family in CONFIG_MAPPING_NAMES)


if __package__ == "megakd.models":
    CONFIG_MAPPING._extra_content = Students(CONFIG_MAPPING._extra_content)


def __getattr__(name: str) -> type[Any]:
    """The classes by their names, as a config's auto_map has them."""
    stock = name.removeprefix(PREFIX)
    for names, of in ((CONFIG_MAPPING_NAMES, "config_class"), (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, None)):
        family = next((family for family, known in names.items() if known == stock), None)
        if name.startswith(PREFIX) and family is not None:
            made = student_class(family)
            return getattr(made, of) if of else made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def student_config(
    teacher: Any, layers: Mapping[int, Mapping[str, Form]], exempt: Mapping[int, tuple[int, ...]] | None = None
) -> Any:
    """The student's config for a teacher's: the same model, with shared-core experts in these layers."""
    model = student_class(teacher.model_type)
    shared: dict[str, Any] = {
        "layers": {str(i): {p: form._asdict() for p, form in forms.items()} for i, forms in layers.items()}
    }
    kept = {str(i): list(ids) for i, ids in (exempt or {}).items() if ids}
    if kept:
        shared["dense_experts"] = kept
    return model.config_class(**_fields(teacher), shared_core=shared, architectures=[model.__name__])


def stock_config(student: Any) -> Any:
    """The config of the stock model that a student expands to."""
    family = student.model_type.removesuffix(SUFFIX)
    fields = {name: value for name, value in _fields(student).items() if name != "shared_core"}
    return CONFIG_MAPPING[family](**fields, architectures=[student_class(family).__mro__[2].__name__])


def stock_with(config: Any, changes: Mapping[str, Any]) -> Any:
    """A stock model's config with other values of some fields."""
    return CONFIG_MAPPING[config.model_type](**_fields(config) | dict(changes), architectures=config.architectures)


def _fields(config: Any) -> dict[str, Any]:
    fields = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    return fields
