"""What tests of SAR-KD share: a dense student, and a run in which it learns from the tests' teacher."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import VOCABULARY


def dense_student(seed: int = 1, **changes: Any) -> Any:
    """A Llama of two layers that knows nothing yet."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        **{**sizes, **changes},
    )  # fmt: skip
    student = LlamaForCausalLM(config)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return student


def sar_recipe(recipe: Path, folder: Path, tokenizer: Any, **sections: Any) -> Path:
    """The tests' recipe with the dense student of `folder`/student and two stages of 3 and 4 steps."""
    dense_student().save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    value = json.loads(recipe.read_text())
    value["model"]["student"] = str(folder / "student")
    routing = {"routing": "top_m", "initial_top_k": 2, "final_top_k": 3}
    value["objective"] = {"kind": "sar", "alpha": 0.7, "temperature": 2.0, **routing}
    value["objective"] |= {"entropy": 0.01, "balance": 0.01, "drift_steps": 2}
    value["optim"]["lr"], value["eval"] = 1e-2, {"every_steps": 2}
    value["stages"] = [
        {"name": "first", "steps": 3, "lr_multipliers": [{"pattern": "^routers", "lr_multiplier": 0.5}]},
        {"name": "second", "steps": 4, "lr_multipliers": [{"pattern": "embed_tokens", "lr_multiplier": 0.0}]},
    ]
    path = folder / "sar.json"
    path.write_text(json.dumps({**value, **sections}))
    return path
