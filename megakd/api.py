"""From Python: a run in two calls (set it up, run the verbs that are missing), and records as whole rows of logits."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from megakd.cli import run_verb
from megakd.engine.checkpoint import published
from megakd.errors import UserError
from megakd.losses.tails import reconstruct_logits
from megakd.names import as_text
from megakd.run import Run

__all__ = ["reconstruct_logits", "run_distillation_training", "setup_distillation_pipeline"]
RECIPE = "qwen3-30b-a3b-r64"  # its stages and rates; teacher, student and data are always given


Given = ParamSpec("Given")
Made = TypeVar("Made")


def _of_one_signature(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """The function; arguments of its namesake in `megakd.integrations.pipeline`, like config=, are one clear line."""

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            name = function.__name__
            raise UserError(
                f"megakd.api.{name}: {error}; it takes {', '.join(inspect.signature(function).parameters)}. With "
                f"config= call megakd.integrations.pipeline.{name}, which hands out models and data sets"
            ) from None
        return function(*args, **kwargs)

    return call


@_of_one_signature
def setup_distillation_pipeline(
    teacher: str | Path,
    student_or_rank: str | Path | int,
    data: str | Path,
    folder: str | Path,
    *overrides: str,
    recipe: str | Path = RECIPE,
) -> Run:
    """A new run in `folder`: what `megakd new` makes of a recipe; nothing is computed yet.

    teacher: a folder or hub id. student_or_rank: a model too, or the rank that `compress` makes one of.
    data: what `data.source` may be. overrides: "section.key=value", after those.
    """
    given = [f"model.teacher={as_text(teacher)}", f"data.source={as_text(data)}", "data.subset=null"]
    if isinstance(student_or_rank, int):
        given.append(f"compress.rank={student_or_rank}")
    else:  # the recipe's stages are about what `compress` makes
        given += [f"model.student={as_text(student_or_rank)}", 'stages=[{"name": "all", "epochs": 1}]']
    return Run.create(recipe, [*given, *overrides], folder)


@_of_one_signature
def run_distillation_training(run: Run | str | Path) -> Path:
    """Run what the run still lacks, verb by verb: each skips what is finished. The folder of the final weights."""
    run = run if isinstance(run, Run) else Run.open(run)
    verbs = ["tokenize", *([] if run.config.model.student else ["compress"])]
    verbs += [] if run.config.objective.live else ["generate-logits"]  # else the teacher itself is asked
    for verb in verbs:
        run_verb([verb, str(run.folder)])
    # in a process of its own: it may start a launcher, and joins the ranks
    code = subprocess.call([sys.executable, "-m", "megakd", "train", str(run.folder)])
    if code:
        raise UserError(f"{run.folder}: training ended with exit code {code}; call this again to go on")
    return published(run.path("checkpoints"))[-1].weights
