"""A Mixture-of-Experts model of random weights with a real model's layer sizes: for timings, memory and tests.

    python tools/make/synthetic_moe.py FOLDER                          2 layers of Qwen3-30B-A3B's sizes, 3.7 GB
    python tools/make/synthetic_moe.py FOLDER --vocabulary 2048 --layers 1 --experts 8 --family mixtral

writes a Hugging Face folder in the hub's layout (one 2-D tensor an expert), bfloat16, sharded, tensor by tensor: no
more than one file's worth of them is in memory. Equal arguments give equal bytes.

Experts are random, but not white, so that compressing them means something. With every part scaled to its share of the
squared norm, matrix e of a layer's projection is
    W_e = common C  +  head U_e diag(k^-decay) V_e^T  +  tail G_e,        k = 1 … rank
C, U, G with normal entries, C the layer's. Half of the energy of V_e, on the side of the hidden size, is the layer's
too: experts read and write partly the same directions. So two experts' cosine is `common`, plus what the head shares.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import installed  # noqa: F401
import torch
from torch import Tensor

from megakd.data.tokenizers import load_tokenizer, vocabulary_size
from megakd.errors import UserError
from megakd.models.hub import copy_side_files, model_of, write_config, write_weights
from megakd.models.shared_core import PROJECTIONS
from megakd.models.sources import as_stored
from megakd.models.spec import MoESpec, spec_for
from megakd.names import expand
from megakd.outputs import check_folder
from megakd.system.files import publishing
from megakd.system.terminal import accept_any_encoding, one_line_errors

SHARD_BYTES = 256 * 2**20
# what a family's config calls the number of experts and their inner size
FIELDS = {
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    "qwen2_moe": ("num_experts", "moe_intermediate_size"),
    "mixtral": ("num_local_experts", "intermediate_size"),
    "olmoe": ("num_experts", "intermediate_size"),
    "deepseek_v3": ("n_routed_experts", "moe_intermediate_size"),
}


class Spectrum(NamedTuple):
    """Shares of an expert's squared norm (the tail has the rest), and how the head's singular values fall."""

    common: float = 0.05
    head: float = 0.6
    decay: float = 0.5
    rank: int = 96


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=expand)
    parser.add_argument("--family", choices=list(FIELDS), default="qwen3_moe", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--experts", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=8, help="experts a token passes (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--expert-hidden", type=int, default=768, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--kv-heads", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, help="default: the tokenizer's, else 151936")
    parser.add_argument("--tokenizer", type=expand, help="a folder whose tokenizer is copied")
    parser.add_argument("--common", type=float, default=Spectrum().common, help="default: %(default)s")
    parser.add_argument("--head", type=float, default=Spectrum().head, help="default: %(default)s")
    parser.add_argument("--decay", type=float, default=Spectrum().decay, help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=Spectrum().rank, help="of the head (default: %(default)s)")
    parser.add_argument("--shard-megabytes", type=float, default=SHARD_BYTES / 2**20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    with one_line_errors("synthetic_moe"):
        args.folder = check_folder(args.folder)
        write(args)
    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    print(f"{args.folder}: {args.family}, {args.layers} layers of {args.experts} experts, {size / 1e9:.2f} GB")


def write(args: argparse.Namespace) -> None:
    """Write the folder that the arguments describe."""
    spectrum = Spectrum(args.common, args.head, args.decay, args.rank)
    if min(spectrum.common, spectrum.head) < 0 or spectrum.common + spectrum.head > 1 or spectrum.rank < 1:
        raise UserError(
            f"--common {args.common} --head {args.head} --rank {args.rank}: shares of one norm, and a rank from 1 on"
        )
    if not 1 <= args.top_k <= args.experts:
        raise UserError(f"--top-k {args.top_k}: must be between 1 and --experts {args.experts}")
    tokenizer: Any = load_tokenizer(args.tokenizer) if args.tokenizer else None
    vocabulary = args.vocabulary or (math.ceil(vocabulary_size(tokenizer) / 8) * 8 if tokenizer else 151936)
    if tokenizer and vocabulary < vocabulary_size(tokenizer):
        raise UserError(f"--vocabulary {vocabulary}: the tokenizer's ids go up to {vocabulary_size(tokenizer) - 1}")
    config = family_config(args, vocabulary)
    config.bos_token_id, config.pad_token_id = None, None
    config.eos_token_id = tokenizer.eos_token_id if tokenizer else None
    with publishing(args.folder) as temporary:
        write_weights(temporary, tensors(config, spectrum, args.seed), int(args.shard_megabytes * 2**20))
        write_config(temporary, config)
        if args.tokenizer:
            copy_side_files(args.tokenizer, temporary)


def family_config(args: argparse.Namespace, vocabulary: int) -> Any:
    """The family's config with these sizes; what they do not say is the family's default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    experts, expert_hidden = FIELDS[args.family]
    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "num_experts_per_tok": args.top_k,
        "tie_word_embeddings": False,
        "intermediate_size": 3 * args.hidden,
        experts: args.experts,
        expert_hidden: args.expert_hidden,
    }
    if args.family == "qwen3_moe":
        fields |= {"head_dim": args.head_dim, "norm_topk_prob": True, "max_position_embeddings": 40960}
    if args.family == "qwen2_moe":
        fields |= {"shared_expert_intermediate_size": args.expert_hidden}
    if args.family == "deepseek_v3":
        half = args.head_dim // 2
        fields |= {"qk_nope_head_dim": args.head_dim, "v_head_dim": args.head_dim, "qk_rope_head_dim": half}
        fields |= {"q_lora_rank": args.hidden // 4, "kv_lora_rank": args.hidden // 4, "num_key_value_heads": args.heads}
        fields |= {"first_k_dense_replace": min(1, args.layers - 1), "n_group": 1, "topk_group": 1}
    config: Any = CONFIG_MAPPING[args.family](**fields)
    config.dtype = torch.bfloat16
    return config


def tensors(config: Any, spectrum: Spectrum, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by their names in the hub's files, in the order of the modules."""
    model = model_of(config, config.model_type)
    config.architectures = [type(model).__name__]
    spec = spec_for(config, config.model_type)
    layer_of = {spec.fused(layer)["gate_up_proj"]: layer for layer in spec.layers}
    for name, empty in model.state_dict().items():
        if name in layer_of:
            layer = layer_of[name]
            gate, up, down = (experts(spec, layer, projection, spectrum, seed) for projection in PROJECTIONS)
            stacked = {name: torch.cat([gate, up], dim=1), spec.fused(layer)["down_proj"]: down}
            yield from as_stored(model, stacked).items()
        elif not spec.is_expert(name):
            yield from as_stored(model, {name: other(name, empty, seed)}).items()


def experts(spec: MoESpec, layer: int, projection: str, spectrum: Spectrum, seed: int) -> Tensor:
    """One projection's matrices of a layer, stacked."""
    columns = spec.shapes[projection][1]
    hidden, expert_hidden = spec.sizes
    rank = min(spectrum.rank, expert_hidden, hidden)
    draw = generator(seed, f"{layer} {projection}")
    scale = columns**-0.5  # an input of unit entries gives an output of unit entries
    sigma = torch.arange(1, rank + 1) ** -spectrum.decay
    # entries of U diag(sigma) V^T have the variance |sigma|^2
    sigma *= math.sqrt(spectrum.head) * scale / sigma.norm()
    tail = math.sqrt(max(0.0, 1 - spectrum.common - spectrum.head)) * scale
    common = math.sqrt(spectrum.common) * scale * torch.randn(expert_hidden, hidden, generator=draw)
    shared = math.sqrt(0.5) * torch.randn(rank, hidden, generator=draw)
    matrix = torch.empty(expert_hidden, hidden)
    found = torch.empty(spec.experts, *spec.shapes[projection], dtype=torch.bfloat16)
    for place in found:
        left = torch.randn(expert_hidden, rank, generator=draw) * sigma
        right = torch.randn(rank, hidden, generator=draw).mul_(math.sqrt(0.5)).add_(shared)
        matrix.normal_(std=max(tail, 1e-30), generator=draw).add_(common).addmm_(left, right)
        place.copy_(matrix.T if projection == "down" else matrix)
    return found


def other(name: str, empty: Tensor, seed: int) -> Tensor:
    """A tensor that is no routed expert's: norms 1, biases 0, unit embeddings, matrices that keep a scale."""
    found = torch.zeros(empty.shape, dtype=torch.bfloat16)
    if empty.ndim < 2:
        return found.fill_(1.0) if name.endswith("norm.weight") else found
    std = 1.0 if "embed_tokens" in name else empty.shape[-1] ** -0.5
    draw = generator(seed, name)
    for rows in found.split(4096):  # normal numbers are drawn in float32: 16 times too coarse in bfloat16
        rows.copy_(torch.empty(rows.shape).normal_(std=std, generator=draw))
    return found


def generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))


if __name__ == "__main__":
    main()
