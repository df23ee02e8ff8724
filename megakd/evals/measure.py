"""Measure one model as a run's `eval` section says: validation set, then each lm-eval task; what is finished is kept.

A measure that is not finite, or a task that fails, is null in the line, and `failed` says why; the others go on.
Where training moves the routers of the teacher (objective.kind=sar) a checkpoint's line says how good that teacher is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from megakd.config.precisions import Quantize
from megakd.config.train import HIGHER_IS_BETTER
from megakd.data.records import Batch
from megakd.data.shards import ShardSet, read_manifest
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer, pair_bos, vocabulary_size
from megakd.engine.checkpoint import Progress, auxiliary_file
from megakd.errors import UserError
from megakd.evals.attention import attention_overlap
from megakd.evals.holdout import Quality, Tokenizers, evaluate_model
from megakd.evals.routers import RouterStatistics
from megakd.evals.tasks import Harness, flat, metric_value
from megakd.identity import TokenizerIdentity, packing_of, stored_tensors, text_facts
from megakd.measured import record_rate
from megakd.models.flops import forward_flops
from megakd.models.isolation import check_config, check_model
from megakd.models.loading import load_model
from megakd.models.quantized import is_quantized
from megakd.models.quantizing import round_weights, stored_as
from megakd.models.routers import Router, find_routers
from megakd.models.routing import choices, copies, in_place_of
from megakd.models.tables import check_tables
from megakd.names import resolve
from megakd.objectives.heads import OtherLogits
from megakd.objectives.sar import SEPARATOR
from megakd.run import Run
from megakd.system.dist import read_world
from megakd.system.files import digest, read_json, write_json
from megakd.system.logging import say
from megakd.system.machine import describe_machine, machine_load

COMPARING = ("kl", "top1", "topk")  # those of them that need the teacher's targets
TEACHER = ("teacher_nll", "teacher_perplexity", "teacher_kl")  # of the teacher with a checkpoint's routers


class Subject(NamedTuple):
    """A model to measure: how reports name it, its folder, and how far it was trained.

    auxiliary: the file of what its checkpoint trained besides, the teacher's routers.
    quantize: the precisions to which its weights are rounded before it is measured.
    """

    name: str
    folder: Path
    progress: Progress
    stage: str | None = None
    auxiliary: Path | None = None
    quantize: Quantize | None = None

    @property
    def is_teacher(self) -> bool:
        """Also where its weights are rounded: teacher@int4."""
        return self.name.partition("@")[0] == "teacher"


class Unusable(UserError):
    """A model that cannot be measured, today or any other day: it does not load."""


class Unmeasured(UserError):
    """A model that could not be measured now: memory ran out, or its code raised an error; worth another try."""


def checkpoint_subject(run: Run, folder: Path, name: str | None = None) -> Subject:
    """A checkpoint, or what `watch` keeps of one: a folder with weights/ and progress.json.

    name: STAGE/step-N, if the folder's own place does not say it.
    """
    file = folder / "progress.json"
    try:
        fields = read_json(file)
        progress = Progress(**{name: fields[name] for name in ("stage", "stage_step", "step", "samples", "tokens")})
        stage = run.config.stages[progress.stage]
    except (UserError, TypeError, KeyError, IndexError) as error:
        raise Unusable(f"{file}: does not say where training stood: {error}") from error
    auxiliary = auxiliary_file(folder) if run.config.objective.trains_routers else None
    return Subject(
        name or f"{folder.parent.name}/{folder.name}",
        folder / "weights",
        progress,
        stage.name,
        auxiliary,
        stage.quantize,
    )


class Meter:
    """What a run measures its models with, opened once.

    tasks: of lm-eval, instead of those of eval.tasks.
    compares: whether the teacher's targets of the validation set are stored, as they must be where training needs such
    too.
    attention: eval.attention, or 0 where the teacher reads other tokens.
    """

    def __init__(self, run: Run, tasks: Sequence[str] | None = None):
        self.config, self.folder = run.config, run.folder
        stored, tokens = (run.path("data", kind, "holdout") for kind in ("logits", "tokens"))
        self.compares = not run.config.objective.live or (stored / "manifest.json").exists()
        self.holdout = ShardSet(stored if self.compares else tokens)
        text = read_manifest(tokens)
        if not text["text_bytes"]:
            raise UserError(f"{tokens}: no whole document is held out; raise data.holdout_tokens in a new run")
        self.tokens_per_byte = text["text_tokens"] / text["text_bytes"]
        wanted = run.config.eval.attention
        tokenizers = _tokenizers(run, text["facts"]) if wanted or not self.compares else None
        self.tokenizers = None if self.compares else tokenizers
        self.attention = 0 if tokenizers else wanted
        if tokenizers and wanted:
            say("validation set: no attention, for the teacher has another tokenizer than the student")
        if self.tokenizers:
            say("validation set: no kl, top1 and topk, for the teacher has another tokenizer than the student")
        elif not self.compares:
            say(f"validation set: no kl, top1 and topk yet; to have them, run: megakd generate-logits {run.folder}")
        self.tasks = list(run.config.eval.tasks if tasks is None else tasks)
        self.harness = Harness(self.tasks, run.config.eval) if self.tasks else None
        self.device = read_world().device

    def row(self, subject: Subject, pieces: Path | None = None) -> dict[str, Any]:
        """A model's line of evals.jsonl; `failed` says of what is null why, by its name.

        pieces: a folder that keeps what is finished, for a process that inherits from one that was killed.
        Unusable or Unmeasured: there is no line. Any other UserError is no fault of this model.
        """
        try:
            return self._row(subject, pieces)
        except UserError:
            raise
        except Exception as error:  # of PyTorch, of a device, of a model's code: the next model may do
            raise Unmeasured(f"{subject.folder}: cannot be measured: {_reason(error)}") from error

    def _row(self, subject: Subject, pieces: Path | None) -> dict[str, Any]:
        model = functools.cache(lambda: self._load(subject))
        against = {} if self.compares else {"targets": False}
        found = [_piece(pieces, "holdout", against, lambda: self._held_out(subject, model()))]
        if self.attention and subject.name != "teacher":
            windows = {"windows": self.attention}
            found.append(_piece(pieces, "attention", windows, lambda: self._attention(subject, model())))
        if subject.auxiliary is not None:
            found.append(_piece(pieces, "teacher", against, lambda: self._teacher_quality(subject)))
        if self.harness is not None:
            found.append(self._tasks(subject, model, pieces))
        row = {
            "model": subject.name,
            "step": subject.progress.step,
            "tokens": subject.progress.tokens,
            "stage": subject.stage,
        }
        failed = {name: reason for part in found for name, reason in part.pop("failed", {}).items()}
        for part in found:
            row |= part
        return row | ({"failed": failed} if failed else {})

    def _tasks(self, subject: Subject, model: Callable[[], Any], pieces: Path | None) -> dict[str, Any]:
        """The numbers of each task; null, with the reason, where lm-eval ends with an error."""
        assert self.harness is not None
        harness, config, tokenizer = self.harness, self.config.eval, functools.cache(lambda: _tokenizer(subject.folder))
        tasks: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for name in self.tasks:
            settings = {"task": name, "limit": config.limit, "few_shot": config.few_shot}
            title = f"{name} on {subject.name}"
            try:
                tasks |= _piece(pieces, "task", settings, lambda: harness.measure(name, model(), tokenizer(), title))  # noqa: B023 (called at once)
            except UserError:
                raise
            except Exception as error:  # code of tasks and their metrics fails in its own ways
                tasks[name] = None
                failed[name] = _reason(error)
                say(f"{title}: {failed[name]}; the other tasks go on")
        return {"tasks": tasks, **({"failed": failed} if failed else {})}

    def _load(self, subject: Subject) -> Any:
        try:
            model = load_model(subject.folder, getattr(torch, self.config.model.dtype))
            facts = text_facts(self.holdout.facts)
            other = self.tokenizers if subject.is_teacher else None
            size = vocabulary_size(other.model) if other else facts["tokenizer"]["vocab_size"]
            check_tables(model, subject.folder, size, facts["sequence_length"])
        except UserError as error:
            raise Unusable(str(error)) from error
        except (MemoryError, torch.OutOfMemoryError):  # not the model's fault
            raise
        except Exception as error:  # what is wrong inside a config or a file of weights has no kind of its own
            raise Unusable(f"{subject.folder}: cannot be loaded: {_reason(error)}") from error
        model = model.eval().to(self.device)
        try:
            if subject.quantize is not None:
                round_weights(model, subject.quantize, str(subject.folder))
            self._check_isolation(model, str(subject.folder))
        except UserError as error:
            raise Unusable(str(error)) from error
        return model

    def _check_isolation(self, model: Any, place: str) -> None:
        """UserError when packed documents of the validation set change each other's numbers."""
        packing = packing_of(self.holdout.facts)
        check_config(model.config, place, packing)
        check_model(model, place, packing)

    def _held_out(self, subject: Subject, model: Any) -> dict[str, Any]:
        """Its quality, and how busy the machine was: what else ran slows its tokens/s.

        Bytes are those of its files where these hold codes, for such a model grows as it is loaded.
        """
        found = self._quality(subject, model) | {"machine_load": machine_load(self.device)}
        if is_quantized(read_json(subject.folder / "config.json")):
            found["bytes"] = sum(tensor.stop - tensor.start for tensor in stored_tensors(subject.folder).values())
        if subject.quantize is not None:
            stored = stored_as(model, subject.quantize, str(subject.folder))
            found |= {"quantized": stored.quantized, "bytes": stored.bytes}
        return found

    def _quality(self, subject: Subject, model: Any) -> dict[str, Any]:
        place, config = str(subject.folder), self.config
        if not subject.is_teacher:
            return _finite(_given(self._measured(model, subject.name, None)), place)
        routers = find_routers(model, place, config.objective.patterns) if config.objective.trains_routers else []
        quality, chosen = self._with_choices(model, routers, subject.name)
        return _finite(_given(quality) | chosen, place)

    def _with_choices(self, model: Any, routers: list[Router], name: str) -> tuple[Quality, dict[str, Any]]:
        """A teacher's quality, and what its routers choose."""
        with choices(routers) as chosen:
            statistics = RouterStatistics(routers, chosen)
            quality = self._measured(model, name, self.tokenizers, statistics.add)
        return quality, {"teacher_routers": statistics.found()} if routers else {}

    def _measured(
        self, model: Any, name: str, tokenizers: Tokenizers | None, after: Callable[[Batch], None] | None = None
    ) -> Quality:
        batch_size = self.config.eval.batch_size
        try:
            found = evaluate_model(
                model,
                self.holdout,
                self.tokens_per_byte,
                batch_size,
                self.device,
                name,
                tokenizers=tokenizers,
                after=after,
            )
        except OtherLogits as error:
            raise Unusable(f"{name}: {error}") from error
        self._record_rate(model, found)
        return found

    def _record_rate(self, model: Any, found: Quality) -> None:
        """Throughput of the forward passes, for `megakd plan --gpus`."""
        settings: dict[str, Any] = {"batch_size": self.config.eval.batch_size}
        with suppress(UserError):  # a model whose FLOPs are not known
            length = self.config.data.sequence_length
            settings["flops_per_token"] = forward_flops(model.config, length, "the model")
        if math.isfinite(found.tokens_per_second):
            device, seconds = describe_machine(self.device)["device"], found.positions / found.tokens_per_second
            record_rate(self.folder, "evaluate", device, found.positions, seconds, 1, **settings)

    def _teacher_quality(self, subject: Subject) -> dict[str, Any]:
        """How good the teacher is with a checkpoint's routers, with as many experts a token as it was trained with."""
        assert subject.auxiliary is not None, subject
        teacher, routers, _ = self._teacher
        set_routers(routers, subject.auxiliary)
        quality, chosen = self._with_choices(teacher, routers, f"the teacher of {subject.name}")
        found = {"teacher_nll": quality.nll, "teacher_perplexity": quality.perplexity, "teacher_kl": quality.kl}
        found = {name: value for name, value in found.items() if value is not None}
        return _finite(found | chosen, f"{subject.auxiliary}: the teacher with these routers")

    def _attention(self, subject: Subject, model: Any) -> dict[str, Any]:
        """How alike it attends to the teacher as it was before training."""
        teacher, routers, originals = self._teacher
        with in_place_of(routers, originals):
            value = attention_overlap(model, teacher, self.holdout, self.attention, self.device, subject.name)
        return _finite({"attention": value}, str(subject.folder))

    @functools.cached_property
    def _teacher(self) -> tuple[Any, list[Router], list[nn.Module]]:
        """The teacher, kept for all checkpoints; where routers are trained, these and copies of them as they were.

        What is wrong with it is no checkpoint's fault.
        """
        folder = resolve(self.config.model.teacher, self.config.model.revision)
        teacher = load_model(folder, getattr(torch, self.config.model.dtype)).eval().to(self.device)
        self._check_isolation(teacher, str(folder))
        learns = self.config.objective.trains_routers
        routers = find_routers(teacher, str(folder), self.config.objective.patterns) if learns else []
        return teacher, routers, copies(routers)

    def lacks(self, row: dict[str, Any]) -> bool:
        """Whether a line was written without cached logits that exist now, or without attention that eval asks for."""
        names = COMPARING if self.compares else ()
        if self.attention and row["model"] != "teacher":
            names = (*names, "attention")
        return any(name not in row for name in names)

    @functools.cached_property
    def best(self) -> str:
        """The measure by which checkpoints are ranked: `eval.best`, with auto resolved.

        UserError when it compares with the teacher, and nothing does.
        """
        best = self.config.eval.best
        if best == "auto":
            best = "kl" if self.compares and not self.tokenizers else "perplexity"
            if best != "kl":
                say("eval.best: auto ranks checkpoints by perplexity, for KL to the teacher is not measured")
        if best in COMPARING and self.tokenizers:
            raise UserError(
                f"eval.best: {best} is not measured, for the teacher has another tokenizer; set eval.best=perplexity"
            )
        if best in COMPARING and not self.compares:
            raise UserError(
                f"eval.best: {best} needs the teacher's targets of the validation set, which are not stored; "
                "run: megakd generate-logits RUN, or set eval.best=perplexity"
            )
        return best


