"""Do documents packed into one sequence change each other's hidden states? Measured, never taken from a family.

A packed sequence separates its documents by position_ids alone, which restart at each of them. Attention whose mask
follows them keeps documents apart; recurrent and convolutional layers, and families whose masks do not read
position_ids (gpt_oss, Falcon, OPT, BLOOM, MPT), do not, and nothing in a config says so.

B sequences, F tokens of a first document, S tokens of a second one, D hidden.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.errors import UserError
from megakd.identity import Packing, packing_of

FIRST, SECOND = 12, 6  # tokens of the two documents

# Relative movements above these are a leak. Isolated models move by 0 to 3e-6 in float32 and leaking ones by 1e-3 and
# more with random weights (45 families of transformers 5.22). In 16 bits sums in another order flip an expert's choice
# now and then, so the bound is wide. A document alone is computed by other kernels than a packed one, and so differs by
# rounding in every layer: by up to 1e-5 in float32; 16 bits say nothing about it. What they miss `check_config` finds.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 6e-2}
FLOAT32, ALONE = 3e-5, 3e-4


class Leak(NamedTuple):
    """How far the hidden states of a second document move, relative to their norm.

    packed: when the first document is another one; alone: when there is no first document.
    """

    packed: float
    alone: float


def check_model(model: Any, place: str, packing: Packing) -> None:
    """UserError when a loaded causal LM, or its decoder, leaks between packed documents; nothing for `documents`.

    Three forwards of at most 4 x 18 tokens where the model lies. Under ZeRO-3 or expert parallelism all ranks call it
    together, within the forward of the engine; all of them come to the same answer.
    """
    if packing == "packed":
        half = TOLERANCE.get(model.get_input_embeddings().weight.dtype)
        bounds = (FLOAT32, ALONE) if half is None else (half, math.inf)
        _refuse(measure(model), place, model.config.model_type, *bounds)


def check_config(config: Any, place: str, packing: Packing) -> bool:
    """The same of the model that a Hugging Face config describes, before any weights are read.

    Its own classes with random weights in float32: only as many layers as it takes to have one of every kind, at full
    width (DeepSeek-V3: 20 s of a core and 1 GB). False when such a model cannot be made or run: then `check_model`
    finds out once the weights are loaded.
    """
    if packing == "documents":
        return True
    leak = _leak_of(config)
    if leak is not None:
        _refuse(leak, place, config.model_type, FLOAT32, ALONE)
    return leak is not None


def _refuse(leak: Leak, place: str, family: str, packed: float, alone: float) -> None:
    if leak.packed > packed:
        what = f"change each other's hidden states (by {leak.packed:.2g} of their norm)"
    elif leak.alone > alone:
        what = f"have other hidden states than alone (by {leak.alone:.2g} of their norm)"
    else:
        return
    raise UserError(
        f"{place}: documents packed into one sequence {what}: {family} does not separate them by position_ids; set "
        "data.packing=documents in a new run, for one document per sequence"
    )


@torch.no_grad()
def measure(model: Any, rows: int = 4) -> Leak:
    """The leak of a model, the largest over the second document's positions of the lower median over `rows` sequences.

    A median, because in 16 bits a single sequence may have an expert's choice flipped by rounding.
    """
    decoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    embeddings = decoder.get_input_embeddings().weight
    text: Any = decoder.config.get_text_config() if hasattr(decoder.config, "get_text_config") else decoder.config
    generator = torch.Generator().manual_seed(0)
    tokens_BT, other_BT = torch.randint(1, text.vocab_size, (2, rows, FIRST + SECOND), generator=generator)
    other_BT[:, FIRST:] = tokens_BT[:, FIRST:]
    positions_BT = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).expand(rows, -1)

    def hidden(tokens: Tensor, positions: Tensor) -> Tensor:
        tokens, positions = (each.to(embeddings.device) for each in (tokens, positions))
        return decoder(tokens, position_ids=positions, use_cache=False).last_hidden_state[:, -SECOND:].float()

    training = decoder.training
    decoder.eval()
    packed, moved = hidden(tokens_BT, positions_BT), hidden(other_BT, positions_BT)
    alone = hidden(tokens_BT[:, FIRST:], positions_BT[:, FIRST:])
    if training:
        decoder.train()
    return Leak(_distance(packed, moved), _distance(packed, alone))


def _distance(hidden_BSD: Tensor, other_BSD: Tensor) -> float:
    norms_BS = hidden_BSD.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    moved_BS = (hidden_BSD - other_BSD).norm(dim=-1) / norms_BS
    return float(moved_BS.median(0).values.max())  # torch's median is the lower one


_leaks: dict[str, Leak | None] = {}  # by what a config says


def _leak_of(config: Any) -> Leak | None:
    """The leak of a config's model; None when the model cannot be made or run."""
    key = f"{type(config)} {json.dumps(config.to_dict(), default=str, sort_keys=True)}"
    if key not in _leaks:
        with torch.random.fork_rng(devices=[]):
            try:
                _leaks[key] = measure(sketch(config), rows=1)
            except Exception:  # a family's own code, with layers and weights it was not made for: any kind may come
                _leaks[key] = None
    return _leaks[key]


