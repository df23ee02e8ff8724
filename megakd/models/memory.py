"""The most memory that a computation holds at once, counted by storages, on fake tensors that hold nothing themselves.

The real modules, engine and optimizer run whole steps at their real sizes: every operation says what shapes and types
it gives, nothing is computed, and no weights are needed. So the count is no formula for a family and no extrapolation:
what autograd keeps, what is computed again, autocast's copies and what the update needs are in it because they happen.
Fake tensors, for on the meta device autocast does nothing, and activations would be float32.
(So it is better than two small sizes and a line through them: attention maps grow with the square of a window, chunks
of logits not at all.) What a kernel takes for itself and gives back is not seen: tests/commands/test_plan.py holds the
sum against the CPU's allocator, and finds it within 3 %.

What depends on values is answered by what costs most: masks are full, windows are packed of several documents, and a
number that somebody asks for is 1.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megakd.errors import UserError

aten = torch.ops.aten


class Peak(NamedTuple):
    """total: the most bytes held at once; parts: what they were at that time, by label."""

    total: int
    parts: dict[str, int]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make until they are freed, by label.

    where: the label of what is made from now on. What was made before counts once it is given one (`label`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.where = "rest"
        self.alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}  # by id of the storage: itself, bytes, label
        self.held: dict[str, int] = defaultdict(int)
        self.total, self.peak = 0, Peak(0, {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls, and makes nothing
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        call = _grouped_mm if func is aten._grouped_mm.default else func
        try:
            out: Any = call(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            out = _answer(func, args)
        if func is aten.all.default:
            out.holds = True
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, self._of(func, args))
        return out

    def label(self, tensors: Iterable[Tensor], label: str) -> None:
        """Call the memory of the given tensors `label` from now on."""
        for tensor in tensors:
            key = self._add(tensor, label)
            reference, size, before = self.alive[key]
            self.alive[key] = reference, size, label
            self.held[before] -= size
            self.held[label] += size

    def forget(self) -> None:
        """Count nothing of what was made so far."""
        self.alive, self.held, self.total = {}, defaultdict(int), 0
        self.forget_peak()

    def forget_peak(self) -> None:
        """Look for the largest sum from now on."""
        self.peak = Peak(self.total, dict(self.held))

    def _of(self, func: Any, args: Any) -> str:
        """Autocast keeps a weight's copy in 16 bits until the forward ends; all else is called as `where` says."""
        if func is aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            return CASTS
        return self.where

    def _add(self, tensor: Tensor, label: str) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.alive:
            size = storage.nbytes()
            self.alive[key] = weakref.ref(storage, lambda gone: self._remove(key, gone)), size, label
            self.held[label] += size
            self.total += size
            if self.total > self.peak.total:
                self.forget_peak()
        return key

    def _remove(self, key: int, gone: Any) -> None:
        if key in self.alive and self.alive[key][0] is gone:  # not forgotten
            _, size, label = self.alive.pop(key)
            self.held[label] -= size
            self.total -= size


class Fakes(FakeTensorMode):
    """Inside of it tensors have shapes and types, but no memory. A copied module's are fakes of the same kind."""

    def __deepcopy__(self, memo: Any) -> "Fakes":
        return self


CASTS = "autocast's copies of weights"


def fake_model(config: Any, dtype: torch.dtype) -> Any:
    """A causal LM of a Hugging Face config, of fake tensors; call it inside of a FakeTensorMode."""
    from transformers import AutoModelForCausalLM

    import megakd.models.student  # noqa: F401  (registers the student)

    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)


def _grouped_mm(left: Tensor, right: Tensor, offsets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The product's place; torch's own form for fake tensors knows bfloat16 alone."""
    groups = [len(offsets)] if left.ndim == right.ndim else []
    return left.new_empty(*groups, left.shape[-2], right.shape[-1])


def _answer(func: Any, args: Any) -> Any:
    """What an operation gives that depends on values: all of a mask, 1 for a number, False for a truth but of all()."""
    if func is aten._local_scalar_dense.default:
        dtype = args[0].dtype
        if dtype == torch.bool:
            return hasattr(args[0], "holds")
        return 1.0 if dtype.is_floating_point else 1
    if func is aten.allclose.default or func is aten.equal.default:
        return True
    if func is aten.nonzero.default:
        return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
    if func is aten.masked_select.default:
        return args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape).numel())
    if func is aten.index.Tensor:
        places: list[Tensor | None] = []
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                places += index.new_empty(index.ndim, index.numel(), dtype=torch.int64).unbind()
            else:
                places.append(index)
        return func(args[0], places)
    raise UserError(f"cannot be predicted: what {func} gives depends on values, or torch's fake tensors do not know it")
