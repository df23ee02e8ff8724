"""Compress a teacher: tasks that any number of processes share through the run's folder."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megakd.compress.assemble import assemble, assemble_stock
from megakd.compress.errors import measure_error
from megakd.compress.fitting import choose_forms, fit_part, predict_errors
from megakd.compress.job import Job
from megakd.compress.measuring import find_order, find_supers, measure_inputs
from megakd.compress.pruning import plan_layer, write_pruned
from megakd.models.shared_core import PROJECTIONS
from megakd.system.tasks import Task


def tasks(job: Job) -> list[Task]:
    """Everything to be done, in the order in which it is best begun."""
    finished = job.run.path("student-0", "compress.json")
    if job.cut is not None:
        found, work = _pruning(job), assemble_stock
    else:
        first = _pruning(job.root) if job.teacher else []
        ready = (job.pruned,) if first else ()
        found = [*first, *(task._replace(needs=(*task.needs, *ready)) for task in _sharing(job))]
        work = assemble
    if job.settings.calibration_tokens:
        found += [_error_task(job, layer) for layer in job.layers]
    return [*found, Task("the student", finished, tuple(task.output for task in found), partial(work, job))]


def _pruning(job: Job) -> list[Task]:
    """Measure the teacher, choose experts, write the model that they are left in."""
    found: list[Task] = []
    for index, layer in enumerate(job.layers):
        inputs, plan = job.part(layer, "inputs"), job.part(layer, "plan")
        work = partial(measure_inputs, job, layer, inputs)
        found.append(Task(f"inputs of layer {layer}", inputs, _before_inputs(job, index), work))
        found.append(Task(f"experts of layer {layer}", plan, (inputs,), partial(plan_layer, job, layer, plan)))
    plans = tuple(job.part(layer, "plan") for layer in job.layers)
    return [*found, Task("the pruned model", job.pruned, plans, partial(write_pruned, job, job.pruned))]


def _error_task(job: Job, layer: int) -> Task:
    """Once the layer's experts are made."""
    made = [job.pruned] if job.cut else job.results(layer)
    output = job.error(layer)
    return Task(
        f"error of layer {layer}", output, (job.answers(layer), *made), partial(measure_error, job, layer, output)
    )


def _sharing(job: Job) -> list[Task]:
    """Measure the teacher, and fit shared cores."""
    settings, before = job.settings, ()
    begin = []
    if settings.super_experts == "auto":
        begin = [Task("super experts", job.super_experts, (), partial(find_supers, job, job.super_experts))]
        before = (job.super_experts,)
    layers = [_layer_tasks(job, index, before) for index in range(len(job.layers))]
    measuring, fitting = [layer.measuring for layer in layers], [layer.fitting for layer in layers]
    if settings.budget is not None:
        tables = [job.candidates(layer) for layer in job.layers]
        choose = Task("forms", job.forms, tuple(tables), partial(choose_forms, job, tables, job.forms))
        return [*begin, *chain(*measuring), choose, *chain(*fitting)]
    rest = []
    # measurements are serial, so they are a layer ahead of the fits; not more, for they take room on the disk
    for first, fits in zip([*measuring, []], [[], *fitting], strict=True):
        rest += first + fits
    return [*begin, *rest]


class _LayerTasks(NamedTuple):
    measuring: list[Task]
    fitting: list[Task]


def _layer_tasks(job: Job, index: int, before: tuple[Path, ...]) -> _LayerTasks:
    """The tasks of the layer at place `index`; before: what all of its fits and predictions wait for."""
    settings, layer = job.settings, job.layers[index]
    measuring, needs = [], before
    if settings.align == "auto":
        order = job.part(layer, "order")
        measuring.append(Task(f"order of layer {layer}", order, (), partial(find_order, job, layer, order)))
        needs += (order,)
    if settings.calibration_tokens:
        inputs = job.part(layer, "inputs")
        work = partial(measure_inputs, job, layer, inputs)
        measuring.append(Task(f"inputs of layer {layer}", inputs, _before_inputs(job, index), work))
        needs += (inputs,)
    if settings.budget is not None:
        table = job.candidates(layer)
        work = partial(predict_errors, job, layer, table)
        measuring.append(Task(f"candidates of layer {layer}", table, needs, work))
        needs += (job.forms,)
    outputs = {p: job.part(layer, p) for p in PROJECTIONS}
    fitting = [Task(f"layer {layer} {p}", o, needs, partial(fit_part, job, layer, p, o)) for p, o in outputs.items()]
    return _LayerTasks(measuring, fitting)


def _before_inputs(job: Job, index: int) -> tuple[Path, ...]:
    """The layer before, whose output a layer reads: measured, and with `sequential` fitted too."""
    if index == 0:
        return ()
    previous = job.layers[index - 1]
    fitted = job.results(previous) if job.sequential else []
    return (job.part(previous, "inputs"), *fitted)
