import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from megakd.capture import teacher as teacher_module
from megakd.capture.targets import draw, targets_from_logits
from megakd.capture.teacher import Teacher, batch_targets
from megakd.config.data import LogitsConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Sample, TeacherTargets
from megakd.errors import UserError
from megakd.models.loading import load_model
from megakd.models.tiny import tiny_moe_config
from tests.conftest import for_each

TEMPERATURES = (1.0, 0.5, 2.0, 5.0)
REAL, PADDED = 43, 50  # vocabulary with and without the rows that pad the embedding
CPU = torch.device("cpu")


class Row(NamedTuple):
    """One position in Python: the head as {id: log p}, tails, draws as {id: share}, entropy, NLL of the label."""

    head: dict[int, float]
    tails: list[float]
    draws: dict[int, float]
    entropy: float
    nll: float


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    log_z = largest + math.log(sum(math.exp(x - largest) for x in logits))
    return [x - log_z for x in logits]


def reference(logits: list[float], label: int, config: LogitsConfig, offset: float) -> Row:
    """One position in Python floats, from the whole distribution."""
    log_p = log_softmax(logits)
    first = sorted(range(len(logits)), key=lambda i: -logits[i])[: config.top_k]
    ids = [i for i in first if math.exp(log_p[i]) >= config.pmin] or first[:1]
    ids = [] if config.profile == "sampled" else ids
    rest = [i for i in range(len(logits)) if i not in ids]
    tails = [math.log(sum(math.exp(log_p[i] / t) for i in rest)) if rest and ids else -math.inf for t in TEMPERATURES]
    nll = 0.0 if label == IGNORED else -log_p[label]
    head = {i: log_p[i] for i in ids}
    if config.profile == "topk":
        return Row(head, tails, {}, 0.0, nll)
    log_powers = log_softmax([x / config.draw_temperature for x in logits])
    entropy = -sum(math.exp(x) * x for x in log_powers)
    mass = sum(math.exp(log_powers[i]) for i in rest)
    shares = reference_draws([math.exp(log_powers[i]) / mass if i in rest else 0.0 for i in range(len(logits))],
                             config.draws, offset)  # fmt: skip
    return Row(head, tails, shares, entropy, nll)


def reference_draws(p: list[float], number: int, offset: float) -> dict[int, float]:
    """Systematic sampling, a point after the other: the first id at which the cumulated p exceeds the point."""
    hits: dict[int, int] = {}
    for i in range(number):
        point, i, total = (i + offset) / number, 0, p[0]
        while total <= point:
            i += 1
            total += p[i]
        hits[i] = hits.get(i, 0) + 1
    return {i: count / number for i, count in hits.items()}


def rows_of(targets: TeacherTargets) -> list[Row]:
    """Targets [N, ..] without the fillers, which are checked: they repeat an id of their row."""
    rows = []
    for ids, logprobs, tails, draw_ids, shares, entropy, nll in zip(*(f.tolist() for f in targets), strict=True):
        head = {i: x for i, x in zip(ids, logprobs, strict=True) if x > -math.inf}
        draws = {i: x for i, x in zip(draw_ids, shares, strict=True) if x > 0}
        assert len(head) == sum(x > -math.inf for x in logprobs) and set(ids) == set(head)
        assert len(draws) == sum(x > 0 for x in shares) and set(draw_ids) == set(draws)
        rows.append(Row(head, tails, draws, entropy, nll))
    return rows


def assert_close(found: Row, expected: Row, tolerance: float) -> None:
    assert found.head.keys() == expected.head.keys() and found.draws.keys() == expected.draws.keys()
    assert found.head == pytest.approx(expected.head, abs=tolerance)
    assert found.tails == pytest.approx(expected.tails, abs=tolerance)
    assert found.draws == pytest.approx(expected.draws, abs=1e-6)  # whole draws over their number
    assert (found.entropy, found.nll) == pytest.approx((expected.entropy, expected.nll), abs=tolerance)


