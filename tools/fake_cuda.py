"""Run forwards on fake CUDA tensors, without a GPU: mixed devices and hidden waits for the GPU are errors with a line.

A fake tensor has a shape, a type and a device, and no values. So an operation on a CPU tensor and a CUDA tensor fails
as it would on a GPU, and whatever needs a value on the CPU (`.item()`, `.tolist()`, a boolean mask) fails too: on a GPU
the CPU would wait there until the GPU has finished. Copies between the devices inside a forward are errors as well.
What it cannot see: backward passes (autograd asks for a device), kernels that refuse a shape, numbers that are wrong.

  python tools/fake_cuda.py            every case
  python tools/fake_cuda.py sar        the cases whose names hold "sar"

With a CPU build of torch the fakes are on the CPU: then waits are found, and mixed devices are not.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import installed  # noqa: F401
import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from megakd.capture.teacher import Teacher
from megakd.config.data import LogitsConfig
from megakd.config.objective import CachedConfig, OnlineConfig, SarConfig
from megakd.data.batches import collate, to_device
from megakd.data.records import Batch, Paired, Sample, Side, TeacherTargets, with_rows
from megakd.models.memory import _grouped_mm
from megakd.models.offload import _streamed
from megakd.models.shared_core import PROJECTIONS, SharedCoreExperts, make_form
from megakd.models.student import student_class, student_config
from megakd.models.tiny import tiny_moe_config
from megakd.objectives.cached import CachedDistillation
from megakd.objectives.online import OnlineDistillation
from megakd.objectives.sar import SarDistillation

# with an index: else torch asks for the current device
DEVICE = torch.device("cuda:0" if torch.version.cuda else "cpu")
VOCABULARY, OTHER_VOCABULARY, LENGTH, TOP_K, DRAWS = 128, 160, 24, 8, 8
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
FORMS = {
    "wrappers": {p: make_form("wrappers", p, 8, 8) for p in PROJECTIONS},
    "additive": {p: make_form("additive", p, 8, 0) for p in PROJECTIONS},
    "two bases": {p: make_form("basis", p, 0, 16, 2) for p in PROJECTIONS},
    "mixture of two": {p: make_form("mixture", p, 0, 16, 2) for p in PROJECTIONS},
}
FACTS = {
    "vocab_size": VOCABULARY, "tails": True, "temperatures": [1.0, 2.0], "top_k": TOP_K, "draws": DRAWS,
    "draw_temperature": 2.0,
}  # fmt: skip
Case = Callable[[FakeTensorMode], None]


class Waits(RuntimeError):
    """A copy between CPU and GPU inside a forward."""


class NoCopies(TorchDispatchMode):
    """Refuses copies between the devices that wait.

    The layers of an offloaded teacher are pinned, and a number for the GPU is an argument of the kernel's launch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own form for fake tensors knows bfloat16 alone
        call = _grouped_mm if func is torch.ops.aten._grouped_mm.default else func
        out: Any = call(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if copies else None
        if not isinstance(source, Tensor) or source.device == out.device or (kwargs or {}).get("non_blocking"):
            return out
        if source.ndim or source.device == DEVICE:
            raise Waits(f"copy from {source.device} to {out.device}, {list(source.shape)}")
        return out


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Inside of it tensors are fakes and may be on DEVICE, and experts take the path that they take on a GPU."""
    with ExitStack() as stack:
        answers = {"is_available": False, "get_device_capability": (9, 0), "is_bf16_supported": True}
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        # else autocast says that there is no CUDA and turns itself off
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        if DEVICE.type == "cpu":
            stack.enter_context(mock.patch.object(SharedCoreExperts, "factors", SharedCoreExperts.grouped))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))


def to_fake(module: nn.Module, mode: FakeTensorMode, stays: Callable[[Tensor], bool] = lambda _: False) -> None:
    """Give a module (and models that it holds in tuples) fake parameters and buffers on DEVICE; tied ones stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, whose id must stay its own

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            with _real():
                whole = tensor.detach()
            value = mode.from_tensor(whole)
            value = value if stays(tensor) else value.to(DEVICE)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            made[id(tensor)] = value, tensor
        return made[id(tensor)][0]

    for root in (module, *_held(module)):
        for each in root.modules():
            for own in (each._parameters, each._buffers):
                own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})


