"""Packed documents that change each other: found from a config, found in a loaded model, and right with one a sequence.

The configs are as small as their families allow; `LEAKING` ones have recurrent or convolutional layers, or masks that
do not read position_ids.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from megakd.capture.source import Capture
from megakd.compress.job import open_job
from megakd.config.objective import OnlineConfig
from megakd.data.batches import collate
from megakd.data.records import Sample
from megakd.data.shards import ShardSet
from megakd.engine.checkpoint import Progress
from megakd.errors import UserError
from megakd.evals.measure import Meter, Subject, Unusable
from megakd.models import isolation
from megakd.models.checks import find_live_teacher
from megakd.models.isolation import check_config, check_model, measure, sketch
from megakd.objectives.cached import fused_head
from megakd.run import Run
from megakd.system.dist import World
from megakd.system.files import write_sealed
from megakd.train import build as train_build
from megakd.train import checks
from tests.conftest import VOCABULARY, files, in_process

PLAIN: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED: dict[str, Any] = {**PLAIN, "num_key_value_heads": 2}
MOE: dict[str, Any] = {
    **GROUPED,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ISOLATED: dict[str, dict[str, Any]] = {
    "qwen3_moe": MOE,
    "llama": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": PLAIN,
    "gemma3_text": {**GROUPED, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "deepseek_v3": {
        **PLAIN, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
LEAKING: dict[str, dict[str, Any]] = {
    "qwen3_next": {**MOE, **LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 24},
    "lfm2": {**GROUPED, "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "jamba": {
        **GROUPED, "num_hidden_layers": 4, "num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "gpt_oss": {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "opt": {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**PLAIN, "alibi": False, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
}  # fmt: skip


def config_of(family: str, **changes: Any) -> Any:
    fields = (ISOLATED | LEAKING)[family]
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoConfig.for_model(family, vocab_size=VOCABULARY, **ends, **fields, **changes)


def model_of(family: str) -> Any:
    """With weights as the family draws them, which are small."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family)).float().eval()


@pytest.mark.parametrize("family", LEAKING)
def test_leak_is_found_from_the_config_alone(family):
    with pytest.raises(UserError, match=f"^here: documents packed .* {family} .* data.packing=documents"):
        check_config(config_of(family), "here", "packed")
    assert check_config(config_of(family), "here", "documents")


@pytest.mark.parametrize("family", ISOLATED)
def test_isolated_family_is_taken(family):
    """From its config, loaded in float32, and in bfloat16, whose rounding is no leak."""
    assert check_config(config_of(family), "here", "packed")
    model = model_of(family)
    check_model(model, "here", "packed")
    check_model(model.to(torch.bfloat16), "here", "packed")


@pytest.mark.parametrize("family", LEAKING)
def test_leak_of_loaded_weights_is_found(family):
    """As small as the 1e-3 of a convolution with small weights."""
    model = model_of(family)
    with pytest.raises(UserError, match=r"data\.packing=documents"):
        check_model(model, "here", "packed")
    check_model(model, "here", "documents")
    assert not model.training
    model.train()
    measure(model)
    assert model.training


def test_model_that_ignores_position_ids_is_refused():
    """Its documents may be apart and still answer otherwise than alone."""
    model = model_of("gpt2")
    forward = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda positions: forward(torch.arange(positions.shape[1])[None])
    assert measure(model).packed < 1e-6
    with pytest.raises(UserError, match="have other hidden states than alone"):
        check_model(model, "here", "packed")


def test_large_config_is_probed_in_little_memory():
    """A 30B model's: one layer of its 48, all experts on the memory of one matrix."""
    config = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_experts=128, moe_intermediate_size=768, vocab_size=151936
    )
    decoder = sketch(config)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in decoder.parameters()}
    assert sum(p.numel() for p in decoder.parameters()) > 9e8
    assert sum(storages.values()) < 2e8 and len(decoder.layers) == 1


