"""What config.json, tokenizers and fingerprints alone tell of a run's models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from megakd.config.model import ModelConfig
from megakd.config.objective import ObjectiveConfig
from megakd.config.run import RunConfig
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer, vocabulary_size
from megakd.errors import UserError
from megakd.identity import ModelIdentity, TokenizerIdentity, changed_fingerprint, identify
from megakd.models.hub import check_readable, empty_model, load_config
from megakd.models.isolation import Packing, check_config
from megakd.models.tables import check_tables
from megakd.names import resolve
from megakd.run import Run
from megakd.system.extras import require
from megakd.system.logging import say


class LiveTeacher(NamedTuple):
    """The teacher of online distillation, found once per training.

    tokenizers: the student's and the teacher's, where they differ; else None.
    """

    folder: Path
    tokenizers: tuple[Any, Any] | None

    @property
    def other_vocab_size(self) -> int | None:
        """Entries of the teacher's tokenizer, where it is not the student's."""
        return None if self.tokenizers is None else vocabulary_size(self.tokenizers[1])


def find_live_teacher(config: RunConfig, facts: dict[str, Any]) -> LiveTeacher | None:
    """The run's live teacher, with its weights; None where cached logits take its place. facts: of the data."""
    if not config.objective.live:
        return None
    folder = resolve(config.model.teacher, config.model.revision)
    theirs = load_tokenizer(folder)
    if not TokenizerIdentity.of(facts["tokenizer"]).difference(identify_tokenizer(theirs)):
        return LiveTeacher(folder, None)
    assert config.model.student is not None  # one that compress made has the teacher's
    mine = load_tokenizer(resolve(config.model.student, config.model.student_revision, weights=False))
    for place, tokenizer in ((folder, theirs), (config.model.student, mine)):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"{place}: a slow tokenizer; to align two of them both must give character offsets")
    teacher = LiveTeacher(folder, (mine, theirs))
    check_objective(config.objective, teacher)
    return teacher


def check_objective(objective: ObjectiveConfig, teacher: LiveTeacher) -> None:
    """UserError when an objective, of a run or of one of its stages, learns nothing across two tokenizers."""
    if teacher.tokenizers is not None and not objective.learns_across_tokenizers:
        raise UserError(
            f"{teacher.folder}: its tokenizer is not the student's, so there is no KL, and objective.likelihood and "
            "objective.features are "
            "0: nothing is left to learn from the teacher"
        )


def student_identity(run: Run) -> ModelIdentity:
    """Which student training starts from, to be recorded when tokenizing or training starts."""
    model = run.config.model
    return identify(model.student or "student-0", model.student_revision, run.student_folder)


def check_teacher(run: Run, folder: Path) -> None:
    """UserError when the live teacher in `folder` is another than the one that training started with."""
    begun = next((event["teacher"] for event in run.events("train") if "teacher" in event), None)
    if begun and (now := changed_fingerprint(begun, folder)):
        raise UserError(
            f"{run.config.model.teacher}: its fingerprint is {now}, that of the teacher that {run.folder} has learned "
            f"from is {begun}: its weights or its config.json were changed; restore them, or make a new run"
        )


def check_student(run: Run, started: bool) -> None:
    """UserError when the student is another than recorded: since training started, or of another commit since tokenize.

    A checkpoint is the student's weights with the student's config.json and tokenizer: both must stay what they were.
    """
    events = run.events("train") if started else run.events("tokenize") if run.config.model.student else []
    before = next((ModelIdentity.of(event["student"]) for event in events if event.get("student")), None)
    if before is None:
        return
    if not started:  # the tokenizer is compared with the tokens'; the weights count from the first step on
        before = replace(before, weights=None)
    if different := before.difference(student_identity(run)):
        raise UserError(
            f"{run.student_folder}: another student than {run.folder} was begun with: {different}; restore it (a hub's "
            "by model.student_revision), or make a new run"
        )


def one_tokenizer(config: RunConfig) -> bool:
    """Whether student and teacher read text in the same tokens."""
    if config.model.student is None:  # one that compress makes has the teacher's
        return True
    places = [(config.model.teacher, config.model.revision), (config.model.student, config.model.student_revision)]
    theirs, mine = (identify_tokenizer(load_tokenizer(resolve(*place, weights=False))) for place in places)
    return theirs.difference(mine) is None


def caches_logits(config: RunConfig) -> bool:
    """Whether a teacher's logits are cached: to train on them, or, of the validation set, to measure the KL to them."""
    return not config.objective.live or one_tokenizer(config)


def check_models(config: RunConfig) -> None:
    """What config.json and tokenizers alone tell of a run's models, before anything is made: UserError, or said aloud.

    Ids and positions stay inside the tables, a given student is no quantized one, experts can be sharded as asked.
    """
    model, length = config.model, config.data.sequence_length
    cached = not config.objective.live
    folder = resolve(model.teacher, model.revision, weights=False)
    theirs, skeleton = identify_tokenizer(load_tokenizer(folder)), empty_model(folder)
    mine, student = theirs, None
    if model.student:
        student = resolve(model.student, model.student_revision, weights=False)
        mine = identify_tokenizer(load_tokenizer(student))
        different = theirs.difference(mine)
        if cached and different:
            raise UserError(
                f"{student}: its tokenizer is not that of {folder} ({different}); cached targets "
                "need one tokenizer: set objective.kind=online or sar, or take another student"
            )
        if different and config.data.has_chats:
            raise UserError(
                f"{student}: its tokenizer is not that of {folder} ({different}), and the two make different texts of "
                "a conversation; data.format=messages and prompt_completion need one tokenizer for both"
            )
        check_readable(student, load_config(student), "training")
        check_tables(empty_model(student), student, mine.vocab_size, length)
    else:
        check_readable(folder, skeleton.config, "compress")
    check_tables(skeleton, folder, theirs.vocab_size, length if mine == theirs else length + length // 4)
    if cached:
        check_divided(skeleton, config.logits.parallel, 1)


def check_divided(model: Any, parallel: str, ranks: int) -> None:
    """UserError when so many ranks cannot share a teacher, given without weights, as logits.parallel says."""
    if parallel == "replica":
        return
    require("deepspeed", f"logits.parallel={parallel}")
    check_readable(Path(model.config.name_or_path), model.config, f"logits.parallel={parallel}")
    if parallel == "autoep":
        from megakd.models.stock_experts import stock_experts

        stock_experts(model, ranks)


def model_folders(model: ModelConfig) -> list[Path]:
    """The folders of the teacher and of a given student, with configuration and tokenizer alone."""
    folders = [resolve(model.teacher, model.revision, weights=False)]
    if model.student:
        folders.append(resolve(model.student, model.student_revision, weights=False))
    return folders


def check_isolation(folders: Sequence[Path], packing: Packing) -> None:
    """UserError when the config of one of the models is of a family that the packing is wrong for."""
    for folder in folders if packing == "packed" else []:
        config = load_config(folder)
        if not check_config(config, str(folder), packing):
            say(
                f"{folder}: a small {config.model_type} cannot be made from its config to see whether packed documents "
                "are separated; this is checked when its weights are loaded"
            )