def logits_of(tokens: int, vocabulary: int, seed: int = 0, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits far from normalised, in float64; labels, every second ignored; offsets."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) + 20
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::2] = IGNORED
    return logits, labels, torch.rand(tokens, generator=generator, dtype=torch.float64)


@for_each("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@for_each("draw_temperature", [1.0, 2.0])
@for_each("pmin", [0.0, 3e-3, 0.2])
@for_each("shape", [(1, 5, 2), (7, 33, 8), (3, 11, 10), (40, 9, 1)])  # N, V, K
@for_each("profile", ["topk", "sampled", "hybrid"])
def test_targets_are_those_of_the_reference(profile, shape, pmin, draw_temperature, dtype, tolerance):
    tokens, vocabulary, top_k = shape
    config = LogitsConfig(
        profile=profile, top_k=top_k, pmin=pmin, draws=13, draw_temperature=draw_temperature, temperatures=TEMPERATURES
    )
    logits, labels, offsets = logits_of(tokens, vocabulary)
    logits = logits.to(dtype)
    targets = targets_from_logits(logits, labels, config, offsets)
    kept, drawn = top_k * (profile != "sampled"), 13 * (profile != "topk")
    shapes = [(tokens, n) for n in (kept, kept, 4, drawn, drawn)] + [(tokens,), (tokens,)]
    assert [tuple(field.shape) for field in targets] == shapes
    assert targets.ids.dtype == targets.draw_ids.dtype == torch.int32
    found = rows_of(targets)
    for row, values, label, offset in zip(found, logits.tolist(), labels.tolist(), offsets.tolist(), strict=True):
        assert_close(row, reference(values, label, config, offset), tolerance)
        assert not row.head.keys() & row.draws.keys()
    assert (targets.label_nll[::2] == 0).all()
    if pmin == 0.2 and shape == (7, 33, 8) and kept:
        assert len({len(row.head) for row in found}) > 1  # adaptive counts


@for_each("vocabulary, top_k", [(6, 6), (1, 1)])
@for_each("profile", ["topk", "hybrid"])
def test_a_head_of_everything_leaves_no_tail(profile, vocabulary, top_k):
    """Draws from nothing: a row of them all the same, whose weight is the tail's zero."""
    logits, labels, offsets = logits_of(5, vocabulary)
    config = LogitsConfig(profile=profile, top_k=top_k, pmin=0.0, draws=3, temperatures=TEMPERATURES)
    targets = targets_from_logits(logits, labels, config, offsets)
    assert (targets.log_tails == -torch.inf).all() and torch.allclose(
        targets.logprobs.exp().sum(-1), torch.ones(5, dtype=torch.float64)
    )
    if profile == "hybrid":
        assert ((targets.draw_ids >= 0) & (targets.draw_ids < vocabulary)).all()
        assert torch.allclose(targets.draw_shares.sum(-1), torch.ones(5))


def test_the_first_entry_stays_however_improbable_it_is():
    logits = torch.zeros(2, 1000, dtype=torch.float64)
    logits[1, 7] = 1e-3
    config = LogitsConfig(top_k=50, pmin=0.5, temperatures=(1.0, 2.0))
    targets = targets_from_logits(logits, torch.tensor([3, 4]), config, torch.zeros(2))
    assert [len(row.head) for row in rows_of(targets)] == [1, 1] and targets.ids[1].eq(7).all()
    assert targets.log_tails.exp()[0].tolist() == pytest.approx([999 / 1000, 999 / 1000**0.5])


def test_tails_include_what_pmin_drops():
    """p = (1/2, 1/4, 1/8, 1/8), K = 3, pmin = 0.2: both eighths are outside."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    config = LogitsConfig(top_k=3, pmin=0.2, temperatures=(1.0, 2.0))
    targets = targets_from_logits(logits, torch.tensor([0]), config, torch.zeros(1))
    assert rows_of(targets)[0].head.keys() == {0, 1}
    assert targets.log_tails.exp().tolist() == [pytest.approx([0.25, 2 * 0.125**0.5])]


def test_tail_is_the_sum_of_powers():
    """p = (1/2, 1/4, 1/4), K = 1, T = 2: 1/2 + 1/2 outside, where the power of the sum would be sqrt(1/2)."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    config = LogitsConfig(top_k=1, temperatures=(2.0,))  # 1 is always declared
    targets = targets_from_logits(logits, torch.tensor([0]), config, torch.zeros(1))
    assert targets.log_tails.exp().tolist() == [pytest.approx([0.5, 1.0])]


@for_each("profile", ["topk", "sampled", "hybrid"])
def test_extreme_logits_stay_finite(profile):
    logits = torch.tensor([[1e4, 0.0, -1e4, 5.0], [-30.0, -30.0, -30.0, -30.0]])
    config = LogitsConfig(profile=profile, top_k=2, pmin=0.0, draws=5, temperatures=TEMPERATURES)
    targets = targets_from_logits(logits, torch.tensor([1, 2]), config, torch.tensor([0.0, 0.99]))
    finite = targets if profile != "sampled" else targets._replace(log_tails=targets.label_nll)
    assert all(field.isfinite().all() for field in finite)
    assert targets.label_nll.tolist() == pytest.approx([1e4, math.log(4)], rel=1e-6)
    if profile != "topk":
        assert targets.entropy.tolist() == pytest.approx([0.0, math.log(4)])
        assert torch.allclose(targets.draw_shares.sum(-1), torch.ones(2))


def test_forbidden_tokens_do_not_spoil_the_entropy():
    """A teacher that sets logits to -inf: 0 log 0 is 0, and they are never drawn."""
    logits = torch.tensor([[1.0, -torch.inf, 1.0, -torch.inf]])
    config = LogitsConfig(profile="sampled", draws=8)
    targets = targets_from_logits(logits, torch.tensor([0]), config, torch.tensor([0.5]))
    assert targets.entropy.item() == pytest.approx(math.log(2)) and rows_of(targets)[0].draws == {0: 0.5, 2: 0.5}


def test_sampled_shares_are_those_of_the_whole_distribution_at_its_temperature():
    logits, labels, _ = logits_of(3, 20)
    config = LogitsConfig(profile="sampled", draws=255, draw_temperature=2.0)
    shares = torch.zeros(3, 20, dtype=torch.float64)
    for offset in np.arange(40) / 40:
        targets = targets_from_logits(logits, labels, config, torch.full((3,), offset))
        shares.scatter_add_(1, targets.draw_ids.long(), targets.draw_shares.double() / 40)
    assert torch.allclose(shares, (logits / 2).softmax(-1), atol=1 / (255 * 40))


def dense_shares(ids_ND: Tensor, shares_ND: Tensor, number: int, vocabulary: int) -> Tensor:
    """Counts of draws by id, [N, V]."""
    counts = (shares_ND * number).round().double()
    return torch.zeros(len(ids_ND), vocabulary, dtype=torch.float64).scatter_add_(1, ids_ND, counts)


def dirichlet(rows: int, vocabulary: int, seed: int, zeros: bool = True) -> Tensor:
    """Rows of all kinds: flat and peaked, with ids of no mass at the start, in the middle and at the end."""
    chooser = np.random.default_rng(seed)
    p = np.stack([chooser.dirichlet(np.full(vocabulary, 10 ** chooser.uniform(-2, 1))) for _ in range(rows)])
    if zeros:
        p[:, chooser.random(vocabulary) < 0.3] = 0
        p[::2, : vocabulary // 4], p[::3, -vocabulary // 4 :] = 0, 0
        p[:, vocabulary // 2] += 1e-3
    return torch.from_numpy(p / p.sum(1, keepdims=True))


@for_each("number", [1, 2, 12, 50, 255])
@for_each("vocabulary", [5, 400])
def test_draws_are_those_of_the_reference(number, vocabulary):
    p = dirichlet(40, vocabulary, number)
    offsets = torch.from_numpy(np.random.default_rng(1).random(40))
    ids, shares = draw(p, number, offsets)
    assert ids.shape == shares.shape == (40, number)
    assert torch.allclose(shares.sum(-1), torch.ones(40), atol=1e-6)
    for row in range(40):
        filled = shares[row] > 0
        found = dict(zip(ids[row][filled].tolist(), shares[row][filled].tolist(), strict=True))
        assert len(found) == filled.sum() and set(ids[row].tolist()) == set(found)  # distinct; fillers repeat
        assert not filled[len(found) :].any()
        assert found == pytest.approx(reference_draws(p[row].tolist(), number, offsets[row].item()), abs=1e-6)
        assert all(abs(share - p[row, i].item()) < 1 / number + 1e-6 for i, share in found.items())


@for_each("number, grid", [(1, 720), (12, 60), (50, 8)])
def test_the_mean_share_over_all_offsets_is_p(number, grid):
    """p in multiples of 1 / (number * grid), offsets at the middles of the grid: exact, not only in expectation."""
    chooser = np.random.default_rng(0)
    p = torch.from_numpy(chooser.multinomial(number * grid, chooser.dirichlet(np.full(30, 0.3), 9)) / (number * grid))
    total = torch.zeros_like(p)
    for step in range(grid):
        offsets = torch.full((9,), (step + 0.5) / grid, dtype=torch.float64)
        total += dense_shares(*draw(p, number, offsets), number, 30)
    assert torch.allclose(total / (number * grid), p, atol=1e-9, rtol=0)


def test_an_id_without_mass_is_never_drawn():
    """Also with offsets at both ends, and where rounding leaves the cumulated sum below or above 1."""
    for seed in range(20):
        p = dirichlet(64, 300, seed)
        for offset in (0.0, 1e-300, 0.5, 1 - 2**-53):
            for number in (1, 50, 255):
                ids, shares = draw(p, number, torch.full((64,), offset, dtype=torch.float64))
                assert p.gather(1, ids).gt(0).all() and torch.allclose(shares.sum(-1), torch.ones(64), atol=1e-5)
    tenths = torch.tensor([[0.0, *[0.1] * 10, 0.0]], dtype=torch.float64)  # cumulated: 0.9999999999999999
    for number in range(1, 256):
        ids, _ = draw(
            tenths, number, torch.tensor([1 - 2**-53], dtype=torch.float64)
        )  # the last point rounds to the end
        assert set(ids[0].tolist()) <= set(range(1, 11))


def test_exact_points_go_to_the_id_that_begins_there():
    """Offset 0 and p in multiples of 1 / number: every point is a border of p; exact fractions say whose it is."""
    counts = [3, 0, 1, 4, 0, 8]
    p = torch.tensor([counts], dtype=torch.float64) / 16
    ids, shares = draw(p, 16, torch.zeros(1))
    found = {
        i: Fraction(s).limit_denominator(16) for i, s in zip(ids[0].tolist(), shares[0].tolist(), strict=True) if s
    }
    assert found == {i: Fraction(n, 16) for i, n in enumerate(counts) if n}


def tiny(vocabulary: int = PADDED, **changes: Any) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = tiny_moe_config(
        vocabulary, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=2, head_dim=8, num_attention_heads=2
    )
    config.tie_word_embeddings = False
    model = Qwen3MoeForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def padded_teacher():
    """Its most probable tokens are often the padding's."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[REAL:] *= 3
    return model


def sample(key: str, length: int, starts: list[int]) -> Sample:
    tokens = np.random.default_rng(length).integers(1, REAL, length + 1).astype(np.int32)
    return Sample(key, tokens, np.array(starts, np.int32))


def chunks_of(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setitem(teacher_module.CHUNK_BYTES, "cpu", 4 * REAL * positions)


CONFIGS = [
    LogitsConfig(profile="topk", top_k=5, pmin=0.02, temperatures=TEMPERATURES),
    LogitsConfig(profile="sampled", draws=11, draw_temperature=2.0, temperatures=TEMPERATURES),
    LogitsConfig(profile="hybrid", top_k=4, draws=7, pmin=0.02, temperatures=TEMPERATURES),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.profile)
def test_padding_of_the_vocabulary_is_cut_before_normalising(padded_teacher, monkeypatch, config):
    """More positions than one chunk, and padded and border positions without a label."""
    batch = collate([sample("a", 101, [0, 77]), sample("b", 90, [0]), sample("c", 101, [0])], 101)
    with torch.no_grad():
        logits = padded_teacher(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    assert (logits.argmax(-1) >= REAL).any()
    chunks_of(monkeypatch, 13)
    offsets = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = batch_targets(Teacher(padded_teacher, config, REAL), batch, offsets, CPU)
    assert all(field.shape[:2] == (3, 101) and not field.requires_grad for field in targets)
    found = rows_of(TeacherTargets(*(field.flatten(0, 1) for field in targets)))
    flat = (logits[..., :REAL].flatten(0, 1).tolist(), batch.labels.flatten().tolist(), offsets.flatten().tolist())
    for row, values, label, offset in zip(found, *flat, strict=True):
        assert_close(row, reference(values, label, config, offset), 2e-5)
    if config.profile != "sampled":
        mass = targets.logprobs.exp().sum(-1) + targets.log_tails[..., 0].exp()
        assert torch.allclose(mass, torch.ones_like(mass), atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.profile)
@pytest.mark.parametrize("positions", [1, 7, 40, 79, 80])
def test_chunks_make_no_difference(padded_teacher, monkeypatch, positions, config):
    batch = collate([sample("a", 40, [0, 7]), sample("b", 37, [0])], 40)
    offsets = torch.rand(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = Teacher(padded_teacher, config, REAL)
    whole = batch_targets(teacher, batch, offsets, CPU)
    calls: list[int] = []
    handle = teacher.lm_head.register_forward_hook(lambda *args: calls.append(len(args[2])))
    chunks_of(monkeypatch, positions)
    parts = batch_targets(teacher, batch, offsets, CPU)
    handle.remove()
    assert calls == [positions] * (80 // positions) + ([80 % positions] if 80 % positions else [])
    for mine, theirs in zip(parts, whole, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        close = torch.isclose(mine.double(), theirs.double(), atol=1e-5, rtol=0)  # -inf is close to -inf
        assert close.all()


def test_less_than_one_position_a_chunk_is_one(padded_teacher, monkeypatch):
    monkeypatch.setitem(teacher_module.CHUNK_BYTES, "cpu", 5)
    batch = collate([sample("a", 6, [0])], 6)
    targets = batch_targets(Teacher(padded_teacher, CONFIGS[0], REAL), batch, torch.zeros(1, 6), CPU)
    assert targets.ids.shape == (1, 6, 5)


def test_packed_documents_get_the_targets_that_they_get_alone(padded_teacher):
    packed = sample("a", 40, [0, 13])
    parts = [Sample("b", packed.tokens[:13], packed.starts[:1]), Sample("c", packed.tokens[13:], packed.starts[:1])]
    config = LogitsConfig(profile="hybrid", top_k=5, draws=9, temperatures=TEMPERATURES)
    teacher, offsets = Teacher(padded_teacher, config, REAL), torch.rand(1, 40, dtype=torch.float64)
    together = batch_targets(teacher, collate([packed], 40), offsets, CPU)
    for part, begin, end in ((parts[0], 0, 12), (parts[1], 13, 40)):
        alone = batch_targets(teacher, collate([part], end - begin), offsets[:, begin:end], CPU)
        for field, one in zip(together, alone, strict=True):
            assert torch.isclose(field[:, begin:end].double(), one.double(), atol=1e-5, rtol=0).all()


class Altered(nn.Module):
    """A causal LM as transformers writes them, whose logits are a function of what its head gives."""

    base_model_prefix = "model"

    def __init__(self, inner: Any, change: Any):
        super().__init__()
        self.model, self.lm_head, self.config, self.change = inner.model, inner.lm_head, inner.config, change

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, tokens: Tensor, use_cache: bool = True) -> Any:
        hidden = self.model(tokens, use_cache=use_cache).last_hidden_state
        return type("Output", (), {"logits": self.change(self.lm_head(hidden))})


CHANGES = {
    "scaled down": lambda x: x / 8,
    "scaled by a twentieth": lambda x: x * 1.05,
    "capped": lambda x: x.abs().max() * torch.tanh(x / x.abs().max()),
    "shifted": lambda x: x + torch.arange(x.shape[-1]) / 100 * x.abs().max(),
}


@for_each("change", CHANGES)
def test_a_family_whose_logits_are_not_its_heads_is_refused(change):
    """Gemma 2 caps them, Granite and Cohere scale them: targets of bare heads would be another distribution's."""
    model, batch = tiny(), collate([sample("a", 20, [0])], 20)
    batch_targets(Teacher(Altered(model, lambda x: x), CONFIGS[0], REAL), batch, torch.zeros(1, 20), CPU)
    with pytest.raises(UserError, match=r"qwen3_moe: logits are not.*cannot be captured") as caught:
        batch_targets(Teacher(Altered(model, CHANGES[change]), CONFIGS[0], REAL), batch, torch.zeros(1, 20), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype, advice", [("float32", False), ("bfloat16", True), ("float16", True)])
def test_a_teacher_that_gives_nan_is_named(tmp_path, dtype, advice):
    """At the first check already, where it was a traceback about tolerances."""
    tiny().save_pretrained(tmp_path)
    model = load_model(tmp_path, getattr(torch, dtype))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = torch.nan
    batch = collate([sample("a", 20, [0])], 20)
    with pytest.raises(UserError) as caught:
        batch_targets(Teacher(model, CONFIGS[0], REAL), batch, torch.zeros(1, 20), CPU)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: the teacher answers") and "NaN" in message and "damaged" in message
    assert (f"too large for {dtype}: try logits.dtype=float32" in message) == advice and "\n" not in message


def test_the_check_adds_no_parameters():
    """ZeRO-3 would split, and a checkpoint would hold, what hangs below the module twice."""
    model = tiny()
    teacher = Teacher(model, CONFIGS[0], REAL)
    assert {id(p) for p in teacher.parameters()} == {id(p) for p in model.parameters()}
    assert teacher.state_dict().keys() == model.state_dict().keys()


class Constant(nn.Module):
    """A decoder that gives one hidden state at every position."""

    def forward(self, tokens_BT: Tensor, **_: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=torch.ones(*tokens_BT.shape, 8, device=tokens_BT.device))  # type: ignore[arg-type]


def test_chunks_are_sized_on_any_kind_of_device():
    """Only cpu and cuda had a size: any other accelerator was a KeyError. "meta" stands for one here."""
    config = LlamaConfig(
        vocab_size=PADDED, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with torch.device("meta"):
        answering = Teacher(LlamaForCausalLM(config), LogitsConfig(top_k=4, temperatures=(1.0,)), REAL)
        answering.unchecked.clear()  # what compares numbers
        answering.model = Constant()
        whole = torch.zeros(2, 6, dtype=torch.int64)
        targets = answering(whole, whole, whole, torch.zeros(2, 6))
    assert targets.ids.shape == (2, 6, 4) and targets.ids.device.type == "meta"
