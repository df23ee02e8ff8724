"""A whole optimizer step: distillation against cross entropy alone, what it waits for data, and on two ranks.

Students and their shards are made here: the time of a step does not depend on what they learned. float32 on one core of
a CPU a rank, bfloat16 on GPUs.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.experts import clocked
from bench.rows import Row
from megakd.config.parsing import parse
from megakd.config.run import RunConfig
from megakd.data import codec
from megakd.data.batches import prefetch, to_device
from megakd.data.codebook import build_book, save_book
from megakd.data.records import IGNORED, Batch, Sample, TeacherTargets
from megakd.data.shard_writer import shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import ShardSet
from megakd.engine.base import Engine
from megakd.engine.checkpoint import Progress
from megakd.engine.local import LocalEngine
from megakd.engine.optim import build_optimizer
from megakd.errors import UserError
from megakd.measured import record_rate
from megakd.models.flops import step_flops
from megakd.models.shared_core import PROJECTIONS, Form
from megakd.models.student import student_config
from megakd.models.tiny import tiny_moe_config
from megakd.names import shipped
from megakd.objectives.build import build
from megakd.system.dist import World, close_world, join_world, sum_over_ranks
from megakd.system.machine import describe_machine
from megakd.train.data import Step, stage_data

ENTRIES, TEMPERATURES, TEMPERATURE = 64, (1.0, 2.0), 2.0


class Case(NamedTuple):
    """A student (changes of `tiny_moe_config`, rank of its wrappers), windows of a step, and how many go at once."""

    model: dict[str, Any]
    rank: int
    length: int
    windows: int
    micro_batch: int


def _large(size: int, length: int = 256, windows: int = 2) -> Case:
    """A vocabulary as Qwen's before a small body: the loss is most of the step."""
    return Case({"vocab_size": 151_936, "hidden_size": size}, 16, length, windows, 1)


BILLION = {
    "vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
}  # fmt: skip
CASES = {
    "demo": Case({}, 16, 256, 16, 8),
    "demo, quick": Case({}, 16, 256, 4, 4),
    "V 151,936, D 256, quick": _large(256, 128, 1),
    "V 151,936, D 256": _large(256),
    "V 151,936, D 512": _large(512),
    "1.1 B": Case(BILLION, 64, 2048, 8, 2),
}


def bench_step(quick: bool, device: str = "cpu", measured: Path | None = None) -> list[Row]:
    """Medians of ratios over rounds in which the forms take turns; then a run's loop; then one and two ranks.

    measured: a folder whose measured.json gets the rate of the run's loop, for `megakd plan --gpus`.
    """
    gpu = device != "cpu"
    names = [name for name in CASES if name.endswith("quick") == quick and (name == "1.1 B") == gpu]
    rounds, steps, turns = (3, 3, 1) if quick else (7, 8, 3)
    if gpu:
        names, rounds, steps = ["1.1 B"], 4 * rounds, 4 * steps
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), CASES[name])
            rows += compare(name, Path(folder), rounds, device)
            rows += wait(name, Path(folder), steps, device, measured)
            # the head of 151,936 alone would be what gloo sends
            if name.startswith("demo") or torch.cuda.device_count() > 1:
                rows += scale(name, Path(folder), steps, turns, gpu)
    return rows


def compare(name: str, folder: Path, rounds: int, device: str) -> list[Row]:
    """KD against the same student's cross entropy: by transformers' logits, and by alpha = 0."""
    case, dataset = CASES[name], ShardSet(folder)
    gpu = device != "cpu"
    config, world = configuration(case, gpu), World(0, 1, torch.device(device))
    objective = build(config, make_student(case), None, dataset.facts)
    optimizer = build_optimizer(objective, (), config.optim)
    engine = LocalEngine(objective, optimizer, config.optim.clip_norm, config.model.dtype, world.device)
    with closing(prefetch(stage_data(config, dataset, Progress(), 1, world))) as data:
        step = next(found for found in data if found is not None)
    step = step._replace(micro_batches=[to_device(batch, world.device) for batch in step.micro_batches])

    def distil(alpha: float) -> Callable[[], None]:
        def action() -> None:
            objective.alpha = alpha
            engine.step(step.micro_batches, step.tokens, 1e-3)

        return action

    forms = {
        "KD": distil(0.5),
        "transformers": lambda: plain_step(engine, step),
        "alpha = 0": distil(0.0),
    }
    taken: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(1 + rounds):
        for form, action in forms.items():
            seconds = clocked(gpu, action)
            if turn:  # the first is a warm-up
                taken[form].append(seconds)
    dataset.close()
    return ratios(name, {form: np.array(each) for form, each in taken.items()})