def test_random_numbers_of_the_process_stay():
    isolation._leaks.clear()
    before = torch.get_rng_state()
    check_config(config_of("qwen3_moe"), "here", "packed")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", [*LEAKING, "qwen3_moe"])
def test_document_in_a_padded_sequence_is_as_alone(family):
    """Padding on the right changes nothing before it, in recurrent layers too."""
    model, tokens = model_of(family), np.random.default_rng(0).integers(1, VOCABULARY, 40).astype(np.int32)
    parts = [tokens[:9], tokens[9:14], tokens[14:40]]
    start = np.zeros(1, np.int32)
    batch = collate([Sample("0", np.append(part, 0).astype(np.int32), start) for part in parts], 30)
    with torch.no_grad():
        rows = model(batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
        for row, part in zip(rows, parts, strict=True):
            alone = model(torch.tensor(part[None].astype(np.int64)), use_cache=False).logits[0]
            torch.testing.assert_close(row[: len(part)], alone, atol=2e-5 * float(alone.abs().max()), rtol=0)
    assert (batch.labels != -100).sum() == sum(map(len, parts))


# --- what every verb does with a model that leaks ---


@pytest.fixture(scope="module")
def leaking(tmp_path_factory, teacher) -> Path:
    """A folder of an lfm2 with the teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("lfm2")
    model_of("lfm2").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(teacher / name, folder / name)
    return folder


@pytest.fixture
def run_of(tmp_path, recipe):
    def make(**model: Any) -> Run:
        value = json.loads(recipe.read_text())
        packing = model.pop("packing", "packed")
        value["model"] |= {name: str(folder) for name, folder in model.items()}
        value["data"] |= {"packing": packing, "tokens": 4000}
        value["stages"] = [{"name": "all", "steps": 2}]
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(value))
        return Run.create(path, [], tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}")

    return make


@pytest.fixture
def given(run_of, prepared):
    """A run with the data of `prepared`, as if its packing had never been asked about."""

    def make(**model: Any) -> Run:
        run = run_of(**model)
        shutil.copytree(prepared / "data", run.path("data"))
        return run

    return make


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_tokenize_refuses_before_it_reads(side, run_of, leaking, teacher):
    run = run_of(**({"teacher": leaking, "student": teacher} if side == "teacher" else {"student": leaking}))
    output = in_process("tokenize", run.folder, code=2)
    assert "data.packing=documents" in output and str(leaking) in output and len(output.splitlines()) == 1
    assert not run.path("data").exists()


def test_training_and_capture_refuse_data_that_was_packed_for_others(given, leaking, teacher):
    run = given(student=leaking)
    assert "data.packing=documents" in in_process("train", run.folder, code=2)
    run = given(teacher=leaking, student=teacher)
    shutil.rmtree(run.path("data", "logits"))
    assert "data.packing=documents" in in_process("generate-logits", run.folder, code=2)


def test_loaded_models_are_probed_too(given, leaking, teacher, monkeypatch):
    """Where a config's small model could not be made."""
    monkeypatch.setattr(isolation, "_leak_of", lambda config: None)
    run = given(student=leaking)
    dataset = ShardSet(run.path("data", "logits", "train"))
    with pytest.raises(UserError, match="lfm2 does not separate"):
        train_build.build_objective(run.config, run.student_folder, dataset.facts)
    run = given(teacher=leaking, student=teacher)
    shutil.rmtree(run.path("data", "logits"))
    capture = Capture(run, leaking, World(0, 1, torch.device("cpu")), VOCABULARY)
    with pytest.raises(UserError, match="lfm2 does not separate"):
        next(capture.targets(ShardSet(run.path("data", "tokens", "train")), [("book", range(1))], run.config.logits))


def test_evaluation_refuses_a_model_that_leaks(given, leaking, teacher):
    run = given(student=leaking)
    with pytest.raises(Unusable, match=r"data\.packing=documents"):
        Meter(run).row(Subject("student-0", leaking, Progress()))


def test_live_teacher_that_leaks_is_refused(given, leaking, teacher, monkeypatch):
    run = given(teacher=leaking, student=teacher)
    config = run.config = run.config.model_copy(update={"objective": OnlineConfig()})
    dataset = ShardSet(run.path("data", "tokens", "train"))
    with pytest.raises(UserError, match="lfm2 does not separate"):
        train_build.build_objective(config, teacher, dataset.facts, find_live_teacher(config, dataset.facts))
    with pytest.raises(UserError, match=r"data\.packing=documents"):
        checks.check(run)


def test_calibration_is_refused_where_the_teacher_leaks(given, teacher, monkeypatch):
    run = given()
    monkeypatch.setattr(isolation, "_leak_of", lambda config: isolation.Leak(0.1, 0.1))
    run.config = run.config.model_copy(
        update={"compress": run.config.compress.model_copy(update={"calibration_tokens": 100})}
    )
    with pytest.raises(UserError, match=r"data\.packing=documents"):
        open_job(run, teacher)


def test_leaking_student_trains_on_one_document_a_sequence(run_of, leaking):
    run = run_of(student=leaking, packing="documents")
    output = in_process("tokenize", run.folder)
    assert "sequences of one document each, of 31 tokens on average" in output
    tokens = ShardSet(run.path("data", "tokens", "train"))
    assert tokens.facts["packing"] == "documents"
    samples = [tokens[i] for i in range(len(tokens))]
    assert all(sample.starts.tolist() == [0] for sample in samples)
    assert min(len(sample.tokens) for sample in samples) < 33
    assert 4000 <= sum(len(sample.tokens) - 1 for sample in samples) < 4000 + 64
    for verb in ("generate-logits", "train", "evaluate"):
        in_process(verb, run.folder)
    rows = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and np.isfinite(rows[-1]["ce"])


def test_data_of_another_packing_is_refused(run_of, prepared):
    run = run_of(packing="documents")
    shutil.copytree(prepared / "data" / "tokens", run.path("data", "tokens"))
    output = in_process("generate-logits", run.folder, code=2)
    assert "its sequences are packed, data.packing is documents" in output


def test_gpt2_is_a_student():
    """Its forward reads cross_attentions of what the decoder answers."""
    assert fused_head(model_of("gpt2"), VOCABULARY).vocab_size == VOCABULARY


def test_tokens_of_before_the_setting_stay(run_of, tmp_path):
    """Their manifest says nothing of packing; a capture of hours may hang on it."""
    run = run_of()
    in_process("tokenize", run.folder)
    for path in run.path("data").rglob("*.json"):
        value = json.loads(path.read_text())
        del value["facts"]["packing"], value["seal"]
        write_sealed(path, value)
    before = files(run.path("data"))
    assert "tokenize train: finished" in in_process("tokenize", run.folder)
    assert files(run.path("data")) == before
    in_process("generate-logits", run.folder)


def test_trainer_refuses_a_student_that_leaks(prepared, leaking, tmp_path):
    from megakd.integrations.hf_trainer import DistillationTrainer, DistillationTrainingArguments

    student = AutoModelForCausalLM.from_pretrained(leaking, dtype=torch.float32)
    args = DistillationTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(UserError, match="lfm2 does not separate"):
        DistillationTrainer(student, args, prepared / "data" / "logits" / "train")


def test_plan_says_what_packing_does(run_of, leaking):
    assert "refused: " in in_process_output("plan", run_of(student=leaking))
    run = run_of(student=leaking, packing="documents")
    assert "once they are tokenized, plan says how much is padding" in in_process_output("plan", run)
    in_process("tokenize", run.folder)
    assert re.search(r"one document per sequence; \d+\.\d% of the positions", in_process_output("plan", run))


def in_process_output(verb: str, run: Run) -> str:
    return " ".join(in_process(verb, run.folder).split())
