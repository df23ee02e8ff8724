"""The teacher-target store against HDF5 + gzip, tar of npz, parquet: bytes, fidelity, speed on one core."""

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.rows import Row
from megakd.capture.targets import targets_from_logits
from megakd.config.data import LogitsConfig
from megakd.data import codec
from megakd.data.codebook import build_book, save_book
from megakd.data.records import Sample, TeacherTargets
from megakd.data.shard_writer import shard_name, summary_of, write_manifest, write_shard
from megakd.data.shards import ShardSet
from megakd.system.logging import Progress

LENGTH, TOP_K, DRAWS = 2048, 64, 50
BOOK_POSITIONS = 4096  # 1024 with --quick
IN_A_ROW = 8  # samples: the first comes upon caches that another store has filled
SYNTHETIC_VOCABULARY = 151_936


# ---- material: whole logits of a teacher, chunk by chunk


def synthetic_logits(positions: int, seed: int, vocabulary: int = SYNTHETIC_VOCABULARY) -> Iterator[tuple[Any, Any]]:
    """(logits [n, V], next tokens [n]) shaped like a language model's: a Zipf prior, a context, noise, some sharp rows.

    The constants were chosen so that what counts for a store comes out near a real model (SmolLM2-135M on English, in
    brackets), a little sharper, as a larger teacher is: outside the top 64 lie 7 % [9] at T = 1; 49 [52] entries exceed
    3e-4 and 37 [39] exceed 1e-3; an id costs about 7 [7] bits in the codebook. The table says what they came to.
    """
    shape, noise = torch.Generator().manual_seed(1234), torch.Generator().manual_seed(seed)
    directions_VD = torch.randn(vocabulary, 64, generator=shape) / 8
    rank_V = torch.randperm(vocabulary, generator=shape).float() + 1
    prior_V = -1.45 * torch.log(rank_V + 2.7)
    for start in range(0, positions, 8):  # small buffers, which the allocator keeps
        n = min(8, positions - start)
        context_ND = torch.randn(n, 64, generator=noise) * 2.7 * torch.exp(0.3 * torch.randn(n, 1, generator=noise))
        logits = context_ND @ directions_VD.T
        logits += prior_V
        logits += 0.9 * torch.randn(n, vocabulary, generator=noise)
        u = torch.rand(n, 1, generator=noise)
        logits *= torch.where(u < 0.33, 1.65, torch.where(u < 0.66, 1.25, 0.97))
        yield logits, torch.multinomial(logits.softmax(-1), 1, generator=noise)[:, 0]


def real_logits(folder: Path, positions: int) -> Iterator[tuple[Any, Any]]:
    """(logits, next tokens) of a real model on real English: the docstrings of this Python."""
    from megakd.data.documents import python_documents
    from megakd.data.tokenizers import load_tokenizer, vocabulary_size
    from megakd.models.loading import load_model

    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.bfloat16).eval()  # the dtype of its weights
    ids: list[int] = []
    for document in python_documents():
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]  # type: ignore[misc]
        if len(ids) > positions:
            break
    for start in range(0, positions, 1024):
        window = torch.tensor(ids[start : start + 1025])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0, :, : vocabulary_size(tokenizer)].float()
        yield logits, window[1:]


class Material(NamedTuple):
    """Records of one teacher under one capture setting, and the layout they are stored in."""

    samples: list[Sample]
    layout: codec.Layout


def capture(
    source: Callable[[int], Iterable[tuple[Any, Any]]],
    settings: dict[str, LogitsConfig],
    records: int,
    aside: int,
    vocabulary: int,
) -> dict[str, Material]:
    """The same logits kept under every setting; the codebook comes from the first `aside` positions, not measured."""
    parts: dict[str, list[TeacherTargets]] = {name: [] for name in settings}
    labels = []
    positions = aside + records * LENGTH
    progress = Progress("teacher", positions, "positions")
    generator = np.random.default_rng(0)
    for logits, following in source(positions):
        offsets = torch.from_numpy(generator.random(len(following)))
        for name, config in settings.items():
            found = targets_from_logits(logits, following, config, offsets)
            parts[name].append(TeacherTargets(*(field.numpy() for field in found)))
        labels.append(following.numpy())
        progress.update(len(following))
    progress.close()
    tokens = np.concatenate(labels).astype(np.int32)
    made = {}
    for name, config in settings.items():
        whole = TeacherTargets(*(np.concatenate(field) for field in zip(*parts[name], strict=True)))
        first = TeacherTargets(*(field[:aside] for field in whole))
        ids = np.concatenate([first.ids[first.logprobs > -np.inf], first.draw_ids[first.draw_shares > 0]])
        head, draws = whole.ids.shape[1], config.draws if config.profile != "topk" else 0
        layout = codec.Layout(
            head, draws, config.levels, config.declared_temperatures, LENGTH, build_book(ids, vocabulary)
        )
        samples = []
        for number, at in enumerate(range(aside, positions, LENGTH)):
            own = TeacherTargets(*(field[at : at + LENGTH] for field in whole))
            window = np.concatenate([tokens[at - 1 : at], tokens[at : at + LENGTH]])
            samples.append(Sample(f"{number:09d}", window, np.array([0]), own))
        made[name] = Material(samples, layout)
    return made


