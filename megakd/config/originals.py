"""Configuration trees of the systems that MegaKD unites, and names that users of Hugging Face type, in our own keys.

One table: an old key is moved to a key of ours, computed from several, skipped because nothing here corresponds to it,
or refused because what it asks for would be done otherwise. A tree may mix old and new keys; two that contradict each
other are refused. `distillation.` before an old key, the group's name in a Hydra tree, may be there or not.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from megakd.config.tails import reaches
from megakd.errors import LONGEST_MESSAGE, UserError, listed
from megakd.system.logging import say
from megakd.system.text import table


class Move(NamedTuple):
    """The value goes to `keys`, as `change` makes it; only: the values it may have (None: any)."""

    keys: str
    change: Callable[[Any], Any] = lambda value: value
    only: dict[Any, Any] | None = None


class Computed(NamedTuple):
    """`_computed` reads it; keys: what comes of it, for hints."""

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


class Set(NamedTuple):
    """A key of ours that an old one gives: `old → key = value`."""

    old: str
    key: str
    value: Any


def is_old(key: str) -> bool:
    """Whether a dotted key belongs to the trees of this table; all that is below distillation does."""
    bare = _bare(key)
    return bare != key.lstrip("+") or bare in TABLE or bare.partition(".")[0] in SECTIONS | {"hydra"}


def any_old(tree: dict[str, Any]) -> bool:
    """Whether a tree has a key of this table, or of the flat files of the other two systems."""
    flat = {word for words in FLAT.values() for word in words.split()}
    return bool(flat & tree.keys()) or any(
        is_old(".".join(path)) or (path == ("stages",) and _old_stages(value)) for path, value in _leaves(tree, ())
    )


def successors(key: str) -> list[str]:
    """What the last word of an old key, or its section, is called here: optim.lr for learning_rate."""
    rules = [rule for name, rule in TABLE.items() if name.rpartition(".")[2] == key]
    return list(dict.fromkeys(rule.keys for rule in rules if not isinstance(rule, Skip)))


def old_words() -> list[str]:
    """The last words of all old keys that are called otherwise here."""
    return [name.rpartition(".")[2] for name, rule in TABLE.items() if not isinstance(rule, Skip)]


def modern(
    file: dict[str, Any], tree: dict[str, Any], overrides: Iterable[str], source: str, defaults: dict[str, Any]
) -> dict[str, Any]:
    """A tree in our keys; what came of its old ones is said in a table. UserError with every fault of it.

    file: the tree without overrides, in which an old key and one of ours must agree. overrides: win, those of our keys
    after all others. defaults: of all our keys.
    """
    asked = {key: value for key, _, value in (item.lstrip("+").partition("=") for item in overrides)}
    found = _Reading(tree, defaults)
    faults = list(found.faults)
    for old, key, value in _Reading(file, defaults).sets:
        there = _at(file, key.split("."))
        if there is not None and there != value and key != "stages":
            faults.append(f"{old} gives {key}={value}, and {key}={there} is there too; leave one of them out")
    faults += [f"{old}: {why}" for old, why in found.skipped if old in asked and why.startswith("every stage")]
    if faults:
        lines = "\n  ".join(faults)
        if len(lines) > LONGEST_MESSAGE - len(source) - 50:
            say(f"{source}:\n  {lines}")
            raise UserError(f"{source}: {len(faults)} keys have no counterpart; they are named above")
        raise UserError(f"{source}: {lines}")
    winning = {key: value for key, value in asked.items() if not is_old(key)}
    rows = [_row(each, winning) for each in found.sets]
    rows += [[old, "–", f"skipped: {why}"] for old, why in found.skipped]
    if rows:
        say(f"{source}: keys of another layout\n{table(['key', '', 'here'], rows, left=True)}")
    raw = found.kept
    for _, key, value in found.sets:
        raw = _with(raw, key.split("."), value)
    return raw


def _row(found: Set, winning: dict[str, str]) -> list[str]:
    """A line of the table; winning: overrides of our keys."""
    value = winning.get(found.key)
    if value is not None and value not in (str(found.value), json.dumps(found.value)):
        return [found.old, "–", f"skipped: {found.key}={_short(value)} counts"]
    return [found.old, "→", f"{found.key} = {_short(found.value)}"]


class _Reading:
    """A tree taken apart: what is ours (`kept`), what old keys give (`sets`), what is `skipped`, and `faults`."""

    def __init__(self, tree: dict[str, Any], defaults: dict[str, Any]):
        self.defaults, self.sets, self.skipped, self.faults = defaults, [], [], []
        self.kept: dict[str, Any] = {}
        old: dict[str, tuple[str, Any]] = {}  # old key without its prefix → as it was written, value
        for path, value in _leaves(tree, ()):
            name = ".".join(path)
            bare = _bare(name)
            if bare == "stages" and (name != bare or _old_stages(value)):
                old["stages"] = name, value
            elif is_old(name):
                if bare in old and old[bare][1] != value:
                    self.faults.append(f"{name}={value} and {old[bare][0]}={old[bare][1]} are one key; leave one out")
                old[bare] = name, value
            elif f"training.{name}" in TABLE and name not in defaults:
                self.faults.append(f"{name}: {_meant(name, '')}")
            else:
                self.kept = _with(self.kept, list(path), value)
        self._flat(tree)
        self.old = {key: pair for key, pair in old.items() if pair[1] is not None}  # null: as if it were not there
        if "teacher.model_path" in self.old and (name := self.old.pop("model.name", None)):
            self.skipped.append((name[0], "teacher.model_path counts"))
        for key, (name, value) in self.old.items():
            self._simple(key, name, value)
        self._computed()

    def _flat(self, tree: dict[str, Any]) -> None:
        for tool, words in FLAT.items():
            if found := [key for key in words.split() if key in tree]:
                self.faults.append(f"{', '.join(found)}: keys of a flat file or of flags; use: python {tool}")

    def _simple(self, key: str, name: str, value: Any) -> None:
        rule = TABLE.get(key)
        if key.startswith("hydra."):
            self.skipped.append((name, FOLDER))
        elif rule is None and key != "stages":
            self.faults.append(f"{name}: {_meant(key, name.removesuffix(key))}")
        elif isinstance(rule, Skip):
            if rule.anyway is not None and value not in rule.anyway:
                self.faults.append(f"{name}={_short(value)} has no counterpart: {rule.why}; leave it out")
            else:
                self.skipped.append((name, rule.why))
        elif isinstance(rule, Move):
            if rule.only is not None and not (isinstance(value, str) and value in rule.only):
                known = ", ".join(dict.fromkeys(map(str, rule.only.values())))
                self.faults.append(f"{name}={_short(value)} has no counterpart: {rule.keys} is one of {known}")
            else:
                self._set(name, rule.keys, rule.change(value) if rule.only is None else rule.only[value])

    def _set(self, old: str, key: str, value: Any) -> None:
        self.sets.append(Set(old, key, value))

    def _take(self, key: str) -> tuple[str, Any]:
        """An old key as it was written, and its value; None where it is not there."""
        return self.old.get(key, (key, None))

    def _first(self, *keys: str) -> tuple[str, Any]:
        return next((self.old[key] for key in keys if key in self.old), (keys[0], None))

    def value(self, key: str) -> Any:
        """A key of ours: what an old one gave, what the tree says, else its default."""
        given = [each.value for each in self.sets if each.key == key]
        there = _at(self.kept, key.split("."))
        return given[-1] if given else there if there is not None else _at(self.defaults, key.split("."))

    def _computed(self) -> None:
        self._objective()
        self._precision()
        self._batches()
        self._stages()
        self._compression()
        name, samples = self._first("dataset.max_samples", "dataset.max_train_samples", "dataset.num_samples")
        if samples is not None and _is_number(samples):
            self._set(
                f"{name}={samples:g} × sequence_length",
                "data.tokens",
                int(samples) * self.value("data.sequence_length"),
            )
        betas = [self._take(f"training.adam_beta{i}") for i in (1, 2)]
        if any(beta is not None for _, beta in betas):
            pair = [d if beta is None else beta for (_, beta), d in zip(betas, (0.9, 0.999), strict=True)]
            self._set("training.adam_beta1, adam_beta2", "optim.betas", pair)
        name, deepspeed = self._take("training.deepspeed")
        if deepspeed:
            self._set(name, "engine.kind", "deepspeed")
            path = isinstance(deepspeed, str)
            self._set(name, "engine.config" if path else "engine.deepspeed", deepspeed)
        name, trackers = self._take("training.report_to")
        if trackers is not None:
            trackers = [trackers] if isinstance(trackers, str) else trackers
            self._set(name, "log.wandb", "online" if {"wandb", "all"} & set(trackers) else "disabled")
            self._set(name, "log.tensorboard", bool({"tensorboard", "all"} & set(trackers)))

    def _objective(self) -> None:
        name, cached = self._take("teacher.use_cached_logits")
        if cached is True:
            self._set(name, "objective.kind", "cached")
        elif cached is not None:  # the same loss from a live teacher
            self._set(name, "objective.kind", "online")
            for part in ("feature", "attention", "layers", "contrastive"):
                self._set(name, f"objective.{part}", 0.0)
            self._set(name, "objective.kl", 1.0)
        name, temperature = self._first("loss.temperature", "training.distillation_temperature")
        if temperature is not None:
            self._set(name, "objective.temperature", temperature)
            captured = self.value("logits.temperatures")
            stored = cached is not False and _is_number(temperature) and temperature > 0
            if stored and not reaches(captured, temperature):
                self._set(name, "logits.temperatures", [1.0, temperature])

    def _precision(self) -> None:
        wanted = {"training.bf16": "bfloat16", "training.fp16": "float16"}
        given = {key: self.old[key] for key in wanted if key in self.old}
        on = [key for key, (_, value) in given.items() if value is True]
        if len(on) == 2:
            self.faults.append("training.bf16 and training.fp16 are both true; leave one out")
        elif given:
            name = ", ".join(f"{name}={value}".lower() for name, value in given.values())
            self._set(name, "model.dtype", wanted[on[0]] if on else "float32")

    def _batches(self) -> None:
        per_device, each = self._take("training.per_device_train_batch_size")
        accumulation, steps = self._take("training.gradient_accumulation_steps")
        if each is not None:
            self._set(per_device, "optim.micro_batch", each)
        fixed = _at(self.kept, ["optim", "batch_tokens"]) is not None
        if steps is None and (each is None or fixed):
            return
        steps = 1 if steps is None else steps
        factors = [
            self.value("optim.micro_batch"),
            steps,
            self.value("engine.ranks"),
            self.value("data.sequence_length"),
        ]
        if not all(_is_number(factor) for factor in factors):
            wrong = {per_device: factors[0], accumulation: factors[1]}
            self.faults += [
                f"{key}: one number is expected, got {value}" for key, value in wrong.items() if not _is_number(value)
            ]
            return
        product = " × ".join(f"{factor:g}" for factor in factors)
        names = "per_device_train_batch_size × gradient_accumulation_steps × engine.ranks × data.sequence_length"
        total = 1
        for factor in factors:
            total *= int(factor)
        self._set(f"{names} = {product}", "optim.batch_tokens", total)

    def _stages(self) -> None:
        places = ("stages", "training.stages", "multi_stage.stages", "training_stages")
        written, stages = self._first(*places)
        enabled = self._first("multi_stage.enabled", "training.multi_stage")[1]
        if enabled is False and stages is not None:
            self.skipped.append((written, "multi_stage.enabled=false"))
            stages = None
        epochs_name, epochs = self._take("training.num_train_epochs")
        steps_name, steps = self._take("training.max_steps")
        steps = None if steps == -1 else steps
        rules_name, rules = self._first("parameter_lr_multipliers", "training.parameter_lr_multipliers")
        if stages is None and epochs is None and steps is None and rules is None:
            return
        length = {"steps": steps} if steps is not None else {} if epochs is None else {"epochs": epochs}
        length_name = steps_name if steps is not None else epochs_name
        own = _at(self.kept, ["stages"])
        if stages is None and own is None:
            if not length:
                length, length_name = {"epochs": 3}, "training.num_train_epochs (3 where it is not given)"
            self._set(length_name, "stages", [{"name": "all", **length}])
            if rules is not None:
                stage = {"name": "all", **length, "lr_multipliers": rules}
                self.sets[-1] = Set(f"{length_name}, {rules_name}", "stages", [stage])
            return
        made = [self._stage(stage, number) for number, stage in enumerate(own if stages is None else stages, 1)]
        used = []
        for stage in [stage for stage in made if isinstance(stage, dict)]:
            if length and not {"epochs", "steps", "tokens"} & stage.keys():
                stage |= length
                used.append(length_name)
            if rules is not None and not stage.get("lr_multipliers"):
                stage["lr_multipliers"] = rules
                used.append(rules_name)
        for name, value in ((length_name, length or None), (rules_name, rules)):
            if value is not None and name not in used:
                what = "lengths" if name == length_name else "lr_multipliers"
                self.skipped.append((name, f"every stage has {what} of its own: stages.0.…"))
        self._set(written if stages is not None else ", ".join(dict.fromkeys(used)) or "stages", "stages", made)

    def _stage(self, stage: Any, number: int) -> Any:
        """A stage in our keys; what is unknown stays, and is refused by its name later."""
        if not isinstance(stage, dict):
            return stage
        made: dict[str, Any] = {}
        for key, value in stage.items():
            if value is None:
                continue
            if key == "loss" and isinstance(value, dict):
                made["objective"] = made.get("objective", {}) | value
            elif key in ("alpha", "temperature"):
                made["objective"] = made.get("objective", {}) | {key: value}
            elif key == "warmup_steps":
                made["optim"] = made.get("optim", {}) | {key: value}
            else:
                made[STAGE.get(key, key)] = value
        name = re.sub(r"[^\w.-]+", "-", str(made.get("name", f"stage{number}"))).strip("-.") or f"stage{number}"
        return {"name": name, **{key: value for key, value in made.items() if key != "name"}}

    def _compression(self) -> None:
        """Steps and a rate are Adam's, which the default solver does not read."""
        keys = {"compress.steps": "compression.steps compression.num_steps compression.optimization_steps "
                "compression.num_iterations", "compress.lr": "compression.lr compression.learning_rate"}  # fmt: skip
        for key, names in keys.items():
            name, value = self._first(*names.split())
            if value is None:
                continue
            self._set(name, key, value)
            if not any(each.key == "compress.solver" for each in self.sets):
                self._set(name, "compress.solver", "adam")


