import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from megakd.data.batches import collate
from megakd.data.records import IGNORED, Sample
from megakd.models.teacher import CHUNK, targets_from_logits, teacher_targets
from megakd.models.tiny import tiny_moe_config

TEMPERATURES = (1.0, 0.5, 2.0, 5.0)
REAL, PADDED = 43, 50  # vocabulary with and without the rows that pad the embedding


def reference(logits: list[float], label: int, top_k: int) -> tuple[list[int], list[float], list[float], float]:
    """One position in Python floats: ids, log-probabilities, tails at TEMPERATURES, NLL of the label."""
    largest = max(logits)
    log_z = largest + math.log(sum(math.exp(x - largest) for x in logits))
    log_p = [x - log_z for x in logits]
    ids = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    rest = [log_p[i] for i in range(len(logits)) if i not in ids]
    tails = [math.log(sum(math.exp(x / t) for x in rest)) if rest else -math.inf for t in TEMPERATURES]
    return ids, [log_p[i] for i in ids], tails, 0.0 if label == IGNORED else -log_p[label]


def check(targets: tuple[Tensor, ...], logits_NV: Tensor, labels_N: Tensor, top_k: int, tolerance: float) -> None:
    for row, (logits, label) in enumerate(zip(logits_NV.double().tolist(), labels_N.tolist(), strict=True)):
        ids, logprobs, tails, nll = reference(logits, label, top_k)
        found = [field[row] for field in targets]
        assert found[0].tolist() == ids
        assert found[1].tolist() == pytest.approx(logprobs, abs=tolerance)
        assert found[2].tolist() == pytest.approx(tails, abs=tolerance)
        assert found[3].item() == pytest.approx(nll, abs=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(1, 5, 2), (7, 33, 8), (3, 11, 11), (4, 9, 1)])  # N, V, K; K = V leaves no tail
def test_targets_are_those_of_the_reference(shape, dtype, tolerance):
    tokens, vocabulary, top_k = shape
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(tokens, vocabulary, generator=generator) + 20).to(dtype)  # far from normalised
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::2] = IGNORED
    targets = targets_from_logits(logits, labels, top_k, TEMPERATURES)
    assert (targets.ids.shape, targets.log_tails.shape, targets.label_nll.shape) == (
        (tokens, top_k),
        (tokens, 4),
        (tokens,),
    )
    check(targets, logits, labels, top_k, tolerance)
    assert (targets.label_nll[::2] == 0).all()


def test_tail_is_the_sum_of_powers():
    """p = (1/2, 1/4, 1/4), K = 1, T = 2: 1/2 + 1/2 outside, where the power of the sum would be sqrt(1/2)."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    targets = targets_from_logits(logits, torch.tensor([0]), 1, (1.0, 2.0))
    assert targets.log_tails.exp().tolist() == [pytest.approx([0.5, 1.0])]


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, 0.0, -1e4, 5.0], [-30.0, -30.0, -30.0, -30.0]])
    targets = targets_from_logits(logits, torch.tensor([1, 2]), 2, TEMPERATURES)
    assert all(field.isfinite().all() for field in targets)
    assert targets.label_nll.tolist() == pytest.approx([1e4, math.log(4)], rel=1e-6)


@pytest.fixture(scope="module")
def padded_teacher():
    """Its most probable tokens are often the padding's."""
    torch.manual_seed(0)
    config = tiny_moe_config(
        PADDED, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=2, head_dim=8, num_attention_heads=2
    )
    config.tie_word_embeddings = False
    model = Qwen3MoeForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.lm_head.weight[REAL:] *= 3
    return model


def sample(key: str, length: int, starts: list[int]) -> Sample:
    tokens = np.random.default_rng(length).integers(1, REAL, length + 1).astype(np.int32)
    return Sample(key, tokens, np.array(starts, np.int32))


def test_padding_of_the_vocabulary_is_cut_before_normalising(padded_teacher):
    """More positions than one chunk, and padded and border positions without a label."""
    batch = collate([sample("a", 201, [0, 77]), sample("b", 190, [0]), sample("c", 201, [0])], 201)
    with torch.no_grad():
        logits = padded_teacher(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    assert (logits.argmax(-1) >= REAL).any() and batch.tokens.numel() > CHUNK
    targets = teacher_targets(padded_teacher, batch, REAL, 5, TEMPERATURES)
    assert [tuple(field.shape) for field in targets] == [(3, 201, 5), (3, 201, 5), (3, 201, 4), (3, 201)]
    assert not any(field.requires_grad for field in targets)
    check([f.flatten(0, 1) for f in targets], logits[..., :REAL].flatten(0, 1), batch.labels.flatten(), 5, 1e-5)
    mass = targets.logprobs.exp().sum(-1) + targets.log_tails[..., 0].exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-5)


def test_packed_documents_get_the_targets_that_they_get_alone(padded_teacher):
    packed = sample("a", 40, [0, 13])
    first = Sample("b", packed.tokens[:13], np.array([0], np.int32))
    second = Sample("c", packed.tokens[13:], np.array([0], np.int32))
    together = teacher_targets(padded_teacher, collate([packed], 40), REAL, 5, TEMPERATURES)
    alone = [
        teacher_targets(padded_teacher, collate([s], len(s.tokens) - 1), REAL, 5, TEMPERATURES) for s in (first, second)
    ]
    for field, one, two in zip(together, *alone, strict=True):
        assert torch.allclose(field[:, :12].double(), one.double(), atol=1e-5)
        assert torch.allclose(field[:, 13:].double(), two.double(), atol=1e-5)
