"""The loss behind the student's head, forward and backward, against three matrix products and against forms of others.

All get hidden states [N, D] and the head's weight, and give the gradients of both: float32 on one core of a CPU,
bfloat16 on a GPU. Dense teachers of the others are hidden states and a head of the student's size, which is one matrix
product more.
"""

import importlib
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from bench.experts import clocked
from bench.rows import Row
from megakd.data.records import TeacherTargets
from megakd.losses import head as fused
from megakd.losses.head import FusedHead
from megakd.losses.reference import distill_loss
from megakd.losses.signals import Dense, Sparse, Stored

VOCABULARY, ENTRIES = 151_936, 64
ALPHA, TEMPERATURE = 0.5, 2.0
STORED = Stored(True, (1.0, TEMPERATURE), None)


class Case(NamedTuple):
    """What every method gets; teacher_ND and teacher_VD are for those that know no cached teacher logits."""

    hidden_ND: Tensor
    weight_VD: nn.Parameter
    labels_N: Tensor
    targets: TeacherTargets
    teacher_ND: Tensor
    teacher_VD: Tensor


def bench_loss(quick: bool, device: str = "cpu") -> list[Row]:
    """Medians of ratios over rounds in which all methods take turns; on a CPU of its time, not the clock's."""
    sizes, tokens, rounds = ([256], 220, 2) if quick else ([256, 1024], 440, 5)
    gpu = device != "cpu"
    if gpu:
        sizes, tokens, rounds = [256, 1024, 4096], 4 * tokens, 4 * rounds
    rows = []
    for size in sizes:
        case = make_case(tokens, size, device, torch.bfloat16 if gpu else torch.float32, VOCABULARY)
        rows += measure(f"D {size}", case, rounds, gpu)
    return rows


