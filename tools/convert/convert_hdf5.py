"""Logit shards ↔ one HDF5 file in the layout of hand-made stores of top-k targets.

    python tools/convert/convert_hdf5.py to runs/a/data/logits/train train.h5
    python tools/convert/convert_hdf5.py from train.h5 again              # a file that `to` wrote states all facts
    python tools/convert/convert_hdf5.py from mine.h5 runs/b/data/logits/train --tokenizer qwen3 --values logprobs \\
        --teacher Qwen/Qwen3-30B-A3B --weights 0123456789abcdef --sequence-length 2048
    python tools/convert/convert_hdf5.py from mine.h5 shards --tokenizer qwen3 --values logits --pad 151643
    python tools/convert/convert_hdf5.py from mine.h5 shards --tokenizer qwen3 --values logits --ids tokens \\
        --indices kd/idx

datasets  input_ids     int32   [N, T]
          topk_values   float16 [N, T, K]  row t is about the token after input_ids[t]; [N, T-1, K] is read as well
          topk_indices  int32   [N, T, K]
and what `to` adds, `from` reads if it is there
          lengths       int32   [N]        tokens of a window; what follows them is padding
          starts        int32   [N] lists  offsets at which documents begin
          log_tails     float32 [N, T, M]  log of the sum over all other tokens of p^(1/T_m)
          label_nll     float32 [N, T]     -log p(input_ids[t + 1])
          label_mask    uint8   [N, T]     of conversations: 1 where the label input_ids[t + 1] counts; the values of a
                                           row whose label does not are -inf
          and an attribute `facts` (JSON): whose targets these are and of which temperatures

logprobs are log-probabilities over the whole vocabulary. For raw logits nothing is known of the tail: train then needs
objective.tail=truncated. Training reads RUN/data/logits/train; it refuses shards of another teacher than the student
comes from, so --teacher, --revision and --weights repeat what RUN/student-0/compress.json says. A conversion that was
killed goes on after its last finished shard when it is started again.

There and back, ids, tokens and documents stay; of the values 2 rows in 100 move by one step of the codec (a mean KL of
2e-7), the second time none.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import installed  # noqa: F401
import numpy as np
from foreign import convert, exported, needs, sorted_head, two_ways, unsaid
from foreign_rows import Names, Row

from megakd.data.shards import ShardSet
from megakd.errors import UserError, listed
from megakd.outputs import check_file
from megakd.system.files import publishing, sha256
from megakd.system.logging import Progress
from megakd.system.terminal import accept_any_encoding, one_line_errors

try:
    import h5py
except ModuleNotFoundError:
    sys.stderr.write("convert_hdf5: needs h5py: pip install 'megakd[convert]'\n")
    sys.exit(2)

CHUNK_CACHE_BYTES = 1 << 30  # of a dataset whose chunks hold many windows, at most


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    parser, to, back = two_ways(__doc__, "HDF5", "OUT.h5", "IN.h5")
    to.add_argument("--gzip", type=int, default=4, choices=range(10), help="level (default: %(default)s)")
    back.add_argument("--ids", default="input_ids", metavar="NAME", help="dataset of tokens (default: %(default)s)")
    back.add_argument("--values-name", default="topk_values", metavar="NAME", help="of values (default: %(default)s)")
    back.add_argument("--indices", default="topk_indices", metavar="NAME", help="of ids (default: %(default)s)")
    args = parser.parse_args(argv)
    with one_line_errors("convert_hdf5"):
        if args.command == "to":
            write_hdf5(ShardSet(args.shards), args.out, args.gzip)
        else:
            names = Names(args.ids, args.indices, args.values_name, "starts", "log_tails", "label_nll")
            with Hdf5Source(args.source, names, unsaid(args)) as source:
                convert(source, args, "convert_hdf5 from")


def write_hdf5(shards: ShardSet, out: Path, level: int) -> None:
    """One window after the other; a row that no token follows holds one entry of log-probability 0."""
    out = check_file(out)
    facts = exported(shards)
    count, length = len(shards), facts["tokens"]["sequence_length"] + 1
    top_k, columns = facts["top_k"], len(facts["temperatures"]) if facts["tails"] else 0
    progress = Progress("convert_hdf5 to", count, "samples")
    with publishing(out) as temporary, h5py.File(temporary, "w") as file:

        def dataset(name: str, dtype: str, *shape: int) -> h5py.Dataset:
            packed = {"chunks": (1, *shape), "compression": "gzip", "compression_opts": level, "shuffle": True}
            return file.create_dataset(name, (count, *shape), dtype, **(packed if shape else {}))

        file.attrs["facts"] = json.dumps(facts)
        tokens, lengths = dataset("input_ids", "i4", length), dataset("lengths", "i4")
        values, indices = dataset("topk_values", "f2", length, top_k), dataset("topk_indices", "i4", length, top_k)
        label_nll = dataset("label_nll", "f4", length)
        log_tails = dataset("log_tails", "f4", length, columns) if columns else None
        label_mask = dataset("label_mask", "u1", length) if shards.masked else None
        starts = file.create_dataset("starts", (count,), h5py.vlen_dtype(np.int32))
        for index in range(count):
            sample = shards[index]
            targets = sample.targets
            assert targets is not None
            ids, logprobs = sorted_head(targets)
            nothing = np.full((1, top_k), -np.inf)
            nothing[0, 0] = 0.0
            lengths[index], starts[index] = len(sample.tokens), sample.starts
            tokens[index] = _padded(sample.tokens, length, 0)
            values[index], indices[index] = _padded(logprobs, length, nothing), _padded(ids, length, 0)
            label_nll[index] = _padded(targets.label_nll, length, 0)
            if log_tails is not None:
                log_tails[index] = _padded(targets.log_tails, length, -np.inf)
            if label_mask is not None and sample.mask is not None:
                label_mask[index] = _padded(sample.mask, length, 0)
            progress.update(1)
    progress.close(f"{out}: {out.stat().st_size / shards.tokens:.1f} bytes per token")


def _padded(array: np.ndarray, length: int, filler: Any) -> np.ndarray:
    out = np.empty((length, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    out[len(array) :] = filler
    return out


class Hdf5Source:
    """An HDF5 file as foreign.Source; datasets, shapes and types are checked when it is opened.

    unsaid: options that a file without facts needs, so that one error names everything that is missing.
    """

    def __init__(self, path: Path, names: Names, unsaid: Sequence[str] = ()):
        self.path, self.names = path, names
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            self.file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(f"{path}: cannot be read as HDF5; was it cut short? ({error})") from error
        needed = {name: self._found(name) for name in (names.tokens, names.ids, names.values)}
        self._check_present([name for name, found in needed.items() if found is None], unsaid)
        self.tokens, self.ids, self.values = (found for found in needed.values() if found is not None)
        self.starts, self.log_tails, self.label_nll, self.label_mask, self.lengths = (
            self._found(name) for name in (names.starts, names.log_tails, names.label_nll, names.label_mask, "lengths")
        )
        self._check()
        self.count, self.longest = self.tokens.shape
        self.top_k = self.values.shape[2]
        self.facts = self._facts()

    def __enter__(self) -> "Hdf5Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def sha256(self) -> str:
        return sha256(self.path)

    def rows(self, first: int) -> Iterator[Row]:
        optional = (self.starts, self.log_tails, self.label_nll, self.label_mask)
        for index in range(first, self.count):
            length = self.longest if self.lengths is None else int(self._read(self.lengths, index))
            if not 0 <= length <= self.longest:
                raise UserError(f"{self.path}: lengths, sample {index}: {length} of {self.longest} tokens")
            tokens, ids, values = (
                self._read(dataset, index)[:length] for dataset in (self.tokens, self.ids, self.values)
            )
            starts, log_tails, label_nll, mask = (None if d is None else self._read(d, index) for d in optional)
            yield Row(index, tokens, ids, values, starts, log_tails, label_nll, mask)

    def _read(self, dataset: h5py.Dataset, index: int) -> Any:
        try:
            return dataset[index]
        except OSError as error:
            raise UserError(f"{self.path}: {_name(dataset)}, sample {index}: cannot be read ({error})") from error

    def _found(self, name: str) -> h5py.Dataset | None:
        found = self.file.get(name)
        return _cached(found) if isinstance(found, h5py.Dataset) else None

    def _check_present(self, lacks: Sequence[str], unsaid: Sequence[str]) -> None:
        """UserError with the datasets that the file lacks, and what else has to be said about it."""
        if not lacks:
            return
        held: list[str] = []
        self.file.visititems(lambda name, item: held.append(name) if isinstance(item, h5py.Dataset) else None)
        more = "" if "facts" in self.file.attrs or not unsaid else f"; {needs(unsaid)}"
        what = f"no dataset {', '.join(lacks)}; it holds {listed(held) or 'none'}"
        raise UserError(f"{self.path}: {what} (--ids, --values-name and --indices give other names){more}")

    def _check(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape[0] < 1 or self.tokens.shape[1] < 2:
            raise UserError(
                f"{self.path}: {_name(self.tokens)} has shape {self.tokens.shape}, expected [N, T], at least (1, 2)"
            )
        count, length = self.tokens.shape
        rows = length - (self.values.ndim == 3 and self.values.shape[1] == length - 1)
        shapes: list[tuple[h5py.Dataset | None, str, tuple[int, ...]]] = [
            (self.tokens, "iu", (count, length)),
            (self.values, "f", (count, rows, max(self.values.shape[-1:], default=0))),
            (self.ids, "iu", self.values.shape),
            (self.log_tails, "f", (count, rows, *(self.log_tails.shape[2:3] if self.log_tails is not None else ()))),
            (self.label_nll, "f", (count, rows)),
            (self.label_mask, "iub", (count, rows)),
            (self.lengths, "iu", (count,)),
        ]
        faults = []
        for dataset, kinds, shape in shapes:
            if dataset is not None and dataset.shape != shape:
                faults.append(f"{_name(dataset)} has shape {dataset.shape}, expected {shape}")
            if dataset is not None and dataset.dtype.kind not in kinds:
                what = "integers" if kinds == "iu" else "floating-point numbers"
                faults.append(f"{_name(dataset)} is of type {dataset.dtype}, expected {what}")
        inner = self.starts is not None and h5py.check_vlen_dtype(self.starts.dtype)
        if self.starts is not None and not (inner and inner.kind in "iu" and self.starts.shape == (count,)):
            faults.append(f"starts is not {count} lists of integers")
        if faults:
            raise UserError(f"{self.path}: {'; '.join(faults)}")

    def _facts(self) -> dict[str, Any] | None:
        text = self.file.attrs.get("facts")
        if text is None:
            return None
        try:
            facts = json.loads(text)
        except (TypeError, ValueError):
            facts = None
        if not isinstance(facts, dict):
            raise UserError(f"{self.path}: its attribute facts is no JSON object; delete the attribute")
        return facts


def _cached(dataset: h5py.Dataset) -> h5py.Dataset:
    """The dataset; where a chunk holds many windows, with room to keep it decompressed while they are read in turn."""
    chunks = dataset.chunks
    if not chunks or chunks[0] == 1:
        return dataset
    across = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape[1:], chunks[1:], strict=True))
    size = min(across * math.prod(chunks) * dataset.dtype.itemsize, CHUNK_CACHE_BYTES)
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(100 * across + 1, size, 1.0)
    file, name = dataset.file, str(dataset.name)
    dataset.id.close()  # as long as it is open anywhere, its cache stays what it was
    return h5py.Dataset(h5py.h5d.open(file.id, name.encode(), access))


def _name(dataset: h5py.Dataset) -> str:
    return str(dataset.name).lstrip("/")


if __name__ == "__main__":
    main()
