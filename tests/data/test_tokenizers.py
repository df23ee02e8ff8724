import json
import random
import shutil
import socket
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import normalizers
from transformers import AutoTokenizer

from megakd.data.packing import Cursor, Window, pack
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.errors import UserError
from megakd.identity import TokenizerIdentity
from megakd.models.tiny import train_tokenizer
from tests.conftest import for_each


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


def sentencepiece_folder(
    folder: Path, documents: list[str], tokenizer_class: str | None, family: str = "qwen3_moe", **changes: Any
) -> Path:
    """A Hugging Face folder with a sentencepiece model as Llama's (BPE, byte fallback, text as it is), but tiny."""
    llama = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 500, "normalization_rule_name": "identity"}
    llama |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}
    lines = iter([line for document in documents for line in document.splitlines()])
    settings = {**llama, "character_coverage": 0.999, "minloglevel": 2, "hard_vocab_limit": False, **changes}
    folder.mkdir(exist_ok=True)
    SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), **settings)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **named}))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


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


@for_each("seed, sequence_length", CASES)
def test_every_pair_inside_a_document_appears_once(seed, sequence_length):
    documents = random_documents(seed, sequence_length)
    expected = Counter(pair for document in documents for pair in pairwise(document))
    found = Counter(
        pair for window in pack(enumerate(documents), sequence_length) for pair in pairs_within_documents(window)
    )
    assert found == expected


@for_each("seed, sequence_length", CASES)
def test_windows_are_full_but_the_last_and_starts_are_where_documents_meet(seed, sequence_length):
    documents = random_documents(seed, sequence_length)
    document_of = {token: i for i, document in enumerate(documents) for token in document}
    windows = list(pack(enumerate(documents), sequence_length))
    assert all(len(w.tokens) == sequence_length + 1 for w in windows[:-1])
    assert all(2 <= len(w.tokens) <= sequence_length + 1 for w in windows[-1:])
    for window in windows:
        owners = [document_of[token] for token in window.tokens.tolist()]
        assert window.starts.tolist() == [0] + [i for i in range(1, len(owners)) if owners[i] != owners[i - 1]]


@for_each("seed, sequence_length", CASES)
def test_packing_goes_on_from_any_window(seed, sequence_length):
    documents = random_documents(seed, sequence_length)
    windows = list(pack(enumerate(documents), sequence_length))
    for done, window in enumerate(windows, 1):
        rest = list(enumerate(documents))[window.after.document :]
        assert same(pack(rest, sequence_length, window.after.token), windows[done:])


def test_document_numbers_with_gaps_are_kept():
    """Validation set documents are skipped of the stream; cursors keep counting in the source's numbers."""
    documents = {3: [1, 2, 3, 4], 8: [5, 6], 9: [7, 8, 9]}
    windows = list(pack(documents.items(), 4))
    assert [w.after for w in windows] == [Cursor(8, 0), Cursor(10, 0)]
    for done, window in enumerate(windows, 1):
        rest = [(i, tokens) for i, tokens in documents.items() if i >= window.after.document]
        assert same(pack(rest, 4, window.after.token), windows[done:])


def test_no_documents_give_no_windows():
    assert list(pack([], 4)) == []
    assert list(pack([(0, [1])], 4)) == []  # one token predicts nothing


def test_facts_of_a_saved_tokenizer_are_those_of_the_tokenizer(tokenizer, teacher):
    facts = identify_tokenizer(tokenizer)
    assert facts == identify_tokenizer(load_tokenizer(teacher))
    assert facts.vocab_size == len(tokenizer.get_vocab()) and facts.eos == tokenizer.eos_token_id


def test_facts_differ_for_another_vocabulary(tokenizer, documents):
    facts = identify_tokenizer(tokenizer)
    shorter = train_tokenizer(documents, len(tokenizer) - 1)
    other = train_tokenizer(["zq zq zzq qz"] * 2000 + documents, len(tokenizer))
    assert identify_tokenizer(shorter).vocab_size == facts.vocab_size - 1
    assert identify_tokenizer(other).vocab_size == facts.vocab_size
    assert len({f.hash for f in (facts, identify_tokenizer(shorter), identify_tokenizer(other))}) == 3


