"""Distillation from MegaKD's shards by Hugging Face's Trainer: the losses, data and parameter groups of `megakd train`.

Nothing in MegaKD imports this file (docs/hugging-face.md). Trainer trains an `Answering`: the objective, with the
student inside. What Trainer saves is the student alone; its loss is divided by the labels of a step, over all ranks and
accumulation steps.
"""

import copy
import json
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import send_to_device
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from megakd.config.objective import CachedConfig
from megakd.config.train import LrRule, OptimConfig
from megakd.data.batches import collate
from megakd.data.records import IGNORED, Batch, Rows, Sample, TeacherTargets, with_rows
from megakd.data.shards import ShardSet
from megakd.data.tokenizers import bos_of, bos_words, identify_tokenizer
from megakd.engine.optim import RULE_HEADERS, assign_rules, build_optimizer, rule_rows
from megakd.errors import UserError, foreign
from megakd.identity import DataIdentity, TokenizerIdentity, packing_of
from megakd.models.hub import copy_code, is_student, load_model
from megakd.models.isolation import check_config, check_model
from megakd.models.tables import check_tables
from megakd.objectives.base import LossReport
from megakd.objectives.cached import CachedDistillation, stored_in
from megakd.system.dist import sum_over_ranks
from megakd.system.logging import say
from megakd.system.text import table

SAVING_REMEDY = "correct its generation_config.json, or set student.generation_config.do_sample = True before"
ALSO = {"loss": "total_loss", "ce": "ce_loss", "kl": "kl_loss"}  # terms that the log has under a second name
STUDENT = "objective.student."  # what the names of an Answering begin with
Data = Any  # a DistillationDataset, or the folder that it reads


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """TrainingArguments and the loss: (1 - alpha) CE + alpha T^2 divergence, as in megakd.config.objective."""

    distillation_alpha: float = field(default=0.5, metadata={"help": "Share of the teacher in the loss, 0 to 1."})
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Of both softmaxes; ghost and hybrid need a tail at it in the targets."}
    )
    distillation_tail: str = field(
        default="ghost", metadata={"help": "What stands for unstored tokens: ghost, truncated, sampled or hybrid."}
    )
    distillation_divergence: str = field(default="kl", metadata={"help": "kl, reverse_kl, jsd, skew_kl or tvd."})
    distillation_mix: float = field(
        default=0.5, metadata={"help": "The teacher's share in jsd's and skew_kl's mixture."}
    )
    lr_multipliers: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={"help": 'JSON list of {"pattern": REGEX, "lr_multiplier": NUMBER}; first match counts, 0 freezes.'},
    )

    def __post_init__(self) -> None:
        if isinstance(self.lr_multipliers, str):
            try:
                self.lr_multipliers = json.loads(self.lr_multipliers)
            except json.JSONDecodeError as error:
                raise UserError(f"lr_multipliers: {self.lr_multipliers!r} is not JSON: {error}") from error
        self.objective_config()
        self.lr_rules()
        super().__post_init__()

    def objective_config(self) -> CachedConfig:
        names = ("alpha", "temperature", "tail", "divergence", "mix")
        values = {name: getattr(self, f"distillation_{name}") for name in names}
        return _checked(lambda: CachedConfig.model_validate(values), "distillation_")

    def lr_rules(self) -> tuple[LrRule, ...]:
        rules = TypeAdapter(tuple[LrRule, ...])
        return _checked(lambda: rules.validate_python(self.lr_multipliers or []), "lr_multipliers.")


