import random
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from megakd.data.tokens import Cursor, Window, load_tokenizer, pack, tokenizer_facts
from megakd.errors import UserError
from megakd.models.tiny import train_tokenizer


def random_documents(seed: int, sequence_length: int) -> list[list[int]]:
    """Distinct tokens over all documents; lengths from 1 to several windows, often just about a window."""
    chooser = random.Random(seed)
    edges = [sequence_length - 1, sequence_length, sequence_length + 1, 2 * sequence_length, 2 * sequence_length + 1]
    lengths = [
        chooser.choice([1, 1, 2, chooser.randint(1, 4 * sequence_length), *edges])
        for _ in range(chooser.randint(1, 12))
    ]
    tokens = iter(range(1, 10**6))
    return [[next(tokens) for _ in range(length)] for length in lengths]


def pairs_within_documents(window: Window) -> Iterable[tuple[int, int]]:
    bounds = [*window.starts.tolist(), len(window.tokens)]
    for start, end in pairwise(bounds):
        yield from pairwise(window.tokens[start:end].tolist())


def same(left: Iterable[Window], right: Iterable[Window]) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.starts, b.starts) and a.after == b.after
        for a, b in zip(left, right, strict=True)
    )


CASES = [(seed, length) for length in (2, 3, 7, 16) for seed in range(25)]


def test_an_example():
    windows = list(pack(enumerate([[1, 2, 3], [4], list(range(5, 13))]), 4))
    assert [(w.tokens.tolist(), w.starts.tolist(), w.after) for w in windows] == [
        ([1, 2, 3, 4, 5], [0, 3, 4], Cursor(2, 0)),  # one token of the third document fitted: it goes on there
        ([5, 6, 7, 8, 9], [0], Cursor(2, 4)),
        ([9, 10, 11, 12], [0], Cursor(3, 0)),
    ]
    assert windows[0].tokens.dtype == windows[0].starts.dtype == np.int32


@pytest.mark.parametrize("seed, sequence_length", CASES)
def test_every_pair_inside_a_document_appears_once(seed, sequence_length):
    documents = random_documents(seed, sequence_length)
    expected = Counter(pair for document in documents for pair in pairwise(document))
    found = Counter(
        pair for window in pack(enumerate(documents), sequence_length) for pair in pairs_within_documents(window)
    )
    assert found == expected


@pytest.mark.parametrize("seed, sequence_length", CASES)
def test_windows_are_full_but_the_last_and_starts_are_where_documents_meet(seed, sequence_length):
    documents = random_documents(seed, sequence_length)
    document_of = {token: i for i, document in enumerate(documents) for token in document}
    windows = list(pack(enumerate(documents), sequence_length))
    assert all(len(w.tokens) == sequence_length + 1 for w in windows[:-1])
    assert all(2 <= len(w.tokens) <= sequence_length + 1 for w in windows[-1:])
    for window in windows:
        owners = [document_of[token] for token in window.tokens.tolist()]
        assert window.starts.tolist() == [0] + [i for i in range(1, len(owners)) if owners[i] != owners[i - 1]]


@pytest.mark.parametrize("seed, sequence_length", CASES)
def test_packing_goes_on_from_any_window(seed, sequence_length):
    documents = random_documents(seed, sequence_length)
    windows = list(pack(enumerate(documents), sequence_length))
    for done, window in enumerate(windows, 1):
        rest = list(enumerate(documents))[window.after.document :]
        assert same(pack(rest, sequence_length, window.after.token), windows[done:])


def test_document_numbers_with_gaps_are_kept():
    """Hold-out documents are left out of the stream; cursors keep counting in the source's numbers."""
    documents = {3: [1, 2, 3, 4], 8: [5, 6], 9: [7, 8, 9]}
    windows = list(pack(documents.items(), 4))
    assert [w.after for w in windows] == [Cursor(8, 0), Cursor(9, 3)]
    for done, window in enumerate(windows, 1):
        rest = [(i, tokens) for i, tokens in documents.items() if i >= window.after.document]
        assert same(pack(rest, 4, window.after.token), windows[done:])


def test_no_documents_give_no_windows():
    assert list(pack([], 4)) == []
    assert list(pack([(0, [1])], 4)) == []  # one token predicts nothing


def test_facts_of_a_saved_tokenizer_are_those_of_the_tokenizer(tokenizer, teacher):
    facts = tokenizer_facts(tokenizer)
    assert facts == tokenizer_facts(load_tokenizer(teacher))
    assert facts["vocab_size"] == len(tokenizer.get_vocab()) and facts["eos"] == tokenizer.eos_token_id


def test_facts_differ_for_another_vocabulary(tokenizer, documents):
    facts = tokenizer_facts(tokenizer)
    shorter = train_tokenizer(documents, len(tokenizer) - 1)
    other = train_tokenizer(["zq zq zzq qz"] * 2000 + documents, len(tokenizer))
    assert tokenizer_facts(shorter)["vocab_size"] == facts["vocab_size"] - 1
    assert tokenizer_facts(other)["vocab_size"] == facts["vocab_size"]
    assert len({f["hash"] for f in (facts, tokenizer_facts(shorter), tokenizer_facts(other))}) == 3


def test_facts_differ_for_an_equal_vocabulary_that_reads_text_otherwise(tokenizer, teacher):
    lower = load_tokenizer(teacher)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert lower.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_facts(lower)["hash"] != tokenizer_facts(tokenizer)["hash"]


def test_load_tokenizer_needs_the_files_of_one(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no tokenizer") as caught:
            load_tokenizer(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_load_tokenizer_of_a_broken_file_is_an_error_with_the_folder(tmp_path, teacher):
    for path in teacher.glob("*token*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(UserError, match="no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_load_tokenizer_needs_an_end_token(tmp_path, teacher):
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="end-of-sequence") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
