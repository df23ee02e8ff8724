"""Refuse a run that cannot train as asked, before any rank starts: data, student, rules, ranks, checkpoint."""

import os

import torch

from megakd.config.checks import check_batches, check_stages
from megakd.config.effects import idle_fields
from megakd.config.run import RunConfig
from megakd.data.curriculum import open_curriculum
from megakd.data.shards import ShardSet
from megakd.data.stream import shards_digest
from megakd.data.tokenizers import bos_of, bos_words, check_bos, identify_tokenizer, load_tokenizer
from megakd.engine.checkpoint import Saved, check_ranks, check_shards, is_sound, published
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import assign_rules
from megakd.errors import UserError
from megakd.identity import DataIdentity, TeacherIdentity, text_facts
from megakd.models.checks import (
    LiveTeacher,
    check_isolation,
    check_student,
    check_teacher,
    find_live_teacher,
    model_folders,
)
from megakd.models.hub import check_readable, empty_model, load_config
from megakd.models.isolation import check_packing
from megakd.models.quantizing import check_parts
from megakd.models.tables import check_tables
from megakd.names import expand, resolve
from megakd.objectives.build import build
from megakd.run import Run
from megakd.system.dist import World, read_world
from megakd.system.extras import require
from megakd.system.files import read_json
from megakd.system.launcher import read_launcher
from megakd.system.logging import say
from megakd.tracking import check_tracking
from megakd.train.elastic import misfit
from megakd.train.validation import open_holdout


def check(run: Run) -> ShardSet:
    """All that can be wrong before any rank starts: data, student, rules, ranks and checkpoint belong to this run."""
    config, student = run.config, run.student_folder
    check_tracking(config.log)
    if config.engine.kind == "deepspeed":
        require("deepspeed", "engine.kind=deepspeed", "set engine.kind=local in a new run")
    if not (student / "config.json").exists():
        raise UserError(f"{student}: no student here; run: megakd compress {run.folder}")
    check_stages(config, str(run.path("config.json")))
    saved = next(reversed(published(run.path("checkpoints"))), None)
    idle = [each for each in idle_fields(config) if not each.replaced]
    if idle and not saved:  # `new` refuses them; of a run that began with them nothing would change
        raise UserError(f"{run.path('config.json')}: {idle[0]}; make a new run without it")
    dataset = open_dataset(run)
    _check_data(run, dataset)
    open_holdout(run)
    check_readable(student, load_config(student), "training")
    if read_world().first:
        check_isolation(model_folders(config.model), config.data.packing)
    live = find_live_teacher(config, dataset.facts)
    _check_stages(run, dataset, live, begins=saved is None)
    unfinished = saved is not None and not reached_end(config, saved, dataset)
    curriculum = open_curriculum(config.stream, dataset)  # measured here, before any rank starts
    if saved and unfinished:
        check_shards(saved, shards_digest(dataset.names, dataset.sizes, curriculum), dataset.folder)
        if live:
            check_teacher(run, live.folder)
    check_student(run, started=saved is not None and unfinished)
    if not was_launched():
        ranks = config.engine.ranks if config.engine.kind == "deepspeed" else 1
        check_world(config, World(0, ranks, torch.device("cpu")))
        if saved and unfinished:
            check_ranks(saved, ranks)
    return dataset


