"""A training step with cached teacher logits, against the same step with a live teacher: time and memory.

Both train the same student on the same batch with alpha CE and T^2 KL; the live form computes the teacher's forward
pass in every step, the cached form reads its 64 most probable tokens and tails. The teacher's logits that are cached
are its own. Measured: float32 on one core of a CPU. Predicted: published sizes of teachers, on tensors without data, as
`megakd plan` does.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from bench.experts import clocked
from bench.loss import peak_bytes
from bench.rows import Row
from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.config.parsing import parse
from megakd.config.run import RunConfig
from megakd.data.records import Batch, TeacherTargets, with_rows
from megakd.engine.local import LocalEngine
from megakd.models.hub import load_config
from megakd.models.loading import load_model
from megakd.models.shared_core import PROJECTIONS, Form
from megakd.models.spec import spec_for
from megakd.models.student import student_config
from megakd.models.tiny import tiny_moe_config
from megakd.objectives.build import build
from megakd.system.dist import World
from megakd.train.build import build_engine
from megakd.train.memory import training_peak

DEMO = Path(__file__).parents[2] / "megakd/assets/demo-teacher"
CPU, GIB = torch.device("cpu"), 2**30
RANK, PREDICTED_RANK, PREDICTED_LENGTH = 16, 64, 2048


class Pair(NamedTuple):
    """Configs of student and teacher; the folder of the teacher's weights (None: random); windows and their length."""

    student: Any
    teacher: Any
    folder: Path | None
    windows: int
    length: int


