import random
import re
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megakd.data.batches import collate
from megakd.data.packing import pack
from megakd.data.records import IGNORED, Paired, Sample, Side
from megakd.data.spans import _ends, _Layout, _match, _view, pair, unaligned_labels
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import UserError
from tests.conftest import for_each
from tests.data.test_tokenizers import sentencepiece_folder

PIECES = [
    "the", " the", " Wörter", "Größe", " naïve", " cafe\u0301", "e\u0301\u0323", "½", "ﬁn", "İstanbul", "ΑΣ",
    "word" * 9,
    "🙂", " 👨‍👩‍👧‍👦", "👩🏽‍🚀", "🇩🇪", "東京", "は、", "한국어", "ที่", " שלום", " مرحبا", "አማርኛ", "𝔘𝔫",
    "\u200b", "\ufeff", "\x00", "\x07",
    "12345", " 3.14159", "1,000", "\n", "\n\n", "\r\n", "\t", "  ", "\n    ", "\n\t\t", "\u00a0", "\u3000", " \n \n",
    "def f(x):\n    return  x\n", "    if a:\n\n        b = 1\n", "a = [1];\n", "://", "...", "!!", "—", "“x”", "_",
    "<|endoftext|>", "</s>", "<s>", "[SEP]", "[UNK]", "<unk>", "<0x0A>", "▁", "Ġ", "##ing", "\ufffd", "a", " b",
]  # fmt: skip


PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's letters are equal to
BYTES = {chr(byte): byte for byte in PRINTED}
BYTES |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in PRINTED)}


def random_text(chooser: random.Random, pieces: int) -> str:
    return "".join(chooser.choice(PIECES) for _ in range(chooser.randint(0, pieces)))


