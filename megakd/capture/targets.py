"""What is kept of a teacher's logits at a position: its most probable tokens, tails, draws."""

import torch
from torch import Tensor

from megakd.config.data import LogitsConfig
from megakd.data.records import IGNORED, TeacherTargets


def targets_from_logits(logits_NV: Tensor, labels_N: Tensor, config: LogitsConfig, offsets_N: Tensor) -> TeacherTargets:
    """Targets of N positions from their whole float logits.

    Head: the top_k tokens whose p is at least pmin, always the first one. log_tails[n, m] = log of the sum over all
    others of p^(1/T_m): of powers, not the power of the sum. Draws: see `draw`.
    """
    log_z_N1 = logits_NV.logsumexp(-1, keepdim=True)
    counted = labels_N != IGNORED
    label_logit_N = logits_NV.gather(-1, labels_N.clamp(min=0)[:, None])[:, 0]
    label_nll_N = torch.where(counted, log_z_N1[:, 0] - label_logit_N, 0.0)
    count = config.top_k if config.profile != "sampled" else 0
    values_NK, ids_NK = logits_NV.topk(count)
    logprobs_NK = values_NK - log_z_N1
    if count:
        kept_NK = logprobs_NK.exp() >= config.pmin
        kept_NK[:, 0] = True
        logprobs_NK.masked_fill_(~kept_NK, -torch.inf)
        ids_NK = torch.where(kept_NK, ids_NK, ids_NK[:, :1])
    rest_NV = logits_NV.scatter(-1, ids_NK, -torch.inf)
    if count:
        tails = [(rest_NV / t).logsumexp(-1) - log_z_N1[:, 0] / t for t in config.declared_temperatures]
        log_tails_NM = torch.stack(tails, 1)
    else:
        log_tails_NM = logits_NV.new_full((len(logits_NV), len(config.declared_temperatures)), -torch.inf)
    number = config.draws if config.profile != "topk" else 0
    if number:
        entropy_N = _entropy(logits_NV / config.draw_temperature)
        draw_ids_ND, shares_ND = draw((rest_NV / config.draw_temperature).double().softmax(-1), number, offsets_N)
    else:
        entropy_N = torch.zeros_like(label_nll_N)
        draw_ids_ND, shares_ND = ids_NK[:, :0], logprobs_NK[:, :0]
    return TeacherTargets(ids_NK.int(), logprobs_NK, log_tails_NM, draw_ids_ND.int(), shares_ND, entropy_N, label_nll_N)


def draw(p_NV: Tensor, number: int, offsets_N: Tensor) -> tuple[Tensor, Tensor]:
    """`number` draws a row from p_NV (float64, rows sum to 1) → distinct ids [N, number], their shares (0 fills up).

    Systematic sampling: draw i is the id at which the cumulated p reaches (i + offset) / number. With an offset uniform
    in [0, 1) the expected share of every id is its p, exactly as for independent draws, and a share is never further
    from p than 1 / number: far less noise (Kitagawa 1996 calls it stratified resampling's deterministic form).
    """
    cumulated_NV = p_NV.cumsum(-1)
    points_ND = (torch.arange(number, device=p_NV.device) + offsets_N.double()[:, None]) / number
    # right=True: an id without mass is never hit; the last point may exceed a sum that rounding left below 1
    hits_ND = torch.searchsorted(cumulated_NV, points_ND * cumulated_NV[:, -1:], right=True)
    last_N1 = (cumulated_NV < cumulated_NV[:, -1:]).sum(-1, keepdim=True)
    hits_ND = torch.minimum(hits_ND, last_N1)
    new_ND = torch.ones_like(hits_ND)
    new_ND[:, 1:] = hits_ND[:, 1:] != hits_ND[:, :-1]
    slots_ND = new_ND.cumsum(-1) - 1
    shares_ND = torch.zeros(hits_ND.shape, device=p_NV.device)
    shares_ND.scatter_add_(1, slots_ND, torch.ones_like(shares_ND))
    ids_ND = hits_ND[:, :1].repeat(1, number).scatter(1, slots_ND, hits_ND)
    return ids_ND, shares_ND / number


def _entropy(scaled_NV: Tensor) -> Tensor:
    """Of softmax(scaled), in nats, [N]."""
    log_z_N = scaled_NV.logsumexp(-1)
    return log_z_N - (scaled_NV.softmax(-1) * scaled_NV).nan_to_num(nan=0.0).sum(-1)