def _meant(key: str, prefix: str) -> str:
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


def _bare(key: str) -> str:
    return key.lstrip("+").removeprefix("distillation.")


def sort_out(overrides: Iterable[str], tree: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Overrides of old keys, which also change the key where the tree has it, and those of ours."""
    plain = [item.lstrip("+") for item in overrides]
    names = [item.partition("=")[0] for item in plain]
    old = [place for item, name in zip(plain, names, strict=True) if is_old(name) for place in _in_place(item, tree)]
    return old, [item for item, name in zip(plain, names, strict=True) if not is_old(name)]


def _in_place(override: str, tree: dict[str, Any]) -> list[str]:
    """An override as it was written, and where the tree has its key with or without `distillation.`, which it means."""
    key, _, value = override.partition("=")
    other = _bare(key) if key.startswith("distillation.") else f"distillation.{key}"
    section, _, last = other.rpartition(".")
    there = _at(tree, section.split(".")) if section else tree
    return [override, *([f"{other}={value}"] if isinstance(there, dict) and last in there else [])]


def _leaves(node: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    """(path, value) of nested mappings; a section of ours that is empty is a leaf, an old one is nothing."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        elif value != {} or not is_old(".".join((*path, key, "x"))):
            yield (*path, key), value


def _old_stages(value: Any) -> bool:
    words = STAGE.keys() - {"name"} | {"loss", "alpha", "temperature"}
    return isinstance(value, list) and any(isinstance(stage, dict) and words & stage.keys() for stage in value)


def _at(node: Any, keys: list[str]) -> Any:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _with(node: Any, keys: list[str], value: Any) -> Any:
    if not keys:
        return value
    node = node if isinstance(node, dict) else {}
    return {**node, keys[0]: _with(node.get(keys[0]), keys[1:], value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
