"""Refuse a run that cannot train as asked, before any rank starts: data, student, rules, ranks, checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch

from megakd.config import RunConfig, SarConfig
from megakd.data.shards import ShardSet
from megakd.data.stream import shards_digest
from megakd.data.tokens import load_tokenizer, tokenizer_facts
from megakd.dist import World
from megakd.effects import check_stages, idle_fields
from megakd.engine.checkpoint import check_ranks, check_shards, published
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import assign_rules
from megakd.errors import UserError
from megakd.files import read_json, resolve
from megakd.launcher import read_launcher
from megakd.models.hub import empty_model, weights_fingerprint
from megakd.objectives.build import build
from megakd.run import Run


def check(run: Run) -> ShardSet:
    """All that can be wrong before any rank starts: data, student, rules, ranks and checkpoint belong to this run."""
    config, student = run.config, run.student_folder
    if not (student / "config.json").exists():
        raise UserError(f"{student}: no student here; run: megakd compress {run.folder}")
    check_stages(config, str(run.path("config.json")))
    saved = next(reversed(published(run.path("checkpoints"))), None)
    idle = [each for each in idle_fields(config) if not each.replaced]
    if idle and not saved:  # `new` refuses them; of a run that began with them nothing would change
        raise UserError(f"{run.path('config.json')}: {idle[0]}; make a new run without it")
    dataset = open_dataset(run)
    _check_data(run, dataset)
    skeleton, teacher = empty_model(student), None
    if config.objective.kind != "cached":
        teacher = empty_model(resolve(config.model.teacher, config.model.revision))
    _, other = tokenizers(config, dataset.facts)
    if other is None and not saved:
        _check_one_tokenizer(config)
    if config.engine.expert_parallel > 1 and config.engine.kind == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # DeepSpeed asks for it
        from megakd.models.expert_parallel import spread_experts

        spread_experts(skeleton, config.engine.expert_parallel, 0)  # so that rules meet the tensors they will train
    for stage in config.stages:
        try:
            size = None if other is None else len(other)
            assign_rules(build(config.at(stage), skeleton, teacher, dataset.facts, size), stage.lr_multipliers)
            if config.engine.kind == "deepspeed":
                deepspeed_config(config.at(stage), 1, 1)
        except UserError as error:
            raise UserError(f"{run.folder}: stage {stage.name!r}: {error}") from error
    last = (len(config.stages) - 1, config.steps_of(config.stages[-1], len(dataset)))
    unfinished = saved is not None and (saved.progress.stage, saved.progress.stage_step) < last
    if saved and unfinished:
        check_shards(saved, shards_digest(dataset.names, dataset.sizes), dataset.folder)
    begun = next((event["teacher"] for event in run.events("train") if "teacher" in event), None)
    if saved and unfinished and begun and begun != (now := live_teacher(run)):
        raise UserError(
            f"{config.model.teacher}: its weights are {now}, and those that {run.folder} has learned from are {begun}; "
            "give the run its teacher back, or make a new one"
        )
    if not was_launched():
        ranks = config.engine.ranks if config.engine.kind == "deepspeed" else 1
        check_world(config, World(0, ranks, torch.device("cpu")))
        if saved and unfinished:
            check_ranks(saved, ranks)
    return dataset


def live_teacher(run: Run) -> str:
    """The fingerprint of the teacher that is asked while training."""
    return weights_fingerprint(resolve(run.config.model.teacher, run.config.model.revision))


def open_dataset(run: Run) -> ShardSet:
    """The training samples as the run's stream section wants them read."""
    stream = run.config.stream
    if (stream.follow or stream.scratch) and not stream.lanes:
        raise UserError(f"{run.folder}: stream.follow and stream.scratch need lanes; set stream.lanes=8 in a new run")
    scratch = Path(stream.scratch) if stream.scratch else None
    if scratch and not scratch.is_dir():
        raise UserError(f"stream.scratch: {scratch} is no folder")
    tolerant = stream.on_damage == "skip"
    kind = "logits" if run.config.objective.kind == "cached" else "tokens"
    return ShardSet(run.path("data", kind, "train"), stream.follow, tolerant, scratch, 2 * stream.lanes)


