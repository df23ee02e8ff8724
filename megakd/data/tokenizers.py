"""Load a tokenizer; what identifies it, and how its documents begin."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.data.shards import label_masked
from megakd.errors import UserError
from megakd.identity import TokenizerIdentity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def identify_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> TokenizerIdentity:
    """What must be equal for token ids to mean the same.

    The hash covers every (token, id) pair and the ids of probe texts, so that equal vocabularies with other
    merges or normalisation differ.
    """
    probes = ["Hello, world!\n  x = 1", "Grüße 東京 🙂", "  leading", "3.14159 1,000", "<|endoftext|>"]
    ids = [tokenizer(probe, add_special_tokens=False)["input_ids"] for probe in probes]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), ids], ensure_ascii=False)
    return TokenizerIdentity(
        vocab_size=vocabulary_size(tokenizer),
        eos=int(tokenizer.eos_token_id),  # type: ignore[arg-type]
        hash=hashlib.sha256(content.encode()).hexdigest()[:16],
    )


def bos_of(tokenizer: "PreTrainedTokenizerBase", rule: str = "auto") -> list[int]:
    """The ids that every document begins with (usually one or none) by `data.bos`.

    auto: those that tokenizer(text) puts before the ids of the text itself; always: the same, or its BOS token where
    there are none; never: none. UserError when `always` finds no BOS token, or `auto` not the text.
    """
    if rule == "never":
        return []
    text = "A text"
    own, plain = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    before = [at for at in range(len(own) - len(plain) + 1) if own[at : at + len(plain)] == plain]
    if not before:
        raise UserError(
            f"data.bos: {tokenizer.name_or_path}: with special tokens {text!r} is {own}, without {plain}: what it "
            "begins texts with cannot be told; set data.bos=never"
        )
    if before[0]:
        return own[: before[0]]
    if rule == "auto":
        return []
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"data.bos=always: the tokenizer of {tokenizer.name_or_path} has no BOS token; use auto or never"
        )
    return [int(tokenizer.bos_token_id)]  # type: ignore[arg-type]


def pair_bos(facts: dict[str, Any], teacher: "PreTrainedTokenizerBase", rule: str) -> tuple[list[int], list[int]]:
    """What documents begin with on the student's side, as its token shards state, and on another tokenizer's.

    Shards from before BOS was a fact have none, and then neither has the other side. UserError for conversations.
    """
    if label_masked(facts):
        raise UserError(
            f"data.format: {teacher.name_or_path} has another tokenizer than the conversations were "
            "tokenized with, and another tokenizer's chat template makes another text; use models of one tokenizer"
        )
    return facts.get("bos", []), bos_of(teacher, rule) if "bos" in facts else []


def check_bos(facts: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", rule: str, place: object) -> str | None:
    """A line when documents of older token shards do not begin as `data.bos` says of a tokenizer; None when they do.

    UserError when shards that state `bos` do not: the tokenizer is not what it was.
    """
    if label_masked(facts):
        return None  # a chat template begins them
    own, made = bos_of(tokenizer, rule), facts.get("bos", [])
    if own == made:
        return None
    text = f"{place}: its documents begin {bos_words(tokenizer, made)}, but by data.bos={rule} those of "
    text += f"{tokenizer.name_or_path} begin {bos_words(tokenizer, own)}"
    if "bos" in facts:
        raise UserError(f"{text}; give the tokenizer back what it began texts with, or tokenize in a new run")
    return f"{text}; these shards were made before data.bos: tokenize in a new run, for such models are worse without"


def bos_words(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """`with '<s>' (id 1)`, or `without a BOS token`."""
    names = (f"{tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in ids)
    return f"with {' '.join(names)}" if ids else "without a BOS token"


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id + 1: rows that a table needs. len(tokenizer) counts entries, and ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder, from its own files alone and never by code among them.

    UserError when there is none, when it has no end token, or when what transformers made of its files is not it.
    """
    from transformers import AutoTokenizer

    try:
        # skipped, trust_remote_code is a question at the terminal
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # every kind of file fails in its own way; each means: this cannot be loaded
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: its tokenizer is code that comes with it, which MegaKD does not run; "
                "save it as a tokenizer.json and take auto_map out of tokenizer_config.json"
            ) from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{folder}: no tokenizer that transformers can load ({reason})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token, which documents are packed with")
    _check_it_reads(tokenizer, folder)
    return tokenizer


def _check_it_reads(tokenizer: Any, folder: Path) -> None:
    """UserError for what transformers 5 loads in silence: an empty vocabulary, a tokenizer.model converted wrongly.

    Without tokenizer.json it rebuilds sentencepiece models by the rules of a class that it takes from the model's type.
    The texts begin without a space and have long words: a beginning with spaces LlamaTokenizer itself reads by one
    token otherwise, and what tells a unigram model that was taken for BPE is how it cuts long words.
    """
    texts = ["Hello, world!\n  x = 1", "Grüße 東京 🙂", "a  b\tc\n\n3.14159 1,000"]
    texts.append("International understanding, internationally misunderstood: photosynthesis and thermodynamics met in")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if set(ids[0]) <= set(tokenizer.all_special_ids):
        raise UserError(f"{folder}: the tokenizer knows no word; is its tokenizer.json or tokenizer.model missing?")
    model = folder / "tokenizer.model"
    if not model.exists() or (folder / "tokenizer.json").exists():
        return
    from sentencepiece import SentencePieceProcessor

    try:
        reference = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError):  # tiktoken's files bear the same name
        return
    for text, found in zip(texts, ids, strict=True):
        if found != reference.encode(text):
            raise UserError(
                f"{folder}: transformers makes a {type(tokenizer).__name__} of tokenizer.model, which reads {text!r} "
                "otherwise than sentencepiece does; save it as a tokenizer.json, or put "
                '"tokenizer_class": "SentencePieceBackend" into tokenizer_config.json (some model types ignore that)'
            )
