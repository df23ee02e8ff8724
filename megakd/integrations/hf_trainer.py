"""Distillation from MegaKD's shards by Hugging Face's Trainer: the losses, data and parameter groups of `megakd train`.

Nothing in MegaKD imports this file (docs/hugging-face.md). Trainer trains an `Answering`: the objective, with the
student inside. What Trainer saves is the student alone; its loss is divided by the labels of a step, over all ranks and
accumulation steps.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from megakd.config.train import OptimConfig
from megakd.data.records import IGNORED, Batch, Rows, TeacherTargets
from megakd.engine.optim import RULE_HEADERS, assign_rules, build_optimizer, rule_rows
from megakd.errors import UserError
from megakd.integrations.hf_arguments import DistillationTrainingArguments, check_arguments, checked
from megakd.integrations.hf_columns import TopKDataset
from megakd.integrations.hf_data import (
    Data,
    DistillationDataset,
    Share,
    check_alike,
    check_data,
    check_saving,
    opened,
    vocabulary_of,
)
from megakd.models.hub import copy_code, is_student
from megakd.models.loading import load_model
from megakd.objectives.base import LossReport
from megakd.objectives.cached import CachedDistillation
from megakd.system.dist import sum_over_ranks
from megakd.system.logging import say
from megakd.system.text import table

__all__ = ["DistillationDataset", "DistillationTrainer", "DistillationTrainingArguments"]
ALSO = {"loss": "total_loss", "ce": "ce_loss", "kl": "kl_loss"}  # terms that the log has under a second name
STUDENT = "objective.student."  # what the names of an Answering begin with


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
    """A Trainer of `model` (of transformers) over teacher targets: shards (data sets or their folders), or columns.

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
        args = check_arguments(args, lr_multipliers)
        if optimizers[0] is not None and args.lr_multipliers:
            raise UserError("optimizers: an optimizer that was given skips lr_multipliers; give one of both")
        self.vocab_size = vocabulary_of(student, processing_class)
        train_dataset = opened(train_dataset, self.vocab_size, "train_dataset")
        eval_dataset = opened(eval_dataset, self.vocab_size, "eval_dataset")
        check_data(student, train_dataset, eval_dataset, processing_class)
        check_saving(student)
        with _whole(student.get_output_embeddings().weight):
            loss = args.objective_config()
            loss = train_dataset.supported(loss) if isinstance(train_dataset, TopKDataset) else loss
            objective = CachedDistillation(student, loss, train_dataset.facts)
        assign_rules(objective, args.lr_rules())
        self.student = student
        self.sums: dict[str, float | Tensor] = {}  # of what is logged, since `sums_from`
        self.sums_from = 0
        super().__init__(
            Answering(objective), args, train_dataset.collate, train_dataset, eval_dataset, processing_class,
            callbacks=callbacks, optimizers=optimizers,
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
            optim = checked(
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
        dataset = self.eval_dataset if eval_dataset is None else opened(eval_dataset, self.vocab_size, "eval_dataset")
        if dataset is None:
            raise UserError("DistillationTrainer: evaluation needs an eval_dataset")
        check_alike(self.train_dataset, dataset)  # type: ignore[arg-type]
        share = Share(dataset, self.args.process_index, self.args.world_size)  # type: ignore[arg-type]
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


def _whole(weight: nn.Parameter) -> Any:
    """A context in which a weight that ZeRO-3 has divided among the ranks is whole."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])


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