# ---- stores


class Store(Protocol):
    """A way to keep samples in one file or folder; `encode` and `decode` work in memory."""

    def encode(self, sample: Sample) -> bytes: ...
    def decode(self, data: bytes) -> Any: ...
    def write(self, samples: list[Sample], folder: Path) -> None: ...
    def open(self, folder: Path) -> Callable[[int], Any]: ...


class Mkd:
    """MegaKD's shards."""

    def __init__(self, layout: codec.Layout):
        self.layout = layout

    def encode(self, sample: Sample) -> bytes:
        return codec.encode(sample, self.layout)

    def decode(self, data: bytes) -> Sample:
        return codec.decode("", data, self.layout)

    def write(self, samples: list[Sample], folder: Path) -> None:
        layout = self.layout
        facts = {
            "tokens": {"sequence_length": LENGTH}, "codec": codec.NAME, "book": layout.book.digest,
            "top_k": layout.top_k, "draws": layout.draws, "levels": layout.levels,
            "temperatures": layout.temperatures, "vocab_size": len(layout.book.places),
        }  # fmt: skip
        facts = json.loads(json.dumps(facts))
        save_book(folder, layout.book)
        sidecar = write_shard(folder, shard_name(0), samples, facts, layout)
        write_manifest(folder, facts, [summary_of(shard_name(0), sidecar)], complete=True)

    def open(self, folder: Path) -> Callable[[int], Any]:
        return ShardSet(folder).__getitem__


def arrays(sample: Sample) -> dict[str, np.ndarray]:
    """What the other stores keep: int32 ids, float16 log-probabilities, tails and NLL; tokens."""
    targets = sample.targets
    assert targets is not None
    return {
        "input_ids": sample.tokens.astype(np.int32),
        "topk_indices": targets.ids.astype(np.int32),
        "topk_values": targets.logprobs.astype(np.float16),
        "log_tails": targets.log_tails.astype(np.float16),
        "label_nll": targets.label_nll.astype(np.float16),
    }


def as_targets(fields: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """What a trainer takes: float32 log-probabilities next to the ids."""
    floats = (fields[name].astype(np.float32) for name in ("topk_values", "log_tails", "label_nll"))
    return (fields["input_ids"], fields["topk_indices"], *floats)


class Hdf5:
    """HDF5 with gzip, a chunk a sample: the common hand-made store."""

    def encode(self, sample: Sample) -> bytes:
        buffer = io.BytesIO()
        self._write([sample], buffer)
        return buffer.getvalue()

    def decode(self, data: bytes) -> Any:
        with h5py.File(io.BytesIO(data)) as file:
            return self._read(file, 0)

    def _write(self, samples: list[Sample], target: Any) -> None:
        with h5py.File(target, "w") as file:
            for name, first in arrays(samples[0]).items():
                data = file.create_dataset(
                    name, (len(samples), *first.shape), first.dtype, chunks=(1, *first.shape), compression="gzip"
                )
                for i, sample in enumerate(samples):
                    data[i] = arrays(sample)[name]

    def _read(self, file: Any, index: int) -> Any:
        return as_targets({name: file[name][index] for name in file})

    def write(self, samples: list[Sample], folder: Path) -> None:
        self._write(samples, folder / "store.h5")

    def open(self, folder: Path) -> Callable[[int], Any]:
        file = h5py.File(folder / "store.h5")
        return lambda index: self._read(file, index)


class TarNpy:
    """A tar with an npz a sample, zip-compressed: WebDataset as most people would write it."""

    def encode(self, sample: Sample) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays(sample))  # type: ignore[arg-type]
        return buffer.getvalue()

    def decode(self, data: bytes) -> Any:
        with np.load(io.BytesIO(data), allow_pickle=False) as fields:
            return as_targets({name: fields[name] for name in fields.files})

    def write(self, samples: list[Sample], folder: Path) -> None:
        with tarfile.open(folder / "store.tar", "w") as tar:
            for i, sample in enumerate(samples):
                data = self.encode(sample)
                info = tarfile.TarInfo(f"{i:09d}.npz")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def open(self, folder: Path) -> Callable[[int], Any]:
        tar = tarfile.open(folder / "store.tar")  # noqa: SIM115
        members = tar.getmembers()

        def read(index: int) -> Any:
            file = tar.extractfile(members[index])
            assert file is not None
            return self.decode(file.read())

        return read


