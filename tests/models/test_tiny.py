import torch
from transformers import Qwen3MoeForCausalLM

from megakd.models.tiny import END_OF_DOCUMENT, tiny_moe_config, train_tokenizer


def test_default_is_the_stated_size():
    config = tiny_moe_config()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen3MoeForCausalLM(config).parameters())
    assert round(parameters / 1e6, 1) == 4.3
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (4, 8, 2)


def test_changes_win_over_the_defaults():
    config = tiny_moe_config(100, num_experts=5, tie_word_embeddings=False)
    assert (config.vocab_size, config.num_experts, config.tie_word_embeddings) == (100, 5, False)
    assert config.hidden_size == tiny_moe_config().hidden_size


def test_tokenizer_gives_text_back(documents, tokenizer):
    for text in [*documents[:20], "naïve – ½ 漢字 \U0001f600\n\n\ttabs and  spaces ", ""]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert all(0 < i < len(tokenizer) for i in ids)  # text never holds the end of a document


def test_tokenizer_has_its_size_and_its_end_of_document(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == END_OF_DOCUMENT and tokenizer.eos_token_id == 0
    assert tokenizer(END_OF_DOCUMENT)["input_ids"] == [0]
    assert tokenizer("the tokenizer")["input_ids"][-1] != 0  # nothing is appended


def test_tokenizer_compresses_and_is_the_same_each_time(documents, tokenizer):
    text = documents[0]
    assert len(tokenizer(text)["input_ids"]) < 0.7 * len(text.encode())
    again = train_tokenizer(documents, 400)
    assert again.get_vocab() == tokenizer.get_vocab()
