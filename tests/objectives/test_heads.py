"""Logits from hidden states are those of the whole model, for families with scales, caps, biases and odd decoders."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from megakd.errors import UserError
from megakd.objectives.heads import streamed_head

VOCABULARY, REAL = 60, 55
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {  # whether the logits come from the model's own code
    "Llama": (LLAMA, False),
    "Gemma2": ({**LLAMA, "final_logit_softcapping": 0.5}, False),
    "Granite": ({**LLAMA, "logits_scaling": 3.0}, False),
    "Cohere": ({**LLAMA, "logit_scale": 0.25}, False),
    "Phi": ({**LLAMA, "partial_rotary_factor": 0.5}, True),  # a bias
    "OPT": (
        {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        True,
    ),  # a decoder below
}


def made(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family][0], pad_token_id=0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_parts_are_the_models(family, dtype):
    model = made(family, dtype)
    tokens = torch.randint(REAL, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20).expand(2, -1)
    head = streamed_head(model, REAL, tokens, positions)
    assert head.own == FAMILIES[family][1]
    with torch.no_grad():
        expected = model(tokens, position_ids=positions, use_cache=False).logits[..., :REAL].flatten(0, 1).float()
        hidden = head.decoder(tokens, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
        found = torch.cat([head.logits(rows).clone() for rows in hidden.split(7)]).float()
        again = model(tokens, position_ids=positions, use_cache=False).logits[..., :REAL].flatten(0, 1).float()
    exact = dtype == torch.float32
    assert torch.allclose(found, expected, atol=(1e-6 if exact else 1e-2) * float(expected.abs().max()), rtol=0)
    assert torch.equal(again, expected)  # the model has its decoder back


def test_a_damaged_model_is_no_other_family():
    """Its NaN are for who measures it to tell."""
    model = made("Phi")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    head = streamed_head(model, REAL, tokens, tokens)
    assert head.logits(torch.ones(1, 16)).isnan().any()


def test_logits_that_no_hidden_state_makes_are_refused():
    model = made("Llama")
    forward = type(model).forward
    model.forward = lambda *args, **named: SimpleNamespace(
        logits=forward(model, *args, **named).logits + named.get("input_ids", args[0] if args else None)[..., None]
    )
    tokens = torch.arange(4)[None]
    with pytest.raises(UserError, match="llama: its logits cannot be made from the hidden states of its decoder"):
        streamed_head(model, REAL, tokens, tokens)