def _check_stages(run: Run, dataset: ShardSet, live: LiveTeacher | None, begins: bool) -> None:
    """Every stage's rules, objective and engine fit the models, which are built here without weights."""
    config, student = run.config, run.student_folder
    skeleton, teacher = empty_model(student), None
    other_size = live.other_vocab_size if live else None
    if other_size is None and begins:
        _check_one_tokenizer(config)
    size, length = text_facts(dataset.facts)["tokenizer"]["vocab_size"], config.data.sequence_length
    check_tables(skeleton, student, size, length)
    if live:
        teacher = empty_model(live.folder)
        # a teacher of another tokenizer may make up to a quarter more tokens of a sequence
        size, length = (size, length) if other_size is None else (other_size, length + length // 4)
        check_tables(teacher, live.folder, size, length)
    if config.engine.activation_checkpointing:
        for model in (skeleton, teacher if config.objective.trains_routers else None):
            if model is not None and not model.supports_gradient_checkpointing:
                raise UserError(
                    f"engine.activation_checkpointing: models of type {model.config.model_type} cannot recompute "
                    "activations; set engine.activation_checkpointing=false"
                )
    if config.engine.expert_parallel > 1 and config.engine.kind == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # DeepSpeed asks for it
        from megakd.models.expert_parallel import spread_experts

        spread_experts(skeleton, config.engine.expert_parallel, 0)  # so that rules meet the tensors they will train
    for stage in config.stages:
        try:
            objective = build(config.at(stage), skeleton, teacher, dataset.facts, other_size)
            assign_rules(objective, stage.lr_multipliers)
            if stage.quantize is not None:
                check_parts(skeleton, stage.quantize, "quantize")
            if config.engine.kind == "deepspeed":
                deepspeed_config(config.at(stage), 1, 1)
        except UserError as error:
            raise UserError(f"{run.folder}: stage {stage.name!r}: {error}") from error


def reached_end(config: RunConfig, saved: Saved, dataset: ShardSet) -> bool:
    """Whether a checkpoint is the end of the last stage."""
    last = (len(config.stages) - 1, config.steps_of(config.stages[-1], len(dataset)))
    return (saved.progress.stage, saved.progress.stage_step) >= last


def finished_training(run: Run) -> Saved | None:
    """The checkpoint at the end of the last stage, where there is one and every byte of it is as it was written."""
    saved = next(reversed(published(run.path("checkpoints"))), None)
    if saved is None or not reached_end(run.config, saved, open_dataset(run)):
        return None
    return saved if is_sound(saved, World(0, 1, torch.device("cpu"))) else None


def open_dataset(run: Run) -> ShardSet:
    """The training samples as the run's stream section wants them read."""
    stream = run.config.stream
    if (stream.follow or stream.scratch) and not stream.lanes:
        raise UserError(f"{run.folder}: stream.follow and stream.scratch need it: set stream.lanes=8 in a new run")
    scratch = expand(stream.scratch) if stream.scratch else None
    if scratch and not scratch.is_dir():
        raise UserError(f"stream.scratch: {scratch} is no folder")
    tolerant = stream.on_damage == "skip"
    return ShardSet(
        run.path("data", run.config.objective.reads, "train"), stream.follow, tolerant, scratch, 2 * stream.lanes
    )


def _check_data(run: Run, dataset: ShardSet) -> None:
    """The logits come from the student's teacher, with the student's tokenizer, in windows of the run's length."""
    config, student = run.config, run.student_folder
    if not config.objective.live:
        _check_teacher(run, dataset)
    tokens, tokenizer = text_facts(dataset.facts), load_tokenizer(student)
    made, mine = DataIdentity.of(dataset.facts), identify_tokenizer(tokenizer)
    if made.tokenizer.difference(mine):
        raise UserError(f"{dataset.folder}: made with a tokenizer of {made.tokenizer}, but {student} has one of {mine}")
    length = config.data.sequence_length
    if made.sequence_length != length:
        raise UserError(f"{dataset.folder}: windows of {made.sequence_length} tokens, data.sequence_length is {length}")
    check_packing(tokens, config.data.packing, dataset.folder)
    if older := check_bos(tokens, tokenizer, config.data.bos, dataset.folder):
        say(f"train: {older}")
    elif config.objective.live and not config.data.has_chats:
        teacher = load_tokenizer(resolve(config.model.teacher, config.model.revision, weights=False))
        own, bos = bos_of(teacher, config.data.bos), tokens.get("bos", [])
        if own != bos and not made.tokenizer.difference(identify_tokenizer(teacher)):  # another reads in its own way
            say(
                f"train: the teacher reads documents that begin {bos_words(teacher, bos)}, as the student does; its "
                f"own texts begin {bos_words(teacher, own)}"
            )
    check_batches(config)


def _check_one_tokenizer(config: RunConfig) -> None:
    """UserError for weights of losses over spans of text, which one tokenizer has no use for."""
    for name in config.objective.across_tokenizers:
        value, default = getattr(config.objective, name), type(config.objective).model_fields[name].default
        if value != default:
            raise UserError(
                f"objective.{name}={value:g} has no effect: teacher and student have one tokenizer; leave it out of a "
                "new run"
            )


def _check_teacher(run: Run, dataset: ShardSet) -> None:
    """UserError when the student was compressed from another teacher than the logits come from."""
    config, student, made_by = run.config, run.student_folder, TeacherIdentity.of(dataset.facts["teacher"])
    teacher = TeacherIdentity(config.model.teacher, config.model.revision, made_by.weights)
    if (student / "compress.json").exists():
        teacher = TeacherIdentity.of(read_json(student / "compress.json")["teacher"])
    if teacher.difference(made_by):
        raise UserError(
            f"{dataset.folder}: logits made by {made_by}, but the student comes from {teacher}; "
            "run: megakd generate-logits RUN in a new run"
        )


def check_world(config: RunConfig, world: World) -> None:
    """The batch must divide among the ranks, and the local engine is one process."""
    if reason := misfit(config, world.size):
        raise UserError(reason)


def was_launched() -> bool:
    """Whether a launcher started this process as a rank of a training; one task of srun may still start a launcher."""
    launched = read_launcher()
    return launched.size > 1 or launched.by not in ("", "srun", "Slurm")
