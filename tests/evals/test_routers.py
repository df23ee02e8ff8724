"""Statistics of a teacher's routers against a count by hand; padding has no say."""

import math

import pytest
import torch

from megakd.data.batches import collate
from megakd.data.records import IGNORED
from megakd.evals.routers import RouterStatistics
from megakd.models.loading import load_model
from megakd.models.routers import find_routers
from megakd.models.routing import choices


def test_they_are_what_a_count_by_hand_says(teacher, dataset):
    model = load_model(teacher, torch.float32)
    routers = find_routers(model, "teacher")
    with torch.no_grad():
        routers[1].module.weight[2] = -10 * routers[1].module.weight.abs().sum()  # an expert that few choose
    batches = [collate([dataset[i] for i in part], 70, whole=True) for part in ((0, 1), (2,))]
    assert any((batch.labels == IGNORED)[:, -1].any() for batch in batches)  # padded
    entropies, counts = [[], []], torch.zeros(2, 4)
    with choices(routers) as chosen, torch.no_grad():
        statistics = RouterStatistics(routers, chosen)
        for batch in batches:
            model(batch.tokens, position_ids=batch.position_ids, use_cache=False)
            for index, choice in enumerate(chosen):
                for n, label in enumerate(batch.labels.flatten().tolist()):
                    if label == IGNORED:
                        continue
                    p = choice.logits[n].double().softmax(-1)
                    entropies[index].append(-sum(x.item() * math.log(x.item()) for x in p if x > 0) / math.log(4))
                    for expert in choice.experts[n].tolist():
                        counts[index, expert] += 1
            statistics.add(batch)
            assert not chosen
    found = statistics.found()
    assert list(found) == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    for index, each in enumerate(found.values()):
        assert each["entropy"] == pytest.approx(sum(entropies[index]) / len(entropies[index]), rel=1e-5)
        assert each["busiest"] == pytest.approx((4 * counts[index].max() / counts[index].sum()).item())
        assert each["idle"] == int((counts[index] == 0).sum())
