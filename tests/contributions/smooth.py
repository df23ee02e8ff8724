"""The objective of tests/test_contributing.py: cross entropy with smoothed labels."""

from typing import Any

from torch.nn.functional import cross_entropy

from megakd.data.records import Batch, labelled
from megakd.objectives.base import LossReport, Objective


class Smooth(Objective):
    """loss(batch) = sum over labelled positions of the cross entropy with smoothed labels."""

    def __init__(self, student: Any, config: Any):
        super().__init__(student, config)
        self.smoothing = config.smoothing
        self.at(0.0)

    def loss(self, batch: Batch) -> LossReport:
        logits = self.student(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
        rows = labelled(batch)
        logits_NV, labels_N = rows.pick(logits).float(), rows.pick(batch.labels)
        total = cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=self.smoothing)
        sharpness = logits_NV.softmax(-1).amax(-1).sum()
        return LossReport(total, {"sharpness": sharpness.detach()})