def byte_level(texts: list[str], size: int, trim: bool = False, form: Any = None) -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: every byte is a letter, a word has the space before it."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = form
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=trim), split])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def unigram(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """As T5's with byte fallback: ▁ for spaces, NFKC, unknown characters as bytes."""
    trained: Any = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer: Any = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer: Any = Tokenizer.from_str(trained.to_str().replace('"byte_fallback":false', '"byte_fallback":true'))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """As BERT's: lower case, no accents, no whitespace, [UNK]; with the truncation and padding some are saved with."""
    tokenizer: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


def words(pieces: str, eos: str = "<e>") -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these, separated by |, each found by a pattern of itself."""
    names = pieces.split("|")
    tokenizer: Any = Tokenizer(models.WordLevel({name: i for i, name in enumerate([eos, *names])}, eos))
    pattern = Regex("|".join(re.escape(name) for name in names))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> dict[str, PreTrainedTokenizerFast]:
    texts = [*documents, *PIECES[:20] * 3]
    folder = sentencepiece_folder(tmp_path_factory.mktemp("align") / "llama", documents, "LlamaTokenizer", "llama")
    return {
        "bytes": byte_level(texts, 500),
        "digits": byte_level(documents, 1200, trim=True),
        "nfc": byte_level(texts, 900, form=normalizers.NFC()),
        "llama": load_tokenizer(folder),  # type: ignore[dict-item]
        "unigram": unigram(texts, 800),
        "wordpiece": word_piece(texts, 600),
    }


def windows(tokenizer: Any, texts: list[str], sequence_length: int) -> list[Sample]:
    ids = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    documents = enumerate([*each, tokenizer.eos_token_id] for each in ids)
    return [Sample(str(i), w.tokens, w.starts) for i, w in enumerate(pack(documents, sequence_length))]


def sample(tokens: list[int], *starts: int) -> Sample:
    return Sample("0", np.array(tokens, np.int32), np.array(starts or [0], np.int32))


# The reference: characters as sets, every position looked at.


class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


def encode(tokenizer: Any, text: str) -> Encoded:
    """By transformers' own call; without the post-processor, which trims spaces off the offsets."""
    processor, tokenizer.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor, None
    settings = {"add_special_tokens": False, "truncation": False, "padding": False, "split_special_tokens": True}
    found = tokenizer([text], return_offsets_mapping=True, **settings)
    tokenizer.backend_tokenizer.post_processor = processor
    return Encoded(found["input_ids"][0], found["offset_mapping"][0])


def rewritten(tokenizer: Any, text: str) -> set[int]:
    """Positions at which the text cannot be cut in two without its normalised form becoming another one."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return set()
    empty = normalizer.normalize_str("0")
    whole, parts = normalizer.normalize_str(f"0{text}0"), range(1, len(text))
    cut = {x: [normalizer.normalize_str(f"0{part}0") for part in (text[:x], text[x:])] for x in parts}
    return {x for x, (left, right) in cut.items() if left[:-1] + right[len(empty) :] != whole}


def reference_ends(text: str, offsets: list[tuple[int, int]], inside: set[int]) -> dict[int, int]:
    """position → tokens taken until there, wherever no character is shared with a later token."""
    found = {}
    for count in range(1, len(offsets) + 1):
        taken = {i for start, stop in offsets[:count] for i in range(start, stop)}
        left = {i for start, stop in offsets[count:] for i in range(start, stop)}
        last, following = max(taken, default=-1), min(left, default=len(text))
        if following <= last:
            continue
        if count == len(offsets):
            last = following - 1
        at = max([last + 1, *(i + 1 for i in range(following) if not text[i].isspace())])
        while at in inside:
            at, following = at - 1, at
        if at > last and (at > 0 or count == len(offsets)):
            found |= dict.fromkeys(range(at, following + 1), count)
    return {at: count for at, count in found.items() if at not in inside}


def reference_boundaries(
    text: str, left: list[tuple[int, int]], right: list[tuple[int, int]], inside: set[int]
) -> list[tuple[int, int]]:
    """How many tokens each side has taken at every shared boundary of one text."""
    ends = [reference_ends(text, offsets, inside) for offsets in (left, right)]
    found = [(0, 0)]
    for at in range(len(text) + 1):
        if at in ends[0] and at in ends[1]:
            counts = ends[0][at], ends[1][at]
            if counts[0] > found[-1][0] and counts[1] > found[-1][1]:
                found.append(counts)
    return found[1:]


def reference_text(tokenizer: Any, ids: list[int], opens: bool, ended: bool) -> str:
    """The text of part of a document without the characters that a window cuts."""

    def decode(front: int, back: int) -> str:
        return tokenizer.decode(
            ids[front : len(ids) - back], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    by_bytes = "<0x00>" in tokenizer.get_vocab()
    front = back = 0
    while by_bytes and opens and front < min(3, len(ids)) and 0x80 <= byte_of(tokenizer, ids[front]) < 0xC0:
        front += 1
    if by_bytes and not ended:
        tail = [byte_of(tokenizer, i) for i in ids[front:]]
        for back in range(min(4, len(tail) + 1)):  # the fewest that leave what Python can decode
            run = [b for b in reversed(tail[: len(tail) - back])]
            run = run[: next((i for i, b in enumerate(run) if b < 0), len(run))][::-1]
            try:
                bytes(run).decode()
                break
            except UnicodeDecodeError:
                continue
        else:
            back = 0
    text = decode(front, back)
    text = text.lstrip("\ufffd") if opens else text
    return text if ended else text.rstrip("\ufffd")


def byte_of(tokenizer: Any, token: int) -> int:
    name = tokenizer.convert_ids_to_tokens(token)
    return int(name[1:-1], 16) if name.startswith("<0x") else -1


def reference_row(one: Sample, student: Any, teacher: Any, lengths: tuple[int, int]) -> tuple[list[list[list]], int]:
    """tokens, labels, positions, spans, label spans of both sides of one sample, and how many spans it has."""
    rows: list[list[tuple[int, int, int]]] = [[], []]  # token, position, span
    spans = 0
    full = False
    unscored = set()
    for start, stop in pairwise([*one.starts.tolist(), len(one.tokens)]):
        ids = one.tokens[start:stop].tolist()
        ended = ids[-1] == student.eos_token_id
        text = reference_text(student, ids[:-1] if ended else ids, start == 0, ended)
        encoded = [encode(side, text) for side in (student, teacher)]
        if not all(each.ids for each in encoded):
            encoded, text = [Encoded([], []), Encoded([], [])], ""
        inside = rewritten(student, text) | rewritten(teacher, text)
        boundaries = reference_boundaries(text, encoded[0].offsets, encoded[1].offsets, inside) if text else []
        tokens = [each.ids for each in encoded]
        if ended:
            tokens = [[*tokens[0], student.eos_token_id], [*tokens[1], teacher.eos_token_id]]
            boundaries.append((len(tokens[0]), len(tokens[1])))
        for before, after in pairwise([(0, 0), *boundaries]):
            grown = [len(rows[side]) + after[side] - before[side] for side in (0, 1)]
            full = full or grown[0] > lengths[0] + 1 or grown[1] > lengths[1] + 1
            if full:  # the student goes on alone
                rows[0] += [(tokens[0][i], i, -1) for i in range(before[0], len(tokens[0]))]
                break
            for side in (0, 1):
                rows[side] += [(tokens[side][i], i, spans) for i in range(before[side], after[side])]
            if before == (0, 0):
                unscored.add(spans)
            spans += 1
    sides = []
    rows[0] = rows[0][: lengths[0] + 1]
    for row, length in zip(rows, lengths, strict=True):
        pairs = list(pairwise(row))
        padding = range(length - len(pairs))
        scored = [b[2] if b[1] > 0 and b[2] not in unscored else -1 for _, b in pairs]
        sides.append(
            [
                [a[0] for a, _ in pairs] + [0 for _ in padding],
                [b[0] if b[1] > 0 else IGNORED for _, b in pairs] + [IGNORED for _ in padding],
                [a[1] for a, _ in pairs] + list(padding),
                [a[2] for a, _ in pairs] + [-1 for _ in padding],
                scored + [-1 for _ in padding],
            ]
        )
    return sides, spans


def check(paired: Paired, samples: list[Sample], student: Any, teacher: Any, lengths: tuple[int, int]) -> None:
    for row, one in enumerate(samples):
        sides, spans = reference_row(one, student, teacher, lengths)
        for name, found, expected in zip(Paired._fields, paired[:2], sides, strict=False):
            for field, tensor, values in zip(Side._fields[:5], found[:5], expected, strict=True):
                assert tensor[row].tolist() == values, (name, field, row)
        assert paired.span_count[row] == spans


PAIRS = [
    ("bytes", "digits"), ("digits", "nfc"), ("nfc", "llama"), ("llama", "digits"), ("bytes", "unigram"),
    ("unigram", "llama"), ("digits", "wordpiece"), ("llama", "wordpiece"), ("wordpiece", "unigram"),
]  # fmt: skip


@for_each("names", PAIRS, ids="-".join)
@for_each("seed", range(2))
def test_pair_matches_reference(made, names, seed):
    """Windows of random texts, whole, mid-document and mid-character; with room to spare, and cut on either side."""
    student, teacher = (made[name] for name in names)
    chooser = random.Random(seed)
    samples = windows(student, [random_text(chooser, 50) for _ in range(8)], 57 + 13 * seed)
    for lengths in ((400, 700), (57 + 13 * seed, 41), (23, 23), (1, 30), (30, 1)):
        check(pair(samples, student, teacher, *lengths), samples, student, teacher, lengths)


@for_each("names", PAIRS, ids="-".join)
def test_pair_matches_reference_on_prose_and_code(made, documents, names):
    student, teacher = (made[name] for name in names)
    texts = [document[:300] for document in documents[:3]]
    texts += ["".join(line + "\n" for line in Path(__file__).read_text().splitlines()[60:70])]
    samples = windows(student, texts, 128)
    check(pair(samples, student, teacher, 200, 300), samples, student, teacher, (200, 300))


@for_each("seed", range(200))
def test_any_offsets_match_reference(seed):
    """Offsets as no tokenizer here gives them: empty, over one another, with gaps; several texts in a batch."""
    chooser = random.Random(seed)
    texts = ["".join(chooser.choice("ab \n") for _ in range(chooser.randint(1, 12))) for _ in range(3)]

    def offsets(text: str) -> list[tuple[int, int]]:
        found, at = [], 0
        while at < len(text) or not found:
            start = max(0, at + chooser.choice([0, 0, 0, 0, 1, -1, -2]))
            stop = start + chooser.choice([0, 1, 1, 2, 3])
            found.append((min(start, len(text)), min(stop, len(text))))
            at = max(at + chooser.choice([0, 1]), found[-1][1])
        return found

    sides = [[Encoded([7] * len(o), o) for o in map(offsets, texts)] for _ in range(2)]
    ended = [chooser.random() < 0.5 for _ in texts]
    layout = _Layout.of(texts, np.array(ended))
    views = [_view(side, layout, 0) for side in sides]  # type: ignore[arg-type]
    inside = [{x for x in range(1, len(text)) if chooser.random() < 0.2} for text in texts]
    rewritten_C = np.zeros(len(layout.solid_C), bool)
    for begin, positions in zip(layout.begins_P.tolist(), inside, strict=True):
        rewritten_C[[begin + x for x in positions]] = True
    found = _match(*(_ends(view, layout, rewritten_C) for view in views))
    expected, before = [], (0, 0)
    for text, left, right, end, positions in zip(texts, *sides, ended, inside, strict=True):
        ends = reference_boundaries(text, left.offsets, right.offsets, positions)
        ends += [(len(left.ids) + 1, len(right.ids) + 1)] if end else []
        expected += [(before[0] + a - 1, before[1] + b - 1) for a, b in ends]
        before = (before[0] + len(left.ids) + end, before[1] + len(right.ids) + end)
    assert list(zip(*(side.tolist() for side in found), strict=True)) == expected


def test_an_example():
    """ "he llo wor ld" against "hello  world": boundaries after "hello" and at the end."""
    student, teacher = words("he|llo| wor|ld"), words("hello| |world")
    he, llo, wor, ld = range(1, 5)
    hello, space, world = range(1, 4)
    paired = pair([sample([he, llo, wor, ld, 0, he, llo], 0, 5)], student, teacher, 8, 5)
    assert paired.student.tokens.tolist() == [[he, llo, wor, ld, 0, he, 0, 0]]
    assert paired.student.labels.tolist() == [[llo, wor, ld, 0, IGNORED, llo, IGNORED, IGNORED]]
    assert paired.student.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1]]
    assert paired.student.spans.tolist() == [[0, 0, 1, 1, 2, 3, -1, -1]]
    assert paired.student.label_spans.tolist() == [[-1, 1, 1, 2, -1, -1, -1, -1]]
    assert paired.teacher.tokens.tolist() == [[hello, space, world, 0, 0]]
    assert paired.teacher.labels.tolist() == [[space, world, 0, IGNORED, IGNORED]]
    assert paired.teacher.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert paired.teacher.spans.tolist() == [[0, 1, 1, 2, -1]]
    assert paired.teacher.label_spans.tolist() == [[1, 1, 2, -1, -1]]
    assert paired.span_count.tolist() == [4]
    assert {tensor.dtype for side in paired[:2] for tensor in side[:5]} | {paired.span_count.dtype} == {torch.int64}


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """What tokens stand for, one by one; the space that ▁ adds in front is whitespace, so it does not matter."""
    raw = b""
    for name in tokenizer.convert_ids_to_tokens(ids):
        if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            raw += bytes(BYTES[letter] for letter in name)
        elif name.startswith("<0x") and len(name) == 6:
            raw += bytes([int(name[1:-1], 16)])
        else:
            raw += name.removeprefix("##").replace("▁", " ").encode()
    return raw.decode()


def squash(text: str, *forms: Callable[[str], str]) -> str:
    for form in forms:
        text = form(text)
    return "".join(text.split())


@for_each("names", [*PAIRS[:8], ("nfc", "wordpiece")], ids="-".join)
def test_spans_hold_the_same_characters_on_both_sides(made, names):
    """What the tokens of a span stand for, apart from whitespace and from what the normalisations change."""
    student, teacher = (made[name] for name in names)
    # text_of misreads the first three; and a unigram model finds the name of its end token in text, as every piece
    left_out = ("▁", "<0x0A>", "##ing", *(["</s>"] if "unigram" in names else []))
    pieces = [piece for piece in PIECES if piece not in left_out]
    chooser = random.Random(0)
    texts = ["".join(chooser.choice(pieces) for _ in range(60)) for _ in range(6)]
    paired = pair(windows(student, texts, 90), student, teacher, 120, 300)
    # what a sentencepiece model normalises is whitespace alone
    forms = [each.backend_tokenizer.normalizer for each in (student, teacher) if each is not made["llama"]]
    forms = [form.normalize_str for form in forms if form] + [str.casefold, partial(unicodedata.normalize, "NFKC")]
    compared = 0
    for left, right in zip(*(labels_by_span(side) for side in paired[:2]), strict=True):
        assert left.keys() == right.keys()
        for span in left:
            both = [(student, left[span]), (teacher, right[span])]
            if left[span] == [student.eos_token_id]:
                assert right[span] == [teacher.eos_token_id]
            elif not any(t.convert_tokens_to_ids("[UNK]") in ids for t, ids in both if "[UNK]" in t.get_vocab()):
                texts = [squash(text_of(tokenizer, ids), *forms) for tokenizer, ids in both]
                assert texts[0] == texts[1]
                compared += 1
    assert compared > 200


def labels_by_span(side: Side) -> list[dict[int, list[int]]]:
    rows = []
    for labels, spans in zip(side.labels.tolist(), side.label_spans.tolist(), strict=True):
        rows.append({})
        for label, span in zip(labels, spans, strict=True):
            if span >= 0:
                rows[-1].setdefault(span, []).append(label)
    return rows


@for_each("name", ["bytes", "digits", "nfc", "wordpiece"])
def test_a_tokenizer_with_itself_gives_the_windows_of_collate(made, documents, name):
    """One span a token, and the tokens, labels and positions as they were stored."""
    tokenizer = made[name]
    texts = [document[:400] for document in documents[:8]]
    if name == "wordpiece":  # its text is another one when decoded, and a window may begin with ##
        texts = [
            tokenizer.decode(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]) for text in texts
        ]
        samples = [sample(w.tokens.tolist(), *w.starts) for w in windows(tokenizer, texts, 10**6)]
    else:
        samples = windows(tokenizer, texts, 64)
        assert any(len(one.starts) > 1 for one in samples)
    length = max(len(one.tokens) - 1 for one in samples)
    paired, batch = pair(samples, tokenizer, tokenizer, length, length), collate(samples, length)
    for side in paired[:2]:
        assert torch.equal(side.tokens, batch.tokens) and torch.equal(side.labels, batch.labels)
        assert torch.equal(side.position_ids, batch.position_ids)
        sizes = torch.tensor([len(one.tokens) for one in samples])
        assert torch.equal(paired.span_count, sizes)
        index = torch.arange(length).expand_as(side.spans)
        assert torch.equal(side.spans, torch.where(index < sizes[:, None] - 1, index, -1))
        assert torch.equal(side.label_spans, torch.where(batch.labels != IGNORED, index + 1, -1))


def test_tokens_that_share_a_character_are_one_span(made):
    """A family of emoji is 25 bytes and 7 characters; each end of a character is a boundary."""
    tokenizer = made["digits"]  # trained on English alone
    ids = tokenizer("a👨‍👩‍👧‍👦b", add_special_tokens=False)["input_ids"]
    paired = pair([sample([*ids, 0])], tokenizer, tokenizer, 40, 40)
    joiner = len(tokenizer("\u200d", add_special_tokens=False)["input_ids"])
    man = len(tokenizer("👨", add_special_tokens=False)["input_ids"])
    assert man > 1 and joiner > 1 and len(ids) == 2 + 4 * man + 3 * joiner
    expected = [0, *np.repeat(np.arange(1, 8), [man, joiner] * 3 + [man]).tolist(), 8]
    assert paired.student.spans[0, : len(ids)].tolist() == expected and paired.span_count.tolist() == [10]


def test_whitespace_that_a_side_drops_goes_with_the_word_after_it(made):
    """BERT has no other boundaries than the ends of words; behind the last word there is none after it."""
    student = words("Is|that|it| |\n\n|?")
    paired = pair([sample([1, 4, 4, 2, 5, 4, 4, 3, 4, 6, 4, 0])], student, made["wordpiece"], 20, 40)
    assert paired.student.spans[0, :12].tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, -1]
    assert paired.student.label_spans[0, 10] == 4 and paired.span_count == 5


def test_a_line_break_is_a_span_where_both_sides_end_with_it():
    student, teacher = words(");|\n|  |x"), words(");\n|\n|  x")
    paired = pair([sample([1, 2, 2, 3, 4, 0])], student, teacher, 8, 8)
    assert paired.student.spans[0, :5].tolist() == [0, 0, 1, 2, 2]
    assert paired.teacher.spans[0, :3].tolist() == [0, 1, 2]


def both_texts(paired: Paired, student: Any, teacher: Any) -> list[tuple[str, str]]:
    """What the tokens of each span of the first row stand for, on both sides, without the end token's span."""
    found = []
    for span in range(int(paired.span_count[0]) - 1):
        ids = [side.tokens[0][side.spans[0] == span].tolist() for side in paired[:2]]
        found.append(
            tuple(t.decode(i, skip_special_tokens=False) for t, i in zip((student, teacher), ids, strict=True))
        )
    return found


def plain(added: str | AddedToken | None = None, form: Any = None) -> Any:
    """Every byte is a token; one added token; a normaliser."""
    letters = ["<e>", *sorted(BYTES)]
    tokenizer: Any = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.normalizer = form
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if added:
        tokenizer.add_tokens([added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


def test_spans_grow_until_both_sides_hold_the_same_text():
    """Not one position lies behind a token on both sides before the end; every label counts as unaligned."""
    student, teacher = words("a| b| c| d"), words("a |b |c |d")
    paired = pair([sample([1, 2, 3, 4, 0])], student, teacher, 8, 8)
    assert paired.student.spans[0, :4].tolist() == paired.teacher.spans[0, :4].tolist() == [0] * 4
    assert both_texts(paired, student, teacher) == [("a b c d", "a b c d")]
    assert unaligned_labels(paired.student).tolist() == [3]


@for_each(
    "student, teacher, spans",
    [
        ("\n|  |<think>|b", "\n | <think>|b", ["\n  <think>", "b"]),
        ("a\n|  |<think>|b", "a|\n  <think>|b", ["a\n  <think>", "b"]),
        ("a|\n|  |<think>|b", "a\n | <think>|b", ["a\n  <think>", "b"]),
        ("a\r|\n|<think>|b", "a|\r\n<think>|b", ["a\r\n<think>", "b"]),
        ("a|\n|  |<|think>|b", "a|\n | <think|>b", ["a", "\n  <think>b"]),
        ("a|\n|  <think>|b", "a|\n | <|think>|b", ["a", "\n  <think>", "b"]),
        ("a|\r|\n|<think>|b", "a|\r\n|<|think|>|b", ["a", "\r\n", "<think>", "b"]),
        ("a |\n|<think>|b", "a| \n|<think>|b", ["a \n", "<think>", "b"]),
        ("a\u00a0| <think>|b", "a|\u00a0 |<think>|b", ["a\u00a0 <think>", "b"]),
    ],
)
def test_spans_do_not_differ_in_whitespace(student, teacher, spans):
    student, teacher = words(student), words(teacher)
    ids = student("".join(spans), add_special_tokens=False)["input_ids"]
    paired = pair([sample([*ids, 0])], student, teacher, 16, 16)
    assert both_texts(paired, student, teacher) == [(text, text) for text in spans]


def test_byte_level_against_metaspace_around_a_special_token():
    """The special token of one side is text to the other; indentation is cut in two ways."""
    text = "so\n  <think>\n\t x  = 1\r\n  </think> y"
    student = byte_level([text] * 20, 330)
    student.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    trained: Any = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.decoder = decoders.Metaspace(prepend_scheme="never")
    trained.train_from_iterator([text] * 20, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    trained.add_special_tokens(["</s>"])
    teacher = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>")
    ids = student(text, add_special_tokens=False)["input_ids"]
    one = sample([*ids, student.eos_token_id])
    paired = pair([one], student, teacher, 80, 80)
    texts = both_texts(paired, student, teacher)
    assert all(left == right for left, right in texts) and "".join(left for left, _ in texts) == text
    check(paired, [one], student, teacher, (80, 80))


@for_each("strips", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}], ids=str)
def test_added_tokens_that_strip_hold_the_whitespace(strips):
    """The added token covers the whitespace around it: the span holds what the other side has there."""
    student, teacher = plain(), plain(AddedToken("<think>", **strips))
    text = "a\n  <think> \nb"
    before, behind = "\n  " if "lstrip" in strips else "", " \n" if "rstrip" in strips else ""
    paired = pair([sample([*student(text)["input_ids"], 0])], student, teacher, 40, 40)
    spans = [left for left, _ in both_texts(paired, student, teacher)]
    assert spans == [*text.split(before + "<think>")[0], f"{before}<think>{behind}", *text.split("<think>" + behind)[1]]


@for_each(
    "form, spans",
    [
        (normalizers.NFC(), ["x", "a\u0301\u0328", "y"]),  # → ą, U+0301
        (normalizers.NFC(), ["x", "a\u0328", "\u0301", "y"]),  # the same, in the order NFC has
        (normalizers.NFC(), ["x", "e\u0301", "y"]),
        (normalizers.NFC(), ["x", "q", "\u0301\u0323", "y"]),  # no composed form: the marks change places
        (normalizers.NFC(), ["x", "ą", "\u0301", "y"]),  # as NFC leaves it
        (normalizers.NFD(), ["x", "a", "\u0301\u0328", "y"]),
        (normalizers.NFC(), ["x", "\u1112\u1161\u11ab", "y"]),  # Hangul: one syllable
        (normalizers.NFKC(), ["x", "\uff76\uff9e", "ﬁ", "y"]),  # a half-width voiced kana; a ligature
        (normalizers.NFC(), ["x", "\u200d", "\u0301", "\ufffd", "\u0301", "y"]),
        (normalizers.Replace("''", '"'), ["x", "''", "y"]),
        (normalizers.Sequence([normalizers.Prepend(" "), normalizers.NFC()]), ["x", "e\u0301\u0323", "q", "\u0301"]),
    ],
)
def test_what_a_normaliser_rewrites_is_one_span(form, spans):
    """Against characters of bytes without a normaliser; on either side, the same spans."""
    sides = plain(), plain(form=form)
    ids = sides[0]("".join(spans), add_special_tokens=False)["input_ids"]
    one = sample([*ids, 0])
    paired = pair([one], *sides, 40, 40)
    found = both_texts(paired, *sides)
    assert [left for left, _ in found] == spans
    assert "".join(right for _, right in found) == form.normalize_str("".join(spans))
    check(paired, [one], *sides, (40, 40))


@for_each("form", [normalizers.NFC(), normalizers.NFD(), normalizers.NFKC()], ids=repr)
def test_random_marks_match_reference(form):
    chooser = random.Random(0)
    letters = "aeq\u1112\u1161\u11ab가\uff76\uff9eﬁ \n\u0301\u0323\u0328\u0302\u0345क\u093c\u09be\u200d\ufffd"
    texts = ["".join(chooser.choice(letters) for _ in range(40)) for _ in range(6)]
    sides = plain(), plain(form=form)
    for student, teacher in (sides, sides[::-1]):
        samples = windows(student, texts, 200)
        check(pair(samples, student, teacher, 200, 300), samples, student, teacher, (200, 300))


def test_end_tokens_are_a_span_and_empty_documents_have_no_other(made):
    student, teacher = made["bytes"], made["llama"]
    (a,) = student("a", add_special_tokens=False)["input_ids"]
    paired = pair([sample([a, 0, 0, 0, a], 0, 2, 3, 4), sample([0, 0], 0, 1), sample([0])], student, teacher, 5, 6)
    assert paired.student.tokens.tolist() == [[a, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert paired.student.spans.tolist() == [[0, 1, 2, 3, -1], [0, -1, -1, -1, -1], [-1] * 5]
    assert paired.student.labels.tolist() == [[0] + [IGNORED] * 4, [IGNORED] * 5, [IGNORED] * 5]
    assert paired.student.label_spans.tolist() == [[1, -1, -1, -1, -1], [-1] * 5, [-1] * 5]
    assert paired.student.position_ids.tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert paired.teacher.spans.tolist() == [[0, 1, 2, 3, -1, -1], [0, -1, -1, -1, -1, -1], [-1] * 6]
    assert paired.teacher.label_spans.tolist() == [[1, -1, -1, -1, -1, -1], [-1] * 6, [-1] * 6]
    assert paired.span_count.tolist() == [5, 2, 1]


def test_text_that_a_side_has_no_tokens_for_is_left_out_of_both(made):
    student, teacher = made["bytes"], made["wordpiece"]
    spaces = student(" \n\n\x07", add_special_tokens=False)["input_ids"]
    assert teacher(" \n\n\x07", add_special_tokens=False)["input_ids"] == []
    paired = pair([sample([*spaces, 0]), sample(spaces)], student, teacher, 8, 8)
    assert paired.span_count.tolist() == [1, 0]
    assert all((side.spans == -1).all() and (side.labels == IGNORED).all() for side in paired[:2])


@for_each("name", ["digits", "llama"])
def test_a_window_cut_inside_characters_keeps_the_whole_ones(made, name):
    """Also where all of it is byte tokens, of which the decoder reads none when one is missing."""
    student, teacher = made[name], made["bytes"]
    text = "አማ\n🙂ርኛ"
    size = len(text.encode())
    stored = student("x" + text, add_special_tokens=False)["input_ids"][-size:]
    assert len(stored) == size and "x" not in student.decode(stored)  # each token a byte
    for begin in range(size):
        for end in range(begin + 1, size + 1):
            expected = teacher(text.encode()[begin:end].decode(errors="ignore"), add_special_tokens=False)["input_ids"]
            found = pair([sample(stored[begin:end])], student, teacher, 20, 60).teacher
            assert found.tokens[found.spans >= 0].tolist() == expected[:-1], (begin, end)
            assert found.labels[found.labels != IGNORED].tolist() == expected[1:]


def test_names_of_special_tokens_in_text_are_text(made):
    student, teacher = made["bytes"], made["wordpiece"]
    text = "a <|endoftext|> b [SEP] c [UNK] d"
    stored = student(text, add_special_tokens=False)["input_ids"]
    assert student.eos_token_id in stored  # read as transformers reads by default
    paired = pair([sample([*stored, 0])], student, teacher, 40, 40)
    assert (paired.student.labels[0] == 0).sum() == (paired.teacher.labels[0] == teacher.eos_token_id).sum() == 1
    assert student.decode(paired.student.tokens[0][paired.student.spans[0] >= 0]) == text
    assert paired.span_count == len(teacher(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]) + 1


@for_each("names", PAIRS[:7], ids="-".join)
def test_rows_depend_on_nothing_beside_them(made, names):
    """Not on other samples of the batch, nor on the room behind them; and cutting keeps a beginning."""
    student, teacher = (made[name] for name in names)
    chooser = random.Random(5)
    samples = windows(student, [random_text(chooser, 40) for _ in range(9)], 50)
    whole = pair(samples, student, teacher, 300, 400)
    for row, one in enumerate(samples):
        alone = pair([one], student, teacher, 120, 310)
        assert alone.span_count[0] == whole.span_count[row]
        for mine, theirs in zip(_tensors(alone), _tensors(whole), strict=True):
            expected = theirs[row, : mine.shape[1]]
            assert torch.equal(mine[0], expected)
        for lengths in ((20, 400), (300, 25)):
            cut = pair([one], student, teacher, *lengths)
            for mine, theirs in zip(cut[:2], whole[:2], strict=True):
                kept = (mine.spans[0] >= 0).sum()
                assert torch.equal(mine.tokens[0, :kept], theirs.tokens[row, :kept])
                known = max(kept - 1, 0)  # the label of the last one may lie behind the cut
                assert torch.equal(mine.label_spans[0, :known], theirs.label_spans[row, :known])
                assert (mine.label_spans[0, kept:] == -1).all()
                assert mine is cut.student or (mine.labels[0, kept:] == IGNORED).all()
            if cut.student.tokens.shape[1] == whole.student.tokens.shape[1]:  # whatever room the teacher's side has
                assert torch.equal(cut.student.labels[0], whole.student.labels[row])
            assert cut.span_count[0] <= whole.span_count[row]


@for_each("names", PAIRS, ids="-".join)
def test_both_sides_score_the_same_spans(made, names):
    """Every token is in a span, spans only go up, and a scored one has labels on both sides, all of them predicted."""
    student, teacher = (made[name] for name in names)
    chooser = random.Random(6)
    samples = windows(student, [random_text(chooser, 50) for _ in range(9)], 60)
    paired = pair(samples, student, teacher, 70, 90)
    for row, count in enumerate(paired.span_count.tolist()):
        scored = []
        for side in paired[:2]:
            spans, labels, positions = side.spans[row], side.label_spans[row], side.position_ids[row]
            kept = int((spans >= 0).sum())
            assert (spans[:kept] >= 0).all() and (spans[kept:] == -1).all()
            assert side is paired.student or (side.tokens[row, kept:] == 0).all()
            assert set(spans[:kept].diff().tolist()) <= {0, 1} and spans[:kept].max() in (count - 1, count - 2)
            assert (labels[side.labels[row] == IGNORED] == -1).all()
            assert set(labels[labels >= 0].tolist()).isdisjoint(spans[:kept][positions[:kept] == 0].tolist())
            scored.append(set(labels.tolist()))
        assert scored[0] == scored[1]


def _tensors(paired: Paired) -> list[torch.Tensor]:
    return [*paired.student[:5], *paired.teacher[:5]]


def test_owners_keep_their_settings(made):
    student, teacher = made["digits"], made["wordpiece"]
    before = [each.backend_tokenizer.to_str() for each in (student, teacher)]
    pair([sample([5, 6, 7])], student, teacher, 4, 4)
    assert [each.backend_tokenizer.to_str() for each in (student, teacher)] == before
    assert not student.backend_tokenizer.encode_special_tokens


def test_threads_give_the_same(made):
    student, teacher = made["bytes"], made["digits"]
    chooser = random.Random(7)
    samples = windows(student, [random_text(chooser, 60) for _ in range(30)], 40)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: pair([one], student, teacher, 80, 80), samples))
    for one, paired in zip(samples, found, strict=True):
        check(paired, [one], student, teacher, (80, 80))


def test_tokenizers_without_offsets_are_refused(made, tmp_path, documents):
    slow = load_tokenizer(sentencepiece_folder(tmp_path / "slow", documents, "SentencePieceBackend"))
    for sides in ((slow, made["bytes"]), (made["bytes"], slow)):
        with pytest.raises(UserError, match="no character offsets") as caught:
            pair([sample([5, 6, 7])], *sides, 4, 4)
        assert str(tmp_path / "slow") in str(caught.value) and "\n" not in str(caught.value)


def test_an_end_token_is_needed(made):
    endless = words("a|b")
    endless.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        pair([sample([1, 2])], made["bytes"], endless, 4, 4)


def test_no_samples_give_no_rows(made):
    paired = pair([], made["bytes"], made["llama"], 4, 6)
    assert (
        paired.student.tokens.shape == (0, 4) and paired.teacher.spans.shape == (0, 6) and len(paired.span_count) == 0
    )


def test_no_label_is_lost_to_a_teacher_of_many_tokens(made, documents):
    """A byte per token: 1,400 of 4,094 labels were left; the teacher's side is as long as it must be now."""
    student, teacher = made["digits"], byte_level(["a"], 257)
    samples = windows(student, documents, 256)[:8]
    labels = [len(one.tokens) - len(one.starts) for one in samples]
    assert min(len(encode(teacher, student.decode(one.tokens.tolist())).ids) for one in samples) > 2 * 256
    paired = pair(samples, student, teacher, 256, 320, 2**31)
    assert (paired.student.labels != IGNORED).sum(1).tolist() == labels
    assert unaligned_labels(paired.student).sum() == 0
    assert paired.teacher.tokens.shape[1] % 64 == 0 and paired.teacher.tokens.shape[1] > 512
    check(paired, samples, student, teacher, (256, paired.teacher.tokens.shape[1]))
    cut = pair(samples, student, teacher, 256, 320, 400)
    assert cut.teacher.tokens.shape[1] == 400
    assert (cut.student.labels != IGNORED).sum(1).tolist() == labels
    left = (paired.student.label_spans >= 0).sum(1) - (cut.student.label_spans >= 0).sum(1)
    assert torch.equal(unaligned_labels(cut.student), left) and left.min() > 0
    ordinary = pair(samples, student, made["nfc"], 256, 320, 2**31)
    assert all(map(torch.equal, _tensors(ordinary), _tensors(pair(samples, student, made["nfc"], 256, 320))))


def begins_with(
    tokenizer: PreTrainedTokenizerFast, name: str, copies: int = 1
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer with tokens of its own before every text, and their ids."""
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token
    )
    names = [f"{name}{i}" for i in range(copies)]
    changed.add_tokens([AddedToken(each, special=True) for each in names])
    ids = changed.convert_tokens_to_ids(names)
    template = processors.TemplateProcessing(" ".join([*names, "$0"]), None, list(zip(names, ids, strict=True)))
    changed.backend_tokenizer.post_processor = template
    return changed, ids


@for_each("copies", [1, 2])
def test_each_side_begins_documents_as_its_own_tokenizer_does(made, copies):
    """Windows that cut documents: BOS where the student's has it, and a span with the teacher's."""
    (student, mine), (teacher, theirs) = begins_with(made["bytes"], "<a>"), begins_with(made["digits"], "<b>", copies)
    texts = ["Twelve words about 12 rivers and the 345 mills on them.", "One more.", "A third, which is cut here: " * 9]
    documents = [student(text, add_special_tokens=False)["input_ids"] for text in texts]
    plain, begun = (
        [
            Sample(str(i), window.tokens, window.starts)
            for i, window in enumerate(pack(enumerate([[*bos, *ids, student.eos_token_id] for ids in documents]), 48))
        ]
        for bos in ([], mine)
    )
    for samples, bos in ((plain, ([], [])), (begun, (mine, theirs))):
        paired = pair(samples, student, teacher, 48, 96, bos=bos)
        assert torch.equal(paired.student.tokens, collate(samples, 48).tokens)
        for row in range(len(samples)):
            for side, own in ((paired.student, bos[0]), (paired.teacher, bos[1])):
                tokens, positions = side.tokens[row].tolist(), side.position_ids[row].tolist()
                firsts = [t for t, position in enumerate(positions) if position == 0 and side.spans[row, t] >= 0]
                opened = [t for t in firsts if t or samples[row].tokens[0] in mine]
                assert all(tokens[t : t + len(own)] == own for t in opened) if bos[0] else not set(theirs) & set(tokens)
                assert not set(own[:1]) & set(side.labels[row].tolist())  # BOS is never predicted
        scored = [side.label_spans[side.label_spans >= 0] for side in (paired.student, paired.teacher)]
        assert set(scored[0].tolist()) == set(scored[1].tolist())
    # with BOS the first word of a document is predicted on both sides, so that more is scored
    counts = [
        (pair(s, student, teacher, 48, 96, bos=b).student.label_spans >= 0).sum()
        for s, b in ((plain, ([], [])), (begun, (mine, theirs)))
    ]
    assert counts[1] > counts[0]


def test_a_teacher_with_bos_gets_it_where_the_students_documents_have_none(made):
    student, (teacher, theirs) = made["bytes"], begins_with(made["digits"], "<b>")
    ids = [*student("A river. " * 30, add_special_tokens=False)["input_ids"], student.eos_token_id]
    samples = [Sample(str(i), w.tokens, w.starts) for i, w in enumerate(pack([(0, ids), (1, ids)], 40))]
    with_bos, without = (pair(samples, student, teacher, 40, 90, bos=([], bos)) for bos in (theirs, []))
    assert torch.equal(with_bos.student.tokens, without.student.tokens)
    assert torch.equal(with_bos.student.label_spans, without.student.label_spans)
    for row in range(len(samples)):
        positions, spans = with_bos.teacher.position_ids[row], with_bos.teacher.spans[row]
        firsts = (positions == 0) & (spans >= 0)
        assert firsts.any() and (with_bos.teacher.tokens[row][firsts] == theirs[0]).all()
        rest = with_bos.teacher.tokens[row][(spans >= 0) & ~firsts].tolist()
        assert (
            rest[: len(rest) - 1]
            == without.teacher.tokens[row][without.teacher.spans[row] >= 0].tolist()[: len(rest) - 1]
        )
    assert theirs[0] not in with_bos.teacher.labels


@for_each("text", ["", "a"])
def test_a_window_that_ends_behind_bos_keeps_its_row(made, text):
    (student, mine), (teacher, theirs) = begins_with(made["bytes"], "<a>"), begins_with(made["digits"], "<b>")
    ids = [*mine, *student(text, add_special_tokens=False)["input_ids"], student.eos_token_id, *mine]
    samples = [Sample("0", np.array(ids, np.int32), np.array([0, len(ids) - 1], np.int32))] * 2
    for bos in ((mine, theirs), (mine, [])):
        paired = pair(samples, student, teacher, 8, 8, bos=bos)
        assert torch.equal(paired.student.tokens[0], paired.student.tokens[1])
        assert paired.student.tokens[0].tolist()[: len(ids) - 1][: len(ids) - 2] == ids[:-1][: len(ids) - 2]
        assert paired.span_count[0] == paired.span_count[1]
