"""The fused loss against losses/reference.py on the same logits in float64; chunks of 10 tokens, blocks of 3."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megakd.data.records import TeacherTargets
from megakd.losses import head as fused
from megakd.losses.divergence import Divergence, divergence_terms
from megakd.losses.head import FusedHead
from megakd.losses.reference import KL, DistillTerms, distill_loss
from megakd.losses.signals import Dense, Sparse, Stored, Tail
from tests.conftest import for_each
from tests.losses.test_divergence import ALL, ON_DATA
from tests.losses.test_reference import TEMPERATURES, example, with_fillers

TAILS: tuple[Tail, ...] = get_args(Tail)
TOKENS, VOCABULARY, ENTRIES, SIZE, WIDTH = 37, 300, 16, 24, 20  # D of the student, G of the teacher
FACTOR = 0.37  # what comes in from above the loss
# relative, of the terms and of the gradients' norms; bfloat16 keeps 8 bits of logits and of their gradient
TOLERANCES = {torch.float64: (1e-13, 1e-12), torch.float32: (1.2e-7, 5e-6), torch.bfloat16: (4e-3, 1.5e-2)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 10 * 4 * VOCABULARY)
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", 3 * 4 * VOCABULARY)
    monkeypatch.setitem(fused.DENSE_CHUNK_BYTES, "cpu", 10 * 4 * VOCABULARY)
    monkeypatch.setitem(fused.DENSE_BLOCK_BYTES, "cpu", 3 * 4 * VOCABULARY)


def inputs(dtype: torch.dtype = torch.float64, padding: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states and the head's weight, logits of a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64)
    weight = 0.4 * torch.randn(VOCABULARY + padding, SIZE, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype)


def stored_targets(tail: Tail, temperature: float) -> tuple[Tensor, TeacherTargets, Stored]:
    """Labels and targets of the vocabulary, with entries that are none; teachers unlike the student."""
    _, _, labels, targets, stored = example((TOKENS, VOCABULARY, ENTRIES), temperature, tail, pmin=0.005)
    return labels, with_fillers(targets, 3), stored


Run = Callable[..., Any]


def differentiated(run: Run, *leaves: Tensor) -> tuple[list[float | None], list[Tensor]]:
    """The terms of run(hidden, weight), or with those of a live teacher too; gradients of FACTOR * total in float64."""
    parameters = [nn.Parameter(leaf.clone()) for leaf in leaves]
    terms = run(*parameters)
    (FACTOR * terms.total).backward()
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        gradients.append(parameter.grad.double())
    assert terms.total.requires_grad and not any(t.requires_grad for t in terms[1:] if t is not None)
    return [None if t is None else t.item() for t in terms], gradients


def alike(found: list[float | None], expected: list[float | None], tolerance: float) -> bool:
    """Numbers that are close, and None in the same places."""
    known = [[x for x in terms if x is not None] for terms in (found, expected)]
    return known[0] == pytest.approx(known[1], rel=tolerance) and (found[3] is None) == (expected[3] is None)


def same(found: Any, expected: Any, dtype: torch.dtype, live: bool = False, kinked: bool = False) -> None:
    """live: rows of a live teacher's loss add up in the dtype of the logits, those of cached logits in float64."""
    value, slope = TOLERANCES[dtype]
    assert alike(found[0], expected[0], 4 * value if live else value)
    for number, (mine, theirs) in enumerate(zip(found[1], expected[1], strict=True)):
        # which of two close probabilities is larger is up to rounding, and a teacher's gradient by tvd nothing else
        most = 10 * slope if number >= 2 and kinked and dtype == torch.bfloat16 else slope
        assert mine.isfinite().all() and (mine - theirs).norm() <= most * theirs.norm()


def dense_run(labels: Tensor, targets: TeacherTargets, stored: Stored, *form: Any, scale=1.0, cap=None) -> Run:
    def run(hidden: Tensor, weight: Tensor) -> Any:
        logits = hidden @ weight[:VOCABULARY].T * scale
        logits = logits if cap is None else cap * (logits / cap).tanh()
        alpha, temperature, tail, *divergence = form
        return distill_loss(logits, labels, Sparse(targets, stored, tail), alpha, temperature, *divergence)

    return run


