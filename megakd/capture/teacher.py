"""Teacher → TeacherTargets: the head, the tails, the draws, the label's NLL; logits never exist but a chunk at a time.

Peak memory beyond the model and its hidden states [B, T, D]: about five buffers of [chunk, V] float32 (nine with draws,
which want float64), CHUNK_BYTES each, whatever B and T are.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.data.records import Batch, TeacherTargets
from megakd.errors import UserError
from megakd.models.isolation import Packing, check_model

# Of one [chunk, V] buffer in float32. On CPUs below what glibc returns to the system at once: 16 MB (27 positions at
# 152k) is several times as fast as 128 MB; elsewhere large enough for the head's matrix product (440 positions).
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}


class Teacher(nn.Module):
    """A causal LM that answers a batch with TeacherTargets (tensors [B, T, ..] on its device).

    An nn.Module with all of the work inside forward, because ZeRO-3 gathers weights only while a module runs.
    vocab_size: real entries; a padded vocabulary is cut before normalising. packing: how the batches' sequences are
    made; the first batch is refused where documents of packed ones change each other's answers (models/isolation.py).
    """

    def __init__(self, model: Any, kept: LogitsConfig, vocab_size: int, packing: Packing = "packed"):
        super().__init__()
        self.model, self.lm_head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
        self.config, self.kept, self.vocab_size = model.config, kept, vocab_size
        self.packing: Packing = packing
        self.unchecked = [model]  # in a list: no child of its own

    @torch.no_grad()
    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor, offsets_BT: Tensor) -> TeacherTargets:
        """offsets_BT: a number of [0, 1) a position, where its draws begin; unused without draws."""
        if self.unchecked:
            self._check(self.unchecked.pop(), tokens_BT[:, :8])
        hidden_ND = self.model(tokens_BT, position_ids=positions_BT, use_cache=False).last_hidden_state.flatten(0, 1)
        rows = max(CHUNK_BYTES["cpu" if hidden_ND.device.type == "cpu" else "cuda"] // (4 * self.vocab_size), 1)
        wholes: list[Tensor] = []
        for start in range(0, len(hidden_ND), rows):
            here = slice(start, start + rows)
            logits_NV = self.lm_head(hidden_ND[here])[:, : self.vocab_size].float()
            part = targets_from_logits(logits_NV, labels_BT.flatten()[here], self.kept, offsets_BT.flatten()[here])
            if not wholes:  # made once: results kept between the chunks would keep the allocator from reusing these
                wholes = [field.new_empty((len(hidden_ND), *field.shape[1:])) for field in part]
            for whole, field in zip(wholes, part, strict=True):
                whole[here] = field
        return TeacherTargets(*(whole.unflatten(0, tokens_BT.shape) for whole in wholes))

    def _check(self, whole: Any, tokens_BT: Tensor) -> None:
        """Logits from hidden states and head are the model's own: no soft cap or scale of its family is skipped."""
        theirs = whole(tokens_BT, use_cache=False).logits.float()
        if theirs.isnan().any():
            dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
            small = f" or too large for {dtype}: try logits.dtype=float32 in a new run" if dtype != "float32" else ""
            place = getattr(whole, "name_or_path", "") or self.config.model_type
            raise UserError(f"{place}: the teacher answers the first batch with NaN; its weights are damaged{small}")
        ours = self.lm_head(self.model(tokens_BT, use_cache=False).last_hidden_state).float()
        if not torch.allclose(theirs, ours, atol=1e-2 * float(theirs.abs().max()), rtol=0):
            raise UserError(
                f"{self.config.model_type}: logits are not the output embeddings times the last hidden state; "
                "this family cannot be captured yet"
            )
        check_model(self.model, getattr(whole, "name_or_path", "") or self.config.model_type, self.packing)


def batch_targets(teacher: Any, batch: Batch, offsets_BT: Tensor, device: torch.device) -> TeacherTargets:
    """Targets of a batch on the CPU; teacher: a Teacher, or a DeepSpeed engine around one."""
    inputs = (batch.tokens, batch.labels, batch.position_ids, offsets_BT)
    targets = teacher(*(tensor.to(device, non_blocking=True) for tensor in inputs))
    return TeacherTargets(*(tensor.cpu() for tensor in targets))