def test_facts_differ_for_an_equal_vocabulary_that_reads_text_otherwise(tokenizer, teacher):
    lower = load_tokenizer(teacher)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert lower.get_vocab() == tokenizer.get_vocab()
    assert identify_tokenizer(lower).hash != identify_tokenizer(tokenizer).hash


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


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "SentencePieceBackend"])
def test_sentencepiece_models_give_the_ids_of_sentencepiece(tmp_path, documents, tokenizer_class):
    folder = sentencepiece_folder(tmp_path, documents, tokenizer_class)
    tokenizer, reference = load_tokenizer(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [*documents, "Grüße 東京 🙂\ta  b\n\n", "1997"]
    if tokenizer_class == "SentencePieceBackend":
        texts += ["  leading", " x"]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == [reference.encode(text) for text in texts]
    ids = tokenizer("東🙂", add_special_tokens=False)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[-7:] == [f"<0x{byte:02X}>" for byte in "東🙂".encode()]  # no such letter was in the text
    assert reference.decode(ids) == "東🙂"
    assert tokenizer.eos_token_id == reference.eos_id()


@pytest.mark.parametrize(
    "tokenizer_class, family, changes",
    [
        (None, "qwen3_moe", {}),  # read as GPT-2's byte-level BPE
        ("LlamaTokenizer", "mixtral", {}),  # loses the space before the first word, whatever the class
        ("LlamaTokenizer", "llama", {"model_type": "unigram"}),  # read as BPE
        ("LlamaTokenizer", "llama", {"normalization_rule_name": "nmt_nfkc"}),  # loses the normalisation
        ("LlamaTokenizer", "llama", {"byte_fallback": False}),
    ],
)
def test_sentencepiece_models_that_transformers_would_misread_are_refused(
    tmp_path, documents, tokenizer_class, family, changes
):
    folder = sentencepiece_folder(tmp_path, documents, tokenizer_class, family, **changes)
    with pytest.raises(UserError, match="otherwise than sentencepiece") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and '"tokenizer_class": "SentencePieceBackend"' in str(caught.value)
    if family == "mixtral":
        return
    config = json.loads((folder / "tokenizer_config.json").read_text())  # what the message tells to do helps
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "SentencePieceBackend"}))
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = load_tokenizer(folder)(documents, add_special_tokens=False)["input_ids"]
    assert ids == [reference.encode(document) for document in documents]


def test_facts_tell_sentencepiece_models_apart(tmp_path, tokenizer, documents):
    def facts(name: str, tokenizer_class: str, **changes: Any) -> TokenizerIdentity:
        return identify_tokenizer(
            load_tokenizer(sentencepiece_folder(tmp_path / name, documents, tokenizer_class, **changes))
        )

    exact, converted = facts("a", "SentencePieceBackend"), facts("b", "LlamaTokenizer")
    normalising = facts("c", "SentencePieceBackend", normalization_rule_name="nmt_nfkc")
    smaller = facts("d", "LlamaTokenizer", vocab_size=450)
    assert exact == facts("e", "SentencePieceBackend")
    assert (exact.vocab_size, smaller.vocab_size) == (500, 450) and exact.eos == 2
    hashes = {f.hash for f in (exact, converted, normalising, smaller, identify_tokenizer(tokenizer))}
    assert len(hashes) == 5  # converted differs for texts that begin with spaces


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "LlamaTokenizer", "SentencePieceBackend"])
def test_an_empty_vocabulary_is_refused(tmp_path, tokenizer_class, content):
    """transformers 5 makes a tokenizer of two special tokens where the files of the vocabulary are missing."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class, "eos_token": "</s>"})
    )
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file, key", [("tokenizer_config.json", "AutoTokenizer"), ("config.json", "AutoConfig")])
def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path, teacher, monkeypatch, file, key):
    """Not even when the question that transformers would ask is answered with yes."""
    for path in teacher.glob("token*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    value = json.loads((tmp_path / file).read_text())
    value |= {"tokenizer_class": "Own", "auto_map": {key: ["own.Own", None] if key == "AutoTokenizer" else "own.Own"}}
    (tmp_path / file).write_text(json.dumps(value))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    if key == "AutoTokenizer":
        with pytest.raises(UserError, match="does not run") as caught:
            load_tokenizer(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    else:
        load_tokenizer(tmp_path)  # its own files are enough
    assert not (tmp_path / "ran").exists()


def test_loading_asks_nobody_on_the_network(tmp_path, teacher, documents, monkeypatch):
    def refuse(*address: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_tokenizer(teacher)
    load_tokenizer(sentencepiece_folder(tmp_path, documents, "LlamaTokenizer", "llama"))


@for_each("seed", range(6))
def test_documents_apart_have_windows_of_their_own(seed):
    """Each window is a piece of one document, all pairs are predicted once, and packing goes on after any window."""
    length = 7
    documents = random_documents(seed, length)
    windows = list(pack(enumerate(documents), length, apart=True))
    expected = [pair for document in documents for pair in pairwise(document)]
    assert [pair for window in windows for pair in pairs_within_documents(window)] == expected
    assert all(window.starts.tolist() == [0] and 2 <= len(window.tokens) <= length + 1 for window in windows)
    for number, window in enumerate(windows):
        rest = ((i, document) for i, document in enumerate(documents) if i >= window.after.document)
        assert same(pack(rest, length, window.after.token, apart=True), windows[number + 1 :])