def _held(module: nn.Module) -> list[nn.Module]:
    """Modules that are no children: teachers and their heads, the routers as they were."""
    found = [each for name in ("held", "initial") for each in getattr(module, name, ())]
    return [each for each in found if isinstance(each, nn.Module)]


def make_student(form: str, exempt: bool = False) -> Any:
    torch.manual_seed(0)
    layers = {layer: FORMS[form] for layer in range(2)}
    config = student_config(tiny_moe_config(VOCABULARY, **SHAPE), layers, {0: (1,)} if exempt else None)
    return student_class("qwen3_moe")(config)


def make_teacher(vocabulary: int = VOCABULARY) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(tiny_moe_config(vocabulary, **SHAPE))


def dense_student() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config)


def make_batch() -> Batch:
    """Two packed windows with targets of every kind; the second ends in padding."""
    chooser = np.random.default_rng(0)
    samples = []
    for length in (LENGTH + 1, LENGTH - 5):
        count = length - 1
        ids = np.argsort(chooser.random((count, VOCABULARY)), -1).astype(np.int32)
        targets = TeacherTargets(
            ids[:, :TOP_K], np.full((count, TOP_K), -3.0, np.float32), np.full((count, 2), -1.0, np.float32),
            ids[:, TOP_K : TOP_K + DRAWS], np.full((count, DRAWS), 1 / DRAWS, np.float32),
            np.ones(count, np.float32), np.ones(count, np.float32),
        )  # fmt: skip
        tokens = chooser.integers(VOCABULARY, size=length)
        samples.append(Sample("key", tokens, np.array([0, 7]), targets))
    return collate(samples, LENGTH)


