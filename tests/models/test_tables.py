"""Ids and positions beyond a model's tables are refused by name; rotary positions beyond the trained ones are said."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.data.tokenizers import identify_tokenizer, vocabulary_size
from megakd.errors import UserError
from megakd.models.tables import check_tables

SHAPES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def empty(family: str, **changes: int):
    config = AutoConfig.for_model(family, vocab_size=50, pad_token_id=1, **{**SHAPES, **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_ids_beyond_the_embedding_are_refused(capsys):
    check_tables(empty("llama"), "place", 50, 8)
    with pytest.raises(UserError, match=r"place: .*ids go up to 50, the embedding has 50 rows"):
        check_tables(empty("llama"), "place", 51, 8)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj"])
def test_positions_beyond_a_table_are_refused(family, capsys):
    field = "max_position_embeddings" if family == "opt" else "n_positions"
    extra = {"word_embed_proj_dim": 16, "rotary_dim": 4, field: 32}
    check_tables(empty(family, **extra), "place", 50, 32)
    with pytest.raises(UserError, match="a table of 32 positions, sequences have 33"):
        check_tables(empty(family, **extra), "place", 50, 33)
    assert capsys.readouterr().err == ""


def test_rotary_positions_beyond_the_trained_ones_are_said(capsys):
    check_tables(empty("llama", max_position_embeddings=32), "place", 50, 33)
    assert "place: max_position_embeddings is 32, sequences have 33 positions" in capsys.readouterr().err


def test_vocabulary_is_the_largest_id_and_not_the_number_of_entries(tokenizer):
    class Gap:
        eos_token_id = 0

        def __len__(self):
            return 3

        def get_vocab(self):
            return {"a": 0, "b": 1, "c": 9}

        def __call__(self, *_, **__):
            return {"input_ids": [0]}

    gap: object = Gap()
    assert identify_tokenizer(gap).vocab_size == 10  # type: ignore[arg-type]
    assert vocabulary_size(tokenizer) == len(tokenizer) == 400
