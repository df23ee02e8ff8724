"""Every key of the systems that MegaKD unites, and of Hugging Face's Trainer, that is called otherwise here: one table.

An old key is moved to a key of ours, computed from several, skipped because nothing here corresponds to it, or refused
because what it asks for would be done otherwise. `distillation.` before it, the group's name in a Hydra tree, may be
there or not. `config.originals` reads trees by this table.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

from megakd.errors import listed


class Move(NamedTuple):
    """The value goes to `keys`, as `change` makes it; only: the values it may have (None: any)."""

    keys: str
    change: Callable[[Any], Any] = lambda value: value
    only: dict[Any, Any] | None = None


class Computed(NamedTuple):
    """`originals` reads it; keys: what comes of it, for hints."""

    keys: str


class Skip(NamedTuple):
    """Nothing corresponds to it, because `why`; anyway: the values that ask for what is done here (None: any)."""

    why: str
    anyway: tuple[Any, ...] | None = None


ORDER = "the order of samples follows from seed"
FOLDER = "everything of a run is in its folder RUN"
HOLDOUT = "the validation set is a share of the documents: data.holdout_fraction, data.holdout_tokens"
PRECISION, LENGTH, REPORT = Computed("model.dtype"), Computed("stages.0.epochs"), Computed("log.wandb")
SCHEDULES = {name: name for name in ("cosine", "linear", "constant")} | {"constant_with_warmup": "constant"}
DTYPES = {alias: name for name, aliases in {
    "bfloat16": "bfloat16 bf16 torch.bfloat16", "float16": "float16 fp16 half torch.float16",
    "float32": "float32 fp32 float torch.float32"}.items() for alias in aliases.split()}  # fmt: skip

# old keys, by words: what becomes of them
_TABLE: dict[str, Move | Computed | Skip] = {
    "teacher.model_path teacher.name teacher.model_name teacher.model": Move("model.teacher"),
    "model.name model.model_name model.name_or_path model.path": Move("model.teacher"),
    "model.torch_dtype": Move("model.dtype", only=DTYPES),
    "model.trust_remote_code teacher.trust_remote_code": Skip("code of a model folder is never run", (False,)),
    "model.device_map teacher.device_map model.device teacher.device": Skip("engine and logits.parallel place models"),
    "student.model_path student.name student.path student.checkpoint model.student_path": Move("model.student"),
    "teacher.use_cached_logits": Computed("objective.kind"),
    "teacher.cache_dir teacher.output_dir teacher.logits_dir": Skip("teacher logits are in RUN/data/logits"),
    "teacher.top_k": Move("logits.top_k"),
    "teacher.batch_size": Move("logits.batch_size"),
    "teacher.dtype teacher.torch_dtype": Move("logits.dtype", only=DTYPES),
    "teacher.force_regenerate teacher.force_regenerate_logits":
        Skip("megakd generate-logits RUN --force captures again", (False,)),
    "teacher.compression teacher.compression_opts": Skip("shards have one codec; tools/convert writes HDF5"),
    "loss.alpha training.distillation_alpha": Move("objective.alpha"),
    "loss.temperature training.distillation_temperature": Computed("objective.temperature"),
    "training.num_train_epochs": LENGTH,
    "training.max_steps": Computed("stages.0.steps"),
    "parameter_lr_multipliers training.parameter_lr_multipliers": Computed("stages.0.lr_multipliers"),
    "training.stages multi_stage.stages training_stages": Computed("stages"),
    "multi_stage.enabled training.multi_stage": Computed("stages"),
    "training.learning_rate": Move("optim.lr"),
    "training.weight_decay": Move("optim.weight_decay"),
    "training.adam_beta1 training.adam_beta2": Computed("optim.betas"),
    "training.adam_epsilon": Move("optim.eps"),
    "training.max_grad_norm": Move("optim.clip_norm"),
    "training.lr_scheduler_type": Move("optim.schedule", only=SCHEDULES),
    "training.warmup_steps": Move("optim.warmup_steps"),
    "training.warmup_ratio": Skip("warmup is a number of steps: optim.warmup_steps", (0,)),
    "training.optim": Skip("the optimizer is AdamW", ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw")),
    "training.label_smoothing_factor": Skip("labels are not smoothed", (0,)),
    "training.per_device_train_batch_size": Computed("optim.micro_batch"),
    "training.gradient_accumulation_steps": Computed("optim.batch_tokens"),
    "training.per_device_eval_batch_size": Move("eval.batch_size"),
    "training.bf16 training.fp16": PRECISION,
    "training.tf32": Skip("float32 products follow torch's own setting"),
    "training.gradient_checkpointing": Move("engine.activation_checkpointing"),
    "training.dataloader_num_workers": Move("stream.workers", lambda n: max(n, 1) if isinstance(n, int) else n),
    "training.dataloader_pin_memory training.dataloader_drop_last training.group_by_length training.length_column_name "
    "training.remove_unused_columns training.dataloader_prefetch_factor":
        Skip("samples are packed and read by stream.workers"),
    "training.logging_steps": Move("log.every_steps"),
    "training.save_steps": Move("checkpoint.every_steps"),
    "training.save_total_limit": Move("checkpoint.keep"),
    "training.save_strategy training.eval_strategy training.evaluation_strategy training.logging_strategy "
    "training.logging_first_step":
        Skip("checkpoint.every_steps and log.every_steps say when"),
    "training.eval_steps": Move("eval.every_steps"),
    "training.do_eval training.do_train":
        Skip("megakd evaluate and watch measure every checkpoint: checkpoint.every_steps"),
    "training.load_best_model_at_end training.greater_is_better":
        Skip("megakd watch keeps the best checkpoint, export --checkpoint best takes it"),
    "training.metric_for_best_model": Skip("eval.best names the measure"),
    "training.output_dir training.logging_dir training.overwrite_output_dir training.resume_from_checkpoint":
        Skip(FOLDER),
    "training.run_name wandb.name wandb.run_name logging.run_name": Move("name"),
    "training.seed": Move("seed"),
    "training.data_seed": Skip(ORDER),
    "training.deepspeed": Computed("engine.config"),
    "training.fsdp training.fsdp_config":
        Skip("ZeRO takes the place of FSDP: engine.kind=deepspeed engine.config=zero3", ("", False, [], {})),
    "training.ddp_find_unused_parameters training.ddp_backend training.local_rank training.torch_compile":
        Skip("engine says how ranks work"),
    "training.report_to": REPORT,
    "training.push_to_hub training.save_safetensors training.disable_tqdm": Skip("megakd export writes the folder"),
    "wandb.project logging.wandb_project": Move("log.wandb_project"),
    "wandb.mode": Move("log.wandb"),
    "wandb.enabled logging.use_wandb": Move("log.wandb", lambda on: "online" if on else "disabled"),
    "wandb.entity wandb.tags wandb.group": Skip("set WANDB_ENTITY, WANDB_TAGS or WANDB_RUN_GROUP"),
    "logging.steps logging.log_steps": Move("log.every_steps"),
    "logging.level logging.log_level": Skip("there is one level"),
    "dataset.name dataset.path": Move("data.source"),
    "dataset.config dataset.config_name dataset.subset": Move("data.subset"),
    "dataset.split dataset.train_split": Move("data.split"),
    "dataset.revision": Move("data.revision"),
    "dataset.text_column dataset.text_field dataset.text_key": Move("data.text_field"),
    "dataset.streaming": Move("data.streaming"),
    "dataset.max_length dataset.max_seq_length dataset.sequence_length dataset.seq_length dataset.block_size "
    "training.max_length training.max_seq_length":
        Move("data.sequence_length"),
    "dataset.max_samples dataset.max_train_samples dataset.num_samples": Computed("data.tokens"),
    "dataset.num_proc dataset.num_workers dataset.preprocessing_num_workers": Move("data.workers", lambda n: n or 0),
    "dataset.eval_split dataset.validation_split dataset.test_split dataset.eval_max_samples dataset.max_eval_samples":
        Skip(HOLDOUT),
    "dataset.shuffle dataset.shuffle_buffer_size dataset.buffer_size dataset.seed": Skip(ORDER),
    "dataset.cache_dir": Skip("set HF_HOME"),
    "compression.rank compression.lora_rank": Move("compress.rank"),
    "compression.method compression.optimizer compression.solver": Move("compress.solver", only={
        "adam": "adam", "als": "als", "Adam": "adam"}),
    "compression.steps compression.num_steps compression.optimization_steps compression.num_iterations": Computed(
        "compress.steps"),
    "compression.lr compression.learning_rate": Computed("compress.lr"),
    "compression.output_dir compression.save_dir": Skip("the student is RUN/student-0"),
    "compression.num_gpus compression.gpus compression.num_workers compression.device":
        Skip("start megakd compress several times, they share the work"),
    "evaluation.tasks": Move("eval.tasks", lambda tasks: tasks.split(",") if isinstance(tasks, str) else tasks),
    "evaluation.limit": Move("eval.limit"),
    "evaluation.num_fewshot evaluation.few_shot": Move("eval.few_shot"),
    "evaluation.batch_size": Move("eval.task_batch_size"),
    "evaluation.poll_interval evaluation.poll_seconds evaluation.check_interval": Move("eval.poll_seconds"),
    "evaluation.gpus evaluation.devices evaluation.device evaluation.num_gpus":
        Skip("start megakd watch there, as often as there are devices"),
    "evaluation.output_dir evaluation.results_dir": Skip("evaluations are in RUN/evals.jsonl"),
    "output.dir output.output_dir output.temp_dir output.save_dir output.checkpoint_dir output.log_dir "
    "output.cache_dir output.model_dir output.models_dir output.results_dir output_dir":
        Skip(FOLDER),
    "device num_gpus gpus": Skip("engine.ranks is the number of processes, one per GPU"),
}  # fmt: skip
TABLE = {name: rule for names, rule in _TABLE.items() for name in names.split()}
SECTIONS = {name.partition(".")[0] for name in TABLE if "." in name} - {"model"}
# keys of the flat files and flags of the other two systems, which have tools of their own
FLAT = {
    "tools/compat/train_student_aware.py --config FILE": "alpha_kd alpha_feature alpha_layerwise initial_top_k "
    "num_epochs batch_size use_dynamic_batching dataset_subset_size use_wandb",
    "tools/compat/train_sar_kd.py --FLAG VALUE": "student_lr grad_accum_steps train_steps per_device_batch_size "
    "router_anchor_weight router_entropy_weight router_load_balance_weight",
}
STAGE = {"stage_name": "name", "num_epochs": "epochs", "num_train_epochs": "epochs", "max_steps": "steps",
         "parameter_lr_multipliers": "lr_multipliers", "learning_rate": "lr"}  # fmt: skip


def is_old(key: str) -> bool:
    """Whether a dotted key belongs to the trees of this table; all that is below distillation does."""
    bare = bare_key(key)
    return bare != key.lstrip("+") or bare in TABLE or bare.partition(".")[0] in SECTIONS | {"hydra"}


def successors(key: str) -> list[str]:
    """What the last word of an old key, or its section, is called here: optim.lr for learning_rate."""
    rules = [rule for name, rule in TABLE.items() if name.rpartition(".")[2] == key]
    return list(dict.fromkeys(rule.keys for rule in rules if not isinstance(rule, Skip)))


def old_words() -> list[str]:
    """The last words of all old keys that are called otherwise here."""
    return [name.rpartition(".")[2] for name, rule in TABLE.items() if not isinstance(rule, Skip)]


def meant(key: str, prefix: str) -> str:
    """What is right instead of an unknown key, which was written with `prefix` before it."""
    section, dot, last = key.partition(".")
    known = [each.partition(".")[2] for each in TABLE if each.startswith(f"{section}.")]
    if dot and known:
        close = difflib.get_close_matches(last, known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {listed(known, 12)}"
        return f"no known key of {section}; {hint}; megakd config lists those of MegaKD"
    places = [each for each in TABLE if each.endswith(f".{key}")]
    if not dot and places:
        place = next((each for each in places if each.startswith("training.")), places[0])
        return f"belongs to {place.partition('.')[0]}: write {prefix}{place}"
    return f"no known key; the sections of {prefix.strip('+.')} are {', '.join(sorted(SECTIONS))}"


def bare_key(key: str) -> str:
    return key.lstrip("+").removeprefix("distillation.")


def are_old_stages(value: Any) -> bool:
    words = STAGE.keys() - {"name"} | {"loss", "alpha", "temperature"}
    return isinstance(value, list) and any(isinstance(stage, dict) and words & stage.keys() for stage in value)
