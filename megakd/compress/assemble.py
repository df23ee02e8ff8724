"""The task that writes the student from what the others fitted."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megakd.compress.job import Job, begun_with
from megakd.compress.pruning import cut_of
from megakd.data.tokenizers import identify_tokenizer, load_tokenizer
from megakd.identity import TeacherIdentity
from megakd.models.hub import cast, copy_code, copy_side_files, exact_names, write_config, write_weights
from megakd.models.shared_core import PROJECTIONS, Form, stored_parameters
from megakd.models.student import student_config
from megakd.system.files import discard, link_file, publishing, read_json, write_json
from megakd.system.version import made_with

SHARD_BYTES = 2**30  # a file of the student, held in memory while it is written


def assemble(job: Job) -> None:
    """Write the student from the parts, one at a time; then they are not needed any more."""
    reports = [read_json(job.part(layer, p).with_suffix(".json")) for layer in job.layers for p in PROJECTIONS]
    forms: dict[int, dict[str, Form]] = {layer: {} for layer in job.layers}
    for part in reports:
        forms[part["layer"]][part["projection"]] = Form(**part["form"])
    exempt = {layer: job.exempt(layer) for layer in job.layers}
    sizes, settings = job.spec.sizes, job.settings
    stored = sum(stored_parameters(f, p, job.experts, *sizes) for own in forms.values() for p, f in own.items())
    report = _report(job, stored) | {
        "rank": settings.rank if settings.budget is None else None,
        "dense_experts": {str(layer): list(ids) for layer, ids in exempt.items() if ids},
        "parts": reports,
    }
    with publishing(job.run.path("student-0")) as temporary:
        write_weights(temporary, _tensors(job, exempt), SHARD_BYTES)
        student = student_config(job.config, forms, exempt)
        student.dtype = job.dtype
        copy_code(temporary, student)
        write_config(temporary, student)
        _finish(job, temporary, report)
    discard(job.root.parts)


def assemble_stock(job: Job) -> None:
    """Make the model of fewer experts the student."""
    report = _report(job, len(job.layers) * cut_of(job).spec.experts * 3 * prod(job.spec.sizes))
    with publishing(job.run.path("student-0")) as temporary:
        temporary.mkdir()
        for file in job.pruned.iterdir():  # not moved: another process would find it missing, and make it again
            link_file(file, temporary / file.name)
        _finish(job, temporary, report)
    discard(job.parts)


def _finish(job: Job, folder: Path, report: dict[str, Any]) -> None:
    """Add to a student's folder what is not weights."""
    copy_side_files(job.root.folder, folder)
    write_json(folder / "compress.json", report)
    job.describe(folder, report)


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


def _report(job: Job, stored: int) -> dict[str, Any]:
    """What compress.json says of every method; stored: numbers of the student's experts, and of what they share."""
    settings, model, root = job.settings, job.run.config.model, job.root
    teachers = len(root.layers) * root.experts * 3 * prod(root.spec.sizes)
    return {
        "megakd": made_with(),
        "teacher": TeacherIdentity(model.teacher, model.revision, begun_with(root)).record(),
        "tokenizer": identify_tokenizer(load_tokenizer(root.folder)).record(),
        "method": settings.method,
        "experts": cut_of(job).spec.experts if job.cut else job.experts,
        "teacher_experts": root.experts,
        "expert_parameters": stored,
        "expert_bytes": stored * job.dtype.itemsize,
        "expert_share": round(stored / teachers, 6),
        "calibration_tokens": settings.calibration_tokens,
        "layers": [_layer_report(job, layer) for layer in job.layers],
    }


def _layer_report(job: Job, layer: int) -> dict[str, Any]:
    """The error of a layer's answers, and which of the teacher's experts are in it, or together."""
    found: dict[str, Any] = {"layer": layer}
    if job.settings.calibration_tokens:
        found |= read_json(job.error(layer))
    if job.root.cut is None:
        return found
    tensors = load_file(job.root.part(layer, "plan"))
    scores, members = tensors["scores"].tolist(), tensors["members"]
    together = [(members == member).nonzero()[:, 0].tolist() for member in range(len(tensors["leading"]))]
    if job.settings.method == "merge":
        return found | {"clusters": together, "tokens": tensors["counts"].tolist()}
    return found | {"kept": [ids[0] for ids in together], "scores": [float(f"{score:.6g}") for score in scores]}