def _tokenizers(run: Run, facts: dict[str, Any]) -> Tokenizers | None:
    """The student's, which the validation set was made with, and the teacher's, where they differ."""
    model = run.config.model
    theirs = load_tokenizer(resolve(model.teacher, model.revision, weights=False))
    if not TokenizerIdentity.of(facts["tokenizer"]).difference(identify_tokenizer(theirs)):
        return None
    return Tokenizers(load_tokenizer(run.student_folder), theirs, pair_bos(facts, theirs, run.config.data.bos))


def set_routers(routers: Sequence[Router], auxiliary: Path) -> None:
    """Give a teacher's routers what a checkpoint made of them; Unusable when the file does not hold just them.

    Buffers, like the correction bias of DeepSeek-V3, are not trained: they may be in the file, or stay as they are.
    """
    modules = nn.ModuleDict({router.name.replace(".", SEPARATOR): router.module for router in routers})
    trained = dict(modules.named_parameters())
    try:
        tensors = {n.removeprefix("routers."): t for n, t in load_file(auxiliary).items() if n.startswith("routers.")}
        missing, unexpected = modules.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Unusable(f"{auxiliary}: does not hold the teacher's routers: {' '.join(str(error).split())}") from error
    if wrong := [*(name for name in missing if name in trained), *unexpected]:
        raise Unusable(f"{auxiliary}: does not hold the teacher's routers: {wrong[0]} is in one of them alone")