class Parquet:
    """Parquet with zstd, a row a sample, nested lists flattened: as `datasets` users keep them."""

    def _table(self, samples: list[Sample]) -> Any:
        rows = [{name: value.ravel() for name, value in arrays(sample).items()} for sample in samples]
        columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
        return pa.table(columns)

    def _save(self, samples: list[Sample], target: Any) -> None:
        pq.write_table(self._table(samples), target, row_group_size=1, compression="zstd")

    def encode(self, sample: Sample) -> bytes:
        buffer = io.BytesIO()
        self._save([sample], buffer)
        return buffer.getvalue()

    def decode(self, data: bytes) -> Any:
        return self._read(pq.ParquetFile(io.BytesIO(data)), 0)

    def _read(self, file: Any, index: int) -> Any:
        group = file.read_row_group(index)
        fields = {name: group.column(name).combine_chunks().values.to_numpy() for name in group.column_names}
        for name in ("topk_indices", "topk_values", "log_tails"):
            fields[name] = fields[name].reshape(len(fields["label_nll"]), -1)
        return as_targets(fields)

    def write(self, samples: list[Sample], folder: Path) -> None:
        self._save(samples, folder / "store.parquet")

    def open(self, folder: Path) -> Callable[[int], Any]:
        file = pq.ParquetFile(folder / "store.parquet")
        return lambda index: self._read(file, index)


# ---- the measurement


def fidelity(samples: list[Sample], decoded: Iterable[TeacherTargets]) -> dict[str, float]:
    """KL(captured || decoded) in nats over stored entries and the tail as one bucket; total variation."""
    kls, tvs = [], []
    for sample, found in zip(samples, decoded, strict=True):
        targets = sample.targets
        assert targets is not None
        p, q = _by_id(targets), _by_id(found)
        with np.errstate(divide="ignore", invalid="ignore"):
            kls.append(np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(1))
        tvs.append(np.abs(p - q).sum(1) / 2)
    kl = np.concatenate(kls)
    return {"kl_mean": kl.mean(), "kl_p99": float(np.quantile(kl, 0.99)), "tv_mean": float(np.concatenate(tvs).mean())}


def _by_id(targets: TeacherTargets) -> np.ndarray:
    """Probabilities in the order of ids, fillers last, then the tail; rows scaled to 1; float64 [T, K + 1]."""
    there = targets.logprobs > -np.inf
    order = np.argsort(np.where(there, targets.ids, 2**31 - 1), axis=1, kind="stable")
    p = np.exp(np.take_along_axis(targets.logprobs, order, 1).astype(np.float64))
    p = np.concatenate([p, np.exp(targets.log_tails[:, :1].astype(np.float64))], 1)
    return p / p.sum(1, keepdims=True)


def times(
    store: Store, samples: list[Sample], records: list[bytes], read: Callable[[int], Any], order: list[int]
) -> dict[str, float]:
    """Seconds for all samples, in memory and from the file."""
    return {
        "encode": seconds(store.encode, samples),
        "decode": seconds(store.decode, records),
        "sequential": seconds(read, range(len(samples))),
        "shuffled": seconds(read, order),
    }


