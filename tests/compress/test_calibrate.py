from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from megakd.compress.calibrate import LayerRunner, Measured, find_super_experts, held_out
from megakd.compress.forms import USUAL
from megakd.errors import UserError
from megakd.models.hub import WEIGHTS, load_config
from megakd.models.shared_core import PROJECTIONS, make_form
from megakd.models.spec import spec_for
from megakd.models.student import student_class, student_config
from tests.models.students import make_model, sources_of

COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64}
COMMON |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.2}
GROUPED = {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=12, num_experts=6, head_dim=6, mlp_only_layers=[1], intermediate_size=22,
        norm_topk_prob=True, tie_word_embeddings=True, output_router_logits=True,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=12, num_experts=6, shared_expert_intermediate_size=18, intermediate_size=22,
        **SLIDING,
    ),
    "mixtral": MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=6, sliding_window=6),
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=12, num_experts=6, clip_qkv=1.5),
    "deepseek_v3": DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, moe_intermediate_size=12, n_routed_experts=6, n_shared_experts=2,
        intermediate_size=22, first_k_dense_replace=1, head_dim=4, **GROUPED, **LATENT,
    ),
}  # fmt: skip
FAMILIES = sorted(CONFIGS)
WINDOWS, LENGTH = 5, 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family): a tiny model in float32, written once in the hub's layout."""

    @cache
    def make(family: str) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]).float()
        with torch.no_grad():
            for name, p in [*model.named_parameters(), *model.named_buffers()]:
                if "norm" in name:
                    p.add_(torch.randn_like(p) * 0.1)
                if name.endswith("e_score_correction_bias"):
                    p.copy_(torch.randn_like(p) * 0.1)
        path = tmp_path_factory.mktemp(family)
        model.save_pretrained(path)
        return path

    return make


