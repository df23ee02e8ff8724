"""Fit the teacher's experts: what a layer's experts share, and small factors an expert.

Any number of processes share the work through the run's folder, one (layer, projection) at a time; each is written when
it is done and not fitted again after a kill. The teacher is read one projection at a time, never whole. The student is
RUN/student-0, a Hugging Face folder, with compress.json and compress.png: the error of every matrix. With
compress.calibration_tokens, the errors that count are those on the inputs that the experts see (run `tokenize` first).

examples:
  megakd compress runs/a
  megakd compress runs/a & megakd compress runs/a & wait     two processes share the work
  srun --ntasks=16 megakd compress runs/a                    so do sixteen on any number of machines
"""

import argparse
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

from megakd.compress.job import open_job
from megakd.compress.pipeline import tasks
from megakd.errors import UserError
from megakd.names import resolve
from megakd.report.model_card import write_card
from megakd.report.plots import plot_errors
from megakd.report.tables import error_table
from megakd.run import Run
from megakd.system.files import discard, read_json
from megakd.system.logging import say
from megakd.system.tasks import run_tasks
from megakd.system.version import made_with

SECTIONS = ("model", "compress", "data")  # of the configuration


def main(run: Run, args: argparse.Namespace) -> None:
    target = run.path("student-0")
    if run.config.model.student:
        raise UserError(f"{run.folder}: model.student names {run.config.model.student}; there is nothing to compress")
    finished = target / "compress.json"
    if finished.exists():
        discard(run.path("compress"))  # a kill came between the student and this
        say(f"{target}: finished")
        return
    if target.exists():
        raise UserError(f"{target}: exists already, and compress did not make it (no compress.json); move it away")
    started = time.perf_counter()
    teacher = resolve(run.config.model.teacher, run.config.model.revision)
    job = open_job(run, teacher, partial(_describe, run.config.name, teacher))
    own = run_tasks("compress", tasks(job), finished, job.root.parts / "locks")
    discard(job.root.parts)  # begun by this process when another had just finished
    report = read_json(finished)
    say(error_table(report))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = time.perf_counter() - started
    run.record("compress", seconds=round(seconds, 1), tasks=own, peak_memory_gb=round(memory, 2), megakd=made_with())
    say(
        f"compress: {own} tasks here in {seconds:.0f} s, at most {memory:.2f} GB; "
        f"calibrated on {report['calibration_tokens']:,} tokens"
    )


def _describe(name: str, teacher: Path, folder: Path, report: dict[str, Any]) -> None:
    """Add the plot of the errors and the model card to a student."""
    plot_errors(report, folder / "compress.png")
    write_card(folder, name, report, license_from=(teacher,))