def fused_run(labels: Tensor, teacher: Any, *form: Any, scale: float = 1.0, cap: float | None = None) -> Run:
    return lambda hidden, weight: FusedHead(weight, VOCABULARY, scale, cap)(hidden, labels, teacher, *form)


STORED, DRAWN = ("ghost", "hybrid"), ("sampled", "hybrid")  # need stored entropies; have a loss of their own
JSD = Divergence("jsd", 0.3)


@for_each("dtype", [torch.float64, torch.float32, torch.bfloat16])
@for_each("padding", [0, 9])
@for_each("alpha, temperature", [(0.3, 1.0), (0.3, 2.0), (1.0, 2.0), (0.0, 1.0), (0.3, 4.0)])
@for_each("tail", TAILS)
def test_it_is_the_dense_form(tail, alpha, temperature, padding, dtype):
    labels, targets, stored = stored_targets(tail, temperature)
    hidden, weight = inputs(dtype, padding)
    dense = dense_run(labels, targets, stored, alpha, temperature, tail)
    expected = differentiated(dense, hidden.double(), weight.double())
    found = differentiated(fused_run(labels, Sparse(targets, stored, tail), alpha, temperature), hidden, weight)
    same(found, expected, dtype)
    assert not found[1][1][VOCABULARY:].any()


@for_each("dtype", [torch.float64, torch.float32])
@for_each("rows", [1, 4, 100])
@for_each(
    "tail, temperature", [(a, t) for a in TAILS for t in (1.0, 2.0, 4.0, 0.5) if a not in STORED or t in TEMPERATURES]
)
def test_the_rows_of_a_block_are_of_no_account(monkeypatch, tail, temperature, rows, dtype):
    """Single rows are finished one by one where what trains allows it."""
    labels, targets, stored = stored_targets(tail, temperature)
    hidden, weight = inputs(dtype)
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", rows * dtype.itemsize * VOCABULARY)
    dense = dense_run(labels, targets, stored, 0.3, temperature, tail)
    expected = differentiated(dense, hidden.double(), weight.double())
    found = differentiated(fused_run(labels, Sparse(targets, stored, tail), 0.3, temperature), hidden, weight)
    same(found, expected, dtype)


def live_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student, then of a teacher of another width and with another padding."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(VOCABULARY + 4, WIDTH, generator=generator, dtype=torch.float64)
    return *inputs(dtype), hidden.to(dtype), weight.to(dtype)


def live_run(labels: Tensor, weights: Tensor | None, *form: Any, kl_weight: float = 1.0) -> Run:
    def run(hidden: Tensor, weight: Any, taught: Tensor, other: Any) -> Any:
        teacher = Dense(FusedHead(other, VOCABULARY), taught, weights)
        return FusedHead(weight, VOCABULARY)(hidden, labels, teacher, *form, kl_weight=kl_weight)

    return run


def live_reference(
    labels: Tensor, weights: Tensor, alpha: float, temperature: float, divergence: Divergence, kl_weight: float = 1.0
) -> Run:
    """The loss against a whole distribution, as its formula reads; autograd goes to both models."""

    def run(hidden: Tensor, weight: Tensor, taught: Tensor, other: Tensor) -> Any:
        s, t = hidden @ weight[:VOCABULARY].T, taught @ other[:VOCABULARY].T

        def at(temperature: float, divergence: Divergence) -> Tensor:
            both = [(side / temperature).log_softmax(-1) for side in (t, s)]
            return divergence_terms(divergence, *both).sum(-1)

        ce, teacher_ce = (nn.functional.cross_entropy(side, labels, reduction="sum") for side in (s, t))
        value = (weights * at(temperature, divergence)).sum()
        total = (1 - alpha) * ce + alpha * kl_weight * temperature**2 * value
        return DistillTerms(total, *(x.detach() for x in (ce, value, at(1.0, KL).sum(), teacher_ce)))

    return run


