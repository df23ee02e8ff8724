"""Identities of teacher, student, tokenizer and data set, which say how they differ; the fingerprint of a model folder.

Each identity is read from the JSON records in manifests, compress.json and history.jsonl, and `record()` gives the same
JSON back. `difference(now)` is one line about what `now` is instead, or None.

A fingerprint is recorded with everything a model made: manifests, compress.json, history.jsonl. It carries the version
of its definition ("v2:…"); one without a version was made by a MegaKD that hashed samples of the weights alone.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Self

from megakd.errors import UserError
from megakd.names import resolve
from megakd.system.files import read_json
from megakd.system.logging import say

Packing = Literal["packed", "documents"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VERSION = "v2"
SMALL = 1 << 20  # bytes; a tensor up to here is hashed whole: norms, biases, a router of 128 x 2048 in bfloat16
STRIDE, PIECE = 8 << 20, 16 << 10  # of a larger one: pieces at both ends and about every STRIDE bytes
THREADS = 8  # on network file systems a read is mostly waiting
# what config.json may say otherwise without another answer: MegaKD names the dtype and the cache at every call
NO_EFFECT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


class StoredTensor(NamedTuple):
    """Where a tensor lies: the name of its file in the folder, and the range of bytes in it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors that transformers would read from a model folder, by name, from the files' headers alone.

    UserError where transformers, or another reader, could read something else: two sets of weights next to each other,
    an index that does not fit its files, a tensor in two files, an adapter that only peft would apply.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder}: adapter_config.json makes transformers load an adapter where peft is installed, and not "
            "elsewhere; merge the adapter into the weights (merge_and_unload) or delete its files"
        )
    found: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for name, tensor in _header(folder / file).items():
            if name in found:
                raise UserError(f"{folder}: {name} is in {found[name].file} and in {file}; delete one of the two files")
            found[name] = tensor
    if (folder / INDEX).exists():
        for name, file in _weight_map(folder).items():
            if name not in found or found[name].file != file:
                raise UserError(
                    f"{folder / INDEX}: says that {name} is in {file}, which does not hold it; it belongs to other "
                    "weights: copy index and files from one place"
                )
    return found


def fingerprint(folder: Path) -> str:
    """A hash of config.json and of every tensor's name, type, shape and content; how weights are split does not count.

    Tensors up to SMALL bytes are read whole, of larger ones PIECE bytes at both ends and about every STRIDE bytes. So
    any training step changes it, and any other router; a few values changed by hand inside a large tensor may not.
    Measured with 60 GB in 18,867 tensors: 0.64 GB are read (tools/bench.py has no case for it; see CHANGELOG).
    """
    config = read_json(folder / "config.json")
    tensors = stored_tensors(folder)
    by_file: dict[str, list[str]] = defaultdict(list)
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        by_file[tensor.file].append(name)

    def hashed(file: str) -> list[tuple[str, str]]:
        with (folder / file).open("rb", buffering=0) as opened:
            return [(name, _sampled(opened, tensors[name])) for name in by_file[file]]

    total = hashlib.sha256(json.dumps(_canonical(config), sort_keys=True, ensure_ascii=False).encode())
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = dict(chain.from_iterable(pool.map(hashed, by_file)))
    except OSError as error:
        raise UserError(f"{folder}: the weights cannot be read: {error.strerror or error}") from error
    for name in sorted(digests):
        total.update(f"\n{name} {tensors[name].dtype} {tensors[name].shape} {digests[name]}".encode())
    return f"{VERSION}:{total.hexdigest()[:16]}"


def fingerprint_like(recorded: str, folder: Path) -> str:
    """The folder's fingerprint by the definition that made `recorded`, so that the two can be compared.

    Says once a process that an old fingerprint is a weaker one.
    """
    version, colon, _ = recorded.partition(":")
    if not colon:
        _say_old(recorded)
        return sampled_files(folder)
    if version != VERSION:
        raise UserError(f"fingerprint {recorded}: made by another version of MegaKD, this one knows {VERSION}")
    return fingerprint(folder)