def windows(packed: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens and positions [W, T]; packed: two or three documents in every window but the second."""
    tokens = torch.randint(1, 96, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).repeat(WINDOWS, 1)
    if packed:
        for row, start in [(0, 4), (0, 9), (2, 1), (3, 8), (3, 15), (4, 16)]:
            positions[row, start:] = torch.arange(LENGTH - start)
    return tokens, positions


def runner(path: Path, tokens: Tensor, positions: Tensor, batch: int | None = None) -> LayerRunner:
    config = load_config(path)
    return LayerRunner(sources_of(path), spec_for(config, "here"), config, tokens, positions, batch=batch)


@torch.no_grad()
def whole(model: Any, tokens: Tensor, positions: Tensor) -> list[Tensor]:
    """Hidden states before the first layer and behind every layer, the last before the norm."""
    found: list[Tensor] = []
    handles = [model.model.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))]
    handles += [layer.register_forward_hook(lambda *a: found.append(a[2].clone())) for layer in model.model.layers]
    model(tokens, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("packed, batch", [(True, 2), (True, None), (False, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_after_layer_is_the_whole_model(folder, family, packed, batch):
    tokens, positions = windows(packed)
    expected = whole(AutoModelForCausalLM.from_pretrained(folder(family)).eval(), tokens, positions)
    run = runner(folder(family), tokens, positions, batch)
    hidden = run.embed()
    assert torch.equal(hidden, expected[0]) and hidden.dtype == torch.float32
    for index in range(3):
        before = hidden.clone()
        out, measured = run.layer(index, hidden)
        assert measured is None and torch.equal(hidden, before)
        assert close(out, expected[index + 1]), (index, (out - expected[index + 1]).abs().max())
        hidden = out


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_a_window_do_not_see_each_other(folder, family):
    tokens, positions = windows()
    results = []
    for changed in (False, True):
        if changed:
            tokens[0, :9] = (tokens[0, :9] + 7) % 96
        run = runner(folder(family), tokens, positions)
        hidden = run.embed()
        for index in range(3):
            hidden, _ = run.layer(index, hidden)
        results.append(hidden)
    assert close(results[0][0, 9:], results[1][0, 9:], 1e-6)
    assert not close(results[0][0, :9], results[1][0, :9], 1e-2)


@torch.no_grad()
def reference(model: Any, index: int, tokens: Tensor, positions: Tensor) -> Measured:
    """All measurements of a layer in float64, one routed row at a time."""
    calls: list[tuple[Tensor, ...]] = []
    block = model.model.layers[index].mlp.experts
    handle = block.register_forward_pre_hook(lambda _, args: calls.append(args))
    states = model(tokens, position_ids=positions, use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    ((x_ND, expert_NA, weight_NA),) = calls
    experts, d, f = len(block.down_proj), x_ND.shape[1], block.down_proj.shape[2]
    held = [w == 0 or w == 4 for w in range(WINDOWS) for _ in range(LENGTH)]
    power, peaks = torch.zeros(experts).double(), torch.zeros(experts).double()
    rows = torch.zeros(2, experts, dtype=torch.int64)
    inputs, hidden = torch.zeros(2, d, d).double(), torch.zeros(2, experts, f, f).double()
    saliency, answers = torch.zeros(experts).double(), torch.zeros(held.count(True), d).double()
    everything = torch.zeros(held.count(False), experts, d).double()
    squares, costs, step = torch.zeros(2, experts).double(), torch.zeros(2, experts, f).double(), 1e-6
    for n, (x, chosen, weights, side) in enumerate(
        zip(x_ND.double(), expert_NA, weight_NA.double(), held, strict=True)
    ):
        if not side:
            for e in range(experts):
                gate, up = block.gate_up_proj[e].double().chunk(2)
                y = block.down_proj[e].double() @ (block.act_fn(gate @ x) * (up @ x))
                everything[held[:n].count(False), e] = y
        inputs[int(side)] += torch.outer(x, x) / held.count(side)
        for e, w in zip(chosen.tolist(), weights, strict=True):
            gate, up = block.gate_up_proj[e].double().chunk(2)
            g, u, down = gate @ x, up @ x, block.down_proj[e].double()
            h = block.act_fn(g) * u
            squares[int(side), e] += w**2
            if not side:  # by finite differences, all units at once: each has its own column of down
                for cost, nudged in zip(costs, (block.act_fn(g + step) * u, block.act_fn(g) * (u + step)), strict=True):
                    cost[e] += w**2 * ((nudged - h) / step).square() * down.square().sum(0)
            if side:
                answers[held[:n].count(True)] += w * (down @ h)
            else:
                saliency[e] += w * (down @ h).norm()
            power[e] += w**2
            peaks[e] = max(peaks[e], (down @ h).abs().max())
            hidden[int(side), e] += w**2 * torch.outer(h, h)
            rows[int(side), e] += 1
    hidden /= squares[..., None, None].clamp(min=1e-30)
    costs /= squares[0, :, None].clamp(min=1e-30)
    mean_power, stream = power.sum() / len(x_ND), torch.zeros(())
    if index + 1 < len(model.model.layers):
        stream = states[index + 1].double().square().sum(-1).flatten().sort().values[(len(x_ND) - 1) // 2]
    saliency /= rows[0].clamp(min=1)
    likeness = torch.einsum("ned,nfd->ef", everything, everything) / len(everything)
    measured = power / power.sum(), rows.sum(0), *inputs, *hidden, *costs, peaks, rows[1], mean_power, stream
    return Measured(*measured, saliency, likeness, answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_measurements_are_those_of_a_slow_reference(folder, family, monkeypatch):
    monkeypatch.setattr("megakd.compress.calibrate.ROWS", 7)  # several pieces an expert
    tokens, positions = windows()
    model = AutoModelForCausalLM.from_pretrained(folder(family)).eval()
    run = runner(folder(family), tokens, positions, batch=2)
    hidden = run.embed()
    for index in range(3):
        out, found = run.layer(index, hidden, measure=True, compare=True)
        assert torch.equal(out, run.layer(index, hidden)[0])
        hidden = out
        assert (found is not None) == (index in run.spec.layers)
        if found is not None:
            expected = reference(model, index, tokens, positions)
            assert found.counts.tolist() == expected.counts.tolist()
            assert found.counts_held.tolist() == expected.counts_held.tolist()
            assert found.counts.sum() == tokens.numel() * 2 and float(found.share.sum()) == pytest.approx(1.0)
            for name, a, b in zip(Measured._fields, found, expected, strict=True):
                shown = name != "stream" or index < 2  # behind the last layer transformers normalises
                assert not shown or (a.double() - b).norm() <= 1e-5 * b.double().norm(), (index, name)


def test_equal_input_gives_equal_bytes_and_batches_change_rounding_alone(folder):
    tokens, positions = windows()

    def measured(batch: int) -> Measured:
        run = runner(folder("qwen3_moe"), tokens, positions, batch)
        found = run.layer(0, run.embed(), measure=True)[1]
        assert found is not None
        return found

    first, again, other = measured(2), measured(2), measured(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all((a - b).double().norm() <= 1e-5 * a.double().norm() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_experts_are_those_of_the_student(folder, family):
    """Layer by layer with a student's experts in the teacher's checkpoint equals the student, exempt experts too."""
    tokens, positions = windows()
    config = load_config(folder(family))
    spec = spec_for(config, "here")
    forms = {p: make_form(s, p, 2, 3) for p, s in zip(PROJECTIONS, USUAL, strict=True)}
    layers = dict.fromkeys(spec.layers, forms)
    torch.manual_seed(3)
    student = student_class(family)(student_config(config, layers, {min(layers): (1, 4)})).eval()
    teacher = AutoModelForCausalLM.from_pretrained(folder(family))
    student.load_state_dict(teacher.state_dict(), strict=False)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "wrapper" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    expected = whole(student, tokens, positions)
    run = runner(folder(family), tokens, positions, batch=2)
    hidden = run.embed()
    for index in range(3):
        experts = student.model.layers[index].mlp.experts if index in layers else None
        hidden, measured = run.layer(index, hidden, experts=experts)
        assert measured is None and close(hidden, expected[index + 1])
    assert not close(hidden, whole(teacher.eval(), tokens, positions)[3], 1e-2)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_fused_experts_in_bfloat16(folder, family, tmp_path):
    """The other layout, and what is stored rounded counts as it is stored."""
    tokens, positions = windows()
    config = load_config(folder(family))
    model = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.bfloat16).eval()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / WEIGHTS)
    config.save_pretrained(tmp_path)
    expected = whole(model.float(), tokens, positions)
    run = runner(tmp_path, tokens, positions)
    hidden = run.embed()
    for index in range(3):
        hidden, _ = run.layer(index, hidden)
    assert close(hidden, expected[3])


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "model.layers.0.self_attn.q_proj.weight",
            None,
            "missing, the first is model.layers.0.self_attn.q_proj.weight",
        ),
        ("model.layers.0.mlp.gate.weight", None, "missing, the first is model.layers.0.mlp.gate.weight"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", None, "no tensor .*experts.3.up_proj.weight"),
        ("model.embed_tokens.weight", None, "missing, the first is model.embed_tokens.weight"),
        ("model.layers.0.mlp.gate.weight", lambda t: t[:4], r"gate.weight has shape \(4, 24\), config.json says \(6, "),
        ("model.layers.0.self_attn.o_proj.weight", lambda t: t.to(torch.float8_e4m3fn), "o_proj.*F8_E4M3"),
        ("model.layers.0.self_attn.o_proj.weight", lambda t: t * torch.nan, "layer 0 answers NaN"),
        ("model.embed_tokens.weight", lambda t: t[:40], r"embed_tokens.weight has shape \(40, 24\)"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(folder, tmp_path, name, change, message):
    tensors = load_file(folder("qwen3_moe") / WEIGHTS)
    changed = tensors.pop(name)
    if change is not None:
        tensors[name] = change(changed).contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    CONFIGS["qwen3_moe"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        run = runner(tmp_path, *windows())
        run.layer(0, run.embed())


def test_a_quarter_of_the_windows_is_held_out_whatever_their_number():
    assert held_out(9, 2)[:, 0].nonzero().flatten().tolist() == [0, 4, 8]
    assert held_out(2, 3).tolist() == [[True] * 3, [False] * 3]
    assert held_out(1, 5).tolist() == [[False, False, False, True, True]]


def test_one_window_of_one_document(folder):
    tokens, positions = windows(packed=False)
    run = runner(folder("olmoe"), tokens[:1], positions[:1])
    _, found = run.layer(0, run.embed(), measure=True)
    assert found is not None
    assert found.counts.sum() == 2 * LENGTH and found.counts_held.sum() == 2 * (LENGTH // 2)


def peaks_of(layers: int, experts: int, seed: int, spread: float = 0.7) -> dict[int, Tensor]:
    """Ordinary peaks: lognormal, growing with depth by up to 4 times."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = (torch.randn(layers, experts, generator=generator) * spread).exp()
    return dict(enumerate(ordinary * torch.linspace(1, 4, layers)[:, None]))


@pytest.mark.parametrize("layers, experts", [(48, 128), (32, 8), (4, 8)])
def test_planted_super_experts_are_found(layers, experts):
    peaks = peaks_of(layers, experts, 0)
    peaks[1][5], peaks[2][7] = 800.0, 300.0
    if layers > 4:  # early ones alone: the last layers take massive activations away again
        peaks[3][0] = 79.0  # below a tenth
        peaks[layers - 1][2] = 5000.0
    few = layers * experts * 0.75 < 200  # the 99.5th percentile of 192 peaks lies above the second largest
    assert find_super_experts(peaks) == ({1: (5,)} if few else {1: (5,), 2: (7,)})


@pytest.mark.parametrize("seed", range(5))
def test_models_without_massive_activations_have_no_super_experts(seed):
    assert find_super_experts(peaks_of(48, 128, seed)) == {}
    assert find_super_experts({}) == {}
    assert find_super_experts({3: torch.zeros(4)}) == {}


def test_a_random_model_has_no_super_experts(folder):
    run = runner(folder("qwen3_moe"), *windows())
    hidden, peaks = run.embed(), {}
    for index in range(3):
        hidden, found = run.layer(index, hidden, measure=True)
        if found is not None:
            peaks[index] = found.peaks
    assert list(peaks) == [0, 2] and find_super_experts(peaks) == {}


@pytest.mark.parametrize("lengths", [[5, 12, 3, 12, 9], [7]])
def test_padding_is_not_measured(lengths, tmp_path):
    """As if every window were run alone at its own length; whatever ids padding has."""
    model = make_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    config, sources = load_config(tmp_path), sources_of(tmp_path)
    sizes = torch.tensor(lengths)
    tokens = torch.randint(1, 61, (len(lengths), 12))
    real = torch.arange(12) < sizes[:, None]
    other = torch.where(real, tokens, 7)
    positions = torch.arange(12).expand(len(lengths), -1)
    found = []
    for ids in (tokens, other):
        runner = LayerRunner(sources, spec_for(config, "here"), config, ids, positions, lengths=sizes)
        found.append(runner.layer(0, runner.embed(), measure=True))
    (out, measured), (again, same) = found
    assert measured is not None and same is not None
    assert torch.equal(out[real], again[real])
    assert all(torch.equal(left, right) for left, right in zip(measured, same, strict=True))
    assert int(measured.counts.sum()) == sum(lengths) * config.num_experts_per_tok
    for row, size in enumerate(lengths):
        alone = LayerRunner(
            sources, spec_for(config, "here"), config, tokens[row : row + 1, :size], positions[row : row + 1, :size]
        )
        torch.testing.assert_close(out[row, :size], alone.layer(0, alone.embed())[0][0], atol=1e-6, rtol=1e-5)
