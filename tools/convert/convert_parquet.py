"""Logit shards ↔ Parquet, a window a row, as users of `datasets` keep top-k targets.

    python tools/convert/convert_parquet.py to runs/a/data/logits/train train.parquet
    python tools/convert/convert_parquet.py from train.parquet again      # a file that `to` wrote states all facts
    python tools/convert/convert_parquet.py from mine/data runs/b/data/logits/train --tokenizer qwen3 \\
        --values logprobs --teacher Qwen/Qwen3-30B-A3B --weights 0123456789abcdef --sequence-length 2048
    python tools/convert/convert_parquet.py from mine.parquet shards --tokenizer qwen3 --values logits --split-at-end

    datasets.load_dataset("parquet", data_files="train.parquet", streaming=True)

columns  input_ids      list<int32>
         topk_ids       list<list<int32>>  row t is about the token after input_ids[t]; any number of entries
         topk_logprobs  list<list<float>>  the same numbers of entries
and what `to` adds, `from` reads if it is there
         starts         list<int32>        offsets at which documents begin
         tail_logprob   list<float>        log of the mass of all other tokens
         log_tails      list<list<float>>  where the shards have tails at more temperatures than 1: at each of them the
                                           log of the sum over all other tokens of p^(1/T)
         label_nll      list<float>        -log p(input_ids[t + 1])
         label_mask     list<bool>         of conversations: whether the label input_ids[t + 1] counts; a row whose
                                           label does not is empty
         and `facts` (JSON) in the metadata: whose targets these are and of which temperatures

The lists of a row are as long as input_ids, or one shorter. IN is a file, or a folder of files in the order of their
names. Numbers are log-probabilities over the whole vocabulary; for raw logits (--values logits) nothing is known of the
tail, and train needs objective.tail=truncated. Training reads RUN/data/logits/train; it refuses shards of another
teacher than the student comes from, so --teacher, --revision and --weights repeat what RUN/student-0/compress.json
says. A conversion that was killed goes on after its last finished shard when it is started again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import installed  # noqa: F401
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from foreign import check_stated, convert, exported, sorted_head, two_ways
from foreign_rows import Names, Row

from megakd.data.folders import data_files
from megakd.data.records import Sample
from megakd.data.shards import ShardSet, label_masked
from megakd.errors import UserError, listed, reason
from megakd.outputs import check_file
from megakd.system.files import digest, publishing, sha256
from megakd.system.logging import Progress, say
from megakd.system.terminal import accept_any_encoding, one_line_errors

NAMES = Names("input_ids", "topk_ids", "topk_logprobs", "starts", "tail_logprob", "label_nll")
GROUP_ENTRIES = 1 << 22  # of a row group: 32 MB before compression
READ_ROWS = 8  # at a time


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    args = two_ways(__doc__, "Parquet", "OUT.parquet", "IN")[0].parse_args(argv)
    with one_line_errors("convert_parquet"):
        if args.command == "to":
            write_parquet(ShardSet(args.shards), args.out)
        else:
            convert(ParquetSource(args.source), args, "convert_parquet from")


def write_parquet(shards: ShardSet, out: Path) -> None:
    """A window a row, the most probable entries first, what is no entry skipped; a row group at a time."""
    out = check_file(out)
    facts = exported(shards)
    schema = _schema(facts)
    progress = Progress("convert_parquet to", len(shards), "samples")
    with (
        publishing(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        group: list[dict[str, pa.Array]] = []
        entries = 0
        for index in range(len(shards)):
            columns = _columns(shards[index], schema)
            group.append(columns)
            entries += len(columns["topk_ids"].flatten().flatten())
            if entries >= GROUP_ENTRIES or index == len(shards) - 1:
                writer.write_batch(_batch(group, schema))
                group, entries = [], 0
            progress.update(1)
    progress.close(f"{out}: {out.stat().st_size / shards.tokens:.1f} bytes per token")


def _schema(facts: dict[str, Any]) -> pa.Schema:
    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float32())
    fields: dict[str, pa.DataType] = {"input_ids": ids, "starts": ids, "label_nll": numbers}
    fields |= {"topk_ids": pa.list_(ids), "topk_logprobs": pa.list_(numbers)}
    if label_masked(facts):
        fields["label_mask"] = pa.list_(pa.bool_())
    if facts["tails"]:
        fields["tail_logprob"] = numbers
        if len(facts["temperatures"]) > 1:
            fields["log_tails"] = pa.list_(numbers)
    return pa.schema(list(fields.items()), metadata={"facts": json.dumps(facts)})


def _columns(sample: Sample, schema: pa.Schema) -> dict[str, pa.Array]:
    """The sample's columns, each an array of one row."""
    targets = sample.targets
    assert targets is not None
    ids, logprobs = sorted_head(targets)
    there = logprobs > -np.inf
    counts, tails = there.sum(1), targets.log_tails
    columns = {
        "input_ids": _list(pa.array(sample.tokens)),
        "starts": _list(pa.array(sample.starts)),
        "label_nll": _list(pa.array(targets.label_nll)),
        "label_mask": _list(pa.array([] if sample.mask is None else sample.mask, pa.bool_())),
        "topk_ids": _list(_lists(ids[there], counts)),
        "topk_logprobs": _list(_lists(logprobs[there], counts)),
        "tail_logprob": _list(pa.array(tails[:, 0])),
        "log_tails": _list(_lists(tails.ravel(), np.full(len(tails), tails.shape[1]))),
    }
    return {name: columns[name] for name in schema.names}


