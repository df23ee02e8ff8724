"""What a capture needs of its tokens and its teacher; UserError, or said aloud, before any weight is read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megakd.config.run import RunConfig
from megakd.data.shards import ShardSet
from megakd.data.tokenizers import check_bos, identify_tokenizer, load_tokenizer
from megakd.errors import UserError
from megakd.identity import DataIdentity, TokenizerIdentity
from megakd.models.checks import check_divided
from megakd.models.hub import empty_model
from megakd.models.isolation import check_packing
from megakd.models.tables import check_tables
from megakd.system.logging import say


def check_tokens(config: RunConfig, folder: Path, sets: Iterable[ShardSet], first: bool) -> TokenizerIdentity:
    """The tokenizer of the teacher in `folder`, which every set was tokenized with, in windows that it can answer.

    first: whether this process says what is unusual.
    """
    reader = load_tokenizer(folder)
    tokenizer = identify_tokenizer(reader)
    advice = "run: megakd tokenize RUN in a new run"
    if config.objective.live:
        advice = "two tokenizers have no KL, so evaluate needs no logits"
    for tokens in sets:
        if different := tokenizer.difference(DataIdentity.of(tokens.facts).tokenizer):
            raise UserError(
                f"{tokens.folder}: tokenized with another tokenizer than {folder} has ({different}); {advice}"
            )
        check_packing(tokens.facts, config.data.packing, tokens.folder)
        if (older := check_bos(tokens.facts, reader, config.data.bos, tokens.folder)) and first:
            say(f"generate-logits: {older}")
    if config.logits.top_k > tokenizer.vocab_size:
        raise UserError(f"logits.top_k: {config.logits.top_k} exceeds the vocabulary of {tokenizer.vocab_size}")
    return tokenizer


def check_teacher(config: RunConfig, folder: Path, tokenizer: TokenizerIdentity, ranks: int) -> Any:
    """The teacher without weights: rows for every token and position, and what so many ranks can share."""
    model = empty_model(folder)
    check_tables(model, folder, tokenizer.vocab_size, config.data.sequence_length)
    check_divided(model, config.logits.parallel, ranks)
    return model