@for_each("dtype", [torch.float64, torch.float32, torch.bfloat16])
@for_each("temperature", [1.0, 2.0, 0.7])
@for_each("divergence, signal", [*ON_DATA, *((divergence, "live") for divergence in ALL)])
def test_every_divergence_of_cached_logits_and_of_a_live_teacher(divergence, signal, temperature, dtype):
    """Terms and gradients are those of autograd in float64, for a live teacher to both models."""
    form = (0.7, temperature, divergence)
    if signal == "live":
        labels, *_ = stored_targets("ghost", 2.0)
        weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.5
        run = live_run(labels, weights, *form, kl_weight=1.3)
        reference, leaves = live_reference(labels, weights, *form, kl_weight=1.3), live_inputs(dtype)
    elif signal == "ghost" and temperature not in TEMPERATURES:
        return  # no tail is stored for it
    else:
        labels, targets, stored = stored_targets(signal, temperature)
        reference = dense_run(labels, targets, stored, *form[:2], signal, divergence)
        run, leaves = fused_run(labels, Sparse(targets, stored, signal), *form), inputs(dtype)
    found = differentiated(run, *leaves)
    expected = differentiated(reference, *(leaf.double() for leaf in leaves))
    same(found, expected, dtype, live=signal == "live", kinked=divergence.kind == "tvd")


@for_each("temperature", [0.5, 1.3, 3.0])
def test_any_temperature(temperature):
    """Below 1, where the exponentials at 1 are the flat ones, and powers that are no whole numbers."""
    labels, targets, stored = stored_targets("truncated", 2.0)
    hidden, weight = inputs()
    expected = differentiated(dense_run(labels, targets, stored, 0.5, temperature, "truncated"), hidden, weight)
    teacher = Sparse(targets, stored, "truncated")
    same(differentiated(fused_run(labels, teacher, 0.5, temperature), hidden, weight), expected, torch.float64)


@for_each("dtype", [torch.float64, torch.float32, torch.bfloat16])
@for_each("scale, cap", [(0.0625, None), (0.7, 5.0), (1.0, 1.5)])
@for_each("temperature", [1.0, 2.0])
def test_scales_and_soft_caps(temperature, scale, cap, dtype):
    labels, targets, stored = stored_targets("ghost", 2.0)
    hidden, weight = inputs(dtype)
    dense = dense_run(labels, targets, stored, 0.5, temperature, "ghost", scale=scale, cap=cap)
    teacher = Sparse(targets, stored, "ghost")
    found = differentiated(fused_run(labels, teacher, 0.5, temperature, scale=scale, cap=cap), hidden, weight)
    same(found, differentiated(dense, hidden.double(), weight.double()), dtype)
    head = FusedHead(nn.Parameter(weight), VOCABULARY, scale, cap)
    assert head.logits(hidden).shape == (TOKENS, VOCABULARY)


@for_each("tail, divergence", [*((a, KL) for a in TAILS), *((a, JSD) for a in TAILS if a not in DRAWN)])
@for_each("temperature", [1.0, 2.0])
def test_gradient_is_that_of_the_returned_loss(tail, temperature, divergence):
    """Finite differences: T^2 must be inside what is differentiated, not only in what is reported."""
    labels, targets, stored = stored_targets(tail, temperature)
    hidden, weight = inputs()
    run = fused_run(labels, Sparse(targets, stored, tail), 0.6, temperature, divergence)
    _, (by_hidden, by_weight) = differentiated(run, hidden, weight)
    generator, step = torch.Generator().manual_seed(7), 1e-5
    for _ in range(3):
        move = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (hidden, weight)]
        ends = [run(hidden + s * move[0], nn.Parameter(weight + s * move[1])).total.item() for s in (step, -step)]
        slope = ((by_hidden * move[0]).sum() + (by_weight * move[1]).sum()) / FACTOR
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope.item(), rel=1e-7)