def make_case(tokens: int, size: int, device: str, dtype: torch.dtype, vocabulary: int) -> Case:
    """A student whose logits have a standard deviation of 2, and targets that keep 0.9 of the mass at T = 1."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(tokens, size, generator=generator).to(device, dtype) for _ in range(2))
    weight, other = (
        (2 * size**-0.5 * torch.randn(vocabulary, size, generator=generator)).to(device, dtype) for _ in range(2)
    )
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    entries = min(ENTRIES, vocabulary)
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:entries] for _ in range(tokens)]).int()
    logprobs = (2 * torch.randn(tokens, entries, generator=generator)).log_softmax(-1) + math.log(0.9)
    tails = torch.tensor([0.1, 40.0]).log().expand(tokens, 2)
    nothing = torch.zeros(tokens)
    targets = TeacherTargets(ids, logprobs, tails, ids[:, :0], logprobs[:, :0], nothing, nothing)
    targets = TeacherTargets(*(field.to(device) for field in targets))
    return Case(hidden.requires_grad_(), nn.Parameter(weight), labels, targets, teacher, other)


def methods(case: Case, more: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], None]]:
    """Name → forward and backward; gradients are made anew each time, as a training step does."""
    head, other = (FusedHead(case.weight_VD, len(case.weight_VD)) for _ in range(2))
    stored = Sparse(case.targets, STORED, "ghost")
    frozen = nn.Parameter(case.teacher_VD, requires_grad=False)
    live = Dense(FusedHead(frozen, len(frozen)), case.teacher_ND)
    dense: dict[str, Callable[[], Tensor]] = {
        "megakd, fused": lambda: head(case.hidden_ND, case.labels_N, stored, ALPHA, TEMPERATURE).total,
        "megakd, dense": lambda: dense_loss(case),
        "densify + kl_div": lambda: densified_loss(case),
        "megakd, fused, teacher of hidden states": lambda: (
            other(case.hidden_ND, case.labels_N, live, ALPHA, TEMPERATURE).total
        ),
        **more,
    }
    return {"floor": floor(case)} | {name: stepping(case, loss) for name, loss in dense.items()}


def stepping(case: Case, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        case.hidden_ND.grad = case.weight_VD.grad = None
        loss().backward()

    return step


def floor(case: Case) -> Callable[[], None]:
    """Three matrix products with a place for [chunk, V] that exists already, and fresh gradients."""
    tokens, vocabulary = len(case.hidden_ND), len(case.weight_VD)
    budget = fused.CHUNK_BYTES["cpu" if case.hidden_ND.device.type == "cpu" else "cuda"]
    parts = -(-tokens // max(budget // (4 * vocabulary), 1))
    rows = -(-tokens // parts)
    place = torch.empty(rows, vocabulary, dtype=case.hidden_ND.dtype, device=case.hidden_ND.device)

    @torch.no_grad()
    def step() -> None:
        case.hidden_ND.grad = case.weight_VD.grad = None
        by_hidden, by_weight = torch.empty_like(case.hidden_ND), torch.empty_like(case.weight_VD)
        for start in range(0, tokens, rows):
            hidden = case.hidden_ND[start : start + rows]
            logits = place[: len(hidden)]
            torch.mm(hidden, case.weight_VD.T, out=logits)
            torch.mm(logits, case.weight_VD, out=by_hidden[start : start + rows])
            if start == 0:
                torch.mm(logits.T, hidden, out=by_weight)
            else:
                by_weight.addmm_(logits.T, hidden)

    return step


def dense_loss(case: Case) -> Tensor:
    logits = case.hidden_ND @ case.weight_VD.T
    return distill_loss(logits, case.labels_N, Sparse(case.targets, STORED, "ghost"), ALPHA, TEMPERATURE).total


def densified_loss(case: Case) -> Tensor:
    """What a training script does that has top-k targets: write them into [N, V], and call kl_div."""
    logits = (case.hidden_ND @ case.weight_VD.T).float()
    p = torch.zeros_like(logits)
    p.scatter_(1, case.targets.ids.long(), (case.targets.logprobs / TEMPERATURE).softmax(-1))
    kl = functional.kl_div((logits / TEMPERATURE).log_softmax(-1), p, reduction="sum")
    ce = functional.cross_entropy(logits, case.labels_N, reduction="sum")
    return (1 - ALPHA) * ce + ALPHA * TEMPERATURE**2 * kl


def others(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The losses of public stacks that are installed; what is not is said aloud."""
    found: dict[str, Callable[[], Tensor]] = {}
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        trl: Any = importlib.import_module("trl.experimental.gkd.gkd_trainer")

        def gkd() -> Tensor:
            student, teacher = case.hidden_ND @ case.weight_VD.T, case.teacher_ND @ case.teacher_VD.T
            loss = trl.GKDTrainer.generalized_jsd_loss
            return loss(student[None].float(), teacher[None].float(), beta=0.5, temperature=TEMPERATURE)

        found["TRL GKD, JSD"] = gkd
    except Exception as error:  # whatever an import of theirs may raise
        print(f"TRL's loss is skipped: {error}")
    try:
        liger: Any = importlib.import_module("liger_kernel.chunked_loss")
        jsd = liger.LigerFusedLinearJSDLoss(
            weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, temperature=TEMPERATURE, compiled=False
        )
        found["Liger JSD"] = lambda: jsd(
            case.hidden_ND, case.weight_VD, case.teacher_ND, case.teacher_VD, case.labels_N
        )
    except Exception as error:
        print(f"Liger's loss is skipped: {error}")
    return found


def measure(name: str, case: Case, rounds: int, gpu: bool) -> list[Row]:
    more = others(case)
    forms = methods(case, more)
    taken: dict[str, list[float]] = {form: [] for form in forms}
    for turn in range(1 + rounds):
        for form, step in forms.items():
            seconds = clocked(gpu, step) if gpu else processor_seconds(step)
            if turn:  # the first is a warm-up
                taken[form].append(seconds)
    gradients = (case.hidden_ND.numel() + case.weight_VD.numel()) * case.weight_VD.element_size()
    rows = []
    forms.clear()  # with all that they keep
    for form, step in methods(case, more).items():
        case.hidden_ND.grad = case.weight_VD.grad = None
        peak = peak_bytes(step, gpu)
        ratio = float(np.median(np.array(taken[form]) / np.array(taken["floor"])))
        where = f"{name}, {form}"
        rows += [
            Row("loss", where, "milliseconds", float(np.median(taken[form])) * 1e3, "ms"),
            Row("loss", where, "time_over_floor", ratio, "x"),
            Row("loss", where, "peak_bytes", peak, "B"),
            Row("loss", where, "peak_over_gradients", peak / gradients, "x"),
        ]
    return rows


def processor_seconds(action: Callable[[], None]) -> float:
    """Of one core: others that want it too do not count."""
    start = time.process_time()
    action()
    return time.process_time() - start


def peak_bytes(action: Callable[[], Any], gpu: bool = False) -> int:
    """The most that an action holds at once beyond what was held before."""
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = action()
    del kept
    events: Any = watched.profiler
    held, most = 0, 0
    changes = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