def changed_fingerprint(recorded: str, folder: Path) -> str | None:
    """The folder's fingerprint where it is another than `recorded`; None where it is the same."""
    now = fingerprint_like(recorded, folder)
    return None if now == recorded else now


def is_old(recorded: str) -> bool:
    """Whether a recorded fingerprint is one of the weights' samples alone."""
    return ":" not in recorded


def sampled_files(folder: Path) -> str:
    """The fingerprint of old records: of each file of weights name, size and 64 spread pieces of 64 KiB.

    It sees neither config.json nor all of a file's tensors. It also hashes files that are no safetensors.
    """
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        total.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(size // 64, 65536)):
                file.seek(place)
                total.update(file.read(65536))
    return total.hexdigest()[:16]


# dataclasses, not NamedTuples: two kinds of identity are never equal, and json.dumps refuses one that was not recorded
@dataclass(frozen=True)
class Identity:
    """What all identities have: they are read from a JSON object, and recorded as one with the same keys in order."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """From a record. A key it lacks is None; keys that are no fields are ignored."""
        return cls(**{field.name: record.get(field.name) for field in fields(cls)})

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelIdentity(Identity):
    """Which model a name meant at a time: commit, of a hub's model; weights, its fingerprint, where they are here."""

    id: str
    revision: str | None
    commit: str | None
    weights: str | None

    def difference(self, now: "ModelIdentity") -> str | None:
        """Fingerprints decide where both are known, else commits."""
        if self.weights and now.weights:
            return None if self.weights == now.weights else f"fingerprint {now.weights} instead of {self.weights}"
        if self.commit and now.commit and self.commit != now.commit:
            return f"commit {now.commit} instead of {self.commit}"
        return None


@dataclass(frozen=True)
class TeacherIdentity(Identity):
    """Which teacher made a student or targets: its name, the revision that was asked for, and its fingerprint."""

    id: str
    revision: str | None
    weights: str  # "unknown" where data was converted from a file that names none

    def __str__(self) -> str:
        at = f", revision {self.revision}" if self.revision else ""
        return f"{self.id} (weights {self.weights}{at})"

    def difference(self, now: "TeacherIdentity") -> str | None:
        """Where just one of two records is of an old MegaKD, the teacher's folder decides, if it is here."""
        return None if self == now or _same_by_folder(self, now) else f"{now} instead of {self}"


@dataclass(frozen=True)
class TokenizerIdentity(Identity):
    """What must be equal for token ids to mean the same: vocabulary (largest id + 1, end token), hash of behaviour."""

    vocab_size: int
    eos: int
    hash: str

    def __str__(self) -> str:
        return f"{self.vocab_size} entries ({self.hash})"

    def difference(self, now: "TokenizerIdentity") -> str | None:
        if self.vocab_size != now.vocab_size:
            return f"a vocabulary of {now.vocab_size} entries instead of {self.vocab_size}"
        if self.eos != now.eos:
            return f"end token {now.eos} instead of {self.eos}"
        return None if self == now else f"other tokens or merges, hash {now.hash} instead of {self.hash}"


@dataclass(frozen=True)
class DataIdentity:
    """How a folder of shards was made, as far as one loss can be right for two of them: from its manifest's facts."""

    tokenizer: TokenizerIdentity
    sequence_length: int
    packing: Packing
    teacher: TeacherIdentity | None  # of token shards None

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Self:
        """From a manifest's facts, which hold those of their tokens where there are targets."""
        tokens, teacher = text_facts(facts), facts.get("teacher")
        return cls(
            TokenizerIdentity.of(tokens["tokenizer"]),
            tokens["sequence_length"],
            packing_of(facts),
            TeacherIdentity.of(teacher) if teacher else None,
        )

    def difference(self, now: "DataIdentity") -> str | None:
        if self.teacher and now.teacher and (different := self.teacher.difference(now.teacher)):
            return f"another teacher: {different}"
        if different := self.tokenizer.difference(now.tokenizer):
            return f"another tokenizer: {different}"
        if self.packing != now.packing:
            return f"another packing: {now.packing} instead of {self.packing}"
        if self.sequence_length != now.sequence_length:
            return f"another sequence length: {now.sequence_length} instead of {self.sequence_length}"
        return None


def text_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a data set's tokens: those of a set with targets are among its facts."""
    return facts.get("tokens", facts)


def packing_of(facts: dict[str, Any]) -> Packing:
    """How the sequences of a folder of shards were made; data of before `data.packing` is packed."""
    return text_facts(facts).get("packing", "packed")


def identify(name: str, revision: str | None, folder: Path) -> ModelIdentity:
    """The identity of the model in `folder`, to which `name` was resolved."""
    commit = folder.name if folder.parent.name == "snapshots" else None
    weights = any((folder / file).exists() for file in (WEIGHTS, INDEX))
    if weights and commit:  # only configuration and tokenizer may have been downloaded
        weights = all((folder / file).exists() for file in _listed_files(folder))
    return ModelIdentity(name, revision, commit, fingerprint(folder) if weights else None)


def _same_by_folder(one: TeacherIdentity, two: TeacherIdentity) -> bool:
    """Whether two records are of one teacher where just one of them is of an old MegaKD: its folder tells.

    Where that is not here, nothing can, and this is said.
    """
    weights = (one.weights, two.weights)
    if (one.id, one.revision) != (two.id, two.revision) or "unknown" in weights:
        return False
    if is_old(one.weights) == is_old(two.weights):
        return False
    try:
        folder = resolve(one.id, one.revision)
    except UserError as error:
        say(
            f"student and logits were made by {one.id} with fingerprints of two versions, {weights[0]} and "
            f"{weights[1]}; whether they are of one teacher cannot be checked without it ({error})"
        )
        return True
    return not any(changed_fingerprint(each, folder) for each in weights)


def tensor_hash(folder: Path, tensor: StoredTensor) -> str:
    """A hash of one tensor's content, sampled as in `fingerprint`."""
    with (folder / tensor.file).open("rb", buffering=0) as file:
        return _sampled(file, tensor)


@cache
def _say_old(recorded: str) -> None:
    say(
        f"fingerprint {recorded}: of an older MegaKD, compared by its own, weaker rule, which sees neither config.json "
        "nor every tensor"
    )


def _listed_files(folder: Path) -> Iterable[str]:
    return [WEIGHTS] if (folder / WEIGHTS).exists() else set(_weight_map(folder).values())


def _weight_files(folder: Path) -> list[str]:
    """The files of weights that transformers reads; UserError where another reader might read others."""
    whole, index = (folder / WEIGHTS).exists(), (folder / INDEX).exists()
    if not whole and not index:
        raise UserError(f"{folder}: neither {WEIGHTS} nor {INDEX} here; MegaKD reads safetensors")
    listed = sorted(set(_weight_map(folder).values())) if index else [WEIGHTS]
    if whole and listed != [WEIGHTS]:
        raise UserError(
            f"{folder}: holds {WEIGHTS}, and {INDEX} with {len(listed)} other files; transformers reads the former, "
            "other programs the latter: delete one of the two sets"
        )
    return listed


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{folder / INDEX}: no weight_map from tensor names to files in it")
    for file in set(found.values()):
        if Path(file).name != file:
            raise UserError(f"{folder / INDEX}: names {file!r}, which is no file of this folder")
    return found


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file: 8 bytes of length, JSON, the tensors' bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("no header of its length")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= start <= stop <= size:
                raise ValueError(f"{name} ends at byte {stop} of a file of {size}: it was cut short")
            found[name] = StoredTensor(path.name, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, stop)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error
    return found


def _sampled(file: BinaryIO, tensor: StoredTensor) -> str:
    """A hash of a tensor's bytes: of all, or of pieces at both ends and spread evenly between."""
    size = tensor.stop - tensor.start
    found = hashlib.sha256()
    if size <= SMALL:
        file.seek(tensor.start)
        found.update(file.read(size))
        return found.hexdigest()
    gaps = 1 + size // STRIDE
    for number in range(gaps + 1):
        file.seek(tensor.start + (size - PIECE) * number // gaps)
        found.update(file.read(PIECE))
    return found.hexdigest()


def _canonical(value: Any) -> Any:
    """A JSON value without what has no effect; 10000.0 and 10000 are one number."""
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items() if key not in NO_EFFECT}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