class DistillationDataset(Dataset[Sample]):
    """The samples of a folder of shards with teacher targets, by index; workers of a DataLoader open it anew."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.shards = ShardSet(self.folder)
        weakref.finalize(self, self.shards.close)  # before Python takes its modules apart
        self.facts = self.shards.facts
        if "codec" not in self.facts:
            raise UserError(f"{folder}: tokens without teacher targets; run: megakd generate-logits RUN")

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Sample:
        return self.shards[index]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.folder,)


@dataclass
class DistillationCollator:
    """Samples → what `Answering.forward` takes; labels are shifted already."""

    sequence_length: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = with_rows(collate(samples, self.sequence_length))
        return dict(zip(("input_ids", "labels", "position_ids", "targets", "counted"), batch[:5], strict=True))


class Answering(nn.Module):
    """The objective as Trainer calls a model; whatever else Trainer asks of a model, the student answers.

    A wrapper, because DDP and DeepSpeed follow the forward of what they wrap, and the loss is inside the objective's.
    """

    accepts_loss_kwargs = True  # so that Trainer counts labels over ranks and accumulation steps
    loss_type = None  # all of them: for a causal language model it would skip the first of a row

    def __init__(self, objective: CachedDistillation):
        super().__init__()
        self.objective = objective

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, targets: TeacherTargets, counted: Rows
    ) -> LossReport:
        return self.objective(Batch(input_ids, labels, position_ids, targets, counted))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            objective: Any = super().__getattr__("objective")
            return getattr(objective.student, name)


class DistillationTrainer(Trainer):
    """A Trainer of `model` (of transformers) over shards with teacher targets; data sets or their folders.

    lr_multipliers: as in the arguments, for those who build them elsewhere. student: the name of `model` in 0.1.

    Refused, because their numbers would be others: FSDP, tensor or sequence parallelism, several GPUs in one process.
    """

    args: DistillationTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: DistillationTrainingArguments | None = None,
        train_dataset: Data = None,
        eval_dataset: Data | dict[str, Data] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        *,
        lr_multipliers: list[dict[str, Any]] | None = None,
        student: Any = None,
    ):
        if (model is None) == (student is None):
            raise UserError("DistillationTrainer: give the student once, as model")
        student = student if model is None else model
        args = _check_arguments(args, lr_multipliers)
        if optimizers[0] is not None and args.lr_multipliers:
            raise UserError("optimizers: an optimizer that was given skips lr_multipliers; give one of both")
        train_dataset, eval_dataset = _opened(train_dataset), _opened(eval_dataset)
        _check_data(student, train_dataset, eval_dataset, processing_class)
        _check_saving(student)
        with _whole(student.get_output_embeddings().weight):
            objective = CachedDistillation(student, args.objective_config(), train_dataset.facts)
        assign_rules(objective, args.lr_rules())
        self.student = student
        self.sums: dict[str, float | Tensor] = {}  # of what is logged, since `sums_from`
        self.sums_from = 0
        super().__init__(
            Answering(objective), args, DistillationCollator(train_dataset.facts["tokens"]["sequence_length"]),
            train_dataset, eval_dataset, processing_class, callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip
        self.loss_is_scaled_for_ga = True
        if self.is_fsdp_enabled or getattr(self.accelerator, "parallelism_config", None) is not None:
            raise UserError("DistillationTrainer: FSDP and parallelism_config are not supported; use DeepSpeed's ZeRO")
        deepspeed: Any = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None and "optimizer" in deepspeed.hf_ds_config.config:
            raise UserError("deepspeed: the optimizer of its file would skip lr_multipliers; delete that section")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; True resumes from the newest checkpoint whose saving was not interrupted."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(_last_whole(Path(str(self.args.output_dir))))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `args.optim` names over the groups of `build_optimizer`."""
        if self.optimizer is None:
            args = self.args
            optim = _checked(
                lambda: OptimConfig(lr=args.learning_rate, weight_decay=args.weight_decay),
                "learning_rate, weight_decay: ",
            )
            answering: Any = self.model
            groups = build_optimizer(answering.objective, args.lr_rules(), optim).param_groups
            kept = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
            if not self.student.get_input_embeddings().weight.requires_grad:
                # backward needs an input that requires gradients where all that comes first is frozen
                self.student.enable_input_require_grads()
            kind, settings = self.get_optimizer_cls_and_kwargs(args, answering)
            if {"params", "model", "optimizer_dict"} & settings.keys() or not isinstance(kind, type):
                raise UserError(f"optim: {args.optim} chooses its parameters itself; lr_multipliers need another one")
            self.optimizer = kind(kept, **settings)
            rows = rule_rows(assign_rules(answering.objective, args.lr_rules()), args.lr_rules(), optim)
            say(f"Trainer: parameter groups\n{table(RULE_HEADERS, rows)}")
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss a label of the whole step, over all ranks and accumulation steps."""
        report: LossReport = model(**inputs)
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        tokens = torch.as_tensor(num_items_in_batch).clamp(min=1)  # without labels the sums are 0
        if model.training:
            if not self.sums:
                self.sums_from = self.state.global_step
            self._add({name: value / tokens for name, value in report.terms.items()})
        loss = report.total / tokens * self.accelerator.num_processes  # gradients are averaged over the ranks
        return (loss, report.terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the terms of the loss, averaged over the steps since the last time as the loss is."""
        steps = self.state.global_step - self.sums_from
        if "loss" in logs and self.sums and steps:
            logs |= {name: value / steps for name, value in self._summed().items()}
            logs |= {ours: logs[name] for name, ours in ALSO.items() if name in logs}
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's samples, blank ones at the end where others have more: none counts twice."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        dataset = _opened(eval_dataset) if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise UserError("DistillationTrainer: evaluation needs an eval_dataset")
        _check_alike(self.train_dataset, dataset)  # type: ignore[arg-type]
        share = _Share(dataset, self.args.process_index, self.args.world_size)  # type: ignore[arg-type]
        return DataLoader(
            share,
            self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, but the metrics are loss and terms a label; it averages over batches, whatever their labels."""
        training, self.sums = self.sums, {}
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        sums = self._summed()
        self.sums = training
        tokens = sums.pop("tokens")
        metrics = {f"{metric_key_prefix}_{name}": value / max(tokens, 1) for name, value in sums.items()}
        metrics |= {
            f"{metric_key_prefix}_{ALSO[name]}": metrics[f"{metric_key_prefix}_{name}"] for name in sums.keys() & ALSO
        }
        share: Any = dataloader.dataset
        return output._replace(metrics={**(output.metrics or {}), **metrics}, num_samples=len(share.dataset))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a batch, without logits: they are never stored."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            report: LossReport = model(**inputs)
        tokens = (inputs["labels"] != IGNORED).sum()
        self._add({"loss": report.total, **report.terms, "tokens": tokens})
        return report.total / tokens.clamp(min=1), None, None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """To the device as they are: Trainer's would round the teacher's log-probabilities to DeepSpeed's 16 bits."""
        moved: Any = send_to_device(inputs, self.args.device)
        return moved

    def _add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def _summed(self) -> dict[str, float]:
        """`sums` over all ranks; they begin anew."""
        values, self.sums = {name: float(value) for name, value in self.sums.items()}, {}
        return dict(zip(values, sum_over_ranks(list(values.values()), self.args.device), strict=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The student as its `save_pretrained` writes it; a compact one with the code that loads it elsewhere."""
        if state_dict:  # gathered by DeepSpeed, head and embedding under two names
            state_dict = {name.removeprefix(STUDENT): t for name, t in state_dict.items() if name.startswith(STUDENT)}
        if is_student(self.student.config) and self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            copy_code(folder, self.student.config)
        wrapper, self.model = self.model, self.student
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model = wrapper

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `from_pretrained` loads it: `save_pretrained` may write other names, of which Trainer's only warns."""
        state = load_model(Path(resume_from_checkpoint), self.student.dtype).state_dict()
        self.student.load_state_dict(state)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _last_whole(folder: Path) -> Path:
    """The newest checkpoint-N of a folder that has its trainer_state.json, which Trainer writes last.

    Newer ones that a kill cut short are named, and overwritten when training comes to their step again.
    """
    names = (path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit())
    for path in sorted(names, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            say(f"{path}: not used: saving it was interrupted (no whole trainer_state.json)")
    raise UserError(f"{folder}: no checkpoint here to resume from; start without resume_from_checkpoint")


class _Share(Dataset[Sample]):
    """Every world-th sample of a data set; blank ones at the end, so that all ranks have as many."""

    def __init__(self, dataset: DistillationDataset, rank: int, world: int):
        self.dataset, self.rank, self.world = dataset, rank, world

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = self.rank + index * self.world
        return self.dataset[place] if place < len(self.dataset) else self.dataset.shards.blank()


def _checked(make: Callable[[], Any], prefix: str) -> Any:
    """What `make` gives; pydantic's first complaint as a UserError that names the argument."""
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{prefix}{'.'.join(map(str, first['loc']))}".rstrip("._")
        raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}") from None


def _check_arguments(args: Any, lr_multipliers: list[dict[str, Any]] | None) -> DistillationTrainingArguments:
    """With the trainer's own `lr_multipliers`; UserError for settings that would change the loss, or have no effect."""
    if not isinstance(args, DistillationTrainingArguments):
        raise UserError(f"args: DistillationTrainingArguments, not {type(args).__name__}")
    if args.n_gpu > 1:
        raise UserError(
            f"DistillationTrainer: one process for {args.n_gpu} GPUs; start one for each: torchrun, accelerate launch"
        )
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise UserError("average_tokens_across_devices=False: the loss is a mean over all ranks' labels; leave it out")
    if args.label_smoothing_factor:
        raise UserError("label_smoothing_factor: the loss knows no label smoothing; leave it out")
    if lr_multipliers is None:
        return args
    if args.lr_multipliers and args.lr_multipliers != lr_multipliers:
        raise UserError("lr_multipliers: the trainer's and those of args differ; leave one of both out")
    args = copy.copy(args)  # the caller's stay as they are
    args.lr_multipliers = lr_multipliers
    args.lr_rules()
    return args


def _opened(data: Any) -> Any:
    """A data set for a folder, also within a dict; all else as it is."""
    if isinstance(data, dict):
        return {name: _opened(each) for name, each in data.items()}
    return DistillationDataset(data) if isinstance(data, str | Path) else data


def _check_data(student: Any, train: DistillationDataset, evaluation: Any, tokenizer: Any) -> None:
    """UserError where student, tokenizer and data do not belong together."""
    if not isinstance(train, DistillationDataset):
        raise UserError(f"train_dataset: a DistillationDataset or a folder of shards, not {type(train).__name__}")
    for dataset in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        if dataset is not None:
            _check_alike(train, dataset)
    facts = train.facts
    place = f"{student.name_or_path or type(student).__name__} (student of {train.folder})"
    check_tables(student, place, facts["vocab_size"], facts["tokens"]["sequence_length"])
    packing, weight = packing_of(facts), student.get_output_embeddings().weight
    check_config(student.config, place, packing)
    if not hasattr(weight, "ds_id"):  # in pieces over ranks it has no weights to run with
        check_model(student, place, packing)
    if tokenizer is not None:
        mine, theirs = identify_tokenizer(tokenizer), TokenizerIdentity.of(facts["tokens"]["tokenizer"])
        if theirs.difference(mine):
            raise UserError(
                f"{train.folder}: made with a tokenizer of {theirs}, but processing_class has one of {mine}"
            )
        own, made = bos_of(tokenizer), facts["tokens"].get("bos", [])
        if own != made:
            say(
                f"{train.folder}: documents begin {bos_words(tokenizer, made)}, texts of processing_class "
                f"{bos_words(tokenizer, own)}; read by it, texts begin otherwise than those that are trained on"
            )


def _check_saving(student: Any) -> None:
    """UserError when transformers would refuse to save the student's configs, which it does hours later otherwise."""
    place = student.name_or_path or type(student).__name__
    with TemporaryDirectory() as folder, foreign(f"{place}: cannot be saved", SAVING_REMEDY):
        student.config.save_pretrained(folder)
        if student.can_generate():
            student.generation_config.save_pretrained(folder)


def _check_alike(train: DistillationDataset, other: Any) -> None:
    """UserError unless the loss that was made for `train` is right for `other`."""
    if not isinstance(other, DistillationDataset):
        raise UserError(f"eval_dataset: a DistillationDataset or a folder of shards, not {type(other).__name__}")
    different = DataIdentity.of(train.facts).difference(DataIdentity.of(other.facts))
    mine, theirs = stored_in(train.facts), stored_in(other.facts)
    if not different and mine != theirs:
        different = f"another capture: {theirs} instead of {mine}"
    if different:
        raise UserError(f"{other.folder}: differs from {train.folder}: {different}")


def _whole(weight: nn.Parameter) -> Any:
    """A context in which a weight that ZeRO-3 has divided among the ranks is whole."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])
