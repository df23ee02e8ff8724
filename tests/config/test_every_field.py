"""Every field of a configuration, under every objective and engine: a difference is seen, or it is refused, or listed.

A field added to config.py fails here until it has a line in FIELDS: how its effect is seen, or why that cannot be.
"""

import json
import re
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from megakd.capture.targets import targets_from_logits
from megakd.config.base import Section
from megakd.config.checks import check, notices
from megakd.config.effects import idle_fields
from megakd.config.objective import KINDS as OBJECTIVES
from megakd.config.parsing import load_recipe
from megakd.config.run import RunConfig
from megakd.config.train import StageConfig
from megakd.data.batches import collate
from megakd.data.curriculum import Curriculum
from megakd.data.lengths import Groups
from megakd.data.records import IGNORED
from megakd.data.stream import Stream, share
from megakd.engine.guard import GRADIENT, Health, after_step, wrong_with
from megakd.engine.optim import build_optimizer, schedule
from megakd.errors import UserError
from megakd.models.checks import LiveTeacher
from megakd.models.loading import load_model
from megakd.objectives.build import build
from megakd.system.dist import World
from megakd.train import build as assemble
from megakd.train import build as train_build
from megakd.train.checks import check_world
from tests.conftest import ROOT
from tests.objectives.sar import dense_student

CPU = torch.device("cpu")
KINDS, ENGINES = ("cached", "sar", "online"), ("local", "deepspeed")


class Seen(NamedTuple):
    """`by` of a configuration differs between the field's default and `value`; beside: other fields that it needs."""

    value: Any
    by: Callable[[RunConfig], Any]
    beside: dict[str, Any] = {}  # noqa: RUF012 (never changed)


class Listed(NamedTuple):
    """Read whatever the kind and engine; test: FILE::NAME that sees its effect, where that takes a run of a verb."""

    value: Any
    why: str
    test: str = ""
    beside: dict[str, Any] = {}  # noqa: RUF012 (never changed)


# ---- how effects are seen

material: dict[str, Any] = {}  # dataset and teacher of the session, for functions that see a configuration alone


@cache
def _trained(objective: str, source: str) -> dict[str, Any]:
    """What an objective does with two windows, and what it trains."""
    config = RunConfig.model_validate_json(source)
    dataset = material["dataset"]
    batch = collate([dataset[0], dataset[1]], 32)
    live = config.objective.live
    teacher = load_model(material["teacher"], torch.float32) if live else None
    facts = dataset.facts["tokens"] if live else dataset.facts
    made = build(config, dense_student(), teacher, facts)
    found: dict[str, Any] = {"names": sorted(name for name, _ in made.named_parameters())}
    for number, (part, step) in enumerate(((0.0, 0), (0.9, 7))):
        made.at(part, step)
        report = made(batch if not live else batch._replace(targets=None))
        found[f"total {number}"] = report.total.item()
        found |= {f"{name} {number}": value.item() for name, value in report.terms.items()}
        found[f"experts {number}"] = [(r.name, r.taken) for r in getattr(made, "found", [])]
        for parameter in made.parameters():  # what holds parameters where they began shows only behind a step
            parameter.data.mul_(1.1)
        made.observe({"kl_t1": 5.0, **{name: value.item() for name, value in report.terms.items()}}, 60)
    groups = build_optimizer(made, (), config.optim).param_groups
    return found | {"memory": made.memory, "rates": [(group["lr"], len(group["params"])) for group in groups]}


