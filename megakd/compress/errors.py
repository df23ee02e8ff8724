"""Tasks that measure what a compression has done: the error of each layer's answers to held-out tokens."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.compress.calibrate import LayerRunner
from megakd.compress.job import Job
from megakd.compress.measuring import compressed, runner_over
from megakd.models.hub import model_of
from megakd.models.sources import Sources
from megakd.system.files import publishing, write_json


def measure_error(job: Job, layer: int, output: Path) -> None:
    """||Y' - Y|| / ||Y||: what the teacher's experts add for held-out tokens, and what the student's do.

    Both read what the teacher's layers before give, behind their own router; shared experts are in neither.
    """
    tensors = load_file(job.answers(layer))
    hidden, expected = tensors["hidden"].to(job.device), tensors["answers"].to(job.device)
    runner = _student_runner(job)
    found = runner.answers(layer, hidden, compressed(job, layer) if job.cut is None else None)
    if len(found) != len(expected):  # a single window, of which the second half is held out
        found = found[runner.held_N]
    error = relative_error(found, expected)
    write_json(output, {"layer": layer, "output_error": round(error, 6)})
    with publishing(job.answers(layer)) as temporary:  # nobody reads it again, and there is one for each layer
        save_file({}, temporary)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; 0 where both are zeros."""
    missed, norm = torch.linalg.vector_norm(found - expected), torch.linalg.vector_norm(expected)
    return float(missed / norm.clamp(min=1e-30))


def _student_runner(job: Job) -> LayerRunner:
    if job.cut is None:
        return runner_over(job, job.sources, job.spec, job.config, held_out=True)
    pruned = Sources(job.pruned, model_of(job.cut.config, str(job.pruned)))
    return runner_over(job, pruned, job.cut.spec, job.cut.config, held_out=True)