def _list(values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _lists(flat: np.ndarray, counts: np.ndarray) -> pa.ListArray:
    ends = np.concatenate([[0], np.cumsum(counts)])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat))


def _batch(group: list[dict[str, pa.Array]], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.concat_arrays([columns[name] for columns in group]) for name in schema.names]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


class _Part(NamedTuple):
    """One file, and the number of its first row among all."""

    path: Path
    file: pq.ParquetFile
    first: int


class ParquetSource:
    """Parquet files as foreign.Source; columns are checked when they are opened."""

    def __init__(self, path: Path):
        self.path = path
        files = _visible(path) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: no *.parquet in it")
        self.parts: list[_Part] = []
        self.count = 0
        for file in files:
            self.parts.append(_Part(file, _open(file), self.count))
            self.count += self.parts[-1].file.metadata.num_rows
            _check_columns(file, self.parts[-1].file.schema_arrow)
        held = [{*NAMES, "log_tails"} & set(part.file.schema_arrow.names) for part in self.parts]
        different = [part.path.name for part, names in zip(self.parts, held, strict=True) if names != held[0]]
        if different or not self.count:
            problem = f"{different[0]} has other columns than {files[0].name}" if different else "no row in it"
            raise UserError(f"{path}: {problem}")
        self.columns = sorted(held[0])
        self.names = NAMES._replace(log_tails="log_tails") if "log_tails" in held[0] else NAMES
        self.facts = self._facts()
        if self.facts is None:
            self.longest, self.top_k = self._widths()
        else:
            check_stated(path, self.facts)
            self.longest, self.top_k = self.facts["tokens"]["sequence_length"] + 1, self.facts["top_k"]

    def sha256(self) -> str:
        sums = [sha256(part.path) for part in self.parts]
        return sums[0] if len(sums) == 1 else digest(sums)

    def rows(self, first: int) -> Iterator[Row]:
        for number, part, batch in self._batches(first, self.columns):
            for index in range(max(first - number, 0), len(batch)):
                place = f"{part.path}: row {number + index - part.first}"
                yield self._row(number + index, place, batch, index)

    def _row(self, number: int, place: str, batch: pa.RecordBatch, index: int) -> Row:
        def flat(name: str) -> np.ndarray | None:
            return _numbers(batch.column(name)[index].values, f"{place}: {name}") if name in self.columns else None

        def nested(name: str, filler: float) -> tuple[np.ndarray, np.ndarray]:
            return _rows_of(batch.column(name)[index].values, f"{place}: {name}", filler)

        tokens, (ids, widths), (values, others) = (
            flat(NAMES.tokens),
            nested(NAMES.ids, 0),
            nested(NAMES.values, -np.inf),
        )
        assert tokens is not None
        if not np.array_equal(widths, others):
            raise UserError(f"{place}: {NAMES.values} has other numbers of entries than {NAMES.ids}")
        tails = flat(NAMES.log_tails)
        if tails is not None:
            tails = tails[:, None]
        if "log_tails" in self.columns:
            tails, widths = nested("log_tails", 0)
            if len(set(widths)) > 1:
                raise UserError(f"{place}: log_tails has lists of different lengths")
        return Row(
            number, tokens, ids, values, flat(NAMES.starts), tails, flat(NAMES.label_nll), flat(NAMES.label_mask)
        )

    def _batches(self, first: int, columns: list[str]) -> Iterator[tuple[int, _Part, pa.RecordBatch]]:
        """(number of its first row among all, file, batch), from the row group that holds row `first` on."""
        for part in self.parts:
            number = part.first
            for group in range(part.file.num_row_groups):
                rows = part.file.metadata.row_group(group).num_rows
                if number + rows <= first:
                    number += rows
                    continue
                try:
                    for batch in part.file.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
                        yield number, part, batch
                        number += len(batch)
                except (pa.ArrowException, OSError) as error:
                    place = f"{part.path}: row {number - part.first} or one soon after"
                    raise UserError(f"{place} cannot be read ({reason(error)})") from error

    def _widths(self) -> tuple[int, int]:
        """Tokens of the longest window and entries of the widest row, from a look at the ids of all rows."""
        progress = Progress("convert_parquet looks at", self.count, "rows")
        longest = top_k = 0
        for _, _, batch in self._batches(0, [NAMES.tokens, NAMES.ids]):
            longest = max(longest, *_lengths(batch.column(NAMES.tokens)))
            top_k = max(top_k, *_lengths(batch.column(NAMES.ids).flatten()), 0)
            progress.update(len(batch))
        progress.close(f"at most {longest} tokens and {top_k} entries")
        return int(longest), int(top_k)

    def _facts(self) -> dict[str, Any] | None:
        found = [(part.file.schema_arrow.metadata or {}).get(b"facts") for part in self.parts]
        if len(set(found)) > 1:
            raise UserError(f"{self.path}: its files state different facts")
        if found[0] is None:
            return None
        try:
            facts = json.loads(found[0])
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            raise UserError(f"{self.path}: facts in its metadata are no JSON object; take them out")
        return facts


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet; was it cut short? ({reason(error)})") from error


