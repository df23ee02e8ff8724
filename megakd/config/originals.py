"""Configuration trees of the systems that MegaKD unites, in our own keys, by the table of `config.original_keys`.

A tree may mix old and new keys; two that contradict each other are refused.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from megakd.config.original_keys import FLAT, FOLDER, STAGE, TABLE, Move, Skip, are_old_stages, bare_key, is_old, meant
from megakd.config.tails import reaches
from megakd.errors import LONGEST_MESSAGE, UserError
from megakd.system.logging import say
from megakd.system.text import table


class Set(NamedTuple):
    """A key of ours that an old one gives: `old → key = value`."""

    old: str
    key: str
    value: Any


def any_old(tree: dict[str, Any]) -> bool:
    """Whether a tree has a key of this table, or of the flat files of the other two systems."""
    flat = {word for words in FLAT.values() for word in words.split()}
    return bool(flat & tree.keys()) or any(
        is_old(".".join(path)) or (path == ("stages",) and are_old_stages(value)) for path, value in _leaves(tree, ())
    )


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
            bare = bare_key(name)
            if bare == "stages" and (name != bare or are_old_stages(value)):
                old["stages"] = name, value
            elif is_old(name):
                if bare in old and old[bare][1] != value:
                    self.faults.append(f"{name}={value} and {old[bare][0]}={old[bare][1]} are one key; leave one out")
                old[bare] = name, value
            elif f"training.{name}" in TABLE and name not in defaults:
                self.faults.append(f"{name}: {meant(name, '')}")
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
            self.faults.append(f"{name}: {meant(key, name.removesuffix(key))}")
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


def sort_out(overrides: Iterable[str], tree: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Overrides of old keys, which also change the key where the tree has it, and those of ours."""
    plain = [item.lstrip("+") for item in overrides]
    names = [item.partition("=")[0] for item in plain]
    old = [place for item, name in zip(plain, names, strict=True) if is_old(name) for place in _in_place(item, tree)]
    return old, [item for item, name in zip(plain, names, strict=True) if not is_old(name)]


def _in_place(override: str, tree: dict[str, Any]) -> list[str]:
    """An override as it was written, and where the tree has its key with or without `distillation.`, which it means."""
    key, _, value = override.partition("=")
    other = bare_key(key) if key.startswith("distillation.") else f"distillation.{key}"
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
