"""Refuse a run that cannot train as asked, before any rank starts: data, student, rules, ranks, checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch

from megakd.config import RunConfig, SarConfig
from megakd.data.shards import ShardSet
from megakd.data.stream import shards_digest
from megakd.data.tokens import bos_of, bos_words, check_bos, load_tokenizer, tokenizer_facts, vocabulary_size
from megakd.dist import World, read_world
from megakd.effects import check_stages, idle_fields
from megakd.engine.checkpoint import check_ranks, check_shards, published
from megakd.engine.ds_json import deepspeed_config
from megakd.engine.optim import assign_rules
from megakd.errors import UserError
from megakd.files import read_json, resolve
from megakd.identity import ModelIdentity, difference, fingerprint, fingerprint_like, identify, is_old
from megakd.launcher import read_launcher
from megakd.log import say
from megakd.models.hub import check_unquantized, empty_model, load_config
from megakd.models.isolation import Packing, check_config, packing_of
from megakd.models.spec import check_preset
from megakd.models.tables import check_tables
from megakd.names import expand
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
    check_unquantized(student, load_config(student), "training")
    if read_world().first:
        check_isolation(run)
    skeleton, teacher = empty_model(student), None
    _, other = tokenizers(config, dataset.facts)
    if other is None and not saved:
        _check_one_tokenizer(config)
    size, length = text_facts(dataset)["tokenizer"]["vocab_size"], config.data.sequence_length
    check_tables(skeleton, student, size, length)
    if config.objective.kind != "cached":
        folder = resolve(config.model.teacher, config.model.revision)
        teacher = empty_model(folder)
        size, length = (size, length) if other is None else (vocabulary_size(other), length + length // 4)
        check_tables(teacher, folder, size, length)
    if config.engine.expert_parallel > 1 and config.engine.kind == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # DeepSpeed asks for it
        from megakd.models.expert_parallel import spread_experts

        spread_experts(skeleton, config.engine.expert_parallel, 0)  # so that rules meet the tensors they will train
    for stage in config.stages:
        try:
            size = None if other is None else vocabulary_size(other)
            assign_rules(build(config.at(stage), skeleton, teacher, dataset.facts, size), stage.lr_multipliers)
            if config.engine.kind == "deepspeed":
                deepspeed_config(config.at(stage), 1, 1)
        except UserError as error:
            raise UserError(f"{run.folder}: stage {stage.name!r}: {error}") from error
    last = (len(config.stages) - 1, config.steps_of(config.stages[-1], len(dataset)))
    unfinished = saved is not None and (saved.progress.stage, saved.progress.stage_step) < last
    if saved and unfinished:
        check_shards(saved, shards_digest(dataset.names, dataset.sizes), dataset.folder)
        check_teacher(run)
    check_student(run, started=saved is not None and unfinished)
    if not was_launched():
        ranks = config.engine.ranks if config.engine.kind == "deepspeed" else 1
        check_world(config, World(0, ranks, torch.device("cpu")))
        if saved and unfinished:
            check_ranks(saved, ranks)
    return dataset


def live_teacher(run: Run, recorded: str | None = None) -> str:
    """The fingerprint of the live teacher, to be compared with `recorded` where that is given."""
    folder = resolve(run.config.model.teacher, run.config.model.revision)
    return fingerprint_like(recorded, folder) if recorded else fingerprint(folder)


def student_identity(run: Run) -> ModelIdentity:
    """Which student training starts from, to be recorded when tokenizing or training starts."""
    model = run.config.model
    return identify(model.student or "student-0", model.student_revision, run.student_folder)


def check_teacher(run: Run) -> None:
    """UserError when the live teacher is another than the one that training started with."""
    begun = next((event["teacher"] for event in run.events("train") if "teacher" in event), None)
    if begun and begun != (now := live_teacher(run, begun)):
        raise UserError(
            f"{run.config.model.teacher}: its fingerprint is {now}, that of the teacher that {run.folder} has learned "
            f"from is {begun}: its weights or its config.json were changed; restore them, or make a new run"
        )


def check_student(run: Run, started: bool) -> None:
    """UserError when the student is another than recorded: since training started, or of another commit since tokenize.

    A checkpoint is the student's weights with the student's config.json and tokenizer: both must stay what they were.
    """
    events = run.events("train") if started else run.events("tokenize") if run.config.model.student else []
    before = next((ModelIdentity(**event["student"]) for event in events if event.get("student")), None)
    if before is None:
        return
    if not started:  # the tokenizer is compared with the tokens'; the weights count from the first step on
        before = before._replace(weights=None)
    if different := difference(before, student_identity(run)):
        raise UserError(
            f"{run.student_folder}: another student than {run.folder} was begun with: {different}; restore it (a hub's "
            "by model.student_revision), or make a new run"
        )


def check_models(run: Run) -> None:
    """What config.json and tokenizers alone tell of a run's models, before anything is made: UserError, or said aloud.

    Ids and positions stay inside the tables, a given student is no quantized one, experts can be sharded as asked.
    """
    config, model, length = run.config, run.config.model, run.config.data.sequence_length
    cached = config.objective.kind == "cached"
    folder = resolve(model.teacher, model.revision, weights=False)
    theirs, skeleton = tokenizer_facts(load_tokenizer(folder)), empty_model(folder)
    mine, student = theirs, None
    if model.student:
        student = resolve(model.student, model.student_revision, weights=False)
        mine = tokenizer_facts(load_tokenizer(student))
        if cached and mine != theirs:
            raise UserError(
                f"{student}: its tokenizer ({mine['hash']}) is not that of {folder} ({theirs['hash']}); cached targets "
                "need one tokenizer: set objective.kind=online or sar, or take another student"
            )
        check_unquantized(student, load_config(student), "training")
        check_tables(empty_model(student), student, mine["vocab_size"], length)
    else:
        check_unquantized(folder, skeleton.config, "compress")
    check_tables(skeleton, folder, theirs["vocab_size"], length if mine == theirs else length + length // 4)
    if config.logits.parallel == "autoep" and cached:
        check_preset(skeleton.config.model_type, folder)


def check_isolation(run: Run) -> None:
    """UserError when the config of teacher or student is of a model that the run's packing is wrong for."""
    model, packing = run.config.model, run.config.data.packing
    folders = [resolve(model.teacher, model.revision, weights=False)]
    if model.student:
        folders.append(resolve(model.student, model.student_revision, weights=False))
    for folder in folders if packing == "packed" else []:
        config = load_config(folder)
        if not check_config(config, str(folder), packing):
            say(
                f"{folder}: a small {config.model_type} cannot be made from its config to see whether packed documents "
                "are separated; this is checked when its weights are loaded"
            )


