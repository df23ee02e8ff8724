"""lm-eval's tasks on a model that is loaded already, one task at a time, for students and stock models alike."""

import contextlib
import difflib
import functools
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megakd.config.train import EvalConfig
from megakd.errors import UserError
from megakd.names import expand
from megakd.system.extras import require
from megakd.system.logging import Progress, say

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else lm-eval forks this process, which has threads, to resample
# Resamples for the standard error of what is no mean; lm-eval's 100,000 take minutes where questions are thousands.
BOOTSTRAP = 1000
SEEDS = (0, 1234)  # lm-eval's own: of `random`, and of numpy, torch and the choice of few-shot examples


class Harness:
    """The named tasks, opened once: an unknown name or an unreadable data set is said before a model is measured."""

    def __init__(self, names: Sequence[str], config: EvalConfig):
        require("lm_eval", f"tasks {', '.join(names)}")
        self.config = config
        self.tasks: dict[str, Any] = {}
        with _only_errors(), _no_bars():
            manager = _manager(names, config.task_folder)
            if config.task_folder:
                _locate(manager, names, expand(config.task_folder))
            for name in names:
                self.tasks[name] = _open(manager, name)
        for name in names:
            for task in self.tasks[name]["tasks"].values():
                _set_few_shot(task, config.few_shot)

    def questions(self) -> dict[str, int]:
        """How many each of the named tasks has, or those of eval.limit."""
        limit = self.config.limit
        counts = {
            name: [len(task.eval_docs) for task in opened["tasks"].values()] for name, opened in self.tasks.items()
        }
        return {name: sum(min(each, limit or each) for each in found) for name, found in counts.items()}

    def measure(self, name: str, model: Any, tokenizer: Any, title: str) -> dict[str, dict[str, Any]]:
        """{task: {"acc,none": …, "acc_stderr,none": …}} as lm-eval names them; of a group the group and its tasks.

        Next to them `samples`, and `higher_is_better` of each metric.
        """
        return self.measure_with(name, lambda: _language_model(model, tokenizer, self.config.task_batch_size, title))

    def measure_with(self, name: str, language_model: Callable[[], Any]) -> dict[str, dict[str, Any]]:
        """The same of a model as lm-eval calls it."""
        from lm_eval.evaluator import evaluate

        _seed(self.tasks[name]["tasks"].values())
        with contextlib.redirect_stdout(sys.stderr), _no_bars():  # lm-eval prints; standard output is the verb's
            lm = language_model()
            found: Any = evaluate(
                lm, self.tasks[name], limit=self.config.limit, bootstrap_iters=BOOTSTRAP, log_samples=False
            )
        return {task: _numbers(metrics, found, task) for task, metrics in found["results"].items()}


def served_model(url: str, model: str, tokenizer: Path, batch_size: int, context: int | None) -> Any:
    """lm-eval's model of a server with OpenAI's interface; prompts are sent as token ids.

    url: up to /v1. context: the most tokens that the server reads; None: lm-eval's own default.
    """
    require("tenacity", "tasks over an endpoint")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    longest = {} if context is None else {"max_length": context}
    with _only_errors():
        return LocalCompletionsAPI(
            base_url=f"{url}/completions",
            model=model,
            tokenizer=str(tokenizer),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            batch_size=batch_size,
            **longest,
        )


def metric_value(tasks: dict[str, dict[str, Any] | None], name: str) -> tuple[float | None, bool]:
    """The value of TASK/METRIC in what `measure` gave (None: not measured), and whether higher is better."""
    task, _, metric = name.partition("/")
    found = tasks.get(task) or {}
    value = found.get(metric if "," in metric else f"{metric},none")
    return value, found.get("higher_is_better", {}).get(metric.partition(",")[0], True)


def flat(tasks: dict[str, dict[str, Any] | None], kind: str = "") -> dict[str, float]:
    """TASK/METRIC or TASK/METRIC_FILTER, the names that curves have: the values, or with "_stderr" their errors."""
    return {
        f"{task}/{key.replace('_stderr,', ',').removesuffix(',none').replace(',', '_')}": value
        for task, metrics in tasks.items()
        for key, value in (metrics or {}).items()  # None: the task failed
        if "," in key and ("_stderr," in key) == bool(kind) and value is not None
    }


def _numbers(metrics: dict[str, Any], found: Any, task: str) -> dict[str, Any]:
    """The numbers of one task; null where one is not finite, which JSON cannot say."""
    numbers = {k: v for k, v in metrics.items() if "," in k and isinstance(v, int | float)}
    result: dict[str, Any] = {k: float(v) if math.isfinite(v) else None for k, v in numbers.items()}
    result["samples"] = int(metrics.get("sample_len") or 0)
    result["higher_is_better"] = {k: v for k, v in found["higher_is_better"].get(task, {}).items() if v is not None}
    return result


