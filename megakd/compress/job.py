"""What every task of a compression shares: the teacher, the run's settings, and where tasks leave what they made."""

from collections.abc import Callable
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
from megakd.models.hub import check_folder, check_readable, load_config, model_of
from megakd.models.shared_core import PROJECTIONS
from megakd.models.sources import Sources
from megakd.models.spec import MoESpec, spec_for
from megakd.run import Run
from megakd.system.dist import read_world, take_device
from megakd.system.files import read_json, write_json


class Job(NamedTuple):
    """What every task needs to know; `parts` is where tasks leave what they made."""

    run: Run
    folder: Path
    config: Any
    sources: Sources
    spec: MoESpec
    layers: list[int]
    parts: Path
    device: torch.device
    describe: Callable[[Path, dict[str, Any]], None]  # adds a model card and a plot to the finished student's folder

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
    sources = Sources(folder, model_of(config, str(folder)))
    device = take_device(read_world()).device
    job = Job(run, folder, config, sources, spec, list(spec.layers), run.path("compress"), device, describe)
    if settings.calibration_tokens:
        _check_tokens(job)
        check_isolation(model_folders(run.config.model), run.config.data.packing)
    begun_with(job)
    return job


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
