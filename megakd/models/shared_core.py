"""The factored expert layer: one dense core a projection, small factors an expert.

A projection of a layer is stored in one of four shapes (docs/compression.md), for gate and up
    wrappers   W_e = (I + U_e S_e^T) C + Q_e V_e^T
    additive   W_e = C + Q_e V_e^T, wrappers without the one that acts on the core
    basis      W_e = A_e Z_g, a basis Z_g of the inputs that the experts of group g share
    mixture    W_e = A_e sum_g m_eg Z_g, bases that all experts share, mixed with coefficients of each
and for down the mirror: C (I + U_e V_e^T) + U'_e P_e^T, C + U'_e P_e^T, Z_g^T B_e^T and (sum_g m_eg Z_g)^T B_e^T. What
is shared, C or all Z_g, is a Linear outside the experts: it runs once a token, not once a routed row.

This file and student.py need torch and transformers alone: they are copied into every model folder.
N tokens, D hidden, F expert hidden, E experts, A active experts, P = N*A routed rows, R rank, G groups or bases.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

PROJECTIONS = ("gate", "up", "down")
SHAPES = ("wrappers", "additive", "basis", "mixture")
FEW_ROWS = 32  # routed rows up to which copies of their factors are multiplied at once


class Form(NamedTuple):
    """How one projection of a layer is stored: a shape and the ranks of the factors left and right of what is shared.

    gate, up: the input wrapper is Q V^T, the output wrapper U S^T acts on the core; a basis of k has output_rank k.
    down: the output wrapper is U' P^T, the input wrapper U V^T acts on the core; a basis of k has input_rank k.
    groups: of experts with a basis each; of a mixture, the number of bases.
    """

    shape: str
    input_rank: int
    output_rank: int
    groups: int = 1

    @property
    def based(self) -> bool:
        """Whether bases are shared instead of a core."""
        return self.shape in ("basis", "mixture")


def free_and_core_rank(form: Form, projection: str) -> tuple[int, int]:
    """(rank of the wrapper that is free, rank of the one that acts on the core, or of the basis)."""
    if projection == "down":
        return form.output_rank, form.input_rank
    return form.input_rank, form.output_rank


def make_form(shape: str, projection: str, free: int, core: int, groups: int = 1) -> Form:
    """The inverse of `free_and_core_rank`."""
    return Form(shape, *((core, free) if projection == "down" else (free, core)), groups)


def core_shape(form: Form, projection: str, hidden: int, expert_hidden: int) -> tuple[int, int]:
    """(d_out, d_in) of what the experts share."""
    rows = form.groups * free_and_core_rank(form, projection)[1] if form.based else expert_hidden
    return (hidden, rows) if projection == "down" else (rows, hidden)


def factor_shapes(
    form: Form, projection: str, experts: int, hidden: int, expert_hidden: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of an expert's factors by parameter name, right [E, n, R], left [E, R, n]; a wrapper of rank 0 has none.

    Left factors are stored transposed, for rows are multiplied by U^T: row by row that takes 0.6 of the time on a CPU.
    """
    free, core = free_and_core_rank(form, projection)
    f, d = expert_hidden, hidden
    far, near = ("output", "input") if projection == "down" else ("input", "output")
    if form.based:
        mix = {mix_name(projection): (experts, form.groups, 1)} if form.shape == "mixture" else {}
        if projection == "down":
            return {**mix, f"{near}_wrapper_{projection}_right": (experts, f, core)}
        return {**mix, f"{near}_wrapper_{projection}_left": (experts, core, f)}
    # the free wrapper reaches from D to F (gate, up) or from F to D (down); that on the core stays in F
    left, right = (d, f) if projection == "down" else (f, d)
    shapes = {}
    if free:
        shapes |= {f"{far}_wrapper_{projection}_left": (experts, free, left)}
        shapes |= {f"{far}_wrapper_{projection}_right": (experts, right, free)}
    if core:
        shapes |= {f"{near}_wrapper_{projection}_left": (experts, core, f)}
        shapes |= {f"{near}_wrapper_{projection}_right": (experts, f, core)}
    return dict(sorted(shapes.items()))


def mix_name(projection: str) -> str:
    """Of the parameter with a mixture's coefficients, next to the expert's other factor."""
    return f"{'input' if projection == 'down' else 'output'}_wrapper_{projection}_mix"


