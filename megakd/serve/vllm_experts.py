# pyright: reportMissingImports=false
"""A layer's shared-core experts in vLLM: router, shared experts and all-reduce stay vLLM's.

vLLM builds a layer's experts from RoutedExperts, which holds the weights, and a FusedMoEMethodBase, which computes with
them from (x, topk_weights, topk_ids). Both are replaced here, and nothing else. The mathematics is SharedCoreExperts'.
Layers without a shared core keep vLLM's own, but for the ids that its kernel for CPUs gets (StockMethod).

With expert parallelism a rank keeps some of the experts (own_experts.py), and vLLM sums over ranks.
N tokens, D hidden, A active experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.utils import extract_layer_index

from megakd.errors import UserError
from megakd.models.shared_core import DenseExperts, SharedCoreExperts, core_shape
from megakd.serve.own_experts import OwnExperts, share_of


class SharedCoreLayer(RoutedExperts):
    """The weights of one layer's experts, and what they compute."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        return SharedCoreMethod(moe_config)

    def build(self) -> None:
        """Make the modules of the layer, without their weights, of the config's forms."""
        config: Any = get_current_vllm_config().model_config.hf_text_config
        self._check(config)
        index = extract_layer_index(self.layer_name)
        forms, exempt = config.forms(index), config.dense_experts(index)
        hidden, inner = self.moe_config.hidden_dim, self.moe_config.intermediate_size
        act_fn = ACT2FN[config.hidden_act].forward
        places = [*range(self.global_num_experts)] if self.expert_map is None else self.expert_map.tolist()
        self.share = share_of(places, exempt)
        self.shared_core = nn.ModuleDict()
        for projection, form in forms.items():
            rows, columns = core_shape(form, projection, hidden, inner)
            self.shared_core[f"{projection}_proj"] = ReplicatedLinear(
                columns, rows, bias=False, prefix=f"{self.layer_name}.{projection}_proj", return_bias=False
            )
        self.dense_experts = None
        if self.share.dense_ids:
            self.dense_experts = DenseExperts(self.share.dense_ids, hidden, inner, act_fn)
        kind = SharedCoreExperts if self.expert_map is None else OwnExperts
        count = len(self.share.experts)
        self.experts = kind(count, hidden, inner, forms, act_fn, self.shared_core, self.dense_experts)
        self.requires_grad_(False)
        parts = {"shared_core": self.shared_core, "experts": self.experts, "dense_experts": self.dense_experts}
        self.stored = {f"{part}.{name}" for part, module in parts.items() if module for name in module.state_dict()}
        self.missing = set(self.stored)

    def _check(self, config: Any) -> None:
        """UserError where vLLM's block of the family is not what a student's config says, or not known here."""
        activation = self.moe_config.activation.value
        if activation != config.hidden_act:
            raise UserError(
                f"{self.layer_name}: config.json says hidden_act={config.hidden_act}, vLLM computes {activation}; "
                "export with --dense and serve that"
            )
        unknown = ("apply_router_weight_on_input", "swiglu_limit", "swiglu_alpha", "swiglu_beta")
        if used := [name for name in unknown if getattr(self, name)]:
            raise UserError(f"{self.layer_name}: MegaKD does not serve experts with vLLM's {', '.join(used)}")

    def load(self, name: str, tensor: Tensor) -> None:
        """Copy a stored tensor: `shared_core.gate_proj.weight`, `experts.basis_group_up`, `dense_experts.down_proj`."""
        if name.startswith("dense_experts.") and self.dense_experts is None:
            return  # all of them are other ranks'
        if name not in self.missing:
            raise UserError(f"{self.layer_name}: no place for the tensor {name} in the forms that config.json gives")
        stored = self.share.of(name, tensor)
        module, _, last = name.rpartition(".")
        target = getattr(self.get_submodule(module), last)
        if stored.shape != target.shape:
            raise UserError(
                f"{self.layer_name}: {name} has shape {tuple(stored.shape)}, the forms of config.json give "
                f"{tuple(target.shape)}"
            )
        target.data.copy_(stored)
        self.missing.remove(name)

    def compute(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        """The weighted sum over a token's experts; with expert parallelism over those that this rank keeps."""
        expert_NA = expert_NA.long()
        if self.expert_map is not None:
            expert_NA = self.expert_map.long()[expert_NA]
        return self.experts(x_ND, expert_NA, weight_NA)


class SharedCoreMethod(FusedMoEMethodBase):
    """What vLLM calls where it would choose kernels for an expert's matrices."""

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        layer.build()

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.ops.megakd.shared_core_experts(x, topk_weights, topk_ids, layer.layer_name)


class StockLayer(RoutedExperts):
    """A student's layer that has no shared core."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        stock = super()._get_quant_method(prefix, quant_config, moe_config)
        return StockMethod(moe_config) if type(stock) is UnquantizedFusedMoEMethod else stock


class StockMethod(UnquantizedFusedMoEMethod):
    """vLLM's own, with the ids of this rank's experts where the kernel does not map them.

    With expert parallelism vLLM 0.32's kernel for CPUs gets the ids of all ranks' experts, ignores expert_map, and
    reads and writes outside its arrays.
    """

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        if layer.expert_map is not None and x.device.type == "cpu":
            place_NA = layer.expert_map[topk_ids.long()]
            topk_weights = topk_weights * (place_NA >= 0)
            topk_ids = place_NA.clamp(min=0).to(topk_ids.dtype)
        return super().apply(layer, x, topk_weights, topk_ids, *rest, **named)


# torch.compile must not look inside: the loop over experts depends on data
@torch.library.custom_op("megakd::shared_core_experts", mutates_args=())
def shared_core_experts(x: Tensor, weight: Tensor, expert: Tensor, layer_name: str) -> Tensor:
    """One layer's experts, found by name in vLLM's forward context."""
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.compute(x, expert, weight)


@shared_core_experts.register_fake
def _(x: Tensor, weight: Tensor, expert: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)
