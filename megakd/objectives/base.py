"""What an objective returns: the one thing engines and the loop know about training."""

from typing import NamedTuple

from torch import Tensor


class LossReport(NamedTuple):
    """Sums over the counted tokens of a batch. A NamedTuple: ZeRO-3's hooks look inside tuples and dicts only.

    total: what is differentiated. terms: named detached sums for the log.
    """

    total: Tensor
    terms: dict[str, Tensor]