def stored_parameters(form: Form, projection: str, experts: int, hidden: int, expert_hidden: int) -> int:
    """Numbers stored for one projection of a layer, the shared part among them."""
    rows, columns = core_shape(form, projection, hidden, expert_hidden)
    shapes = factor_shapes(form, projection, experts, hidden, expert_hidden).values()
    return rows * columns + sum(e * n * r for e, n, r in shapes)


class DenseExperts(nn.Module):
    """Some experts kept as they are ("super experts"): a token's rows through them, weighted and summed, [N, D]."""

    def __init__(self, ids: Sequence[int], hidden: int, expert_hidden: int, act_fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.ids, self.act_fn = tuple(ids), act_fn
        self.gate_up_proj = nn.Parameter(torch.randn(len(self.ids), 2 * expert_hidden, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(len(self.ids), hidden, expert_hidden) * expert_hidden**-0.5)

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        total = torch.zeros_like(x_ND)
        for expert, gate_up, down in zip(self.ids, self.gate_up_proj, self.down_proj, strict=True):
            token, place = torch.where(expert_NA == expert)
            gate, up = (x_ND[token] @ gate_up.T).chunk(2, dim=-1)
            y = (self.act_fn(gate) * up) @ down.T * weight_NA[token, place, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total


class SharedCoreExperts(nn.Module):
    """All experts of one layer, called as the family's own: experts(x_ND, expert_NA, weight_NA) -> [N, D].

    The factors are direct parameters, so that ZeRO-3 gathers them together. What is shared (`core`: gate_proj, up_proj
    and down_proj) and the experts kept dense (`exempt`) are modules of the block around it, held here but not owned.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        expert_hidden: int,
        forms: Mapping[str, Form],
        act_fn: Callable[[Tensor], Tensor],
        core: nn.ModuleDict,
        exempt: DenseExperts | None = None,
    ):
        super().__init__()
        self.num_experts, self.expert_hidden = experts, expert_hidden
        self.forms = dict(forms)
        # a plain function, not a child module: experts without tokens skip it, and ZeRO-3 ends the run when ranks
        # call different numbers of modules
        self.act_fn = act_fn
        self.held = (core, exempt)  # in a tuple: nn.Module would register them as children
        for projection, form in self.forms.items():
            for name, shape in factor_shapes(form, projection, experts, hidden, expert_hidden).items():
                # zero left factors: a new layer starts as its core, and gradients reach the left factors at once
                zero = name.endswith("_left") and not form.based
                factor = torch.zeros(shape) if zero else torch.randn(shape) * shape[1] ** -0.5
                self.register_parameter(name, nn.Parameter(factor))
            if form.shape == "basis" and form.groups > 1:
                self.register_buffer(f"basis_group_{projection}", torch.arange(experts) % form.groups)

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        core: Any
        core, exempt = self.held
        gate_N, up_N = core["gate_proj"](x_ND), core["up_proj"](x_ND)
        dense_ND = None
        if exempt is not None:
            dense_ND = exempt(x_ND, expert_NA, weight_NA)
            for expert in exempt.ids:
                weight_NA = weight_NA.masked_fill(expert_NA == expert, 0.0)
        inner_N, outer_ND = self.factors(x_ND, gate_N, up_N, expert_NA, weight_NA)
        out_ND = core["down_proj"](inner_N) + outer_ND
        return out_ND if dense_ND is None else out_ND + dense_ND

    def factors(
        self, x_ND: Tensor, gate_N: Tensor, up_N: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From tokens and core(tokens) to what the core of down is applied to, and what is added to it, [N, D].

        Both are summed over a token's experts, weighted.
        """
        if expert_NA.numel() <= FEW_ROWS and not torch.is_grad_enabled():
            return self.gathered(x_ND, gate_N, up_N, expert_NA, weight_NA)
        if x_ND.device.type == "cuda" and gate_N.dtype != torch.float64 and self._aligned():  # which it does not know
            return self.grouped(x_ND, gate_N, up_N, expert_NA, weight_NA)
        return self.loop(x_ND, gate_N, up_N, expert_NA, weight_NA)

    def loop(
        self, x_ND: Tensor, gate_N: Tensor, up_N: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`factors`, expert by expert: best on CPUs, where an expert's rows stay in the cache."""
        expert_P, order_P = expert_NA.flatten().sort(stable=True)
        experts, rows = torch.unique_consecutive(expert_P, return_counts=True)
        counts = rows.tolist()
        tokens = (order_P // expert_NA.shape[1]).split(counts)
        weights = weight_NA.flatten()[order_P, None].split(counts)
        pick = {p: _each((*self._stacked(p), self._mix(p)), self.num_experts) for p in PROJECTIONS}
        groups = {p: self._groups(p).tolist() for p in PROJECTIONS}
        inner_N = gate_N.new_zeros(len(x_ND) * self._slots("down"), self._width())
        outer_ND = torch.zeros_like(x_ND)
        gate_N, up_N = self._by_group("gate", gate_N), self._by_group("up", up_N)

        def slots(projection: str, token: Tensor, expert: int) -> Tensor:
            """Rows of [N*G, ..] that belong to the tokens and the expert's group."""
            count = self._slots(projection)
            return token if count == 1 else token * count + groups[projection][expert]

        # rows are gathered and added up expert by expert, while they are in the cache: [P, D] is never written
        for expert, token, weight in zip(experts.tolist(), tokens, weights, strict=True):
            x = x_ND.index_select(0, token)  # several times as fast as x_ND[token], and so is its gradient
            gate = _gate_or_up(x, gate_N.index_select(0, slots("gate", token, expert)), *pick["gate"](expert))
            up = _gate_or_up(x, up_N.index_select(0, slots("up", token, expert)), *pick["up"](expert))
            h = (self.act_fn(gate) * up * weight).to(gate.dtype)  # some routers weigh in float32
            inner, outer = _down(h, *pick["down"](expert))
            # under autocast the products are of another type than the sums
            inner_N.index_add_(0, slots("down", token, expert), inner.to(inner_N.dtype))
            if outer is not None:
                outer_ND.index_add_(0, token, outer.to(outer_ND.dtype))
        return inner_N.view(len(x_ND), inner_N.shape[1] * self._slots("down")), outer_ND

    def grouped(
        self, x_ND: Tensor, gate_N: Tensor, up_N: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`factors` by grouped matrix products over all rows, without a loop.

        In bfloat16 on GPUs of compute capability 9 and 10 nothing waits for the device; elsewhere torch's grouped_mm
        reads the offsets and multiplies group by group.
        """
        dtype = gate_N.dtype  # that of autocast, where it is on
        expert_P, order_P = expert_NA.flatten().sort(stable=True)
        experts = torch.arange(self.num_experts, device=expert_P.device)
        ends_E = torch.searchsorted(expert_P, experts, right=True).to(torch.int32)

        def product(rows: Tensor, matrices_E: Tensor, added: Tensor | None = None) -> Tensor:
            made = functional.grouped_mm(rows[:, 0].to(dtype), matrices_E.to(dtype), offs=ends_E)[:, None]
            return made if added is None else added + made

        return self._by_row(x_ND, gate_N, up_N, expert_NA, weight_NA, order_P, product)

    def gathered(
        self, x_ND: Tensor, gate_N: Tensor, up_N: Tensor, expert_NA: Tensor, weight_NA: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`factors` for few rows: a copy of its expert's factors for each, multiplied as a batch.

        No size depends on the data. Not for gradients: that of a copied `left` is a whole `left` each time.
        """
        given, expert_P = gate_N.dtype, expert_NA.flatten()
        # small batches of 16 bits take up to twice as long on a CPU as those of float32
        dtype = torch.promote_types(given, torch.float32) if x_ND.device.type == "cpu" else given

        def product(rows: Tensor, matrices_E: Tensor, added: Tensor | None = None) -> Tensor:
            # index_select takes a sixth of the time of matrices_E[expert_P]
            matrices_P = matrices_E.index_select(0, expert_P).to(dtype)
            return torch.bmm(rows, matrices_P) if added is None else torch.baddbmm(added, rows, matrices_P)

        inner_N, outer_ND = self._by_row(x_ND, gate_N.to(dtype), up_N.to(dtype), expert_NA, weight_NA, None, product)
        return inner_N.to(given), outer_ND.to(given)

    def _by_row(
        self,
        x_ND: Tensor,
        gate_N: Tensor,
        up_N: Tensor,
        expert_NA: Tensor,
        weight_NA: Tensor,
        order_P: Tensor | None,
        product: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor]:
        """`factors` of routed rows in an order, or token by token, in the type of gate_N and up_N.

        product(rows [P, 1, n], matrices [E, n, m], added [P, 1, m] or None): rows times their experts' matrices, plus
        what is added.
        """
        dtype, (tokens, active) = gate_N.dtype, expert_NA.shape
        expert_P, weight_P = (y.flatten() if order_P is None else y.flatten()[order_P] for y in (expert_NA, weight_NA))

        def slots(count: int, projection: str) -> Tensor:
            row_P = torch.arange(tokens * active, device=x_ND.device) if order_P is None else order_P
            return row_P // active if count == 1 else row_P // active * count + self._groups(projection)[expert_P]

        def spread(y_N: Tensor, count: int, projection: str) -> Tensor:
            """Of tokens [N, count*n] what each row needs, [P, 1, n]."""
            if order_P is None and count == 1:
                return y_N[:, None].expand(-1, active, -1).reshape(tokens * active, 1, y_N.shape[1])
            y_N = y_N.view(tokens * count, y_N.shape[1] // count)
            index_P = slots(count, projection)
            return (y_N.index_select(0, index_P) if order_P is None else y_N[index_P])[:, None]

        def collect(y_P: Tensor, count: int) -> Tensor:
            """The transpose: sums of rows [P, 1, n] for each token, [N, count*n]."""
            wide = torch.promote_types(dtype, torch.float32)
            if order_P is None and count == 1:
                return y_P.view(tokens, active, y_P.shape[2]).sum(1, dtype=wide).to(dtype)
            y_N = torch.zeros(tokens * count, y_P.shape[2], dtype=wide, device=x_ND.device)
            y_N.index_add_(0, slots(count, "down"), y_P[:, 0].to(wide))
            return y_N.view(tokens, count * y_P.shape[2]).to(dtype)

        x_P = spread(x_ND, 1, "").to(dtype)
        rows = {}
        for projection, core_N in (("gate", gate_N), ("up", up_N)):
            mix = self._mix(projection)
            y = spread(core_N, self._slots(projection), projection)
            if mix is not None:
                y = _mixed(y[:, 0], mix[expert_P])[:, None]
            left, right, free_left, free_right = self._stacked(projection)
            if self.forms[projection].based:
                y = product(y, left)
            elif left is not None and right is not None:
                y = product(product(y, right), left, y)
            if free_left is not None and free_right is not None:
                y = product(product(x_P, free_right), free_left, y)
            rows[projection] = y
        h_P = self.act_fn(rows["gate"]) * rows["up"] * weight_P[:, None, None].to(dtype)
        left, right, free_left, free_right = self._stacked("down")
        inner_P, mix = h_P, self._mix("down")
        if self.forms["down"].based:
            inner_P = product(h_P, right)
        elif left is not None and right is not None:
            inner_P = product(product(h_P, right), left, h_P)
        if mix is not None:
            inner_P = _unmixed(inner_P[:, 0], mix[expert_P])[:, None]
        outer_ND = torch.zeros_like(x_ND, dtype=dtype)
        if free_left is not None and free_right is not None:
            outer_ND = collect(product(product(h_P, free_right), free_left), 1)
        return collect(inner_P, self._slots("down")), outer_ND

    def _aligned(self) -> bool:
        """Whether grouped_mm takes all factors: rows of whole 16 bytes, 8 numbers of bfloat16."""
        factors = (p for name, p in self.named_parameters() if not name.endswith("_mix"))
        sizes = {size for p in factors for size in getattr(p, "ds_shape", p.shape)[1:]}
        return hasattr(functional, "grouped_mm") and all(size % 8 == 0 for size in sizes)

    def _by_group(self, projection: str, core_N: Tensor) -> Tensor:
        """[N, G*k] as [N*G, k]; sizes are spelled out, for no tokens leave nothing to infer them from."""
        groups = self._slots(projection)
        return core_N if groups == 1 else core_N.view(core_N.shape[0] * groups, core_N.shape[1] // groups)

    def _slots(self, projection: str) -> int:
        """Parts of a core's numbers of which an expert has one of its own: groups of a basis."""
        form = self.forms[projection]
        return 1 if form.shape == "mixture" else form.groups

    def _width(self) -> int:
        """Columns that one group's core of down takes: F, the rank of its basis, or that of all bases of a mixture."""
        form = self.forms["down"]
        if not form.based:
            return self.expert_hidden
        return self.input_wrapper_down_right.shape[2] * form.groups // self._slots("down")  # type: ignore

    def _mix(self, projection: str) -> Tensor | None:
        """The coefficients of a mixture's bases, [E, G]; None for other shapes."""
        return getattr(self, mix_name(projection)).squeeze(2) if self.forms[projection].shape == "mixture" else None

    def _groups(self, projection: str) -> Tensor:
        found = getattr(self, f"basis_group_{projection}", None)
        return torch.zeros(self.num_experts, dtype=torch.int64) if found is None else found

    def _stacked(self, projection: str) -> tuple[Tensor | None, ...]:
        """(left, right of the wrapper on the core or the basis; left, right of the free one), None where it is not."""
        near, far = ("input", "output") if projection == "down" else ("output", "input")
        names = [f"{wrapper}_wrapper_{projection}_{side}" for wrapper in (near, far) for side in ("left", "right")]
        return tuple(getattr(self, name, None) for name in names)


def _each(stacks: Sequence[Tensor | None], experts: int) -> Callable[[int], tuple[Tensor | None, ...]]:
    """What an expert has of each [E, ..]; for gradients all is unbound: that of a `left[e]` is a whole `left`."""
    if torch.is_grad_enabled():
        return list(zip(*[(None,) * experts if s is None else s.unbind() for s in stacks], strict=True)).__getitem__
    return lambda expert: tuple(None if s is None else s[expert] for s in stacks)


def _mixed(rows: Tensor, mix: Tensor | None) -> Tensor:
    """sum_g m_g z_g of rows (z_1, …, z_G) [P, G*k], [P, k]; mix: [G], or [P, G]; None: the rows."""
    if mix is None:
        return rows
    parts = rows.view(len(rows), mix.shape[-1], rows.shape[1] // mix.shape[-1])
    return (mix.to(rows.dtype).expand(len(rows), -1)[:, None] @ parts)[:, 0]


def _unmixed(rows: Tensor, mix: Tensor | None) -> Tensor:
    """The transpose of `_mixed`: (m_1 y, …, m_G y) of rows y, [P, G*k]."""
    if mix is None:
        return rows
    return (mix.to(rows.dtype).expand(len(rows), -1)[:, :, None] * rows[:, None]).flatten(1)


def _gate_or_up(
    x: Tensor,
    y: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    free_left: Tensor | None,
    free_right: Tensor | None,
    mix: Tensor | None,
) -> Tensor:
    """L C x + Q V^T x from y = C x, or A y from y = Z x, mixed where there is a mix, for one expert's rows."""
    y = _mixed(y, mix)
    if left is not None:
        y = y @ left if right is None else torch.addmm(y, y @ right, left)
    if free_left is not None and free_right is not None:
        # in place: y is a product or gathered rows, which no gradient needs; autocast does not cast for it
        y.addmm_(x @ free_right, free_left.to(y.dtype))
    return y


def _down(
    h: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    free_left: Tensor | None,
    free_right: Tensor | None,
    mix: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """((I + U V^T) h, U' P^T h), or (B^T h, None), mixed, for one expert's rows."""
    inner = h
    if right is not None:
        inner = h @ right if left is None else torch.addmm(h, h @ right, left)
    return _unmixed(inner, mix), None if free_left is None or free_right is None else (h @ free_right) @ free_left


def dense_weight(tensors: Mapping[str, Tensor], projection: str, expert: int) -> Tensor:
    """One expert's matrix [d_out, d_in] expanded, in float32 (float64 stays float64).

    tensors: the layer's by name (`shared_core.gate_proj.weight`, `experts.input_wrapper_gate_left`, …).
    """
    core = tensors[f"shared_core.{projection}_proj.weight"]
    core = core.to(torch.promote_types(core.dtype, torch.float32))

    def factor(wrapper: str, side: str) -> Tensor | None:
        found = tensors.get(f"experts.{wrapper}_wrapper_{projection}_{side}")
        if found is None:
            return None
        return (found[expert].T if side == "left" else found[expert]).to(core.dtype)

    near, far = ("input", "output") if projection == "down" else ("output", "input")
    left, right, free_left, free_right = (factor(w, s) for w in (near, far) for s in ("left", "right"))
    group, mix = (tensors.get(f"experts.{n}") for n in (f"basis_group_{projection}", mix_name(projection)))
    g = 0 if group is None else int(group[expert])
    if mix is not None:
        axis = 1 if projection == "down" else 0
        core = torch.einsum("g,g...->...", mix[expert, :, 0].to(core), torch.stack(core.chunk(mix.shape[1], axis)))
    if projection == "down":
        if left is None and right is not None:
            return core[:, g * right.shape[1] : (g + 1) * right.shape[1]] @ right.T
        weight = core if left is None or right is None else core + core @ left @ right.T
    else:
        if right is None and left is not None:
            return left @ core[g * left.shape[1] : (g + 1) * left.shape[1]]
        weight = core if left is None or right is None else core + left @ (right.T @ core)
    return weight if free_left is None or free_right is None else weight + free_left @ free_right.T
