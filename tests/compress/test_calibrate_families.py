"""Every family runs a layer at a time as it does whole, or is refused: never calibrated on other inputs in silence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megakd.compress.calibrate import LayerRunner
from megakd.errors import UserError
from megakd.models.loading import load_model
from megakd.models.spec import spec_for
from tests.models.students import relative, sources_of
from tests.models.test_any_family import WORKS, small_model

# their layers give the next one more than hidden states, or their model keeps weights outside of layers
REFUSED = ("glm_moe_dsa", "zaya")


@torch.no_grad()
def states(model: Any, tokens: Tensor, positions: Tensor) -> list[Tensor]:
    """Hidden states before the first layer and behind every layer, the last before the norm."""
    found: list[Tensor] = []

    def note(output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [model.model.layers[0].register_forward_pre_hook(lambda _, args: note(args))]
    handles += [layer.register_forward_hook(lambda *called: note(called[2])) for layer in model.model.layers]
    model(tokens, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", WORKS)
def test_a_layer_at_a_time_is_the_whole_model(family, tmp_path):
    """Norms and scales between experts and residual stream (Afmoe, Cohere2, FlexOlmo) were left out.

    Granite's embedding_multiplier was applied in front of every layer; Gemma's, nowhere.
    """
    small_model(family).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float32).eval()
    tokens = torch.randint(3, 120, (4, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).expand(4, -1)
    spec = spec_for(model.config, family)

    def run() -> list[Tensor]:
        runner = LayerRunner(sources_of(tmp_path), spec, model.config, tokens, positions, batch=3)
        found = [runner.embed()]
        for index in range(len(runner.layers)):
            found.append(runner.layer(index, found[-1], measure=index in spec.layers)[0])
        return found

    if family in REFUSED:
        with pytest.raises(UserError, match=f"{family} cannot be run one layer at a time.*calibration_tokens=0"):
            run()
        return
    for mine, theirs in zip(run(), states(model, tokens, positions), strict=True):
        assert relative(mine, theirs) <= 1e-5
