"""A store of top-k targets as somebody wrote it by hand, in HDF5."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.conftest import VOCABULARY
from tests.tools.examples import random_logits, window

TOP_K = 6


class Handmade:
    """The three arrays of a hand-made store, and the teacher's logits behind them."""

    def __init__(self, values: str, samples: int = 5, tokens: int = 13):
        self.logits = [random_logits(tokens, VOCABULARY, seed=7 + i).numpy() for i in range(samples)]
        self.input_ids = np.stack([window(i, VOCABULARY, tokens)[0] for i in range(samples)])
        whole = [each - np.log(np.exp(each.astype(np.float64)).sum(1, keepdims=True)) for each in self.logits]
        self.logprobs = np.stack(whole)
        numbers = self.logprobs if values == "logprobs" else np.stack(self.logits) + 3.0
        self.indices = np.argsort(-numbers, axis=2)[:, :, :TOP_K].astype(np.int32)
        self.values = np.take_along_axis(numbers, self.indices, 2).astype(np.float16)

    def write(self, path: Path, **changes: Any) -> Path:
        """changes: another array under a name, or None to leave it out."""
        arrays = {"input_ids": self.input_ids, "topk_values": self.values, "topk_indices": self.indices, **changes}
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                if array is not None:
                    file.create_dataset(name, data=array)
        return path
