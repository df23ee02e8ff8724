"""The task that writes the student from what the others fitted."""

from collections.abc import Iterator, Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megakd.compress.job import Job, begun_with
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.identity import TeacherIdentity
from megakd.models.hub import cast, copy_code, copy_side_files, exact_names, write_config, write_weights
from megakd.models.shared_core import PROJECTIONS, Form, stored_parameters
from megakd.models.student import student_config
from megakd.system.files import discard, publishing, read_json, write_json
from megakd.system.version import made_with

SHARD_BYTES = 2**30  # a file of the student, held in memory while it is written


def assemble(job: Job) -> None:
    """Write the student from the parts, one at a time; then they are not needed any more."""
    reports = [read_json(job.part(layer, p).with_suffix(".json")) for layer in job.layers for p in PROJECTIONS]
    forms: dict[int, dict[str, Form]] = {layer: {} for layer in job.layers}
    for part in reports:
        forms[part["layer"]][part["projection"]] = Form(**part["form"])
    exempt = {layer: job.exempt(layer) for layer in job.layers}
    report = _report(job, reports, forms, exempt)
    with publishing(job.run.path("student-0")) as temporary:
        write_weights(temporary, _tensors(job, exempt), SHARD_BYTES)
        student = student_config(job.config, forms, exempt)
        student.dtype = job.dtype
        copy_code(temporary, student)
        write_config(temporary, student)
        copy_side_files(job.folder, temporary)
        write_json(temporary / "compress.json", report)
        job.describe(temporary, report)
    discard(job.parts)


def _tensors(job: Job, exempt: Mapping[int, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """(name in the modules, tensor) of the student, read one at a time: it need not fit in memory."""
    exact = exact_names(job.sources.model)
    for name in job.sources.made_by:
        if not job.spec.is_expert(name):
            yield name, cast(name, job.sources.raw(name), job.dtype, exact)
    for layer in job.layers:
        block = job.spec.place(layer)
        for projection in PROJECTIONS:
            for name, tensor in load_file(job.part(layer, projection)).items():
                yield f"{block}.{name}", tensor
        if exempt[layer]:
            for name, tensor in job.dense_experts(layer, exempt[layer]).items():
                yield f"{block}.dense_experts.{name}", tensor.to(job.dtype)


def _report(
    job: Job,
    reports: list[dict[str, Any]],
    forms: Mapping[int, Mapping[str, Form]],
    exempt: Mapping[int, tuple[int, ...]],
) -> dict[str, Any]:
    """compress.json."""
    settings, model = job.settings, job.run.config.model
    sizes = job.spec.sizes
    chosen = [(projection, form) for layer in job.layers for projection, form in forms[layer].items()]
    return {
        "megakd": made_with(),
        "teacher": TeacherIdentity(model.teacher, model.revision, begun_with(job)).record(),
        "tokenizer": identify_tokenizer(load_tokenizer(job.folder)).record(),
        "rank": settings.rank if settings.budget is None else None,
        "expert_parameters": sum(stored_parameters(form, p, job.experts, *sizes) for p, form in chosen),
        "calibration_tokens": settings.calibration_tokens,
        "dense_experts": {str(layer): list(ids) for layer, ids in exempt.items() if ids},
        "parts": reports,
    }