def objective(config: RunConfig) -> Any:
    stage = config.at(config.stages[0])
    # engine and data have no say: what was computed under one engine holds under the other
    plain = stage.model_copy(update={"engine": RunConfig().engine, "stages": RunConfig().stages})
    try:
        return _trained(stage.objective.model_dump_json(), plain.model_dump_json())
    except UserError as error:  # one normalised expert per token, the default of sar.initial_top_k, teaches nothing
        return str(error)


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.proj, self.norm = nn.Embedding(3, 2), nn.Linear(2, 2), nn.LayerNorm(2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


class Plain(nn.Module):
    """An objective as `build_engine` knows it, that remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.told = Student(), []

    def checkpoint_activations(self) -> None:
        self.told.append("activations")

    def quantize(self, said: Any, place: str) -> None:
        self.told.append(str(said))

    def checkpoint_teacher(self) -> None:
        self.told.append("teacher")


class Engine:
    """What DeepSpeed would be given."""

    def __init__(self, objective: Any, optimizer: Any, settings: Any, world: World, spread: int):
        self.clip_norm, self.autocast, self.scaler, self.settings = 0.0, None, None, settings


def engine(config: RunConfig) -> Any:
    """What a stage's engine is made of: groups, clipping, precision, DeepSpeed's settings, checkpointing."""
    stage, plain = config.stages[0], Plain()
    fake = types.ModuleType("megakd.engine.deepspeed")
    fake.DeepSpeedEngine = Engine  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"megakd.engine.deepspeed": fake}):
        made: Any = train_build.build_engine(config.at(stage), plain, stage, World(0, 1, CPU))  # type: ignore[arg-type]
    optimizer = build_optimizer(Plain(), stage.lr_multipliers, config.at(stage).optim)
    groups = [{key: str(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    autocast = made.autocast and (made.autocast.fast_dtype, made.autocast._enabled)
    return groups, made.clip_norm, autocast, getattr(made, "settings", None), plain.told


def factors(config: RunConfig) -> list[float]:
    return [schedule(config.at(config.stages[0]).optim, step, 40) for step in range(40)]


def batches(config: RunConfig) -> Any:
    windows = config.at(config.stages[0]).windows_per_step
    return share(list(range(windows)), 0, 1, config.optim.micro_batch)


def order(config: RunConfig) -> list[int]:
    curriculum = None
    if config.stream.curriculum != "off":
        curriculum = Curriculum(np.arange(60), config.stream.curriculum_start, config.stream.curriculum_epochs)
    size = config.stream.group_by_length
    groups = Groups(np.arange(60) % 7, size) if size else None
    return Stream([30, 30], config.seed, config.stream.lanes, curriculum, groups).take(0, 60)


def world(config: RunConfig) -> str:
    try:
        check_world(config, World(0, 1, CPU))
    except UserError as error:
        return str(error)
    return ""


def health(config: RunConfig) -> Any:
    found = Health()
    for loss in [1.0] * 20:
        found = after_step(found, loss, "", config.guard)
    return found, wrong_with(5.0, found, config.guard)


def judged(config: RunConfig) -> str:
    from megakd.engine.base import StepReport
    from megakd.engine.checkpoint import Progress
    from megakd.run import Run
    from megakd.train.skipped import judge

    try:
        report = StepReport({"total": 1.0}, float("nan"), GRADIENT)
        judge(Run(Path("run"), config), Progress(), report, 1, World(1, 2, CPU))
    except UserError as error:
        return str(error)
    return ""


def passes(config: RunConfig) -> int:
    return config.steps_of(config.stages[0])


def length(config: RunConfig) -> int:
    return config.steps_of(config.stages[0], 1000)


def ranks(config: RunConfig) -> Any:
    from megakd.run import Run
    from megakd.train import launch

    with mock.patch.object(launch.subprocess, "Popen") as started, mock.patch.object(launch.signal, "signal"):
        launch.launch(Run(Path("run"), config))
    return started.call_args.kwargs["env"]["RANKS"]


def teacher_place(config: RunConfig) -> Any:
    """Whether the teacher's layers go to CPU memory, and whether it is read in parts."""
    names = ("load_model", "build", "offload", "fill", "keep_exact", "_check_packing", "_place")
    teacher = LiveTeacher(Path("teacher"), None) if config.objective.live else None
    with (
        mock.patch.multiple(assemble, **dict.fromkeys(names, mock.DEFAULT)),
        mock.patch.object(assemble, "hollow_model", return_value=(mock.MagicMock(), mock.MagicMock())) as hollow,
        mock.patch("megakd.models.sharded.divide"),
    ):
        train_build.build_objective(config, Path("student"), mock.MagicMock(), teacher)
        asked: Any = train_build.offload
        return asked.called, mock.call(Path("teacher"), mock.ANY) in hollow.mock_calls


def captured(config: RunConfig) -> Any:
    """The targets of some positions."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = config.logits.model_copy(update={"top_k": min(config.logits.top_k, 50)})
    found = targets_from_logits(logits, torch.tensor([1, 2, IGNORED, 3]), settings, torch.full((4,), 0.5))
    return [field.tolist() for field in found]


def stage(config: RunConfig) -> Any:
    at = config.at(config.stages[0])
    return at.objective, at.optim, at.engine


# ---- the list

VERB = "read by a verb that does not know the kind"
COMPRESS, TOKENIZE = "read by compress alone", "read by tokenize alone"
T = "tests/"
CHAT_COLUMNS = "tests/data/test_conversations.py::test_columns_have_the_names_that_are_given"

FIELDS: dict[str, Seen | Listed] = {
    "name": Listed(
        "other",
        "the run's name in W&B and in the model card",
        T + "test_tracking.py::test_wandb_offline_writes_under_the_run",
    ),
    "seed": Seen(3, order),
    "model.teacher": Listed("x/y", VERB, T + "test_cli.py::test_logits_of_another_teacher"),
    "model.revision": Listed("main", "resolve() downloads it; refused for a folder", beside={"model.teacher": "x/y"}),
    "model.student_revision": Listed(
        "main", "resolve() downloads it; refused for a folder", beside={"model.student": "x/y"}
    ),
    "model.student": Listed(
        "x", VERB, T + "test_run.py::test_training_starts_at_the_given_student_or_the_compressed_one"
    ),
    "model.dtype": Seen("float16", engine),
    "compress.rank": Listed(
        3, COMPRESS, T + "commands/test_compress.py::test_every_family_at_full_rank_is_its_teacher"
    ),
    "compress.split": Listed(
        "free", COMPRESS, T + "commands/test_compress.py::test_a_free_split_is_never_larger_nor_worse"
    ),
    "compress.budget": Listed(
        0.3, COMPRESS, T + "commands/test_compress.py::test_a_budget_is_kept_and_spent_better_than_evenly"
    ),
    "compress.method": Listed(
        "prune",
        COMPRESS,
        T + "commands/test_compress_methods.py::test_students_are_stock_and_say_what_they_store",
        {"compress.budget": 0.5},
    ),
    "compress.experts": Listed(
        2, COMPRESS, T + "commands/test_compress_methods.py::test_pruning_before_sharing_is_pruning_at_full_rank"
    ),
    "compress.criterion": Listed(
        "frequency",
        COMPRESS,
        T + "commands/test_compress_methods.py::test_the_experts_kept_are_those_of_a_brute_force",
        {"compress.experts": 2},
    ),
    "compress.flops": Listed(
        0.3, COMPRESS, T + "compress/test_planner.py::test_flops_are_kept_to", {"compress.budget": 0.3}
    ),
    "compress.shapes": Listed(
        ["basis"], COMPRESS, T + "compress/test_planner.py::test_candidates_span_the_shares", {"compress.budget": 0.3}
    ),
    "compress.solver": Listed("adam", COMPRESS, T + "commands/test_compress.py::test_adam_comes_close_to_als"),
    "compress.sweeps": Listed(2, COMPRESS, T + "compress/test_fit.py::test_error_never_grows_with_sweeps"),
    "compress.tolerance": Listed(
        0.1, COMPRESS, T + "compress/test_fit.py::test_stops_at_the_tolerance_and_tells_each_sweep"
    ),
    "compress.steps": Listed(
        2, COMPRESS, T + "commands/test_compress.py::test_adam_comes_close_to_als", {"compress.solver": "adam"}
    ),
    "compress.lr": Listed(
        0.5, COMPRESS, T + "commands/test_compress.py::test_adam_comes_close_to_als", {"compress.solver": "adam"}
    ),
    "compress.calibration_tokens": Listed(
        5, COMPRESS, T + "commands/test_compress.py::test_calibration_makes_the_student_better"
    ),
    "compress.damping": Listed(
        [0.5], COMPRESS, T + "compress/test_fit.py::test_of_several_dampings_the_best_on_held_out_inputs_is_kept"
    ),
    "compress.sequential": Listed(
        True, COMPRESS, T + "commands/test_compress.py::test_calibration_makes_the_student_better"
    ),
    "compress.align": Listed("off", COMPRESS, T + "commands/test_compress.py::test_upcycled_experts_are_put_in_order"),
    "compress.super_experts": Listed("auto", COMPRESS, T + "commands/test_compress.py::test_super_experts_stay_dense"),
    "data.source": Listed("a.jsonl", TOKENIZE, T + "data/test_documents.py::test_every_kind_of_file_gives_its_texts"),
    "data.subset": Listed("a", TOKENIZE, T + "data/test_documents.py::test_hub_data_sets_stream_through_datasets"),
    "data.split": Listed("test", TOKENIZE, T + "data/test_documents.py::test_hub_data_sets_stream_through_datasets"),
    "data.text_field": Listed(
        "body", TOKENIZE, T + "data/test_documents.py::test_other_columns_and_fields_can_be_the_text"
    ),
    "data.format": Listed(
        "messages",
        TOKENIZE,
        T + "commands/test_chat.py::test_every_conversation_has_the_labels_of_the_templates_own_mask",
    ),
    "data.messages_field": Listed("chat", TOKENIZE, CHAT_COLUMNS, {"data.format": "messages"}),
    "data.prompt_field": Listed("question", TOKENIZE, CHAT_COLUMNS, {"data.format": "prompt_completion"}),
    "data.completion_field": Listed("answer", TOKENIZE, CHAT_COLUMNS, {"data.format": "prompt_completion"}),
    "data.tools_field": Listed("functions", TOKENIZE, CHAT_COLUMNS, {"data.format": "messages"}),
    "data.streaming": Listed(False, TOKENIZE, T + "data/test_documents.py::test_hub_data_sets_stream_through_datasets"),
    "data.bos": Listed(
        "never", TOKENIZE, T + "commands/test_tokenize.py::test_the_rule_of_bos_is_stated_in_the_manifest"
    ),
    "data.revision": Listed("a", TOKENIZE, T + "data/test_documents.py::test_a_hub_source_is_read_at_its_revision"),
    "data.sequence_length": Seen(1024, batches),
    "data.packing": Listed(
        "documents", TOKENIZE, T + "models/test_isolation.py::test_leaking_student_trains_on_one_document_a_sequence"
    ),
    "data.tokens": Seen(2**24, passes, {"stages": [{"name": "a", "epochs": 1}]}),
    "data.holdout_fraction": Listed(
        0.5, TOKENIZE, T + "data/test_documents.py::test_held_out_depends_on_the_text_alone"
    ),
    "data.holdout_tokens": Listed(
        5, TOKENIZE, T + "commands/test_tokenize.py::test_the_budget_gives_the_first_windows_of_the_whole"
    ),
    "data.shard_tokens": Listed(
        5,
        TOKENIZE,
        T + "capture/test_pipeline.py::test_six_workers_killed_at_random_then_any_number_give_the_bytes_of_one",
    ),
    "data.sources": Listed(
        [{"source": "a.jsonl"}],
        TOKENIZE,
        T + "commands/test_mixture.py::test_shares_are_those_asked_for_in_every_stretch",
    ),
    "data.chat_template": Listed(
        "chat.jinja",
        TOKENIZE,
        T + "commands/test_chat.py::test_a_template_of_a_file_takes_the_place_of_the_tokenizers",
        {"data.format": "messages"},
    ),
    "data.on_bad_line": Listed(
        "skip", TOKENIZE, T + "commands/test_bad_lines.py::test_bad_lines_are_refused_or_counted_and_named"
    ),
    "data.workers": Listed(2, TOKENIZE, T + "commands/test_tokenize.py::test_workers_end_with_a_killed_parent"),
    "logits.profile": Seen("sampled", captured, {"objective.tail": "sampled", "objective.temperature": 1.0}),
    "logits.top_k": Seen(5, captured),
    "logits.pmin": Seen(0.1, captured),
    "logits.levels": Listed(5, "read by the codec", T + "data/test_codec.py::test_what_rounding_costs_in_nats"),
    "logits.draws": Seen(9, captured, {"logits.profile": "hybrid"}),
    "logits.draw_temperature": Seen(2.0, captured, {"logits.profile": "hybrid"}),
    "logits.temperatures": Seen([2.0, 3.0], captured),
    "logits.parallel": Listed(
        "zero3",
        "read by generate-logits alone",
        T + "capture/test_pipeline.py::test_teacher_spread_over_two_ranks_says_what_a_whole_one_says",
    ),
    "logits.engine": Listed(
        "vllm", "read by generate-logits alone", T + "capture/test_vllm.py::test_both_engines_give_equal_records"
    ),
    "logits.dtype": Listed("float32", "the teacher's, in generate-logits"),
    "logits.batch_size": Listed(3, "memory of generate-logits"),
    "stream.lanes": Seen(1, order),
    "stream.curriculum": Seen("nll", order),
    "stream.curriculum_start": Seen(0.5, order, {"stream.curriculum": "nll"}),
    "stream.curriculum_epochs": Seen(2.0, order, {"stream.curriculum": "nll"}),
    "stream.group_by_length": Seen(4, order, {"data.packing": "documents"}),
    "stream.follow": Listed(
        True,
        "how shards are opened",
        T + "commands/test_waiting.py::test_training_follows_an_unfinished_capture",
        {"stream.lanes": 2},
    ),
    "stream.workers": Listed(
        3, "speed alone", T + "train/test_data.py::test_workers_decode_at_once_at_any_micro_batch"
    ),
    "stream.on_damage": Listed(
        "skip", "how shards are read", T + "commands/test_train.py::test_damaged_samples_are_left_out_counted_and_named"
    ),
    "stream.scratch": Listed(
        "/tmp",
        "where shards are read",
        T + "commands/test_train.py::test_scratch_must_be_a_folder",
        {"stream.lanes": 2},
    ),
    "objective.kind": Listed("cached", "walked itself"),
    "objective.alpha": Seen(0.9, objective),
    "objective.temperature": Seen(1.0, objective),
    "objective.tail": Seen("truncated", objective),
    "objective.divergence": Seen("jsd", objective),
    "objective.mix": Seen(0.2, objective, {"objective.divergence": "skew_kl"}),
    "objective.routing": Seen("all", objective),
    "objective.initial_top_k": Seen(2, objective, {"objective.routing": "top_m"}),
    "objective.final_top_k": Seen(2, objective, {"objective.routing": "top_m", "objective.initial_top_k": 3}),
    "objective.router_lr": Seen(0.5, objective, {"objective.routing": "learned"}),
    "objective.router_balance": Seen(0.5, objective, {"objective.routing": "learned"}),
    "objective.router_patterns": Seen(["layers.0.mlp.gate$"], objective, {"objective.routing": "all"}),
    "objective.router_lr_multiplier": Seen(0.3, objective),
    "objective.anchor": Seen(0.7, objective),
    "objective.anchor_form": Seen("absolute", objective),
    "objective.entropy": Seen(0.5, objective),
    "objective.balance": Seen(0.5, objective),
    "objective.likelihood": Listed(
        0.5,
        "two tokenizers alone; refused by train where there is one",
        T + "train/test_sar.py::test_slow_tokenizers_and_nothing_to_learn_are_refused",
    ),
    "objective.features": Listed(
        0.5,
        "two tokenizers alone; refused by train where there is one",
        T + "train/test_sar.py::test_weights_of_spans_are_refused_where_there_is_one_tokenizer",
    ),
    "objective.drift_steps": Seen(7, objective),
    "objective.kl": Seen(0.2, objective),
    "objective.feature": Seen(0.5, objective),
    "objective.attention": Seen(0.5, objective),
    "objective.layers": Seen(0.5, objective),
    "objective.progressive_layers": Seen(True, objective),
    "objective.contrastive": Seen(0.5, objective),
    "objective.contrastive_temperature": Seen(0.5, objective),
    "objective.gap": Seen(1.0, objective),
    "objective.importance": Seen(1.0, objective),
    "optim.lr": Seen(1.0, engine),
    "optim.betas": Seen([0.5, 0.5], engine),
    "optim.eps": Seen(1e-3, engine),
    "optim.weight_decay": Seen(0.5, engine),
    "optim.schedule": Seen("linear", factors),
    "optim.warmup_steps": Seen(3, factors),
    "optim.final_lr_ratio": Seen(0.5, factors),
    "optim.clip_norm": Seen(3.0, engine),
    "optim.batch_tokens": Seen(2**14, batches),
    "optim.micro_batch": Seen(4, batches),
    "stages.0.name": Listed(
        "other", "the folder of its checkpoints", T + "engine/test_checkpoint.py::test_a_checkpoint_is_found_whole"
    ),
    "stages.0.tokens": Seen(2**25, length),
    "stages.0.steps": Seen(7, length, {"stages": [{"name": "a", "steps": 5}]}),
    "stages.0.epochs": Seen(2.0, length, {"stages": [{"name": "a", "epochs": 1}]}),
    "stages.0.lr": Seen(1.0, stage),
    "stages.0.lr_multipliers": Seen([{"pattern": "norm", "lr_multiplier": 0.5}], engine),
    "stages.0.objective": Seen({"alpha": 0.9}, stage),
    "stages.0.optim": Seen({"weight_decay": 0.7}, stage),
    "stages.0.quantize": Seen({"linear": "int8"}, engine),
    "stages.0.config": Seen("zero2", engine),
    "stages.0.deepspeed": Seen({"zero_optimization": {"stage": 1}}, engine, {"stages.0.config": "zero2"}),
    "engine.kind": Listed("local", "walked itself"),
    "engine.config": Seen("zero2", engine),
    "engine.deepspeed": Seen({"zero_optimization": {"stage": 1}}, engine),
    "engine.ranks": Seen(2, ranks),
    "engine.expert_parallel": Seen(2, world),
    "engine.activation_checkpointing": Seen(True, engine),
    "engine.offload_teacher": Seen(True, teacher_place),
    "engine.teacher_parallel": Seen("zero3", teacher_place),
    "guard.nonfinite": Seen("skip", judged),
    "guard.spike": Seen(2.0, health),
    "guard.window": Seen(10, health, {"guard.spike": 9.0}),
    "guard.rollback": Listed(
        2, "read by the loop", T + "engine/test_guard.py::test_spikes_are_left_out_and_a_run_goes_back"
    ),
    "checkpoint.every_steps": Listed(
        3, "read by the loop", T + "train/test_sar.py::test_a_border_is_crossed_in_another_process_alike"
    ),
    "checkpoint.every_epochs": Listed(
        1,
        "read by the loop",
        T + "train/test_resume.py::test_a_new_run_goes_on_from_an_epochs_checkpoint",
        {"stages": [{"name": "a", "epochs": 1}]},
    ),
    "checkpoint.keep": Listed(
        1, "read by the loop", T + "engine/test_checkpoint.py::test_rotate_keeps_the_newest_and_the_protected"
    ),
    "eval.every_steps": Listed(
        3, "read by the loop", T + "engine/test_equivalence.py::test_deepspeed_gives_the_local_curve"
    ),
    "eval.batch_size": Listed(
        3, VERB, T + "evals/test_holdout.py::test_a_student_is_worse_and_the_batch_size_does_not_matter"
    ),
    "eval.tasks": Listed(["a"], VERB, T + "evals/test_tasks.py::test_numbers_are_those_of_a_loop_over_tokens"),
    "eval.task_folder": Listed(
        "a", "of eval.tasks and evaluate --tasks", T + "evals/test_tasks.py::test_mistakes_are_named"
    ),
    "eval.limit": Listed(
        3, "of eval.tasks and evaluate --tasks", T + "evals/test_tasks.py::test_limit_and_few_shot_do_what_they_say"
    ),
    "eval.few_shot": Listed(
        3, "of eval.tasks and evaluate --tasks", T + "evals/test_tasks.py::test_limit_and_few_shot_do_what_they_say"
    ),
    "eval.task_batch_size": Listed(3, "speed of eval.tasks and evaluate --tasks"),
    "eval.attention": Listed(2, VERB, T + "evals/test_attention.py::test_a_run_measures_it_when_asked"),
    "eval.best": Listed(
        "nll", VERB, T + "commands/test_watch.py::test_the_best_is_kept_by_the_measure_that_was_asked_for"
    ),
    "eval.poll_seconds": Listed(1.0, "how often watch looks"),
    "log.every_steps": Listed(
        3, "read by the loop", T + "test_tracking.py::test_stage_watch_divides_by_the_steps_tokens_and_counts_damage"
    ),
    "log.tensorboard": Listed(
        False, "read by the log", T + "test_tracking.py::test_tensorboard_holds_the_same_numbers"
    ),
    "log.wandb": Listed("disabled", "read by the log", T + "test_tracking.py::test_wandb_offline_writes_under_the_run"),
    "log.wandb_project": Listed(
        "x",
        "read by the log; wandb may be switched on later",
        T + "test_tracking.py::test_wandb_offline_writes_under_the_run",
    ),
}


def all_fields() -> list[str]:
    found = []
    for name, field in RunConfig.model_fields.items():
        if name == "objective":
            found += {f"objective.{key}": None for kind in OBJECTIVES.values() for key in kind.model_fields}
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found += [f"{name}.{key}" for key in field.annotation.model_fields]
        elif name == "stages":
            found += [f"stages.0.{key}" for key in StageConfig.model_fields]
        else:
            found.append(name)
    return found


def test_every_field_has_a_line_and_every_line_a_field():
    assert sorted(FIELDS) == sorted(all_fields())


def test_every_listed_field_is_read_and_its_test_exists():
    code = "\n".join(path.read_text() for path in (ROOT / "megakd").rglob("*.py") if path.parent.name != "config")
    for path, line in FIELDS.items():
        if isinstance(line, Listed):
            assert re.search(rf"\.{path.rpartition('.')[2]}\b", code), f"{path}: nobody reads it"
            file, _, name = line.test.partition("::")
            assert not file or f"def {name}(" in (ROOT / file).read_text(), (path, line.test)


@pytest.fixture(scope="module")
def made(tmp_path_factory, dataset, teacher) -> Callable[..., RunConfig]:
    material.update(dataset=dataset, teacher=teacher)
    recipe = tmp_path_factory.mktemp("walk") / "recipe.json"
    base = {"stages": [{"name": "a", "tokens": 2**24}], "optim": {"batch_tokens": 2**15}}
    recipe.write_text(json.dumps(base))

    def make(changes: dict[str, Any]) -> RunConfig:
        return load_recipe(recipe, [f"{path}={json.dumps(value)}" for path, value in changes.items()])

    return make


def test_a_field_that_needs_another_is_refused_or_said_without_it(made):
    enough = ("stages.", "data.tokens", "logits.profile")  # what they need to be seen is no condition of their effect
    for path, line in FIELDS.items():
        if line.beside and not path.startswith(enough):
            try:
                alone = made({path: line.value})
            except UserError as error:
                assert path.rpartition(".")[2] in str(error)
                continue
            assert path in {each.path for each in idle_fields(alone)}, path


def of_kind(path: str, kind: str) -> bool:
    """Whether a field is one that a run of this kind has."""
    section, _, key = path.partition(".")
    return section != "objective" or key in OBJECTIVES[kind].model_fields


@pytest.mark.parametrize("engine_kind", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_field_is_without_effect_unsaid(kind, engine_kind, made):
    unsaid = []
    for path, line in FIELDS.items():
        if path in ("objective.kind", "engine.kind"):
            continue
        if not of_kind(path, kind):
            with pytest.raises(UserError, match=rf"unknown key '{path}': it is a field of objective.kind="):
                made({"objective.kind": kind, path: line.value})
            continue
        beside = {other: value for other, value in line.beside.items() if of_kind(other, kind)}
        about = {"objective.kind": kind, "engine.kind": engine_kind, **beside}
        try:
            before, after = made(about), made({**about, path: line.value})
        except UserError as error:
            assert path in str(error), (path, error)  # refused while it is read
            continue
        idle = {each.path: each for each in idle_fields(after)}
        if path in idle:
            if idle[path].replaced:
                assert str(idle[path]) in notices(after)
            else:
                with pytest.raises(UserError):
                    check(after, "recipe")
        elif isinstance(line, Seen) and line.by(before) == line.by(after):
            unsaid.append(path)
    assert not unsaid