@for_each("divergence", ALL)
def test_student_equal_to_teacher_gives_zero_and_no_gradient(divergence):
    hidden, weight = inputs(padding=0)
    logits = hidden @ weight.T
    ids = logits.topk(ENTRIES).indices
    log_p = logits.log_softmax(-1)
    tails = [((logits / t).scatter(1, ids, -torch.inf).logsumexp(-1) - logits.logsumexp(-1) / t) for t in TEMPERATURES]
    nothing = torch.zeros(TOKENS)
    targets = TeacherTargets(
        ids.int(), log_p.gather(1, ids), torch.stack(tails, 1), ids[:, :0], log_p[:, :0], nothing, nothing
    )
    stored = Stored(True, TEMPERATURES, None)
    teacher = Sparse(targets, stored, "ghost")
    terms, gradients = differentiated(fused_run(ids[:, 0], teacher, 1.0, 2.0, divergence), hidden, weight)
    assert terms[0] == pytest.approx(0, abs=1e-11) and terms[3] == pytest.approx(0, abs=1e-11)
    if divergence.kind != "tvd":  # which has a kink there
        assert max(g.abs().max().item() for g in gradients) < 1e-11


@for_each("dtype", [torch.float64, torch.float32])
@for_each("scale", [1e-3, 30.0, 3e3])
@for_each("tail", TAILS)
def test_extreme_students(tail, scale, dtype):
    """Logits of thousands: the rest's mass is far below what a number can hold, its logarithm is not."""
    labels, targets, stored = stored_targets(tail, 2.0)
    hidden, weight = inputs(dtype)
    weight *= scale
    found = differentiated(fused_run(labels, Sparse(targets, stored, tail), 0.5, 2.0), hidden, weight)
    dense = dense_run(labels, targets, stored, 0.5, 2.0, tail)
    expected = differentiated(dense, hidden.double(), weight.double())
    assert alike(found[0], expected[0], 1e-12 if dtype == torch.float64 else 1e-6)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert mine.isfinite().all() and (mine - theirs).norm() <= 1e-3 * theirs.norm()


@for_each("dtype", [torch.float64, torch.float32])
def test_stored_mass_that_rounds_to_one(dtype):
    """log(1 - sum of probabilities) would be NaN here; the complement's sum is not."""
    weight = torch.tensor([[40.0], [0.0], [-1.0], [-2.0]], dtype=dtype)
    ids, logprobs, nothing = torch.tensor([[0]]), torch.tensor([[-1e-9]]), torch.zeros(1)
    targets = TeacherTargets(ids, logprobs, torch.tensor([[1e-9]]).log(), ids[:, :0], logprobs[:, :0], nothing, nothing)
    hidden, weight = torch.ones(1, 1, dtype=dtype, requires_grad=True), nn.Parameter(weight)
    teacher = Sparse(targets, Stored(True, (1.0,), None), "ghost")
    terms = FusedHead(weight, 4)(hidden, torch.tensor([0]), teacher, 1.0, 1.0)
    terms.total.backward()
    q = weight.detach()[:, 0].double().softmax(0)
    expected = logprobs.double().exp().log().sum() - q[0].log() + 1e-9 * (1e-9 / q[1:].sum()).log()
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-3) and weight.grad.isfinite().all()
    assert weight.grad[1].item() == pytest.approx((q[1] - 1e-9 * q[1] / q[1:].sum()).item(), rel=1e-5)


@for_each(
    "tail, divergence",
    [
        ("hybrid", KL),
        *((a, d) for a in ("ghost", "truncated") for d in (KL, Divergence("tvd"), Divergence("jsd", 0.5))),
    ],
)
def test_all_entries_stored(tail, divergence):
    """K = V: there is no rest at all."""
    _, _, labels, targets, stored = example((TOKENS, 13, 13), 2.0, tail, pmin=0.0)
    hidden, weight = inputs()
    weight = weight[:13]

    def run(hidden: Tensor, weight: Tensor) -> Any:
        return distill_loss(hidden @ weight.T, labels, Sparse(targets, stored, tail), 0.5, 2.0, divergence)

    def mine(hidden: Tensor, weight: Any) -> Any:
        teacher = Sparse(targets, stored, tail)
        return FusedHead(weight, 13)(hidden, labels, teacher, 0.5, 2.0, divergence)

    same(differentiated(mine, hidden, weight), differentiated(run, hidden, weight), torch.float64)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@for_each("dtype", [torch.float32, torch.bfloat16])