def _check_data(run: Run, dataset: ShardSet) -> None:
    """The logits come from the student's teacher, with the student's tokenizer, in windows of the run's length."""
    config, student, facts = run.config, run.student_folder, dataset.facts
    if config.objective.kind == "cached":
        _check_teacher(run, dataset)
    tokens = facts["tokens"] if config.objective.kind == "cached" else facts
    mine, theirs = tokenizer_facts(load_tokenizer(student)), tokens["tokenizer"]
    if mine != theirs:
        raise UserError(
            f"{dataset.folder}: made with a tokenizer of {theirs['vocab_size']} entries ({theirs['hash']}), "
            f"but {student} has one of {mine['vocab_size']} ({mine['hash']})"
        )
    length = config.data.sequence_length
    if tokens["sequence_length"] != length:
        raise UserError(
            f"{dataset.folder}: windows of {tokens['sequence_length']} tokens, data.sequence_length is {length}"
        )
    for stage in config.stages:
        if (batch := config.at(stage).optim.batch_tokens) % length:
            raise UserError(f"optim.batch_tokens: {batch} is no multiple of data.sequence_length {length}")


def tokenizers(config: RunConfig, facts: dict[str, Any]) -> tuple[Any, Any]:
    """Student's and teacher's, where the teacher is asked while training and has another one; else (None, None)."""
    if config.objective.kind == "cached":
        return None, None
    folder = resolve(config.model.teacher, config.model.revision, weights=False)
    theirs = load_tokenizer(folder)
    if tokenizer_facts(theirs) == facts["tokenizer"]:
        return None, None
    assert config.model.student is not None  # one that compress made has the teacher's
    mine = load_tokenizer(resolve(config.model.student, weights=False))
    for place, tokenizer in ((folder, theirs), (config.model.student, mine)):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{place}: a slow tokenizer; to align two of them both must give character offsets")
    if config.objective.kind == "sar" and not config.sar.likelihood and not config.sar.features:
        raise UserError(
            f"{folder}: its tokenizer is not the student's, so there is no KL, and sar.likelihood and sar.features are "
            "0: nothing is left to learn from the teacher"
        )
    return mine, theirs


def _check_one_tokenizer(config: RunConfig) -> None:
    """UserError for weights of losses over spans of text, which one tokenizer has no use for."""
    for name in ("likelihood", "features") if config.objective.kind == "sar" else ():
        value, default = getattr(config.sar, name), SarConfig.model_fields[name].default
        if value != default:
            raise UserError(
                f"sar.{name}={value:g} has no effect: teacher and student have one tokenizer; leave it out of a new run"
            )


def _check_teacher(run: Run, dataset: ShardSet) -> None:
    config, student, made_by = run.config, run.student_folder, dataset.facts["teacher"]
    teacher = {"id": config.model.teacher, "revision": config.model.revision, "weights": made_by["weights"]}
    if (student / "compress.json").exists():
        teacher = read_json(student / "compress.json")["teacher"]
    if made_by != teacher:
        raise UserError(
            f"{dataset.folder}: logits made by {made_by['id']} (weights {made_by['weights']}), but the student comes "
            f"from {teacher['id']} (weights {teacher['weights']}); run: megakd generate-logits RUN in a new run"
        )


def check_world(config: RunConfig, world: World) -> None:
    """The batch must divide among the ranks, and the local engine is one process."""
    if config.engine.kind == "local" and world.size > 1:
        raise UserError(
            f"engine.kind: local is one process, this is a world of {world.size}; "
            "set engine.kind=deepspeed in a new run"
        )
    spread = config.engine.expert_parallel
    if config.engine.kind == "local" and spread > 1:
        raise UserError(
            f"engine.expert_parallel: {spread}, but engine.kind local is one process; set engine.kind=deepspeed in a "
            "new run, or engine.expert_parallel=1"
        )
    if world.size % spread:
        raise UserError(
            f"engine.expert_parallel: {spread} does not divide the {world.size} ranks; change engine.ranks or it"
        )
    for stage in config.stages:
        windows = config.at(stage).windows_per_step
        if windows % (world.size * config.optim.micro_batch):
            raise UserError(
                f"optim.batch_tokens: {windows} windows a step do not divide among {world.size} ranks x "
                f"optim.micro_batch {config.optim.micro_batch}; change optim.micro_batch, engine.ranks or the batch"
            )


def was_launched() -> bool:
    """Whether a launcher started this process as a rank of a training; one task of srun may still start a launcher."""
    launched = read_launcher()
    return launched.size > 1 or launched.by not in ("", "srun", "Slurm")
