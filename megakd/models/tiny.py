"""A small Qwen3-MoE, and a BPE tokenizer for it: what the demo and the tests train in minutes or seconds."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

END_OF_DOCUMENT = "<|endoftext|>"


def tiny_moe_config(vocab_size: int = 2048, **changes: object) -> Qwen3MoeConfig:
    """The demo teacher's shape: 4.3 M parameters, 4 layers of 8 experts, 2 of them active."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 384,
        "moe_intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return Qwen3MoeConfig(**{**shape, **changes})  # type: ignore[arg-type]


def train_tokenizer(documents: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries, end of document = id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT)