def test_what_needs_no_gradient_costs_no_product(dtype):
    labels, targets, stored = stored_targets("ghost", 2.0)
    hidden, weight = inputs(dtype)
    run = fused_run(labels, Sparse(targets, stored, "ghost"), 0.5, 2.0)
    expected, both = differentiated(run, hidden, weight)
    chunks = 4
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        h, w = hidden.clone().requires_grad_(needs[0]), nn.Parameter(weight.clone(), requires_grad=needs[1])
        with Products() as products:
            terms = run(h, w)
        assert products.count == chunks * (1 + sum(needs)) and terms.total.requires_grad == any(needs)
        assert terms.total.item() == expected[0]
        if any(needs):
            (FACTOR * terms.total).backward()
        for tensor, needed, gradient in zip((h, w), needs, both, strict=True):
            assert (tensor.grad is not None) == needed and (not needed or torch.equal(tensor.grad.double(), gradient))
    with torch.no_grad(), Products() as products:
        terms = run(hidden.clone().requires_grad_(), nn.Parameter(weight))
    assert products.count == chunks and not terms.total.requires_grad and terms.total.item() == expected[0]


def test_a_tied_head_adds_both_gradients():
    labels, targets, stored = stored_targets("ghost", 2.0)
    _, weight = inputs()
    ids = torch.arange(TOKENS) % 7

    def gradient(loss: Run) -> Tensor:
        table = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        loss(table(ids).tanh(), table.weight).total.backward()
        return table.weight.grad

    found = gradient(fused_run(labels, Sparse(targets, stored, "ghost"), 0.5, 2.0))
    assert torch.allclose(found, gradient(dense_run(labels, targets, stored, 0.5, 2.0, "ghost")), atol=1e-11)


@for_each("tail", TAILS)
def test_no_tokens_is_zero_with_a_live_graph(tail):
    labels, targets, stored = stored_targets(tail, 2.0)
    nobody = torch.zeros(TOKENS, dtype=torch.bool)
    teacher = Sparse(TeacherTargets(*(field[nobody] for field in targets)), stored, tail)
    hidden, weight = inputs(torch.float32)
    hidden.requires_grad_()
    parameter = nn.Parameter(weight)
    terms = FusedHead(parameter, VOCABULARY)(hidden[nobody], labels[nobody], teacher, 0.5, 2.0)
    assert terms.total.requires_grad and not any(t.item() for t in terms if t is not None)
    terms.total.backward()
    for gradient in (hidden.grad, parameter.grad):
        assert gradient is not None and not gradient.any()


def test_under_autocast_products_are_in_its_dtype():
    """float32 weights, as on the local engine with bfloat16: the result is that of bfloat16 weights."""
    labels, targets, stored = stored_targets("ghost", 2.0)
    hidden, weight = inputs(torch.bfloat16)
    run = fused_run(labels, Sparse(targets, stored, "ghost"), 0.5, 2.0)
    expected = differentiated(run, hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = differentiated(run, hidden.float(), weight.float())
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert (mine - theirs).norm() <= 5e-3 * theirs.norm()  # theirs is rounded when it is passed on


def test_the_gradient_of_a_head_is_summed_in_float32():
    """Sums over many chunks in bfloat16 lose what is small next to them."""
    labels, targets, stored = stored_targets("ghost", 2.0)
    hidden, weight = inputs(torch.bfloat16)
    many = TeacherTargets(*(field.repeat(40, *(1,) * (field.ndim - 1)) for field in targets))
    run = fused_run(labels.repeat(40), Sparse(many, stored, "ghost"), 0.5, 2.0)
    _, (_, once) = differentiated(fused_run(labels, Sparse(targets, stored, "ghost"), 0.5, 2.0), hidden, weight)
    _, (_, found) = differentiated(run, hidden.repeat(40, 1), weight)
    assert (found - 40 * once).norm() <= 4e-3 * (40 * once).norm()


def test_gradients_are_handed_over_once():
    labels, targets, stored = stored_targets("ghost", 2.0)
    hidden, weight = inputs()
    total = fused_run(labels, Sparse(targets, stored, "ghost"), 0.5, 2.0)(hidden, nn.Parameter(weight)).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="passed on by an earlier backward"):
        total.backward()


