"""What the planner predicts against whole fits, and what it buys against trying everything."""

import itertools
import random

import pytest
import torch

from megakd.compress.fit import Settings, fit_projection
from megakd.compress.forms import USUAL, Candidate, Sizes, candidates, dense_flops, form_flops
from megakd.compress.groups import find_groups, sketch
from megakd.compress.planner import allocate
from megakd.compress.predict import basis_curves, measure
from megakd.compress.threads import threads_over
from megakd.errors import UserError
from megakd.models.shared_core import PROJECTIONS, Form, make_form, stored_parameters
from megakd.names import resolve
from tests.conftest import for_each
from tests.models.students import experts_in


def demo_experts(layer: int, projection: str) -> torch.Tensor:
    folder = resolve("demo")
    return experts_in(folder, layer, projection)


def related(experts: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Experts with a common part, falling spectra, and partly the same inputs, [E, rows, columns]."""
    draw = torch.Generator().manual_seed(seed)
    common = 0.3 * torch.randn(rows, columns, generator=draw)
    shared = torch.randn(16, columns, generator=draw)
    scale = torch.logspace(0, -1, columns)
    matrices = []
    for _ in range(experts):
        head = torch.randn(rows, 16, generator=draw) @ (shared + torch.randn(16, columns, generator=draw)) / 8
        matrices.append(common + head + torch.randn(rows, columns, generator=draw) * scale)
    return torch.stack(matrices)


def whole_fit(weights: torch.Tensor, projection: str, form: Form) -> float:
    """The root of the lost share of energy, all experts fitted."""
    _, fit = fit_projection(weights, projection, form, Settings())
    norms = weights.float().square().sum((1, 2))
    return float((fit.errors.square() * norms).sum() / norms.sum()) ** 0.5


@for_each("projection, layer", [("gate", 1), ("down", 2)])
def test_predictions_on_a_trained_model_are_those_of_whole_fits(projection, layer):
    weights = demo_experts(layer, projection)
    forms = [make_form("additive", projection, 16, 0), make_form("basis", projection, 0, 24)]
    forms += [make_form("wrappers", projection, *ranks) for ranks in ((32, 8), (24, 40))]
    for found in measure(weights, projection, 2, forms=forms):
        exact = whole_fit(weights, projection, found.form)
        tolerance = 1e-3 if found.form.shape == "basis" else 0.02
        assert found.error**0.5 == pytest.approx(exact, rel=tolerance), found.form


def test_down_is_the_mirror_of_gate():
    weights = related(6, 20, 33)
    gate = measure(weights, "gate", 2, groups=2)
    down = measure(weights.mT.contiguous(), "down", 2, groups=2)
    assert [(c.parameters, c.flops) for c in gate] == [(c.parameters, c.flops) for c in down]
    assert [c.error for c in gate] == pytest.approx([c.error for c in down], abs=1e-4)
    assert gate[0].form.input_rank == down[0].form.output_rank > 0


def test_stored_types_and_numbers_of_threads_do_not_matter():
    weights = related(12, 16, 24).bfloat16()
    first = measure(weights, "gate", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = measure(weights, "gate", 2)
    finally:
        torch.set_num_threads(threads)
    assert first == again
    exact = measure(weights.double(), "gate", 2)
    assert [c.error for c in first] == pytest.approx([c.error for c in exact], abs=1e-4)


def test_more_ranks_of_one_shape_lose_less():
    found = measure(related(10, 24, 40), "gate", 2, groups=1)
    for shape in ("additive", "basis"):
        errors = [c.error for c in found if c.form.shape == shape]
        assert errors == sorted(errors, reverse=True) and 0 <= errors[-1] < errors[0] < 1


def test_experts_of_zeros_lose_nothing():
    assert {c.error for c in measure(torch.zeros(4, 16, 24), "gate", 2)} == {0.0}
    some = torch.cat([torch.zeros(2, 16, 24), related(6, 16, 24)])
    assert all(0 <= c.error <= 1 for c in measure(some, "gate", 2))


def test_identical_experts_need_no_factors():
    weights = related(1, 16, 24).expand(5, -1, -1)
    assert all(c.error < 1e-6 for c in measure(weights, "gate", 2, shapes=("additive", "wrappers")))


def test_progress_ends_at_one():
    seen = []
    measure(related(4, 16, 24), "gate", 2, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1) and len(seen) > 3


@for_each("counts", [(1,), (1, 2, 4), (3,)])
def test_basis_curves_are_those_of_singular_value_decompositions(counts):
    weights = related(7, 5, 9).double()
    with threads_over(weights) as threads:
        curves = basis_curves(weights, counts, threads)
        known = sketch(weights, torch.ones(7), threads)
    for groups in counts:
        group = find_groups(known, groups)
        for k in range(10):
            lost = 0.0
            for g in range(groups):
                sigma = torch.linalg.svdvals(weights[group == g].flatten(0, 1))
                lost += float(sigma[k:].square().sum())
            assert curves[groups][k] == pytest.approx(lost, abs=1e-9)


@for_each("sizes", [(128, 2048, 768), (8, 192, 192), (8, 4096, 14336), (4, 32, 24), (256, 7168, 2048)])
@for_each("projection", PROJECTIONS)
def test_candidates_span_the_shares(sizes, projection):
    experts, hidden, expert_hidden = sizes
    active = max(2, experts // 16)
    found = candidates(projection, Sizes(experts, active, hidden, expert_hidden), groups=4)
    assert len(found) == len(set(found)) and {form.shape for form in found} == set(USUAL)
    shares = [stored_parameters(form, projection, *sizes) / (experts * hidden * expert_hidden) for form in found]
    assert min(shares) >= 0.03 and max(shares) <= 0.95
    for shape in USUAL:
        mine = sorted(share for share, form in zip(shares, found, strict=True) if form.shape == shape)
        step = (8 if expert_hidden >= 128 else 1) * (3 * expert_hidden + hidden) / (expert_hidden * hidden)
        assert mine[0] < 0.03 + 1 / experts + step and mine[-1] > 0.75, shape
        assert max(b - a for a, b in itertools.pairwise(mine)) < 0.05 + step / 2, shape
    if expert_hidden >= 128:
        assert all(form.input_rank % 8 == form.output_rank % 8 == 0 for form in found)
    for form in found:
        affordable = form_flops(form, projection, active, hidden, expert_hidden)
        assert form.groups == 1 or affordable <= dense_flops(active, hidden, expert_hidden)
    assert any(form.input_rank != form.output_rank for form in found if form.shape == "wrappers")
    assert {1, 2} <= {form.groups for form in found if form.shape == "basis"} <= {1, 2, 4}


def test_mixtures_are_considered_where_they_are_named():
    """Up to twice as many bases as groups, no more than half of the experts, and no more FLOPs than the teacher's."""
    found = candidates("gate", Sizes(128, 8, 2048, 768), ["mixture"], groups=4)
    assert {form.shape for form in found} == {"mixture"} and {form.groups for form in found} == {2, 4, 8}
    assert all(form_flops(form, "gate", 8, 2048, 768) <= dense_flops(8, 2048, 768) for form in found)
    few = candidates("gate", Sizes(8, 2, 192, 192), ["mixture"], groups=8)
    assert {form.groups for form in few} == {2, 4}
    # 2 bases of 10: both run for every token, then 8 sums of both and 8 matrices [768, 10]
    assert form_flops(Form("mixture", 0, 10, 2), "up", 8, 2048, 768) == 2 * (2 * 10 * 2048 + 8 * 2 * 10 + 8 * 768 * 10)


def test_flops_are_those_of_the_factored_forward():
    """Qwen3-30B-A3B's layer at rank 64: 22.8 MFLOP a token instead of 75.5 (docs/compression.md)."""
    factored = sum(form_flops(Form("wrappers", 64, 64), p, 8, 2048, 768) for p in PROJECTIONS)
    assert factored / 1e6 == pytest.approx(22.8, abs=0.05)
    assert 3 * dense_flops(8, 2048, 768) / 1e6 == pytest.approx(75.5, abs=0.05)
    # a basis of 2 groups of 10: both run for every token, then 8 matrices [768, 10]
    assert form_flops(Form("basis", 0, 10, 2), "up", 8, 2048, 768) == 2 * (2 * 10 * 2048 + 8 * 768 * 10)


def random_tables(seed: int, keys: int, size: int) -> dict[tuple[int, str], list[Candidate]]:
    draw = random.Random(seed)
    tables = {}
    for key in range(keys):
        scale = draw.uniform(0.2, 2)
        rows = []
        for number in range(size):
            parameters = draw.randint(5, 100)
            error = scale * (1 - parameters / 110) ** 2 * draw.uniform(0.7, 1.3)
            rows.append(Candidate(Form("additive", number, 0), parameters, parameters * draw.uniform(0.5, 2), error))
        tables[key, "gate"] = rows
    return tables


def chosen(tables: dict, forms: dict) -> list[Candidate]:
    return [next(c for c in tables[key] if c.form == form) for key, form in forms.items()]


def totals(found: list[Candidate] | tuple[Candidate, ...]) -> tuple[float, float, float]:
    return sum(c.parameters for c in found), sum(c.flops for c in found), sum(c.error for c in found)


@for_each("seed", range(8))
def test_allocation_is_optimal_but_for_its_last_step(seed):
    """Against every combination: no more is lost than the best with one step of the hull less to spend."""
    tables = random_tables(seed, 4, 6)
    everything = [totals(c) for c in itertools.product(*tables.values())]
    biggest = max(c.parameters for table in tables.values() for c in table)
    for budget in (0.3, 0.45, 0.6, 0.8):
        spent, _, error = totals(chosen(tables, allocate(tables, 400, budget)))
        assert spent <= 400 * budget
        best = min(e for p, _, e in everything if p <= 400 * budget)
        poorer = [e for p, _, e in everything if p <= 400 * budget - biggest]
        assert best - 1e-12 <= error <= min(poorer, default=float("inf")) + 1e-12


@for_each("seed", range(8))
def test_fine_tables_are_spent_optimally(seed):
    """Convex tables with small steps: as good as every combination, within a step's gain."""
    draw = random.Random(seed)
    tables = {}
    for key, projection in itertools.product(range(2), ("gate", "down")):
        scale, decay = draw.uniform(0.5, 2), draw.uniform(0.02, 0.1)
        tables[key, projection] = [
            Candidate(Form("basis", 0, r), 4 * r, 4.0 * r, scale * 2.718 ** (-decay * r)) for r in range(1, 21)
        ]
    limit = 0.5 * 4 * 80
    best = min(e for p, _, e in map(totals, itertools.product(*tables.values())) if p <= limit)
    assert totals(chosen(tables, allocate(tables, 320, 0.5)))[2] == pytest.approx(best, abs=1e-12)


@for_each("seed", range(20))
def test_more_budget_is_never_worse(seed):
    tables = random_tables(seed, 7, 12)
    errors = []
    for budget in (b / 100 for b in range(25, 101)):
        spent, _, error = totals(chosen(tables, allocate(tables, 700, budget)))
        assert spent <= 700 * budget
        errors.append(error)
    assert errors == sorted(errors, reverse=True)


@for_each("seed", range(12))
def test_flops_are_kept_to(seed):
    """And no more is lost than the best of all with a tenth less of both."""
    tables = random_tables(seed, 4, 7)
    everything = [totals(c) for c in itertools.product(*tables.values())]
    for flops in (0.4, 0.5, 0.7):
        try:
            forms = allocate(tables, 400, 0.6, 500.0, flops)
        except UserError:
            assert not any(p <= 0.6 * 400 and f <= 0.8 * flops * 500 for p, f, _ in everything)
            continue
        spent, used, error = totals(chosen(tables, forms))
        assert spent <= 0.6 * 400 and used <= flops * 500
        poorer = [e for p, f, e in everything if p <= 0.7 * 0.6 * 400 and f <= 0.7 * flops * 500]
        assert error <= min(poorer, default=float("inf"))


def test_flops_that_do_not_bind_change_nothing():
    tables = random_tables(3, 5, 9)
    assert allocate(tables, 500, 0.5, 1000.0, 1.0) == allocate(tables, 500, 0.5)


def test_equal_tables_get_equal_ranks():
    table = [Candidate(Form("additive", r, 0), 100 * r, 100.0 * r, 2.0**-r) for r in range(1, 30)]
    tables = {(layer, p): table for layer in range(4) for p in PROJECTIONS}
    forms = allocate(tables, 12 * 3000, 0.5)
    assert set(forms.values()) == {Form("additive", 15, 0)} and list(forms) == sorted(tables)


def test_equal_tables_use_the_flops_they_may():
    """Two forms, one twice as good and dear: half of ten projections can have it, though all change at one price."""
    table = [Candidate(Form("additive", r, 0), 10, 100.0 * r, 1.0 / r) for r in (1, 2)]
    tables = {(layer, "gate"): table for layer in range(10)}
    forms = allocate(tables, 200, 0.5, 2000.0, 0.76)
    assert sorted(form.input_rank for form in forms.values()) == [1] * 5 + [2] * 5


def test_it_spends_where_it_buys_most():
    plain = torch.randn(6, 24, 40, generator=torch.Generator().manual_seed(1))
    easy = plain * torch.logspace(0, -2, 40)
    tables = {(0, "gate"): measure(easy, "gate", 2), (1, "gate"): measure(plain, "gate", 2)}
    dense = 2 * plain.numel()
    forms = allocate(tables, dense, 0.5)
    one, two = chosen(tables, forms)
    assert one.parameters < two.parameters and one.parameters + two.parameters <= dense // 2
    uniform = sum(min(c.error for c in table if c.parameters <= dense // 4) for table in tables.values())
    assert one.error + two.error < uniform


def test_budgets_that_nothing_fits_name_one_that_works():
    tables = {(0, p): measure(related(4, 16, 24), p, 2) for p in ("gate", "up")}
    dense = 2 * 4 * 16 * 24
    with pytest.raises(UserError, match=r"budget=0.01: the smallest of compress.shapes need 0\.\d+") as caught:
        allocate(tables, dense, 0.01)
    allocate(tables, dense, float(str(caught.value).split()[-1]))
    with pytest.raises(UserError, match=r"flops=0.001: with compress.budget=0.5 the experts need at least") as caught:
        allocate(tables, dense, 0.5, 2 * dense_flops(2, 24, 16), 0.001)
    allocate(tables, dense, 0.5, 2 * dense_flops(2, 24, 16), float(str(caught.value).split()[-1]))
