"""Arrow files and data sets saved to disk, read as a parquet file of the same rows is."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megakd.data.conversations import Columns, Origin, iter_conversations
from megakd.data.documents import find_files, iter_documents, source_files
from megakd.errors import UserError
from tests.data.chats import CHATS, document

TEXTS = [f"document {i}" for i in range(600)]
MESSAGES = Columns("messages", "messages", "prompt", "completion", "tools")


def written(folder: Path, kind: str, columns: dict[str, Any]) -> Path:
    table = pyarrow.table(columns)
    path = folder / f"some.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind in ("stream.arrow", "file.arrow"):
        make = pyarrow.ipc.new_stream if kind == "stream.arrow" else pyarrow.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(path, num_shards=2)
    return path


KINDS = ["parquet", "stream.arrow", "file.arrow", "saved"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
def test_texts_are_the_same_however_they_are_stored(tmp_path, kind, large):
    texts = pyarrow.array(TEXTS, pyarrow.large_string()) if large and kind != "saved" else TEXTS
    source = written(tmp_path, kind, {"id": list(range(600)), "text": texts})
    assert list(iter_documents(str(source))) == TEXTS
    assert list(iter_documents(str(source), skip=300)) == TEXTS[300:]
    assert source_files(str(source))["bytes"] > 1000  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_in_list_columns(tmp_path, kind):
    chats = list(CHATS.values())
    source = written(tmp_path, kind, {"messages": chats, "id": list(range(len(chats)))})
    assert [found for found, _ in iter_conversations(Origin(str(source)), MESSAGES)] == list(map(document, chats))


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_missing_or_no_text_is_named(tmp_path, kind):
    source = written(tmp_path, kind, {"body": TEXTS, "ids": [[1, 2]] * 600})
    with pytest.raises(UserError, match=r"no column 'text'; data\.text_field may be body, ids"):
        list(iter_documents(str(source)))
    with pytest.raises(UserError, match=r"column 'ids' holds .*list.*, not text"):
        list(iter_documents(str(source), text_field="ids"))
    with pytest.raises(UserError, match=r"no column 'messages'; data\.messages_field"):
        list(iter_conversations(Origin(str(source)), MESSAGES))


def test_a_saved_set_is_read_in_the_order_that_it_was_saved_with(tmp_path):
    """Rows that were shuffled or filtered are indices next to the files: the files alone have other rows."""
    made = datasets.Dataset.from_dict({"text": TEXTS}).shuffle(seed=1).select(range(100))
    made.save_to_disk(tmp_path / "saved")
    assert list(iter_documents(str(tmp_path / "saved"))) == made["text"][:]
    file = next((tmp_path / "saved").glob("*.arrow"))
    with pytest.raises(UserError, match=f"part of a saved data set; give the folder {tmp_path / 'saved'}"):
        list(iter_documents(str(file)))


def test_a_saved_set_with_splits_gives_the_one_that_is_asked_for(tmp_path):
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert list(iter_documents(str(tmp_path / "saved"))) == ["train"]
    assert list(iter_documents(str(tmp_path / "saved"), split="test")) == ["test"]
    assert find_files(str(tmp_path / "saved"), "test").taken == [tmp_path / "saved" / "test"]
    with pytest.raises(UserError, match=r"data\.split: .* has no split 'dev'; it has train, test"):
        list(iter_documents(str(tmp_path / "saved"), split="dev"))


def test_a_damaged_arrow_file_is_named(tmp_path):
    source = written(tmp_path, "stream.arrow", {"text": TEXTS})
    source.write_bytes(source.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"some\.stream\.arrow: cannot be read to its end"):
        list(iter_documents(str(source)))
    source.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"some\.stream\.arrow: cannot be read to its end"):
        list(iter_documents(str(source)))
