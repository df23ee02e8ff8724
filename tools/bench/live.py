"""A step with a live teacher, against the loop that one writes by hand: time and memory.

By hand: both models' logits whole, cross_entropy and kl_div of them, AdamW. Weights and tokens are random: what a step
takes does not depend on what is learned. float32 on one core of a CPU, float16 on a GPU within 8 GiB.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from bench.experts import clocked
from bench.loss import peak_bytes
from bench.rows import Row
from megakd.config.parsing import parse
from megakd.config.run import RunConfig
from megakd.config.train import StageConfig
from megakd.data.records import Batch
from megakd.engine.local import LocalEngine
from megakd.models.offload import offload
from megakd.models.tiny import tiny_moe_config
from megakd.objectives.build import build
from megakd.system.dist import World
from megakd.train.build import build_engine

TEMPERATURE, CAP = 2.0, 8 * 2**30
FORMS = {  # with routers that learn; with the teacher's layers in CPU memory
    "frozen": (False, False),
    "routers learn": (True, False),
    "routers learn, offloaded": (True, True),
}


class Case(NamedTuple):
    student: Any
    teacher: Any
    windows: int
    length: int


def _case(vocabulary: int, student: dict[str, Any], teacher: dict[str, Any], windows: int, length: int) -> Case:
    return Case(
        LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=length, **student),
        tiny_moe_config(vocabulary, **teacher) if "num_experts" not in teacher
        else Qwen3MoeConfig(vocab_size=vocabulary, tie_word_embeddings=True, norm_topk_prob=True, **teacher),
        windows, length,
    )  # fmt: skip


def _llama(hidden: int, layers: int) -> dict[str, Any]:
    heads = hidden // 32
    return {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads}  # fmt: skip


SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
CASES = {
    "V 2,048, quick": _case(2048, _llama(64, 2), {"num_hidden_layers": 1}, 2, 64),
    "V 2,048": _case(2048, _llama(128, 4), {}, 4, 256),
    "V 49,152": _case(49152, _llama(128, 4), {}, 2, 256),
    "SmolLM2-135M, 4 experts, T 1024": _case(
        49152,
        {**SMOLLM2, "intermediate_size": 1536},
        {**SMOLLM2, "moe_intermediate_size": 1536, "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2},
        1, 1024,
    ),
}  # fmt: skip


def bench_live(quick: bool, device: str = "cpu") -> list[Row]:
    """Medians of ratios over rounds in which the forms take turns; peaks beyond what was held before the step."""
    gpu = device != "cpu"
    if gpu:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(CAP / whole, 1.0))
    rows = []
    for name, case in CASES.items():
        if name.endswith("quick") == quick and name.startswith("SmolLM2") == gpu:
            rows += measure(name, case, 3 if quick else 7, torch.device(device))
    return rows


def measure(name: str, case: Case, rounds: int, device: torch.device) -> list[Row]:
    rows, batch = [], random_batch(case, device)
    for form, (learn, away) in FORMS.items():  # one after the other: the card is small
        engine = make_engine(case, learn, away, device)
        rows += compare(f"{name}, {form}", engine, batch, rounds, away)
        del engine
        gc.collect()
    return rows


def compare(name: str, engine: LocalEngine, batch: Batch, rounds: int, away: bool) -> list[Row]:
    """An engine's step, and, where the teacher is on the device, the same by hand with the engine's own models."""
    gpu, tokens = batch.tokens.is_cuda, batch.tokens.numel()
    actions: dict[str, Callable[[], Any]] = {name: lambda: engine.step([batch], tokens, 1e-3)}
    if not away:
        actions[f"{name}, by hand"] = lambda: step_by_hand(engine, batch)
    taken: dict[str, list[float]] = {form: [] for form in actions}
    for turn in range(1 + rounds):
        for form, action in actions.items():
            seconds = clocked(gpu, action)
            if turn:  # the first is a warm-up
                taken[form].append(seconds)
    peaks = {form: peak_bytes(action, gpu) for form, action in actions.items()}
    rows = []
    for form, each in taken.items():
        rows.append(Row("live", form, "milliseconds", float(np.median(each)) * 1e3, "ms"))
        rows.append(Row("live", form, "tokens_per_second", tokens / float(np.median(each)), "1/s"))
        rows.append(Row("live", form, "peak", peaks[form] / 1e6, "MB"))
    if not away:
        own, other = (np.array(each) for each in taken.values())
        rows.append(Row("live", name, "over_by_hand", float(np.median(own / other)), "x"))
        rows.append(Row("live", name, "peak_over_by_hand", peaks[name] / peaks[f"{name}, by hand"], "x"))
    if gpu:
        rows.append(Row("live", name, "held_in_all", torch.cuda.max_memory_allocated() / 1e6, "MB"))
    return rows


def random_batch(case: Case, device: torch.device) -> Batch:
    tokens, labels = (torch.randint(case.student.vocab_size, (case.windows, case.length)) for _ in range(2))
    positions = torch.arange(case.length).expand(case.windows, -1)
    return Batch(tokens.to(device), labels.to(device), positions.to(device))


def make_engine(case: Case, learn: bool, away: bool, device: torch.device) -> LocalEngine:
    """An engine of SAR-KD around models with random weights."""
    gpu = device.type != "cpu"
    rate = {"pattern": "^routers", "lr_multiplier": 0.1 if learn else 0.0}
    config: RunConfig = parse({
        "model": {"dtype": "float16" if gpu else "float32"},
        "data": {"sequence_length": case.length},
        "objective": {"kind": "sar", "alpha": 0.5, "temperature": TEMPERATURE, "anchor": 0.0, "drift_steps": 0},
        "optim": {"micro_batch": case.windows, "batch_tokens": case.windows * case.length},
        "stages": [{"name": "all", "steps": 1, "lr_multipliers": [rate]}],
        "engine": {"kind": "local", "offload_teacher": away, "activation_checkpointing": gpu},
    }, "bench")  # fmt: skip
    torch.manual_seed(0)
    student: Any = AutoModelForCausalLM.from_config(case.student)
    teacher: Any = AutoModelForCausalLM.from_config(case.teacher, dtype=getattr(torch, config.model.dtype))
    if away:
        offload(teacher, device)
    else:
        teacher.to(device)
    facts = {"tokenizer": {"vocab_size": case.student.vocab_size}}
    objective: Any = build(config, student, teacher, facts)
    for parameter in objective.routers.parameters():
        parameter.data = parameter.data.to(device, torch.float32)
    stage: StageConfig = config.stages[0]
    engine = build_engine(config, objective, stage, World(0, 1, device))
    assert isinstance(engine, LocalEngine)
    return engine


def step_by_hand(engine: LocalEngine, batch: Batch) -> None:
    """What a training script does: both models' logits, cross_entropy and kl_div, clipping, AdamW."""
    objective: Any = engine.objective
    student, teacher = objective.student, objective.held[0]
    learns = any(parameter.requires_grad for parameter in objective.routers.parameters())
    with engine.autocast:
        own: Tensor = student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits.flatten(0, 1)
        with torch.set_grad_enabled(learns):
            theirs = teacher(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits.flatten(0, 1)
    own, theirs = own.float(), theirs.float()
    ce = functional.cross_entropy(own, batch.labels.flatten())
    log_q, log_p = (logits.div(TEMPERATURE).log_softmax(-1) for logits in (own, theirs))
    kl = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = 0.5 * ce + 0.5 * TEMPERATURE**2 * kl
    engine.scaler.scale(loss).backward()
    engine.scaler.unscale_(engine.optimizer)
    torch.nn.utils.clip_grad_norm_(engine.trained, engine.clip_norm)
    engine.scaler.step(engine.optimizer)
    engine.scaler.update()
    engine.optimizer.zero_grad(set_to_none=True)