def ratios(name: str, taken: dict[str, np.ndarray]) -> list[Row]:
    rows = [Row("step", f"{name}, {form}", "milliseconds", float(np.median(taken[form])) * 1e3, "ms") for form in taken]
    for form in taken:
        if form != "KD":
            ratio = float(np.median(taken["KD"] / taken[form]))
            rows.append(Row("step", f"{name}, {form}", "kd_over_ce", ratio, "x"))
    return rows


def plain_step(engine: LocalEngine, step: Step) -> None:
    """What a training script does: the model's logits, cross_entropy, clipping, AdamW."""
    student: Any = engine.objective.student
    for batch in step.micro_batches:
        with engine.autocast:
            logits: Tensor = student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        (loss / step.tokens).backward()
    nn.utils.clip_grad_norm_(engine.trained, engine.clip_norm)
    engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)


def wait(name: str, folder: Path, steps: int, device: str, measured: Path | None = None) -> list[Row]:
    """The loop of `megakd train` on one device."""
    case, dataset = CASES[name], ShardSet(folder)
    config, world = configuration(case, device != "cpu"), World(0, 1, torch.device(device))
    objective = build(config, make_student(case), None, dataset.facts)
    optimizer = build_optimizer(objective, (), config.optim)
    engine = LocalEngine(objective, optimizer, config.optim.clip_norm, config.model.dtype, world.device)
    found = run(config, dataset, engine, world, steps)
    dataset.close()
    if measured:
        flops, on = step_flops(config, objective.student.config, None), describe_machine(world.device)["device"]
        record_rate(measured, "train", on, found["tokens"], found["seconds"], ranks=1, flops_per_token=flops)
    rows = [Row("step", f"{name}, a run", "data_wait_share", found["waited"] / found["seconds"], "of the time")]
    return [*rows, Row("step", f"{name}, a run", "tokens_per_second", found["tokens"] / found["seconds"], "tokens/s")]


def run(config: RunConfig, dataset: ShardSet, engine: Engine, world: World, steps: int) -> dict[str, float]:
    """Tokens of `steps` steps, their seconds, those without data, and those of the CPU; one before is a warm-up."""
    tokens, waited, seconds, worked = 0, 0.0, 0.0, 0.0
    with closing(prefetch(stage_data(config, dataset, Progress(), 1 + steps, world))) as data:
        asked = time.perf_counter()
        for number, step in enumerate(found for found in data if found is not None):
            ready = time.perf_counter()
            engine.step(on_device(step, world.device), step.tokens, 1e-3)
            if world.device.type != "cpu":
                torch.cuda.synchronize()
            done = time.perf_counter()
            if not number:
                worked = time.process_time()
            else:
                tokens, waited, seconds = tokens + step.tokens, waited + ready - asked, seconds + done - asked
            asked = done
    return {"tokens": tokens, "waited": waited, "seconds": seconds, "cpu_seconds": time.process_time() - worked}


def on_device(step: Step, device: torch.device) -> Iterator[Batch]:
    return (to_device(batch, device) for batch in step.micro_batches)


def scale(name: str, folder: Path, steps: int, turns: int, gpu: bool) -> list[Row]:
    """DeepSpeed's ZeRO-2 on one rank and on more, the same batch of all ranks; they take turns.

    cpu_efficiency: by the CPU's time, which other work on the machine does not change, and waiting for each other
    neither: what two ranks do twice, and what they send.
    """
    most = torch.cuda.device_count() if gpu else 2
    found: dict[int, list[dict[str, float]]] = {1: [], most: []}
    for _ in range(turns):
        for ranks, each in found.items():
            each.append(launch(name, folder, steps, ranks))
    rates = {ranks: np.array([one["tokens"] / one["seconds"] for one in each]) for ranks, each in found.items()}
    work = {ranks: np.array([one["cpu_seconds"] / one["tokens"] for one in each]) for ranks, each in found.items()}
    rows = [
        Row("step", f"{name}, zero2, ranks: {ranks}", "tokens_per_second", float(np.median(rate)), "tokens/s")
        for ranks, rate in rates.items()
    ]
    where = f"{name}, zero2, ranks: {most}"
    rows.append(Row("step", where, "efficiency", float(np.median(rates[most] / rates[1])) / most, "of linear"))
    if not gpu:
        rows.append(Row("step", where, "cpu_efficiency", float(np.median(work[1] / work[most])), "of linear"))
    return rows