def seconds(action: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """For all items, one after the other, at least IN_A_ROW; what comes out is freed at once, as a stream does."""
    rounds = -(-IN_A_ROW // len(items))
    start = time.perf_counter()
    for _ in range(rounds):
        for item in items:
            action(item)
    return (time.perf_counter() - start) / rounds


def bench_store(quick: bool, real: Path | None) -> list[Row]:
    """Every store on the same captures: synthetic ones, and those of a real model when there is one."""
    records, aside, repeats = (1, 1024, 5) if quick else (8, BOOK_POSITIONS, 25)
    common = {"top_k": TOP_K, "temperatures": (1.0,), "draws": DRAWS}
    settings = {
        "pmin 3e-4": LogitsConfig(**common),
        "pmin 3e-4, T = 1, 2": LogitsConfig(**{**common, "temperatures": (1.0, 2.0)}),
        "pmin 1e-3": LogitsConfig(pmin=1e-3, levels=206, **common),
        "all 64": LogitsConfig(pmin=0.0, **common),
        "sampled 50": LogitsConfig(profile="sampled", **common),
        "hybrid 16 + 50": LogitsConfig(profile="hybrid", **{**common, "top_k": 16}),
    }
    if quick:
        settings = {name: config for name, config in settings.items() if "T =" not in name and "hybrid" not in name}
    rows = []
    sources: dict[str, tuple[Any, int]] = {"synthetic": (lambda n: synthetic_logits(n, 0), SYNTHETIC_VOCABULARY)}
    if real:
        from megakd.data.tokenizers import load_tokenizer, vocabulary_size

        sources["real"] = (lambda n: real_logits(real, n), vocabulary_size(load_tokenizer(real)))
    for kind, (source, vocabulary) in sources.items():
        torch.set_num_threads(os.cpu_count() or 1)
        captured = capture(source, settings, records, aside, vocabulary)
        torch.set_num_threads(1)
        rows += measure(kind, captured, repeats)
    return rows


def measure(kind: str, captured: dict[str, Material], repeats: int) -> list[Row]:
    plain = captured["all 64"].samples
    # the others keep all 64: their ids would have to be ragged to drop any
    cases: dict[str, tuple[Store, list[Sample]]] = {"hdf5_gzip": (Hdf5(), plain)}
    cases |= {"tar_npz": (TarNpy(), plain), "parquet_zstd": (Parquet(), plain)}
    cases |= {f"megakd, {name}": (Mkd(material.layout), material.samples) for name, material in captured.items()}
    rows: list[Row] = []
    timings: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        readers, records = {}, {}
        for number, (case, (store, samples)) in enumerate(cases.items()):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            store.write(samples, folder)
            size = sum(p.stat().st_size for p in folder.iterdir() if not p.name.startswith("book-"))
            rows.append(Row("store", case, "bytes_per_token", size / (LENGTH * len(samples)), "bytes"))
            readers[case], records[case] = store.open(folder), [store.encode(sample) for sample in samples]
            for name, value in _fidelity(store, samples, records[case]):
                rows.append(Row("store", case, name, value, "share" if name == "tv_mean" else "nats"))
        order = np.random.default_rng(0).permutation(len(plain)).tolist()
        for _ in range(repeats):
            for case, (store, samples) in cases.items():
                for name, taken in times(store, samples, records[case], readers[case], order).items():
                    timings.setdefault((case, name), []).append(taken)
    tokens = LENGTH * len(plain)
    for case in cases:
        for name in ("encode", "decode", "sequential", "shuffled"):
            mine, base = np.array(timings[case, name]), np.array(timings["hdf5_gzip", name])
            rows.append(Row("store", case, f"{name}_ratio", float(np.median(base / mine)), "x hdf5_gzip"))
            rows.append(Row("store", case, f"{name}_speed", tokens / float(np.median(mine)), "tokens/s"))
        rows.append(
            Row("store", case, "random_access", float(np.median(timings[case, "shuffled"])) / len(plain) * 1e3, "ms")
        )
    return [row._replace(case=f"{kind}: {row.case}" if kind != "synthetic" else row.case) for row in rows]


def _fidelity(store: Store, samples: list[Sample], records: list[bytes]) -> list[tuple[str, float]]:
    first = samples[0].targets
    assert first is not None
    if not first.ids.shape[1]:
        return []  # draws are kept exactly
    decoded = (store.decode(data) for data in records)
    if isinstance(store, Mkd):
        return list(fidelity(samples, (d.targets for d in decoded)).items())
    empty = np.empty((LENGTH, 0), np.float32)
    found = (TeacherTargets(ids, logp, tails, empty, empty, nll, nll) for _, ids, logp, tails, nll in decoded)
    return list(fidelity(samples, found).items())
