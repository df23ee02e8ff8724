import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, Sample, TeacherTargets
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.evals import holdout as module
from megakd.evals.holdout import Stopwatch, Tokenizers, batch_sums, evaluate_model
from megakd.losses.reference import topk_kl
from megakd.models.loading import load_model
from megakd.objectives.heads import streamed_head

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def holdout(prepared):
    shards = ShardSet(prepared / "data" / "logits" / "holdout")
    yield shards
    shards.close()


def reference_sums(logits: Tensor, batch: Batch) -> list[float]:
    """One position after the other in Python floats; entries in any order, those of -inf are none."""
    nll = kl = 0.0
    top1 = overlap = positions = 0.0
    for row, position in (batch.labels != IGNORED).nonzero().tolist():
        log_q = torch.log_softmax(logits[row, position].double(), 0).tolist()
        ids, log_p, tails, *_ = (field[row, position].tolist() for field in batch.targets)
        head = {i: x for i, x in zip(ids, log_p, strict=True) if x > -math.inf}
        nll -= log_q[batch.labels[row, position]]
        rest = sum(math.exp(x) for i, x in enumerate(log_q) if i not in head)
        tail = math.exp(tails[0])
        mass = sum(map(math.exp, head.values())) + tail
        kl += sum(math.exp(x) / mass * math.log(math.exp(x) / mass / math.exp(log_q[i])) for i, x in head.items())
        kl += tail / mass * math.log(tail / mass / rest) if tail else 0.0
        mine = sorted(range(len(log_q)), key=lambda i: -log_q[i])[: len(head)]
        # all that are stored as the most probable are first
        top1 += mine[0] in [i for i, x in head.items() if x == max(head.values())]
        overlap += len(set(mine) & set(head)) / len(head)
        positions += 1
    return [nll, kl, top1, overlap, positions]


def whole_sums(logits: Tensor, batch: Batch, dtype: torch.dtype = torch.float32) -> list[float]:
    """[NLL, KL, top-1, overlap, positions] of stored logits: how they were made before the head was chunked."""
    counted = batch.labels != IGNORED
    logits_NV, labels_N, targets = logits[counted].float().to(dtype), batch.labels[counted], batch.targets
    nll = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    ids_NK, logprobs_NK = targets.ids[counted].long(), targets.logprobs[counted]
    log_tail_N = targets.log_tails[..., 0][counted]
    kl = topk_kl(logits_NV, ids_NK, logprobs_NK.to(dtype), log_tail_N.to(dtype), 1.0, "ghost").sum()
    mine_NK = logits_NV.topk(ids_NK.shape[-1]).indices
    first_NK = logprobs_NK == logprobs_NK.amax(1, keepdim=True)
    top1 = ((ids_NK == mine_NK[:, :1]) & first_NK).any(1).sum()
    kept_NK = logprobs_NK > -torch.inf
    kept_N1 = kept_NK.sum(1, keepdim=True)
    counted_NK = (torch.arange(ids_NK.shape[1]) < kept_N1).to(logits_NV.dtype)
    among_NK = torch.zeros_like(logits_NV).scatter(1, mine_NK, counted_NK).gather(1, ids_NK)
    overlap = ((among_NK * kept_NK).sum(1) / kept_N1[:, 0]).sum()
    return [float(each) for each in (nll, kl, top1, overlap, counted.sum())]


def sums_of(logits: Tensor, batch: Batch) -> list[float]:
    """`batch_sums` where the head gives its input, and the positions."""
    sums = batch_sums(lambda rows: rows, logits, batch, logits.shape[-1], Stopwatch(CPU))
    return [*sums.tolist(), int((batch.labels != IGNORED).sum())]


def small_chunks(monkeypatch: pytest.MonkeyPatch, vocabulary: int, rows: int, block: int) -> None:
    for name, count in (("CHUNK_BYTES", rows), ("BLOCK_BYTES", block)):
        monkeypatch.setattr(module, name, {"cpu": 4 * vocabulary * count})