def _given(quality: Quality) -> dict[str, Any]:
    return {name: value for name, value in quality._asdict().items() if value is not None}


def _tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except UserError as error:
        raise Unusable(str(error)) from error


def _finite(values: dict[str, Any], place: str) -> dict[str, Any]:
    """The same with null where a number is not finite, which JSON cannot say, and under `failed` what it was."""
    failed: dict[str, str] = {}

    def finite(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner, name) for key, inner in value.items()}
        if not isinstance(value, float) or math.isfinite(value):
            return value
        what = "NaN" if math.isnan(value) else "infinite"
        failed.setdefault(name, f"{place}: {name} on the validation set is {what}")
        return None

    found = {name: finite(value, name) for name, value in values.items()}
    return {**found, "failed": failed} if failed else found


def _reason(error: Exception) -> str:
    """An error of foreign code in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def failures(row: dict[str, Any]) -> list[str]:
    """What could not be measured of a line's model, and why."""
    return [f"{row['model']}: {name}: {reason}" for name, reason in row.get("failed", {}).items()]


def raise_failures(found: Sequence[str]) -> None:
    """UserError naming what could not be measured, when everything else was."""
    if found:
        raise UserError(
            f"{len(found)} could not be measured, everything else was: {'; '.join(found)}; to measure one again: "
            "megakd evaluate RUN --model NAME"
        )


def _piece(
    folder: Path | None, kind: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` gives, or what it gave under these settings before the process was killed."""
    if folder is None:
        return measure()
    path = folder / (f"{kind}-{digest(settings)}.json" if settings else f"{kind}.json")
    if not path.exists():
        write_json(path, {**settings, "found": measure()})
    return read_json(path)["found"]


def measure_of(row: dict[str, Any], name: str) -> tuple[float | None, bool]:
    """A measure of a line (None: not measured), and whether higher is better."""
    return metric_value(row.get("tasks", {}), name) if "/" in name else (row.get(name), HIGHER_IS_BETTER[name])


def rank(row: dict[str, Any], name: str) -> tuple[float] | None:
    """A key that sorts the best line first; None where it was not measured."""
    value, higher = measure_of(row, name)
    return None if value is None or not math.isfinite(value) else (-value if higher else value,)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What curves are drawn of: the measures of the validation set, and those of tasks under TASK/METRIC."""
    names = (*HIGHER_IS_BETTER, "attention", *TEACHER)
    measured = {name: row[name] for name in names if row.get(name) is not None}
    return {**measured, **flat(row.get("tasks", {}))}