def _visible(folder: Path) -> list[Path]:
    """The parquet files of a folder itself; what is hidden, temporary or in folders below is counted aloud."""
    found = data_files(folder, (".parquet",), below=False)
    if found.passed:
        say(f"{folder}: {found.counts(('.parquet',))}{found.passed_over()}")
    return found.taken


def _check_columns(path: Path, schema: pa.Schema) -> None:
    whole, real = (pa.types.is_integer, "integers"), (pa.types.is_floating, "floating-point numbers")
    depth = {NAMES.tokens: (1, whole), NAMES.ids: (2, whole), NAMES.values: (2, real), NAMES.starts: (1, whole)}
    depth |= {NAMES.log_tails: (1, real), "log_tails": (2, real), NAMES.label_nll: (1, real)}
    depth[NAMES.label_mask] = (1, (pa.types.is_boolean, "true and false"))
    for name, (lists, (fits, what)) in depth.items():
        if name not in schema.names:
            if name in (NAMES.tokens, NAMES.ids, NAMES.values):
                raise UserError(f"{path}: no column {name}; it holds {listed(schema.names)}")
            continue
        kind: Any = schema.field(name).type
        for _ in range(lists):
            kind = kind.value_type if _is_list(kind) else None
        if kind is None or not fits(kind):
            expected = "lists of lists of " if lists == 2 else "lists of "
            raise UserError(f"{path}: {name} is {schema.field(name).type}, expected {expected}{what}")


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _numbers(values: Any, place: str) -> np.ndarray:
    if values is None or values.null_count:
        raise UserError(f"{place}: null where numbers should be")
    return values.to_numpy(zero_copy_only=False)


def _lengths(lists: Any) -> np.ndarray:
    """Of each list; 0 for null, which is refused when the list is read."""
    return pc.call_function("list_value_length", [lists]).fill_null(0).to_numpy(zero_copy_only=False)


def _rows_of(lists: Any, place: str, filler: float) -> tuple[np.ndarray, np.ndarray]:
    """A list of lists as one array, short lists filled up, and their lengths."""
    if lists is None or lists.null_count:
        raise UserError(f"{place}: null where lists should be")
    flat, counts = _numbers(lists.flatten(), place), _lengths(lists)
    out = np.full((len(counts), int(counts.max(initial=0))), filler, flat.dtype)
    out[np.arange(out.shape[1]) < counts[:, None]] = flat
    return out, counts


if __name__ == "__main__":
    main()