def sketch(config: Any) -> Any:
    """The decoder of a config's causal LM, cut to its first layers and with random weights, in float32 on the CPU."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.initialization import guard_torch_init_functions

    import megakd.models.student  # noqa: F401  (registers the student)

    config = copy.deepcopy(config)
    with torch.device("meta"):
        # the class itself: under a ZeRO-3 configuration from_config would divide the weights among ranks
        whole = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    decoder = getattr(whole, whole.base_model_prefix).eval()
    _cut(decoder)
    _fill(decoder)
    with torch.no_grad(), guard_torch_init_functions():  # buffers, as from_pretrained makes those that are not stored
        decoder.initialize_weights()
    return decoder


def _cut(decoder: Any) -> None:
    """Keep the shortest prefix of the layers that holds every kind: classes inside it, and what the config calls it.

    A prefix, because some families look up a layer's kind by its place in the list.
    """
    count = decoder.config.num_hidden_layers
    kinds = getattr(decoder.config, "layer_types", None) or [None] * count
    for module in decoder.modules():
        for name, layers in module.named_children():
            if isinstance(layers, nn.ModuleList) and len(layers) == count == len(kinds):
                firsts: dict[Any, int] = {}
                for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
                    firsts.setdefault((kind, *(type(inner) for inner in layer.modules())), index)
                setattr(module, name, layers[: max(firsts.values()) + 1])
                return


CONTIGUOUS = 1 << 26  # entries of a matrix beyond which rows overlap (embeddings; kernels copy those of others)


def _fill(decoder: Any) -> None:
    """Give every parameter random numbers, all out of one pool, so that a layer of 100 GB takes what one matrix does.

    Matrices are scaled to keep the norm of hidden states, vectors lie around 1 (weights of norms) or 0. The experts of
    a layer share most numbers, and so do the rows of an embedding beyond CONTIGUOUS entries, shifted by one.
    """
    generator = torch.Generator().manual_seed(0)
    modules = list(decoder.modules())
    parameters = {(module, name): p for module in modules for name, p in module._parameters.items() if p is not None}
    spans = [1 + sum((n - 1) * s for n, s in zip(p.shape, _strides(p.shape), strict=True)) for p in parameters.values()]
    pool = torch.randn(max(spans, default=0) + 9973, generator=generator) * decoder.config.hidden_size**-0.5
    for ((module, name), parameter), span in zip(parameters.items(), spans, strict=True):
        if parameter.ndim < 2:
            value = 0.1 * torch.randn(parameter.shape, generator=generator) + name.endswith("weight")
        else:
            start = int(torch.randint(len(pool) - span, (), generator=generator))
            value = pool.as_strided(parameter.shape, _strides(parameter.shape), start)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
        module._parameters[name]._is_hf_initialized = True  # transformers leaves it as it is
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _strides(shape: torch.Size) -> list[int]:
    if len(shape) < 2:
        return [1] * len(shape)
    rows = shape[-1] if len(shape) > 2 or shape.numel() <= CONTIGUOUS else 1
    return [*[1] * (len(shape) - 2), rows, 1]


def check_packing(facts: dict[str, Any], packing: Packing, place: Path) -> None:
    """UserError when sequences were not made as `data.packing` says."""
    if (made := packing_of(facts)) != packing:
        raise UserError(
            f"{place}: its sequences are {made}, data.packing is {packing}; run: megakd tokenize in a new run"
        )