def test_calls_do_not_disturb_each_other():
    """Buffers are kept between calls; results are not in them. Also for other sizes and dtypes through one module."""
    labels, targets, stored = stored_targets("ghost", 2.0)
    hidden, weight = inputs(torch.float32)
    teacher = Sparse(targets, stored, "ghost")
    head = FusedHead(nn.Parameter(weight), VOCABULARY)
    first = head(hidden, labels, teacher, 0.5, 2.0)
    few = Sparse(TeacherTargets(*(field[:3] for field in targets)), stored, "ghost")
    second = head(hidden[:3], labels[:3], few, 0.5, 1.0)
    (first.total + second.total).backward()
    found = head.weight.grad.clone()
    head.weight.grad = None
    for again in (lambda: head(hidden, labels, teacher, 0.5, 2.0), lambda: head(hidden[:3], labels[:3], few, 0.5, 1.0)):
        again().total.backward()
    assert torch.allclose(found, head.weight.grad, atol=1e-4)
    with torch.inference_mode():
        few_rows = FusedHead(head.weight, VOCABULARY)
        few_rows(hidden, labels, teacher, 0.5, 2.0)
    few_rows(hidden, labels, teacher, 0.5, 2.0).total.backward()
    head.double()
    assert head(hidden.double(), labels, teacher, 0.5, 2.0).total.dtype == torch.float64


def test_the_weight_stays_the_students():
    """One Parameter, one name, nothing more in a state."""
    model = nn.ModuleDict({"lm_head": nn.Linear(3, 5, bias=False)})
    whole = nn.ModuleDict({"student": model, "head": FusedHead(model["lm_head"].weight, 5)})
    assert [name for name, _ in whole.named_parameters()] == ["student.lm_head.weight"]
    assert list(whole.state_dict()) == ["student.lm_head.weight"]
    whole.load_state_dict({"student.lm_head.weight": torch.ones(5, 3)})
    assert whole["head"].weight.eq(1).all() and whole["head"].weight is model["lm_head"].weight


@pytest.fixture
def allocations() -> Iterator[Any]:
    from tests.tools.examples import tool

    yield tool("bench.loss").peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["ghost", "capped", "frozen teacher", "teacher learns"])
def test_peak_memory_is_the_gradients_and_two_buffers(allocations, monkeypatch, form, dtype):
    """Of [chunk, V] in float32, at sizes where what is small next to them is small; two more for a live teacher."""
    tokens, vocabulary, size, chunk = 96, 40_000, 32, 24
    for name, rows in (("CHUNK_BYTES", chunk), ("BLOCK_BYTES", 1)):
        for where in (name, f"DENSE_{name}"):
            monkeypatch.setitem(getattr(fused, where), "cpu", rows * 4 * vocabulary)
    _, _, labels, targets, stored = example((tokens, 300, 8), 2.0)
    generator = torch.Generator().manual_seed(0)

    def model() -> tuple[Tensor, nn.Parameter]:
        hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
        return hidden, nn.Parameter(torch.randn(vocabulary, size, generator=generator).to(dtype))

    (hidden, weight), (taught, other) = model(), model()
    teacher: Any = Sparse(targets, stored, "ghost")
    live = form.endswith("teacher") or form.endswith("learns")
    if live:
        teacher = Dense(FusedHead(other.requires_grad_(form == "teacher learns"), vocabulary), taught)
        taught.requires_grad_(form == "teacher learns")
    head = FusedHead(weight, vocabulary, softcap=30.0 if form == "capped" else None)
    peak = allocations(lambda: head(hidden, labels, teacher, 0.5, 2.0).total.backward())
    gradients = 4 * (weight.numel() + hidden.numel())
    if dtype == torch.bfloat16:
        gradients += 2 * weight.numel()  # as which the head's, summed in float32, is passed on
    if form == "teacher learns":
        gradients *= 2
    each = 1 if dtype == torch.float32 else 1.5
    buffers = 2 * each if live else 2 if form == "capped" else each
    some_rows = 12 if live else 2
    assert peak <= gradients + (buffers * chunk + some_rows) * 4 * vocabulary + 2**18
