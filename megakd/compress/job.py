"""What every task of a compression shares: the teacher, the run's settings, and where tasks leave what they made."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.config.model import CompressConfig
from megakd.data.shards import read_manifest
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.errors import UserError
from megakd.identity import DataIdentity, changed_fingerprint, fingerprint
from megakd.models.checks import check_isolation, model_folders
from megakd.models.cut import Cut, cut_to, groups_of, possible_counts
from megakd.models.hub import check_folder, check_readable, load_config, model_of
from megakd.models.shared_core import PROJECTIONS
from megakd.models.sources import Sources
from megakd.models.spec import MoESpec, active_experts, spec_for
from megakd.run import Run
from megakd.system.dist import read_world, take_device
from megakd.system.files import read_json, write_json


class Job(NamedTuple):
    """What every task needs to know; `parts` is where tasks leave what they made.

    folder: of the model whose experts are compressed, read by open_sources once it is there. cut: that model with as
    many experts as shall be kept; None where all are. teacher: where the model is itself a pruned one, which this work
    makes first, the job of its teacher.
    """

    run: Run
    folder: Path
    config: Any
    open_sources: Callable[[], Sources]
    spec: MoESpec
    layers: list[int]
    parts: Path
    device: torch.device
    describe: Callable[[Path, dict[str, Any]], None]  # adds a model card and a plot to the finished student's folder
    cut: Cut | None = None
    teacher: "Job | None" = None

    @property
    def sources(self) -> Sources:
        return self.open_sources()

    @property
    def root(self) -> "Job":
        """The job of the teacher itself."""
        return self.teacher or self

    @property
    def settings(self) -> CompressConfig:
        return self.run.config.compress

    @property
    def dtype(self) -> torch.dtype:
        """Of the student's tensors."""
        return getattr(torch, self.run.config.model.dtype)

    @property
    def experts(self) -> int:
        return self.spec.experts

    @property
    def tokens(self) -> Path:
        """The training tokens of the run."""
        return self.run.path("data", "tokens", "train")

    def part(self, layer: int, kind: str) -> Path:
        """What a task makes of a layer; kind: a projection, or inputs, or order."""
        return self.parts / f"layer-{layer:03d}-{kind}.safetensors"

    @property
    def sequential(self) -> bool:
        """Whether a layer is measured behind those that are compressed already."""
        return self.settings.sequential and self.cut is None

    def results(self, layer: int) -> list[Path]:
        """What is made of a layer's measurements; nobody reads them afterwards."""
        return [self.part(layer, kind) for kind in (("plan",) if self.cut else PROJECTIONS)]

    def answers(self, layer: int) -> Path:
        """What the teacher's experts answer to held-out tokens, and the windows that those are in."""
        return self.root.part(layer, "answers")

    def error(self, layer: int) -> Path:
        """The error of a layer's answers."""
        return self.parts / f"layer-{layer:03d}-error.json"

    @property
    def pruned(self) -> Path:
        """The folder of the model with fewer experts, before it is a student or what a student is made of."""
        return self.root.parts / "pruned"

    def candidates(self, layer: int) -> Path:
        return self.parts / f"layer-{layer:03d}-candidates.json"

    @property
    def forms(self) -> Path:
        return self.parts / "forms.json"

    @property
    def super_experts(self) -> Path:
        return self.parts / "super-experts.json"

    def exempt(self, layer: int) -> tuple[int, ...]:
        """The experts of a layer that stay dense."""
        if self.settings.super_experts == "off":
            return ()
        return tuple(read_json(self.super_experts).get(str(layer), ()))

    def dense_experts(self, layer: int, ids: tuple[int, ...]) -> dict[str, Tensor]:
        """The matrices of experts that stay dense, stacked."""
        gate, up, down = (self.sources.experts(self.spec, layer, p)[list(ids)] for p in PROJECTIONS)
        return {"gate_up_proj": torch.cat([gate, up], dim=1), "down_proj": down}


def undescribed(folder: Path, report: dict[str, Any]) -> None:
    """No model card and no plot."""