def random_batch(seed: int, noise: float, vocabulary: int = 30, top_k: int = 8) -> tuple[Tensor, Batch]:
    """A model's logits, and targets of a teacher that is like it; heads of 1 to 8 entries, shuffled, with fillers."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (2 * torch.rand(4, 25, 1, generator=generator) - 1)  # from flat to certain
    teacher = scale * torch.randn(4, 25, vocabulary, generator=generator)
    logits = teacher + noise * scale * torch.randn(teacher.shape, generator=generator)
    labels = torch.randint(vocabulary, (4, 25), generator=generator)
    labels[torch.rand(4, 25, generator=generator) < 0.2] = IGNORED
    config = LogitsConfig(top_k=top_k, pmin=0.05)
    flat = targets_from_logits(teacher.flatten(0, 1), labels.flatten(), config, torch.zeros(100))
    order = torch.rand(100, top_k, generator=generator).argsort(-1)
    flat = flat._replace(ids=flat.ids.gather(1, order), logprobs=flat.logprobs.gather(1, order))
    counts = (flat.logprobs > -torch.inf).sum(-1)
    assert set(counts.tolist()) >= {1, 2, 3, 4, 5} and (flat.logprobs[:, 0] == -torch.inf).any()
    targets = TeacherTargets(*(field.unflatten(0, (4, 25)) for field in flat))
    return logits, Batch(torch.zeros_like(labels), labels, torch.zeros_like(labels), targets)


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_unsorted_heads_with_adaptive_counts(seed):
    logits, batch = random_batch(seed, noise=0.3)
    expected = reference_sums(logits, batch)
    assert sums_of(logits, batch) == pytest.approx(expected, rel=1e-5)
    assert expected[2] < expected[4] and expected[3] < expected[4]


def test_a_model_equal_to_its_teacher_agrees_wholly():
    """Whatever the order of the head and the number of its entries."""
    logits, batch = random_batch(0, noise=0.0)
    _, kl, top1, overlap, positions = sums_of(logits, batch)
    assert top1 == overlap == positions and abs(kl) < 1e-5


def test_any_of_the_tokens_that_rounding_made_equal_is_first():
    """Two stored at 0.4, one at 0.1: the model may put either of the two first, wherever they stand in the row."""
    ids = torch.tensor([[3, 7, 5, 3]])
    targets = [ids, torch.tensor([[0.1, 0.4, 0.4, 0.0]]).log(), torch.tensor([[0.1]]).log()]
    empty, zero = torch.zeros(1, 0), torch.zeros(1)
    batch = Batch(*(torch.zeros(1, 1, dtype=torch.int64),) * 3, TeacherTargets(
        *(field[None] for field in (*targets, empty.int(), empty, zero, zero))
    ))  # fmt: skip
    for token, agrees in ((7, 1), (5, 1), (3, 0), (0, 0)):
        logits = torch.zeros(1, 1, 9)
        logits[..., token] = 5
        assert sums_of(logits, batch)[2] == agrees


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_sums_are_those_of_the_reference(holdout, teacher, noise):
    batch = collate([holdout[i] for i in range(3)], 37)
    with torch.no_grad():
        logits = load_model(teacher, torch.float32).eval()(batch.tokens, position_ids=batch.position_ids).logits
    logits = logits + noise * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    expected = reference_sums(logits, batch)
    assert sums_of(logits, batch) == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert (expected[2] < 0.98 * expected[4]) if noise else (expected[2] == expected[4])


def test_the_teacher_agrees_with_itself(holdout, teacher):
    """float32 logits: what is left is the rounding of cached teacher logits to bytes."""
    quality = evaluate_model(load_model(teacher, torch.float32), holdout, 0.25, 8, CPU, "teacher")
    labelled = [
        holdout[i].targets.label_nll[collate([holdout[i]], len(holdout[i].tokens) - 1).labels[0].numpy() != IGNORED]
        for i in range(len(holdout))
    ]
    stored = [x for part in labelled for x in part.tolist()]
    assert quality.positions == len(stored) == sum(holdout.entry(i).labels for i in range(len(holdout)))
    assert 0 <= quality.kl < 2e-4
    assert quality.top1 == 1.0
    assert quality.topk > 0.99
    assert quality.perplexity == pytest.approx(math.exp(sum(stored) / len(stored)), rel=1e-2)
    assert quality.nll == pytest.approx(math.log(quality.perplexity), rel=1e-9)
    assert quality.bits_per_byte == pytest.approx(quality.nll / math.log(2) * 0.25, rel=1e-9)
    assert quality.tokens_per_second > 0


def test_a_student_is_worse_and_the_batch_size_does_not_matter(holdout, prepared):
    student = load_model(prepared / "student-0", torch.float32)
    found = [
        evaluate_model(student, holdout, 0.25, size, CPU, "student")._replace(tokens_per_second=0)
        for size in (1, 7, 500)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] == pytest.approx(found[2], rel=1e-5)
    assert found[0].kl > 0.01 and 0 < found[0].top1 < 1 and 0 < found[0].topk < 1


def test_size_counts_tied_embeddings_once(holdout, teacher):
    model = load_model(teacher, torch.bfloat16)
    quality = evaluate_model(model, holdout, 0.25, 8, CPU, "teacher")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    count = sum(tensor.numel() for name, tensor in model.state_dict().items() if name != "lm_head.weight")
    assert (quality.parameters, quality.bytes) == (count, 2 * count)
    assert quality.kl < 1e-2  # bfloat16 alone


def test_padding_of_the_vocabulary_is_cut(holdout, teacher):
    torch.manual_seed(0)
    model = load_model(teacher, torch.float32)
    expected = evaluate_model(model, holdout, 0.25, 8, CPU, "teacher")
    model.resize_token_embeddings(416, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[400:].normal_(std=2.0)
    found = evaluate_model(model, holdout, 0.25, 8, CPU, "padded")
    assert (found.nll, found.kl, found.top1) == pytest.approx((expected.nll, expected.kl, expected.top1), abs=1e-6)


def test_evaluation_switches_dropout_off(holdout, teacher):
    model = load_model(teacher, torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert evaluate_model(model, holdout, 0.25, 8, CPU, "teacher").kl < 2e-4


@pytest.fixture(scope="module")
def tokens(prepared):
    """The same validation set without targets."""
    shards = ShardSet(prepared / "data" / "tokens" / "holdout")
    yield shards
    shards.close()


@pytest.mark.parametrize("padded", [False, True])
def test_without_targets_the_rest_is_the_same(holdout, tokens, teacher, padded):
    model = load_model(teacher, torch.float32)
    if padded:
        model.resize_token_embeddings(416, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[400:].normal_(std=2.0)
    expected = evaluate_model(model, holdout, 0.25, 8, CPU, "teacher")
    found = evaluate_model(model, tokens, 0.25, 8, CPU, "teacher")
    assert (found.kl, found.top1, found.topk) == (None, None, None)
    rest = {"kl": 0.0, "top1": 0.0, "topk": 0.0, "tokens_per_second": 0.0}
    assert found._replace(**rest) == pytest.approx(expected._replace(**rest), rel=1e-7)


def test_a_batch_without_targets_has_sums_of_its_own():
    logits, batch = random_batch(0, noise=0.3)
    whole = sums_of(logits, batch)
    assert sums_of(logits, batch._replace(targets=None)) == [pytest.approx(whole[0], rel=1e-7), 0, 0, 0, whole[4]]


def test_a_model_that_reads_the_text_in_its_own_tokens(tokens, teacher, tokenizer):
    """With the validation set's own tokenizer: the same, but for words that a window cuts, encoded again."""
    model = load_model(teacher, torch.float32)
    expected = evaluate_model(model, tokens, 0.25, 8, CPU, "teacher")
    found = evaluate_model(model, tokens, 0.25, 8, CPU, "teacher", tokenizers=Tokenizers(tokenizer, tokenizer))
    assert found.nll == pytest.approx(expected.nll, rel=0.02)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=0.02)
    assert found.positions == pytest.approx(expected.positions, rel=0.02) and found.kl is None