def check_packing(facts: dict[str, Any], packing: Packing, place: Path) -> None:
    """UserError when sequences were not made as `data.packing` says."""
    if (made := packing_of(facts)) != packing:
        raise UserError(
            f"{place}: its sequences are {made}, data.packing is {packing}; run: megakd tokenize in a new run"
        )


def open_dataset(run: Run) -> ShardSet:
    """The training samples as the run's stream section wants them read."""
    stream = run.config.stream
    if (stream.follow or stream.scratch) and not stream.lanes:
        raise UserError(f"{run.folder}: stream.follow and stream.scratch need lanes; set stream.lanes=8 in a new run")
    scratch = expand(stream.scratch) if stream.scratch else None
    if scratch and not scratch.is_dir():
        raise UserError(f"stream.scratch: {scratch} is no folder")
    tolerant = stream.on_damage == "skip"
    kind = "logits" if run.config.objective.kind == "cached" else "tokens"
    return ShardSet(run.path("data", kind, "train"), stream.follow, tolerant, scratch, 2 * stream.lanes)


def _check_data(run: Run, dataset: ShardSet) -> None:
    """The logits come from the student's teacher, with the student's tokenizer, in windows of the run's length."""
    config, student = run.config, run.student_folder
    if config.objective.kind == "cached":
        _check_teacher(run, dataset)
    tokens, tokenizer = text_facts(dataset), load_tokenizer(student)
    mine, theirs = tokenizer_facts(tokenizer), tokens["tokenizer"]
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
    check_packing(tokens, config.data.packing, dataset.folder)
    if older := check_bos(tokens, tokenizer, config.data.bos, dataset.folder):
        say(f"train: {older}")
    elif config.objective.kind != "cached":
        teacher = load_tokenizer(resolve(config.model.teacher, config.model.revision, weights=False))
        own, made = bos_of(teacher, config.data.bos), tokens.get("bos", [])
        if own != made and tokenizer_facts(teacher) == theirs:  # another tokenizer reads the text in its own way
            say(
                f"train: the teacher reads documents that begin {bos_words(teacher, made)}, as the student does; its "
                f"own texts begin {bos_words(teacher, own)}"
            )
    check_batches(config)


def check_batches(config: RunConfig) -> None:
    """UserError when a stage's batch is no whole number of sequences: what the configuration alone can tell."""
    length = config.data.sequence_length
    for stage in config.stages:
        batch = config.at(stage).optim.batch_tokens
        if batch % length:
            own = f"stages: {stage.name}: " if "batch_tokens" in stage.optim else ""
            near = max(round(batch / length), 1) * length
            raise UserError(
                f"{own}optim.batch_tokens: {batch} is no multiple of data.sequence_length {length}; set {near} in a "
                "new run"
            )


def text_facts(dataset: ShardSet) -> dict[str, Any]:
    """The facts of a data set's tokens: those of a set with targets are among its facts."""
    return dataset.facts.get("tokens", dataset.facts)


def tokenizers(config: RunConfig, facts: dict[str, Any]) -> tuple[Any, Any]:
    """Student's and teacher's, where the teacher is asked while training and has another one; else (None, None)."""
    if config.objective.kind == "cached":
        return None, None
    folder = resolve(config.model.teacher, config.model.revision, weights=False)
    theirs = load_tokenizer(folder)
    if tokenizer_facts(theirs) == facts["tokenizer"]:
        return None, None
    assert config.model.student is not None  # one that compress made has the teacher's
    mine = load_tokenizer(resolve(config.model.student, config.model.student_revision, weights=False))
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
    if made_by != teacher and not _same_by_old_fingerprints(made_by, teacher):
        raise UserError(
            f"{dataset.folder}: logits made by {made_by['id']} (weights {made_by['weights']}), but the student comes "
            f"from {teacher['id']} (weights {teacher['weights']}); run: megakd generate-logits RUN in a new run"
        )


def _same_by_old_fingerprints(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two records are of one teacher where just one of them is of an old MegaKD: its folder tells.

    Where that is not here, nothing can, and this is said.
    """
    names, weights = [{**each, "weights": None} for each in (one, two)], (one["weights"], two["weights"])
    if names[0] != names[1] or is_old(weights[0]) == is_old(weights[1]) or "unknown" in weights:
        return False
    try:
        folder = resolve(one["id"], one["revision"])
    except UserError as error:
        say(
            f"student and logits were made by {one['id']} with fingerprints of two versions, {weights[0]} and "
            f"{weights[1]}; whether they are of one teacher cannot be checked without it ({error})"
        )
        return True
    return all(fingerprint_like(each, folder) == each for each in weights)


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