QWEN: dict[str, Any] = {"vocab_size": 151_936, "hidden_size": 2048, "max_position_embeddings": 4096}
TEACHERS: dict[str, dict[str, Any]] = {  # sizes of published models
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "max_position_embeddings": 4096,
    },
    "Qwen1.5-MoE-A2.7B, 14B": {
        **QWEN, "model_type": "qwen2_moe", "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts": 60, "num_experts_per_tok": 4,
    },
    "Qwen3-30B-A3B": {
        **QWEN, "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}  # fmt: skip


def bench_offline(quick: bool, real: Path | None = None) -> list[Row]:
    """Medians of ratios over rounds in which the forms take turns; without --quick and --real also predictions."""
    rows = [row for name, pair in pairs(quick, real) for row in measure(name, pair, 3 if quick else 7)]
    if not quick and real is None:
        for name, fields in TEACHERS.items():
            rows += predict(f"predicted: {name}", AutoConfig.for_model(**fields), PREDICTED_RANK, PREDICTED_LENGTH)
    return rows


def pairs(quick: bool, real: Path | None) -> Iterator[tuple[str, Pair]]:
    if real is not None:
        teacher = load_config(real)
        student = compressed(teacher, RANK) if teacher.model_type != "llama" else halved(teacher)
        yield real.name, Pair(student, teacher, real, 1 if quick else 2, 128 if quick else 512)
        return
    teacher = tiny_moe_config(2048, num_hidden_layers=2)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    student = LlamaConfig(vocab_size=2048, tie_word_embeddings=True, num_key_value_heads=2, **sizes)
    yield "toy", Pair(student, teacher, None, 2, 64)
    if not quick:
        teacher = load_config(DEMO)
        yield "demo", Pair(compressed(teacher, RANK), teacher, DEMO, 8, 256)


def compressed(teacher: Any, rank: int) -> Any:
    """The teacher with a shared core and wrappers of this rank in each of its layers of experts."""
    layers = spec_for(teacher, "bench").layers
    return student_config(
        teacher, {layer: dict.fromkeys(PROJECTIONS, Form("wrappers", rank, rank)) for layer in layers}
    )


def halved(teacher: Any) -> Any:
    """A dense model with half of the teacher's layers."""
    fields = teacher.to_dict() | {"num_hidden_layers": teacher.num_hidden_layers // 2}
    return type(teacher)(**{name: value for name, value in fields.items() if name != "layer_types"})


def measure(name: str, pair: Pair, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    teacher: Any = (
        AutoModelForCausalLM.from_config(pair.teacher)
        if pair.folder is None
        else load_model(pair.folder, torch.float32)
    ).eval()
    batch = batch_of(pair, teacher)
    engines = {form: make_engine(pair, teacher if form == "live" else None) for form in ("live", "cached")}
    actions: dict[str, Callable[[], Any]] = {form: stepping(engine, batch) for form, engine in engines.items()}
    taken: dict[str, list[float]] = {form: [] for form in actions}
    for turn in range(1 + rounds):
        for form, action in actions.items():
            seconds = clocked(False, action)
            if turn:  # the first is a warm-up
                taken[form].append(seconds)
    rows, totals = [], {}
    for form, engine in engines.items():
        totals[form] = held_bytes(engine, teacher if form == "live" else None) + peak_bytes(actions[form])
        rows.append(Row("offline", f"{name}, {form}", "milliseconds", float(np.median(taken[form])) * 1e3, "ms"))
        rows.append(Row("offline", f"{name}, {form}", "memory", totals[form] / GIB, "GiB"))
    live, cached = (np.array(taken[form]) for form in ("live", "cached"))
    rows.append(Row("offline", f"{name}, cached", "speed_over_live", float(np.median(live / cached)), "x"))
    rows.append(Row("offline", f"{name}, cached", "memory_over_live", totals["cached"] / totals["live"], "x"))
    gc.collect()
    return rows


def stepping(engine: LocalEngine, batch: Batch) -> Callable[[], Any]:
    return lambda: engine.step([batch], batch.tokens.numel(), 1e-3)


def held_bytes(engine: LocalEngine, teacher: Any) -> int:
    """Weights of the student and of a live teacher, and the optimizer's state."""
    modules = [engine.objective] if teacher is None else [engine.objective, teacher]
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    found |= {id(t): t for state in engine.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
    return sum(tensor.nbytes for tensor in found.values())


def batch_of(pair: Pair, teacher: Any) -> Batch:
    """Random tokens, and the targets that a capture of the teacher's logits keeps of them."""
    size = (pair.windows, pair.length)
    tokens, labels = (torch.randint(pair.teacher.vocab_size, size) for _ in range(2))
    positions = torch.arange(pair.length).expand(pair.windows, -1)
    with torch.no_grad():
        logits = teacher(tokens, position_ids=positions, use_cache=False).logits.flatten(0, 1).float()
    flat = targets_from_logits(logits, labels.flatten(), LogitsConfig(), torch.zeros(len(logits)))
    targets = TeacherTargets(*(field.unflatten(0, size) for field in flat))
    return with_rows(Batch(tokens, labels, positions, targets))


def configuration(kind: str, windows: int, length: int, dtype: str) -> RunConfig:
    objective: dict[str, Any] = {"kind": kind, "alpha": 0.5, "temperature": 2.0}
    if kind == "online":
        objective |= {"kl": 1.0, "feature": 0.0, "attention": 0.0, "layers": 0.0, "contrastive": 0.0}
    return parse({
        "model": {"dtype": dtype},
        "data": {"sequence_length": length},
        "objective": objective,
        "optim": {"micro_batch": windows, "batch_tokens": windows * length},
        "stages": [{"name": "all", "steps": 1}],
        "engine": {"kind": "local"},
    }, "bench")  # fmt: skip


def make_engine(pair: Pair, teacher: Any) -> LocalEngine:
    """An engine around a new student of the same weights; teacher None: it reads cached targets."""
    config = configuration("cached" if teacher is None else "online", pair.windows, pair.length, "float32")
    torch.manual_seed(1)
    student: Any = AutoModelForCausalLM.from_config(pair.student)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    settings, vocabulary = LogitsConfig(), pair.teacher.vocab_size
    facts: dict[str, Any] = {
        "tokenizer": {"vocab_size": vocabulary}, "vocab_size": vocabulary, "top_k": settings.top_k, "draws": 0,
        "draw_temperature": None, "temperatures": list(settings.declared_temperatures), "tails": True,
    }  # fmt: skip
    engine = build_engine(config, build(config, student, teacher, facts), config.stages[0], World(0, 1, CPU))
    assert isinstance(engine, LocalEngine)
    return engine


def predict(name: str, teacher: Any, rank: int, length: int) -> list[Row]:
    """The live step's peak on one GPU; without the teacher's weights, a bound of the cached step's peak.

    The largest sum over time of all but the teacher's weights is at most the largest sum of all minus those weights.
    """
    config = configuration("online", 1, length, "bfloat16")
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"activation_checkpointing": True})})
    live = training_peak(config, config.stages[0], compressed(teacher, rank), teacher, teacher.vocab_size)
    cached = live.total - live.parts["weights of the teacher"]
    return [
        Row("offline", f"{name}, live", "memory", live.total / GIB, "GiB"),
        Row("offline", f"{name}, cached", "memory", cached / GIB, "GiB"),
        Row("offline", f"{name}, cached", "memory_over_live", cached / live.total, "x"),
    ]
