"""Whether the token ids and positions of a run stay inside a model's tables: embedding, head, positions."""

from typing import Any

from torch import nn

from megakd.errors import UserError
from megakd.system.dist import read_world
from megakd.system.logging import say

SPARE = 8  # rows that a table of positions may have beyond max_position_embeddings: OPT's has 2


def check_tables(model: Any, place: object, vocab_size: int, positions: int) -> None:
    """UserError when ids below `vocab_size`, or so many positions, exceed a table of `model`; names `place`.

    Beyond max_position_embeddings a learned table has no row, which is refused. Rotary positions have no end, so there
    it is said aloud: the model computes, but was not trained on them. model: with weights, cut by ZeRO-3, or empty.
    """
    for what, module, field in (
        ("embedding", model.get_input_embeddings(), "num_embeddings"),
        ("head", model.get_output_embeddings(), "out_features"),
    ):
        rows = getattr(module, field, None)
        if rows is not None and vocab_size > rows:
            raise UserError(
                f"{place}: the tokenizer's ids go up to {vocab_size - 1}, the {what} has {rows} rows; resize it "
                "(resize_token_embeddings) and train the new rows, or save the tokenizer without the tokens beyond"
            )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or positions <= limit:
        return
    if _has_table(model, limit):
        raise UserError(
            f"{place}: has a table of {limit} positions, sequences have {positions}; set "
            f"data.sequence_length={limit} or less in a new run"
        )
    if read_world().first:
        say(
            f"{place}: max_position_embeddings is {limit}, sequences have {positions} positions: in documents of more "
            "tokens the model reads positions that it was not trained on; shorter: data.sequence_length in a new run"
        )


def _has_table(model: Any, limit: int) -> bool:
    """Whether a model looks positions up: in an embedding, or in a buffer of sines like GPT-J's."""
    tokens = model.get_input_embeddings()
    sizes = [
        module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens
    ]
    sizes += [len(buffer) for buffer in model.buffers() if buffer.ndim == 2]
    return any(limit <= size <= limit + SPARE for size in sizes)