def test_text_that_exceeds_a_models_table_of_positions_is_one_line(tokens, tokenizer):
    """In its own tokens the text of a sequence may be longer than data.sequence_length: an IndexError before."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=20)
    with pytest.raises(UserError, match="table of 20 positions"):
        evaluate_model(
            GPT2LMHeadModel(config), tokens, 0.25, 8, CPU, "teacher", tokenizers=Tokenizers(tokenizer, tokenizer)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows, block", [(1, 1), (7, 3), (1000, 64)])
def test_sums_are_those_of_stored_logits_whatever_the_chunks(rows, block, dtype, monkeypatch):
    logits, batch = random_batch(1, noise=0.3)
    small_chunks(monkeypatch, logits.shape[-1], rows, block)
    expected = whole_sums(logits.to(dtype), batch, torch.float64)
    assert sums_of(logits.to(dtype), batch) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(whole_sums(logits.to(dtype), batch), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_the_whole_models_logits(dtype, holdout, prepared, monkeypatch):
    """The model called whole, all logits of the validation set stored; chunks of 50 positions."""
    model = load_model(prepared / "student-0", dtype).eval()
    expected = [0.0] * 5
    for i in range(len(holdout)):
        batch = collate([holdout[i]], 32)
        with torch.no_grad():
            logits = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits[..., :400]
        expected = [a + b for a, b in zip(expected, whole_sums(logits, batch, torch.float64), strict=True)]
    small_chunks(monkeypatch, 400, 50, 16)
    found = evaluate_model(model, holdout, 0.25, 1, CPU, "student")
    assert (found.nll, found.kl, found.top1, found.topk) == pytest.approx(
        [x / expected[4] for x in expected[:4]], rel=1e-6
    )
    assert found.positions == expected[4]


def test_no_more_positions_than_a_chunk_have_logits_at_once(holdout, teacher, monkeypatch):
    model, heights = load_model(teacher, torch.float32), []
    monkeypatch.setattr(module, "streamed_head", lambda *args: watched(streamed_head(*args), heights))
    small_chunks(monkeypatch, 400, 50, 16)
    whole = type(model).forward

    def forward(self, *args, **named):
        answer = whole(self, *args, **named)
        heights.append(answer.logits.shape[1] * 1000)  # told from those of the head
        return answer

    monkeypatch.setattr(type(model), "forward", forward)
    found = evaluate_model(model, holdout, 0.25, 8, CPU, "teacher")
    by_whole = [height // 1000 for height in heights if height >= 1000]
    by_head = [height for height in heights if height < 1000]
    assert max(by_whole) <= 8  # some tokens of the first batch, to compare
    assert max(by_head) <= 50 and sum(by_head) == found.positions


def watched(head, heights):
    return head._replace(logits=lambda rows: heights.append(len(rows)) or head.logits(rows))


class Windows:
    """A validation set in memory."""

    folder = Path("memory")

    def __init__(self, samples: list[Sample], stored: bool):
        self.samples, self.layout = samples, stored or None
        tokens = {"sequence_length": 32, "tokenizer": {"vocab_size": 400}}
        self.facts = {"vocab_size": 400, "tokens": tokens} if stored else tokens

    def length(self, index: int) -> int:
        return len(self[index].tokens) - 1

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("labels", [32, 1])
def test_one_window_is_enough(labels, stored, holdout, teacher):
    whole, model = holdout[3], load_model(teacher, torch.float32).eval()
    sample = whole._replace(
        tokens=whole.tokens[: labels + 1], starts=whole.starts[:1], targets=whole.targets if stored else None
    )
    found = evaluate_model(model, Windows([sample], stored), 0.25, 8, CPU, "teacher")  # type: ignore[arg-type]
    batch = collate([whole._replace(tokens=sample.tokens, starts=sample.starts)], 32)
    with torch.no_grad():
        logits = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    expected = whole_sums(logits, batch, torch.float64)
    assert found.positions == labels == expected[4]
    assert found.nll == pytest.approx(expected[0] / labels, rel=1e-6)
    assert found.kl == (pytest.approx(expected[1] / labels, rel=1e-3, abs=1e-6) if stored else None)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("windows", [0, 1])
def test_a_holdout_without_a_label_is_one_line(windows, stored, holdout, teacher):
    sample = holdout[0]._replace(tokens=holdout[0].tokens[:3], starts=np.arange(3))  # documents of one token
    sample = sample if stored else sample._replace(targets=None)
    model = load_model(teacher, torch.float32)
    with pytest.raises(
        UserError, match=r"memory: no position of the validation set has a label; raise data.holdout_tokens"
    ):
        evaluate_model(model, Windows([sample] * windows, stored), 0.25, 8, CPU, "teacher")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale, nll", [(torch.nan, torch.nan), (1e6, None), (torch.inf, torch.nan)])
def test_logits_that_are_not_finite_are_said_and_stop_nothing(scale, nll, holdout, teacher):
    """NaN says nothing at all, an NLL beyond 709 has no perplexity."""
    model = load_model(teacher, torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= scale
    found = evaluate_model(model, holdout, 0.25, 8, CPU, "broken")
    if nll is None:
        assert found.perplexity == math.inf and 709 < found.nll < math.inf and 0 <= found.top1 <= 1
    else:
        assert all(math.isnan(x) for x in (found.perplexity, found.nll, found.kl, found.top1, found.topk))
    assert found.positions > 0 and found.tokens_per_second > 0