def _manager(names: Sequence[str], folder: str | None) -> Any:
    """lm-eval's index of tasks; its own 14,000, which take 12 s to read, only when a name is not in the folder."""
    from lm_eval.tasks import TaskManager

    place = None if folder is None else expand(folder)
    if place is not None:
        if not place.is_dir():
            raise UserError(f"eval.task_folder: {folder} is no folder")
        own = TaskManager(include_path=place, include_defaults=False)
        if all(name in own.task_index for name in names):
            return own
    manager = TaskManager(include_path=place)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            where = f"below {folder}" if folder else "(eval.task_folder is not set)"
            raise UserError(
                f"eval.tasks: lm-eval knows no task {name!r}, nor is there one {where}"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )
    return manager


def _open(manager: Any, name: str) -> Any:
    """A task, group or tag with its data sets loaded."""
    try:
        return manager.load([name])
    except Exception as error:  # data sets, their loaders, templates and code of tasks fail each in their own way
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"eval.tasks: {name} cannot be opened: {type(error).__name__}: {reason}") from error


def _locate(manager: Any, names: Sequence[str], folder: Path) -> None:
    """Name data files of the requested tasks in `folder` from their YAML files on, wherever this process runs.

    lm-eval would look from the working directory on, and a folder of tasks could not be moved. Tasks that nobody
    requested are not loaded: their `!function` would run code.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    for name in _requested(manager, names):
        entry = manager.task_index[name]
        file: Any = entry.yaml_path
        if file is None or not Path(file).resolve().is_relative_to(folder.resolve()):
            continue
        if "!function" in Path(file).read_text(encoding="utf-8", errors="replace"):
            say(f"eval.tasks: {name} runs Python code that {file} names")
        if ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files"):
            with contextlib.suppress(Exception):  # opening it says what is wrong
                task = load_yaml(file)
                files = _below(Path(file).parent.resolve(), task["dataset_kwargs"]["data_files"])
                entry.cfg = {**task, "dataset_kwargs": {**task["dataset_kwargs"], "data_files": files}}
                entry.yaml_path = None  # else lm-eval reads it again


def _requested(manager: Any, names: Iterable[str]) -> set[str]:
    """The registered names that lm-eval opens for `names`: tasks, and what groups and tags hold, through all levels."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name not in manager.task_index:
            continue
        found.add(name)
        entry = manager.task_index[name]
        if entry.kind.name == "TAG":
            waiting += entry.tags
        elif entry.kind.name == "GROUP":
            waiting += _members(entry.cfg or {})
    return found


def _members(group: dict[str, Any]) -> list[str]:
    """The names in a group's `task`; of groups that it defines itself, theirs."""
    members = group.get("task")
    names = []
    for item in members if isinstance(members, list) else [members]:
        if isinstance(item, dict):
            names += [each for each in (item.get("group"), item.get("task")) if isinstance(each, str)]
            names += _members(item) if isinstance(item.get("task"), list) else []
        elif isinstance(item, str):
            names.append(item)
    return names


def _below(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {key: _below(folder, value) for key, value in files.items()}
    if isinstance(files, list):
        return [_below(folder, value) for value in files]
    return files if "://" in files else str(folder / files)


def _set_few_shot(task: Any, few_shot: int | None) -> None:
    """As lm-eval's command line does: a task that says 0 keeps it, one that says nothing has 0."""
    own = task.get_config("num_fewshot")
    if few_shot is not None and own != 0:
        task.set_config(key="num_fewshot", value=few_shot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _seed(tasks: Iterable[Any]) -> None:
    """Start every random choice anew, so that a task gives the same prompts each time."""
    import torch

    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[1])
    for task in tasks:
        task.set_fewshot_seed(seed=SEEDS[1])


def _language_model(model: Any, tokenizer: Any, batch_size: int, title: str) -> Any:
    """lm-eval's HFLM over `model`, with our progress line; softmax in float32 whatever the model computes in."""
    from lm_eval.models.huggingface import HFLM

    base: Any = HFLM

    class Watched(base):
        progress: Progress | None = None

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            with self._counting(len(requests)):  # of which a long one takes several forward passes
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            rolling = override_bs is not None
            with contextlib.nullcontext() if rolling else self._counting(len(requests)):
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            with self._counting(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._count(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = super()._model_generate(context, *args, **kwargs)
            self._count(len(context))
            return tokens

        @contextlib.contextmanager
        def _counting(self, requests: int) -> Iterator[None]:
            """A progress line over so many requests; lm-eval answers some of them without a forward pass."""
            self.progress = progress = Progress(title, requests, "requests")
            yield
            progress.update(max(requests - progress.done, 0))
            progress.close()
            self.progress = None

        def _count(self, rows: int) -> None:
            if self.progress is not None:
                self.progress.update(rows)

    with _only_errors():  # it warns that a loaded model was passed, which is what we want
        return Watched(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32"
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of lm-eval and datasets, which would break our own line and fill logs."""
    import datasets
    import tqdm.std

    bar: Any = tqdm.std.tqdm
    init, shown = bar.__init__, datasets.is_progress_bar_enabled()
    bar.__init__ = functools.partialmethod(init, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        bar.__init__ = init
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