def make_pair() -> Batch:
    """The same for a teacher with another tokenizer: spans of one to three tokens, some that cannot be scored."""

    def side(length: int, tokens_per_span: int) -> Side:
        tokens, positions = torch.zeros(2, length, dtype=torch.int64), torch.arange(length).expand(2, -1)
        spans = (positions // tokens_per_span).clone()
        spans[:, -3:] = -1
        label_spans = spans.roll(-1, 1)
        label_spans[:, :2] = -1
        return Side(tokens, torch.where(spans >= 0, 1, -100), positions, spans, label_spans)

    student, teacher = side(LENGTH, 2), side(LENGTH + LENGTH // 2, 3)
    count = torch.full((2,), int(max(student.spans.max(), teacher.spans.max())) + 1)
    return Batch(*student[:3], paired=Paired(student, teacher, count))


def on_gpu(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The batch as a step gets it."""

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return mode.from_tensor(value)
        return type(value)(*map(fake, value)) if hasattr(value, "_fields") else value

    with _real():
        batch = with_rows(batch)
    return to_device(fake(batch), DEVICE)


def run_objective(make: Callable[[], nn.Module], batch: Callable[[], Batch], dtype: torch.dtype | None) -> Case:
    """A forward of a training step; dtype: of autocast, None without."""

    def run(mode: FakeTensorMode) -> None:
        with _real():
            objective, whole = make(), batch()
        away = getattr(objective, "away", set())
        to_fake(objective, mode, lambda tensor: id(tensor) in away)
        objective.train()
        moved = on_gpu(whole, mode)
        autocast = torch.autocast(DEVICE.type, dtype) if dtype else nullcontext()
        with autocast, NoCopies():
            report: Any = objective(moved)
        for name, value in {"total": report.total, **report.terms}.items():
            assert isinstance(value, FakeTensor) and value.device == DEVICE, (name, value)

    return run


@contextmanager
def _real() -> Iterator[None]:
    """Ordinary tensors inside of the mode: models are built on the CPU, as `train/build.py` does."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


def _cached(tail: str, form: str = "wrappers", exempt: bool = False, **fields: Any) -> Callable[[], nn.Module]:
    facts = {**FACTS, "top_k": 0, "tails": False} if tail == "sampled" else FACTS
    facts = {**facts, "draws": 0} if tail in ("ghost", "truncated") else facts
    config = CachedConfig(**{"tail": tail, "temperature": 2.0, **fields})
    return lambda: CachedDistillation(make_student(form, exempt), config, facts)


def _online(paired: bool, **fields: Any) -> Callable[[], nn.Module]:
    every = {"gap": 0.5, "importance": 0.5, "routing": "capacity", **fields}
    config, size = OnlineConfig(temperature=2.0, **every), OTHER_VOCABULARY if paired else None
    return lambda: OnlineDistillation(
        make_student("wrappers"), make_teacher(size or VOCABULARY), config, VOCABULARY, size
    )


def _sar(paired: bool, away: bool = False, again: bool = False, **fields: Any) -> Callable[[], nn.Module]:
    every = {"entropy": 0.1, "balance": 0.1, "drift_steps": 1, "routing": "all", **fields}
    config, size = SarConfig(temperature=2.0, **every), OTHER_VOCABULARY if paired else None

    def make() -> nn.Module:
        teacher = make_teacher(size or VOCABULARY)
        if away:
            for layer in teacher.get_decoder().layers:
                layer.forward = _streamed(layer, layer.forward, DEVICE)
        objective: Any = SarDistillation(dense_student(), teacher, config, VOCABULARY, size)
        if again:
            objective.checkpoint_activations()
        if away:
            layers, trained = teacher.get_decoder().layers, {id(p) for p in objective.routers.parameters()}
            objective.away = {id(t) for t in (*layers.parameters(), *layers.buffers())} - trained
        return objective

    return make


def _capture(profile: str) -> Case:
    """The teacher's answer to a batch; the check of the first batch may wait, and is not made here."""

    def run(mode: FakeTensorMode) -> None:
        with _real():
            kept = LogitsConfig(profile=profile, top_k=TOP_K, draws=DRAWS, temperatures=(1.0, 2.0))  # type: ignore
            teacher, whole = Teacher(make_teacher(), kept, VOCABULARY - 8), make_batch()
            teacher.unchecked.clear()
        to_fake(teacher, mode)
        batch, offsets = on_gpu(whole, mode), mode.from_tensor(torch.zeros(2, LENGTH)).to(DEVICE)
        with NoCopies():
            targets = teacher(batch.tokens, batch.labels, batch.position_ids, offsets)
        assert all(field.device == DEVICE for field in targets)

    return run


def cases() -> dict[str, Case]:
    half, brain, none = torch.float16, torch.bfloat16, None
    found = {f"cached, {tail}": run_objective(_cached(tail), make_batch, brain)
             for tail in ("ghost", "truncated", "sampled", "hybrid")}  # fmt: skip
    for kind in ("reverse_kl", "jsd", "skew_kl", "tvd"):
        found[f"cached, {kind}"] = run_objective(_cached("ghost", divergence=kind), make_batch, half)
        found[f"sar, {kind}"] = run_objective(_sar(False, divergence=kind), make_batch, half)
    for form in ("additive", "two bases"):
        found[f"cached, student of {form}"] = run_objective(_cached("ghost", form), make_batch, brain)
    found["cached, float32"] = run_objective(_cached("ghost", alpha=0.3), make_batch, none)
    for paired, batch in ((False, make_batch), (True, make_pair)):
        name = "two tokenizers" if paired else "one tokenizer"
        found[f"online, {name}"] = run_objective(_online(paired), batch, brain)
        found[f"online, {name}, plain"] = run_objective(_online(paired, gap=0.0, importance=0.0), batch, half)
        found[f"sar, {name}"] = run_objective(_sar(paired), batch, brain)
        found[f"sar, {name}, computed again"] = run_objective(_sar(paired, again=True), batch, half)
        found[f"sar, {name}, offloaded"] = run_objective(_sar(paired, away=True, again=True), batch, half)
    for profile in ("topk", "sampled", "hybrid"):
        found[f"capture, {profile}"] = _capture(profile)
    return found


def check(case: Case) -> str | None:
    """What a case fails with, and the last lines of MegaKD that it passed through; None when it passes."""
    try:
        with fake_gpu() as mode:
            case(mode)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/megakd/" in f.filename]
        lines = [f"  {f.filename.rpartition('/megakd/')[2]}:{f.lineno}: {f.line}" for f in frames[-3:]]
        return "\n".join([f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}", *lines])
    return None


def main() -> int:
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    wanted = [(name, case) for name, case in cases().items() if all(word in name for word in sys.argv[1:])]
    failed = 0
    for name, case in wanted:
        problem = check(case)
        failed += problem is not None
        print(f"{name}: {problem or 'passed'}")
    print(f"{len(wanted) - failed} of {len(wanted)} cases passed on fakes of {DEVICE} (torch {torch.__version__})")
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
