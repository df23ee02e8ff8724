"""Train the demo's teacher (a 4.3 M parameter Qwen3-MoE and its tokenizer) from text that pip and CPython install.

    python tools/make/train_demo_teacher.py OUT                    # what is shipped: about an hour on 2 cores
    python tools/make/train_demo_teacher.py OUT --steps 20         # try the tool

The text: CPython's language reference and docstrings, three times, and once the docstrings of the packages of
requirements.txt named below. Documents that `held_out` names are never trained on. OUT gets a Hugging Face folder
in bfloat16 and `training.json` (command, seed, versions, sha256 of text and weights, held-out loss over steps).
Killed and started again with the same OUT, it goes on from its last 200 steps, which OUT.resume.pt keeps. OUT is a new
or empty folder, or one that this tool made.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import platform
import time
from pathlib import Path

import installed  # noqa: F401
import numpy as np
import torch
import transformers
from transformers import Qwen3MoeForCausalLM

from megakd.data.batches import collate
from megakd.data.documents import held_out, python_documents
from megakd.data.packing import pack
from megakd.data.records import IGNORED, Sample
from megakd.data.tokenizers import vocabulary_size
from megakd.models.tiny import END_OF_DOCUMENT, tiny_moe_config, train_tokenizer
from megakd.names import expand
from megakd.outputs import check_folder, producing
from megakd.system.files import publishing
from megakd.system.terminal import accept_any_encoding, one_line_errors

PACKAGES = ("torch", "transformers", "numpy", "sympy", "networkx", "scipy", "sklearn", "pandas", "matplotlib")
MARK = "tools/make/train_demo_teacher.py"
HOLDOUT, SEQUENCE, ROWS = 0.05, 256, 16
PEAK_LR, WARMUP, AUX = 2e-3, 100, 0.01


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=expand)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with one_line_errors("train_demo_teacher"):
        out = check_folder(args.out, MARK)
    torch.manual_seed(args.seed)

    own = list(python_documents())
    roots = [Path(importlib.util.find_spec(p).submodule_search_locations[0]) for p in PACKAGES]  # type: ignore
    train_text = [d for d in own if not held_out(d, HOLDOUT)]
    test_text = [d for d in own if held_out(d, HOLDOUT)]
    more = [d for d in python_documents(roots) if not held_out(d, HOLDOUT)]
    tokenizer = train_tokenizer(train_text)
    rng = np.random.default_rng(args.seed)
    train = windows(shuffled(train_text * 3 + more, rng), tokenizer)
    test = windows(test_text, tokenizer)
    print(f"{len(train)} windows of {SEQUENCE} tokens to train on, {len(test)} held out", flush=True)
    order = np.concatenate([rng.permutation(len(train)) for _ in range(math.ceil(args.steps * ROWS / len(train)))])

    model = Qwen3MoeForCausalLM(tiny_moe_config(vocabulary_size(tokenizer)))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    history, first = [], 0
    state = out.with_name(f"{out.name}.resume.pt")
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history, first = saved["history"], saved["step"]
    start = time.perf_counter()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * learning_rate(step, args.steps)
        loss = train_step(model, optimizer, [train[i] for i in order[step * ROWS : (step + 1) * ROWS]])
        done = step + 1
        if done % 50 == 0:
            seconds = (time.perf_counter() - start) / (done - first)
            print(f"step {done}/{args.steps} loss {loss:.4f} {seconds:.2f} s/step", flush=True)
        if done % 500 == 0 or done == args.steps:
            history.append([done, held_out_loss(model, test)])
            print(f"step {done} held-out loss {history[-1][1]:.4f}", flush=True)
        if done % 200 == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history, "step": done}
            with publishing(state) as temporary:
                torch.save(saved, temporary)
    with producing(out, MARK) as folder:
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report = {
            "command": f"python tools/make/train_demo_teacher.py OUT --steps {args.steps} --seed {args.seed}",
            "seed": args.seed,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "text_sha256": hashlib.sha256("\n".join(train_text + more).encode()).hexdigest(),
            "tokens": args.steps * ROWS * SEQUENCE,
            "held_out_loss": history,
            "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        }
        (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    state.unlink(missing_ok=True)


def shuffled(documents: list[str], rng: np.random.Generator) -> list[str]:
    return [documents[i] for i in rng.permutation(len(documents))]


def windows(documents: list[str], tokenizer) -> list[Sample]:
    ids = tokenizer([d + END_OF_DOCUMENT for d in documents], verbose=False)["input_ids"]
    return [Sample(str(i), w.tokens, w.starts) for i, w in enumerate(pack(enumerate(ids), SEQUENCE))]


def learning_rate(step: int, steps: int) -> float:
    return min((step + 1) / WARMUP, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_step(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, samples: list[Sample]) -> float:
    batch = collate(samples, SEQUENCE)
    out = model(batch.tokens, position_ids=batch.position_ids, use_cache=False, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    (loss + AUX * out.aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, samples: list[Sample]) -> float:
    total = count = 0.0
    for first in range(0, len(samples), ROWS):
        batch = collate(samples[first : first + ROWS], SEQUENCE)
        logits = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
        labels = batch.labels.flatten()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        count += (labels != IGNORED).sum().item()
    return total / count


if __name__ == "__main__":
    main()