def open_job(run: Run, folder: Path, describe: Callable[[Path, dict[str, Any]], None] = undescribed) -> Job:
    """The teacher in `folder` and what is to be done with it; UserError when it cannot be."""
    config = load_config(folder)
    check_folder(folder, config)
    check_readable(folder, config, "compress")
    spec = spec_for(config, str(folder))
    settings, smallest = run.config.compress, min(spec.sizes)
    if settings.budget is None and settings.rank > smallest:
        raise UserError(f"{run.folder}: compress.rank={settings.rank} exceeds the experts' smaller side, {smallest}")
    others = [shape for shape in settings.shapes if shape != "wrappers"]
    if settings.method == "shared_core" and settings.solver == "adam" and settings.budget is not None and others:
        raise UserError(
            f"{run.folder}: compress.solver=adam fits wrappers alone, compress.shapes also names {', '.join(others)}; "
            "make a new run with compress.shapes='[\"wrappers\"]' or compress.solver=als"
        )
    count = kept_experts(settings, config, spec, run.folder)
    cut = None if count is None else cut_to(config, spec, count, str(folder))
    device, layers, parts = take_device(read_world()).device, list(spec.layers), run.path("compress")
    job = Job(run, folder, config, open_sources(folder, config), spec, layers, parts, device, describe, cut)
    _ = job.sources  # read now: what is wrong with the folder is said before anything is done
    if settings.calibration_tokens:
        _check_tokens(job)
        check_isolation(model_folders(run.config.model), run.config.data.packing)
    begun_with(job)
    if cut is None or settings.method != "shared_core":
        return job
    opener = open_sources(job.pruned, cut.config)
    return job._replace(
        folder=job.pruned,
        config=cut.config,
        open_sources=opener,
        spec=cut.spec,
        parts=job.parts / "shared",
        cut=None,
        teacher=job,
    )


def open_sources(folder: Path, config: Any) -> Callable[[], Sources]:
    """The tensors of a model's folder, opened when they are asked for the first time."""
    return cache(lambda: Sources(folder, model_of(config, str(folder))))


def kept_experts(settings: CompressConfig, config: Any, spec: MoESpec, place: Path | str) -> int | None:
    """How many experts of each layer a student keeps, None where no method takes any away; UserError where it cannot.

    A budget keeps the largest possible number within it.
    """
    experts, active = spec.experts, active_experts(config)
    counts = possible_counts(config, spec)
    among = f" in {groups_of(config)} groups" if groups_of(config) > 1 else ""
    why = f"a token uses {active} of {experts} experts{among}"
    if settings.experts is not None:
        if settings.experts not in counts:
            raise UserError(f"{place}: compress.experts={settings.experts}: {why}; possible are {_spans(counts)}")
        if settings.method == "shared_core" and settings.budget and settings.budget >= settings.experts / experts:
            raise UserError(
                f"{place}: compress.experts={settings.experts} keeps {settings.experts / experts:.3g} of the experts' "
                f"parameters, compress.budget={settings.budget:g} must be below it"
            )
        return settings.experts
    if settings.method == "shared_core":
        return None
    assert settings.budget is not None
    fitting = [count for count in counts if count <= settings.budget * experts + 1e-9]
    if not fitting:
        raise UserError(
            f"{place}: compress.budget={settings.budget:g} keeps {int(settings.budget * experts)} experts, but {why}; "
            f"set it to {counts[0] / experts:.4g} at least"
        )
    return fitting[-1]


def _spans(counts: list[int]) -> str:
    """2 … 16, or 4, 8, … 16 where they are further apart."""
    if len(counts) < 4:
        return ", ".join(map(str, counts))
    first = f"{counts[0]}" if counts[1] - counts[0] == 1 else f"{counts[0]}, {counts[1]}"
    return f"{first} … {counts[-1]}"


def _check_tokens(job: Job) -> None:
    """UserError when the run has no tokens to calibrate on, or has them of another tokenizer than the teacher's."""
    run = job.run
    if not (job.tokens / "manifest.json").exists():
        raise UserError(
            f"{run.folder}: compress.calibration_tokens={job.settings.calibration_tokens} needs the run's tokens; "
            f"run: megakd tokenize {run.folder}, or set compress.calibration_tokens=0"
        )
    made = DataIdentity.of(read_manifest(job.tokens)["facts"])
    if different := identify_tokenizer(load_tokenizer(job.folder)).difference(made.tokenizer):
        raise UserError(
            f"{job.tokens}: tokenized with another tokenizer than {job.folder} has ({different}); tokenize in a new run"
        )


def begun_with(job: Job) -> str:
    """The fingerprint of the teacher that any process began this work with; UserError when it is another now."""
    known = job.parts / "teacher.json"
    if not known.exists():
        write_json(known, {"weights": fingerprint(job.folder)})
    begun = read_json(known)["weights"]
    if now := changed_fingerprint(begun, job.folder):
        raise UserError(
            f"{job.parts}: begun with a teacher of fingerprint {begun}, {job.folder} has {now} now: its weights or its "
            "config.json were changed; restore them, or delete that folder to begin again"
        )
    return begun
