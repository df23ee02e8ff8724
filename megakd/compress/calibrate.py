"""Run a checkpoint layer by layer and measure what its experts see: the weights of one layer in memory at a time.

A decoder layer is the family's own, run inside the family's own model (masks, rotary embeddings, sliding windows), in
float32. Its experts note what they are called with and answer 0: a block adds them linearly, so that expert after
expert is added afterwards, each over all tokens, and converted to float32 once.
W windows, T positions, N = W*T tokens, D hidden, F expert hidden, E experts, A active experts a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.compress.one_layer import OneLayer, without_parameters
from megakd.errors import UserError, reason
from megakd.models.sources import Sources
from megakd.models.spec import MoESpec
from megakd.models.student import expert_block

BATCH_TOKENS = 4096  # through attention at a time; 4096 queries of 32 heads are 64 MB
ROWS = 4096  # of one expert at a time
HELD_OUT = 4  # every fourth window is held out
SAMPLED = 256  # training tokens that are given to all experts, to compare what they answer
EARLY, PERCENTILE, OF_LARGEST, OF_MEDIAN = 0.75, 0.995, 0.1, 50.0  # see find_super_experts

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [N, D], expert [N, A], weight [N, A]) -> [N, D]


class Measured(NamedTuple):
    """What the experts of one MoE layer see over N tokens, float32, on the runner's device.

    A routed row of expert e is a token x with e among its active ones, w its routing weight, h = act(gate x) * (up x).
    """

    share: Tensor  # [E] sum of w^2 over an expert's rows, divided by that of all experts: what its error counts
    counts: Tensor  # [E] int64, routed rows, the held-out ones among them
    inputs: Tensor  # [D, D] mean of x x^T over training tokens: the inputs of every gate and up
    inputs_held: Tensor  # [D, D] the same over held-out tokens
    # [E, F, F] sum w^2 h h^T / sum w^2 over an expert's training rows, 0 without: the inputs of its down
    hidden: Tensor
    hidden_held: Tensor  # [E, F, F]
    # [E, F] what a unit of squared error in (gate x)_j costs the output, to first order, over training rows:
    # sum w^2 (dh_j / d(gate x)_j)^2 / sum w^2 * ||column j of down||^2
    gate_rows: Tensor
    up_rows: Tensor  # [E, F] the same of (up x)_j
    peaks: Tensor  # [E] largest |entry| of an expert's output down h, not weighted
    counts_held: Tensor  # [E] int64, routed rows of held-out tokens
    power: Tensor  # [] mean over tokens of the sum of its experts' w^2
    stream: Tensor  # [] median over tokens of the squared norm of the hidden state behind the layer
    # [E] mean over an expert's training rows of w ||down h||, 0 without: its saliency (REAP: Lasby et al. 2025)
    saliency: Tensor
    # [E, E] mean of y_i . y_j, y = down h, over SAMPLED training tokens that all experts get; 0 where not asked for
    likeness: Tensor
    answers: Tensor  # [H, D] what the experts add for each held-out token: the sum of w down h


class LayerRunner:
    """Runs windows of tokens through the layers of a checkpoint in order, of any family of `MoESpec`.

    tokens, position_ids: [W, T]; positions restart at 0 where a packed document begins, as in training.
    batch: windows through attention at a time; results depend on it by rounding alone.
    lengths: [W] the tokens of each window, the rest of it is padding: never measured, and without experts' outputs,
    which nothing before it sees. None: no padding.
    Held out is every fourth window, the first among them; of a single window, the second half.
    """

    def __init__(
        self,
        sources: Sources,
        spec: MoESpec,
        config: Any,
        tokens: Tensor,
        position_ids: Tensor,
        *,
        device: torch.device | str = "cpu",
        lengths: Tensor | None = None,
        batch: int | None = None,
    ):
        assert tokens.shape == position_ids.shape and tokens.ndim == 2, (tokens.shape, position_ids.shape)
        self.sources, self.spec, self.config = sources, spec, config
        self.device = torch.device(device)
        self.tokens, self.position_ids = tokens, position_ids.to(self.device)
        self.batch = batch or max(BATCH_TOKENS // tokens.shape[1], 1)
        self.held_N, self.real_N = held_out(*tokens.shape).flatten().to(self.device), None
        if lengths is not None and int(lengths.min()) < tokens.shape[1]:
            real = torch.arange(tokens.shape[1]) < lengths[:, None]
            held = held_out(*tokens.shape) if len(tokens) > 1 else held_out(1, int(lengths[0]))
            self.real_N = real.flatten().nonzero()[:, 0].to(self.device)
            self.held_N = (held[real] if len(tokens) > 1 else held[0]).to(self.device)
        self.act_fn = spec.activation
        with self._one_layer_at_a_time():
            self.model = OneLayer(config, self.device)
        self.layers = self.model.layers
        self.blocks: dict[int, Any] = {index: expert_block(self.layers[index]) for index in spec.layers}

    @torch.no_grad()
    def embed(self) -> Tensor:
        """Hidden states before the first layer, [W, T, D] float32."""
        name = "model.embed_tokens.weight"
        stored = self.sources.recipe(name).names[0]
        table = self.sources.checkpoint.tensor(stored)  # mapped: only the rows that are looked up are read
        if int(self.tokens.max()) >= len(table):
            raise UserError(f"{self.sources.place(name)} has {len(table)} rows, the tokens go to {self.tokens.max()}")
        used, ids = self.tokens.cpu().unique(return_inverse=True)
        rows_VD, ids = table[used].to(self.device, torch.float32), ids.to(self.device)
        with self._one_layer_at_a_time():
            batches = zip(ids.split(self.batch), self.position_ids.split(self.batch), strict=True)
            return torch.cat([self.model.embed(rows_VD, *batch) for batch in batches])

    @torch.no_grad()
    def layer(
        self,
        index: int,
        hidden: Tensor,
        experts: Experts | None = None,
        measure: bool = False,
        compare: bool = False,
    ) -> tuple[Tensor, Measured | None]:
        """Hidden states behind layer `index`, a new [W, T, D]; and the measurements, None where nothing is measured.

        experts: stands for the family's, called as those are, a batch at a time; None: the checkpoint's own.
        compare: measure `likeness` too.
        A layer without experts passes through its dense MLP.
        """
        assert experts is None or not measure, "what is measured are the checkpoint's own experts"
        sparse = index in self.spec.layers
        assert sparse or experts is None, f"layer {index} has no experts to stand for"
        recorder = _Recorder(self.tokens.numel())
        if sparse:
            self.blocks[index].experts = recorder if experts is None else _Delegate(experts)
        out = self._through(index, hidden)
        found = None
        if sparse and experts is None:
            adds = self._adds(index, hidden)
            answers = out if adds else torch.zeros_like(out)
            found = self._add_experts(index, recorder, answers.view(-1, out.shape[-1]), measure, compare)
            if not adds:  # a norm, a scale, or something else lies between the experts and the residual stream
                self.blocks[index].experts = _Replay(answers.view(-1, out.shape[-1]))
                out = self._through(index, hidden)
            if found is not None:
                out_ND = out.view(-1, out.shape[-1])
                norms_N = torch.linalg.vector_norm(out_ND if self.real_N is None else out_ND[self.real_N], dim=1)
                found.stream.copy_(norms_N.median().square())
        if not torch.isfinite(out.sum()) and not torch.isfinite(out).all():
            raise UserError(f"{self.sources.folder}: layer {index} answers NaN or infinite numbers: damaged weights?")
        return out, found

    @torch.no_grad()
    def answers(self, index: int, hidden: Tensor, experts: Experts | None = None) -> Tensor:
        """What the experts of a layer add for each token but padding, [N, D]: the sum of w down h."""
        recorder = _Recorder(self.tokens.numel())
        self.blocks[index].experts = recorder
        self._through(index, hidden)
        if experts is None:
            found = torch.zeros_like(recorder.noted[0])
            self._add_experts(index, recorder, found, measure=False, compare=False)
        else:
            batches = zip(*(part.split(BATCH_TOKENS) for part in recorder.noted), strict=True)
            found = torch.cat([experts(*batch) for batch in batches])
        return found if self.real_N is None else found[self.real_N]

    def _through(self, index: int, hidden: Tensor) -> Tensor:
        """The family's forward over one layer, [W, T, D]."""
        layer = self.layers[index]
        layer.load_state_dict(self._weights(index), assign=True)
        out = torch.empty_like(hidden)
        for start in range(0, len(hidden), self.batch):
            rows = slice(start, min(start + self.batch, len(hidden)))
            with self._one_layer_at_a_time():
                out[rows] = self.model.run(index, hidden[rows].to(self.device), self.position_ids[rows])
        if index in self.blocks:
            self.blocks[index].experts = None
        layer.load_state_dict(without_parameters(layer), assign=True)
        return out

    def _adds(self, index: int, hidden: Tensor) -> bool:
        """Whether a layer's output is what it is without experts plus their answer: with one, and with zeros."""
        probe = torch.randn(hidden[:1].shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        found = []
        for answer in (probe, torch.zeros_like(probe)):
            self.blocks[index].experts = _Replay(answer.view(-1, answer.shape[-1]))
            found.append(self._through(index, hidden[:1]))
        moved = (found[0] - found[1]).to(self.device)
        return bool((moved - probe).norm() <= 1e-3 * probe.norm())

    @contextmanager
    def _one_layer_at_a_time(self) -> Iterator[None]:
        """UserError where a family's own code cannot do that."""
        try:
            yield
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a family's code, with layers that it was not made for: any kind may come
            raise UserError(
                f"{self.sources.folder}: {self.config.model_type} cannot be run one layer at a time, as calibration "
                f"does ({reason(error)}); set compress.calibration_tokens=0 in a new run, with "
                "compress.method=shared_core"
            ) from error

    def _weights(self, index: int) -> dict[str, Tensor]:
        """All tensors of a layer (its experts are replaced by now), by their names inside it, in float32."""
        found = {}
        for name in self.layers[index].state_dict():
            whole = f"model.layers.{index}.{name}"
            tensor = self.sources.raw(whole)
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(f"{self.sources.place(whole)} is stored as {kind}; convert it to bfloat16 first")
            found[name] = tensor.to(self.device, torch.float32)
        return found

    def _add_experts(
        self, index: int, called: "_Recorder", out_ND: Tensor, measure: bool, compare: bool
    ) -> Measured | None:
        """Add the experts' answers to what they were called with, in place; the measurements."""
        x_ND, expert_NA, weight_NA = (part if self.real_N is None else part[self.real_N] for part in called.noted)
        found = self._measured(x_ND, expert_NA, weight_NA) if measure else None
        place_N = self.held_N.cumsum(0) - 1  # of a held-out token among those
        weights = [self.sources.experts(self.spec, index, p) for p in ("gate", "up", "down")]
        for expert, (token, weight) in enumerate(routed(expert_NA, weight_NA, self.spec.experts)):
            if len(token) == 0:
                continue
            gate, up, down = (w[expert].to(self.device, torch.float32) for w in weights)
            for row, w in zip(token.split(ROWS), weight.split(ROWS), strict=True):
                rows = self._through_expert(x_ND[row], w, gate, up, down)
                out_ND.index_add_(0, row if self.real_N is None else self.real_N[row], rows.y * w)
                if found is not None:
                    held = self.held_N[row]
                    self._add_rows(found, expert, rows, held)
                    found.answers.index_add_(0, place_N[row[held]], (rows.y * w)[held])
            if found is not None:
                _divide(found, expert, weight, self.held_N[token], down)
        if found is not None and compare:
            self._compare(found, x_ND, weights)
        return found

    def _compare(self, found: Measured, x_ND: Tensor, weights: list[Tensor]) -> None:
        """Give training tokens to all experts, and add up the inner products of their answers."""
        training = (~self.held_N).nonzero()[:, 0]
        some = training[torch.linspace(0, len(training) - 1, min(SAMPLED, len(training))).round().long()]
        experts = self.spec.experts
        y_END = x_ND.new_empty(experts, len(some), x_ND.shape[1])
        for expert in range(experts):
            gate, up, down = (w[expert].to(self.device, torch.float32) for w in weights)
            y_END[expert] = self._through_expert(x_ND[some], x_ND.new_ones(len(some), 1), gate, up, down).y
        flat = y_END.flatten(1)
        found.likeness.copy_(flat @ flat.T / len(some))

    def _through_expert(self, x: Tensor, w: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> "_Rows":
        g, u = x @ gate.T, x @ up.T
        activated = self.act_fn(g)
        h = activated * u
        return _Rows(w, g, u, activated, h, h @ down.T)

    def _add_rows(self, found: Measured, expert: int, rows: "_Rows", held: Tensor) -> None:
        """Add an expert's rows to its sums; those of held-out tokens to the held-out second moment alone."""
        w, g, u, activated, h, y = rows
        found.peaks[expert] = torch.maximum(found.peaks[expert], y.abs().max())
        found.saliency[expert] += (w[:, 0] * torch.linalg.vector_norm(y, dim=1))[~held].sum()
        weighted = h * w
        for total, part in ((found.hidden, weighted[~held]), (found.hidden_held, weighted[held])):
            total[expert].addmm_(part.T, part)
        # h = act(g) u: dh/dg = act'(g) u and dh/du = act(g)
        of_gate, of_up = slope(self.act_fn, g) * u * w, activated * w
        found.gate_rows[expert] += of_gate[~held].square().sum(0)
        found.up_rows[expert] += of_up[~held].square().sum(0)

    def _measured(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Measured:
        """The measurements that need no expert; zeros for the others."""
        experts, (d, f) = self.spec.experts, self.spec.sizes
        power = x_ND.new_zeros(experts, dtype=torch.float64)
        power.index_add_(0, expert_NA.flatten(), weight_NA.flatten().double().square())
        inputs = x_ND.new_zeros(2, d, d)
        for x, held in zip(x_ND.split(ROWS), self.held_N.split(ROWS), strict=True):
            for total, part in zip(inputs, (x[~held], x[held]), strict=True):
                total.addmm_(part.T, part)
        count_held = int(self.held_N.sum())
        inputs[0] /= max(len(x_ND) - count_held, 1)
        inputs[1] /= max(count_held, 1)
        hidden = (x_ND.new_zeros(experts, f, f) for _ in range(2))
        rows = (x_ND.new_zeros(experts, f) for _ in range(2))
        counts, counts_held = (
            torch.bincount(chosen.flatten(), minlength=experts) for chosen in (expert_NA, expert_NA[self.held_N])
        )
        share, mean_power = (power / power.sum()).float(), (power.sum() / len(x_ND)).float()
        peaks, saliency = x_ND.new_zeros(2, experts)
        stream, likeness, answers = (x_ND.new_zeros(shape) for shape in ((), (experts, experts), (count_held, d)))
        return Measured(
            share,
            counts,
            inputs[0],
            inputs[1],
            *hidden,
            *rows,
            peaks,
            counts_held,
            mean_power,
            stream,
            saliency,
            likeness,
            answers,
        )


class _Rows(NamedTuple):
    """Rows of one expert: routing weights w, g = gate x, u = up x, act(g), h = act(g) u, y = down h."""

    w: Tensor
    g: Tensor
    u: Tensor
    activated: Tensor
    h: Tensor
    y: Tensor


def _divide(found: Measured, expert: int, weight: Tensor, held: Tensor, down: Tensor) -> None:
    """An expert's sums by the sums of its squared routing weights, in float64: they are of all its rows."""
    squares = weight[:, 0].double().square()
    own, other = (float(squares[side].sum()) or 1.0 for side in (~held, held))
    found.saliency[expert].div_(max(int((~held).sum()), 1))
    found.hidden[expert].div_(own)
    found.hidden_held[expert].div_(other)
    for rows in (found.gate_rows, found.up_rows):
        rows[expert].mul_(down.square().sum(0) / own)


def slope(act_fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an activation function at every entry."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(act_fn(leaf).sum(), leaf)[0]


def held_out(windows: int, length: int) -> Tensor:
    """Which tokens are held out, [W, T] bool: windows 0, 4, 8, …; of a single window, its second half."""
    if windows == 1:
        return (torch.arange(length) >= (length + 1) // 2)[None]
    return (torch.arange(windows) % HELD_OUT == 0)[:, None].expand(windows, length)


def routed(expert_NA: Tensor, weight_NA: Tensor, experts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every expert in turn its tokens [n], in order, and their routing weights [n, 1]."""
    order_P = torch.argsort(expert_NA.flatten(), stable=True)
    counts = torch.bincount(expert_NA.flatten(), minlength=experts).tolist()
    tokens = (order_P // expert_NA.shape[1]).split(counts)
    return iter(zip(tokens, weight_NA.flatten()[order_P, None].split(counts), strict=True))


def find_super_experts(peaks: dict[int, Tensor]) -> dict[int, tuple[int, ...]]:
    """The experts that make a model's massive activations, by layer; layers without any are skipped.

    Su et al. 2025 ("Unveiling Super Experts in Mixture-of-Experts Large Language Models"), equation 6: the peak of an
    expert's output is above the 99.5th percentile of all peaks and above a tenth of the largest. As in the authors'
    code, only the first three quarters of the layers count: massive activations form early, and the last layers,
    which take them away again, have large outputs too.

    Any model has a largest peak, so we also ask that it is more than 50 times the median peak, else there are none.
    Sun et al. 2024 call an activation massive above about 1000 times the median |activation|; an ordinary expert's
    peak over thousands of tokens is itself 5 to 7 times its median |output|, so a massive one is some 150 to 200 times
    the median peak, and 50 leaves a factor of three.
    """
    early = round((max(peaks, default=0) + 1) * EARLY)
    considered = {layer: peak.float().cpu() for layer, peak in sorted(peaks.items()) if layer < early}
    if not considered:
        return {}
    every = torch.cat(list(considered.values()))
    largest = every.max()
    if not largest > OF_MEDIAN * every.median():
        return {}
    bound = torch.maximum(torch.quantile(every.double(), PERCENTILE).float(), OF_LARGEST * largest)
    found = {layer: tuple(torch.where(peak > bound)[0].tolist()) for layer, peak in considered.items()}
    return {layer: experts for layer, experts in found.items() if experts}


class _Recorder(nn.Module):
    """Stands for a block's experts: notes what it is called with, N tokens in batches, and answers 0."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.filled = tokens, 0
        self.noted: tuple[Tensor, ...] = ()

    def forward(self, *called: Tensor) -> Tensor:
        if not self.noted:  # made once: parts joined at the end would need their memory twice
            self.noted = tuple(part.new_empty(self.tokens, part.shape[1]) for part in called)
        for whole, part in zip(self.noted, called, strict=True):
            whole[self.filled : self.filled + len(part)] = part
        self.filled += len(called[0])
        return torch.zeros_like(called[0])


class _Replay(nn.Module):
    """Stands for a block's experts: answers of N tokens, given out in the batches that ask."""

    def __init__(self, answer_ND: Tensor):
        super().__init__()
        self.answer_ND, self.given = answer_ND, 0

    def forward(self, x_ND: Tensor, *_: Tensor) -> Tensor:
        self.given += len(x_ND)
        return self.answer_ND[self.given - len(x_ND) : self.given].to(x_ND.device)


class _Delegate(nn.Module):
    """Any callable as a block's experts, without owning its parameters."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.called = (experts,)  # in a tuple: nn.Module would register a module as its child

    def forward(self, x_ND: Tensor, expert_NA: Tensor, weight_NA: Tensor) -> Tensor:
        return self.called[0](x_ND, expert_NA, weight_NA)