def launch(name: str, folder: Path, steps: int, ranks: int) -> dict[str, float]:
    """What so many processes of this module found in `run`: the mean of their seconds, the sum of those of the CPU."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*words, "--module", "bench.step", name, str(folder), str(steps)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise UserError(f"{ranks} ranks ended with exit code {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return json.loads(lines[-1])


def main_of_rank(name: str, folder: str, steps: str) -> None:
    """One rank of `launch`."""
    from megakd.engine.deepspeed import DeepSpeedEngine
    from megakd.engine.ds_json import deepspeed_config

    torch.set_num_threads(1)
    world, case, dataset = join_world(), CASES[name], ShardSet(Path(folder))
    gpu = world.device.type != "cpu"
    config = configuration(case, gpu, world.size)
    student = make_student(case).to(torch.bfloat16 if gpu else torch.float32)
    objective = build(config, student, None, dataset.facts)
    settings = deepspeed_config(config, world.size, config.windows_per_step)
    engine = DeepSpeedEngine(objective, build_optimizer(objective, (), config.optim), settings, world)
    found = run(config, dataset, engine, world, int(steps))
    seconds, worked = sum_over_ranks([found["seconds"], found["cpu_seconds"]], world.device)
    if world.first:
        print(json.dumps({**found, "seconds": seconds / world.size, "cpu_seconds": worked}))
    dataset.close()
    close_world()


def configuration(case: Case, gpu: bool, ranks: int = 1) -> RunConfig:
    """That of a run over the case's shards."""
    zero2 = json.loads(shipped("ds_configs", "zero2.json").read_text())
    micro = min(case.micro_batch, case.windows // ranks)
    raw = {
        "model": {"dtype": "bfloat16" if gpu else "float32"},
        "data": {"sequence_length": case.length},
        "objective": {"alpha": 0.5, "temperature": TEMPERATURE},
        "optim": {"batch_tokens": case.windows * case.length, "micro_batch": micro},
        "engine": {"config": "zero2", "deepspeed": zero2},
    }
    return parse(raw, "bench_step")


def make_student(case: Case) -> Any:
    """A compressed student of random weights."""
    teacher = tiny_moe_config(**case.model)
    form = Form("wrappers", case.rank, case.rank)
    config = student_config(teacher, {i: dict.fromkeys(PROJECTIONS, form) for i in range(teacher.num_hidden_layers)})
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(config)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return student


def write_shards(folder: Path, case: Case, steps: int = 4) -> None:
    """One shard of so many steps, after which a run begins it anew: tokens of a Zipf law, targets that keep 0.9."""
    vocabulary, length = tiny_moe_config(**case.model).vocab_size, case.length
    generator = np.random.default_rng(0)
    draw = zipf(vocabulary, generator)
    book = build_book(draw(1 << 16), vocabulary)
    layout = codec.Layout(ENTRIES, 0, 238, TEMPERATURES, length, book)
    facts = {
        "tokens": {"tokenizer": {"vocab_size": vocabulary}, "sequence_length": length}, "codec": codec.NAME,
        "book": book.digest, "vocab_size": vocabulary, "levels": layout.levels, "top_k": ENTRIES, "draws": 0,
        "draw_temperature": None, "temperatures": list(TEMPERATURES), "tails": True,
    }  # fmt: skip
    save_book(folder, book)
    samples = (make_sample(key, case, draw, generator) for key in range(steps * case.windows))
    sidecar = write_shard(folder, shard_name(0), samples, facts, layout)
    write_manifest(folder, facts, [summary_of(shard_name(0), sidecar)], complete=True)


def zipf(vocabulary: int, generator: np.random.Generator) -> Callable[[int], np.ndarray]:
    """Draws of so many ids; which of them are frequent is random."""
    order, weights = generator.permutation(vocabulary), 1 / (np.arange(vocabulary) + 2.7)
    above = np.cumsum(weights / weights.sum())
    return lambda count: order[np.minimum(np.searchsorted(above, generator.random(count)), vocabulary - 1)]


def make_sample(key: int, case: Case, draw: Callable[[int], np.ndarray], generator: np.random.Generator) -> Sample:
    ids = np.stack([distinct(draw, ENTRIES) for _ in range(case.length)]).astype(np.int32)
    logits = 2 * generator.standard_normal(ids.shape)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) + math.log(0.9)
    tails = np.tile(np.log([0.1, 40.0]), (case.length, 1))
    nothing = np.zeros(case.length, np.float32)
    targets = TeacherTargets(
        ids, logprobs.astype(np.float32), tails.astype(np.float32), ids[:, :0], tails[:, :0].astype(np.float32),
        nothing, nothing + 3,
    )  # fmt: skip
    return Sample(f"{key:09d}", draw(case.length + 1).astype(np.int32), np.array([0], np.int32), targets)


def distinct(draw: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    found = np.unique(draw(2 * count))
    while len(found) < count:
        found = np.unique(np.concatenate([found, draw(count)]))
    return found[:: len(found) // count][:count]


if __name__ == "__main__":
    main_of_rank(*sys.argv[1:])
