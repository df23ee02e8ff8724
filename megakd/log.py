"""What a person watches: a progress line with ETA, and metrics to metrics.jsonl, TensorBoard and W&B."""

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megakd.config import LogConfig, RunConfig
from megakd.errors import foreign
from megakd.files import append_json, publishing, read_json_lines


def say(message: str) -> None:
    """One line for the person at the terminal."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


class Progress:
    """`generate-logits  34%  120k/350k tokens  5.3k tokens/s  ETA 0:42`, redrawn on a terminal, else a line every 10 s.

    done: what was finished before (a resumed pass), which does not count for the rate.
    own: what this process has to do itself (default: all the rest); rate and ETA are about that.
    """

    def __init__(
        self, name: str, total: float, unit: str, done: float = 0, quiet: bool = False, own: float | None = None
    ):
        self.name, self.total, self.unit, self.quiet = name, max(total, 1), unit, quiet
        self.done = self.before = done
        self.own = total - done if own is None else own
        self.start = self.shown = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def update(self, count: float, note: str = "") -> None:
        self.done += count
        now = time.perf_counter()
        if not self.quiet and now - self.shown >= (0.2 if self.terminal else 10):
            self.shown = now
            sys.stderr.write(("\r\x1b[K" if self.terminal else "") + self.line(note) + ("" if self.terminal else "\n"))
            sys.stderr.flush()

    def add_others(self, count: float) -> None:
        """Count what other processes did."""
        self.done += count
        self.before += count

    def line(self, note: str = "") -> str:
        seconds, mine = max(time.perf_counter() - self.start, 1e-9), self.done - self.before
        rate = mine / seconds
        eta = clock(max(self.own - mine, 0) / rate) if rate > 0 else "?"
        counts = f"{short(self.done)}/{short(self.total)} {self.unit}"
        share = min(self.done / self.total, 1)
        return f"{self.name}  {share:4.0%}  {counts}  {short(rate)} {self.unit}/s  ETA {eta}  {note}".rstrip()

    def close(self, note: str = "") -> None:
        if not self.quiet:
            seconds = time.perf_counter() - self.start
            rate = (self.done - self.before) / max(seconds, 1e-9)
            counts = f"{short(self.done)} {self.unit} in {clock(seconds)}, {short(rate)} {self.unit}/s"
            sys.stderr.write(("\r\x1b[K" if self.terminal else "") + f"{self.name}: {counts}  {note}".rstrip() + "\n")
            sys.stderr.flush()


class MetricLog:
    """Writes each step's metrics everywhere under the same names; resumed at `step`, forgets what came after it."""

    def __init__(self, folder: Path, config: LogConfig, name: str, run_id: str, frozen: dict[str, Any], step: int):
        self.file = folder / "metrics.jsonl"
        rows = read_json_lines(self.file, "step")
        if any(row["step"] > step for row in rows):
            with publishing(self.file) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in rows if r["step"] <= step), encoding="utf-8")
        self.board = self.wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if config.wandb != "disabled":
            self.wandb = _open_wandb(folder, config.wandb_project, name, run_id, frozen, config.wandb)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        # JSON has no NaN: what is not finite is written as null, and on no curve
        written = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        append_json(self.file, {"step": step, **written})
        numbers = {k: v for k, v in written.items() if isinstance(v, int | float)}
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(f"train/{key}", value, step)
        if self.wandb is not None:
            self.wandb.log({f"train/{k}": v for k, v in numbers.items()}, step=step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _open_wandb(folder: Path, project: str, name: str, run_id: str, frozen: dict[str, Any], mode: str) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
    how: Any = mode
    with foreign(f"{folder}: W&B", "correct it, or set log.wandb=disabled"):
        return wandb.init(
            project=project, name=name.strip() or None, id=run_id, resume="allow", mode=how, dir=str(folder),
            config=frozen, settings=settings,
        )  # fmt: skip


def log_evaluation(folder: Path, config: RunConfig, step: int, numbers: dict[str, float]) -> None:
    """Put numbers of a checkpoint as `eval/NAME` at its step, beside a training that may go on in another process.

    Each call leaves files of its own, whole, so a kill loses nothing and processes do not meet.
    TensorBoard follows a folder's newest file alone (`DirectoryWatcher`): another one beside training's would end its
    curves, so these are a folder below. Of two processes that send to one W&B run each counts lines from its own start:
    the server keeps the last of a number; in its shared mode it ignores steps. So this is recorded offline under the
    run's id, with a step of its own, for `wandb sync` to append when training has ended; in a folder of its own, for
    sync sends what is in one by age, and a training that was resumed later would have its steps counted on from here.
    """
    if config.log.tensorboard:
        from torch.utils.tensorboard.writer import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard" / "eval")) as board:
            for name, value in numbers.items():
                if finite(value) is not None:
                    board.add_scalar(f"eval/{name}", value, step)
    if config.log.wandb != "disabled":
        frozen = config.model_dump(mode="json")
        place = folder / "watch"
        place.mkdir(exist_ok=True)
        run = _open_wandb(place, config.log.wandb_project, config.name, wandb_id(config), frozen, "offline")
        run.define_metric("eval/step", hidden=True)
        run.define_metric("eval/*", step_metric="eval/step")
        run.log({"eval/step": step, **{f"eval/{name}": value for name, value in numbers.items()}})
        run.finish()


def wandb_id(config: RunConfig) -> str:
    """The id that all processes of a run give W&B: the name in letters that W&B takes, fingerprint, the folder's mark.

    Two folders of one recipe have two ids. A folder keeps its id when training resumes, and when it is moved.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name).strip("-")[:60] or "run"
    return "-".join(part for part in (name, config.fingerprint()[:8], config.mark) if part)


class StageWatch:
    """Times the steps of a stage; hands their metrics to a MetricLog and a line to the terminal (on the first rank)."""

    def __init__(self, stage: str, steps: int, first_step: int, every_steps: int, log: MetricLog | None):
        self.stage, self.steps, self.first_step, self.every_steps, self.log = stage, steps, first_step, every_steps, log
        self.start = self.asked = time.perf_counter()
        self.waited = 0.0
        self.damaged = 0

    def data_ready(self) -> None:
        """The step's data is here; what passed since the last step was waiting."""
        self.waited = time.perf_counter() - self.asked

    def resume_clock(self) -> None:
        """Leave out what passed since the last step, such as saving a checkpoint."""
        self.asked = time.perf_counter()

    def step_done(
        self,
        stage_step: int,
        step: int,
        seen: int,
        tokens: int,
        sums: dict[str, float],
        lr: float,
        norm: float,
        damaged: int = 0,
        left_out: int = 0,
        norms: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Log a step of `tokens` counted tokens; stage_step, step: done in the stage, in all; seen: tokens in all.

        damaged: samples that the step left out; logged is their number since this process began the stage.
        left_out: updates that were not made so far. norms: more of them, by their names in the log.
        """
        now = time.perf_counter()
        seconds = now - self.asked
        self.asked = now
        if self.log is None:
            return
        means = {"loss" if name == "total" else name: value / max(tokens, 1) for name, value in sums.items()}
        speed, wait, memory = tokens / seconds, self.waited / seconds, peak_memory_gb()
        self.damaged += damaged
        counts = {"damaged_samples": self.damaged, "left_out_updates": left_out}
        counts = {name: count for name, count in counts.items() if count}
        timing = {"tokens_per_second": speed, "data_wait_share": wait, "memory_gb": memory}
        numbers = {**means, "lr": lr, "grad_norm": norm, **norms, **counts, **timing}
        self.log.write(step, {"stage": self.stage, "tokens": seen, **numbers})
        if stage_step % self.every_steps == 0 or stage_step == self.steps:
            left = (now - self.start) / (stage_step - self.first_step) * (self.steps - stage_step)
            parts = [
                f"{self.stage} {stage_step}/{self.steps} {stage_step / self.steps:.0%}",
                " ".join(f"{name} {value:.4f}" for name, value in means.items()) or "nothing to learn from",
                f"lr {lr:.2e}",
                f"grad {norm:.2f}",
                f"{short(speed)} tokens/s",
                f"wait {wait:.1%}",
                f"{memory:.2f} GB",
                f"ETA {clock(left)}",
            ]
            say(" | ".join(parts))


def peak_memory_gb() -> float:
    """Peak memory of this process: of its GPU where it has one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def short(number: float) -> str:
    """1234567 → 1.23M, in three digits."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def finite(value: Any) -> float | None:
    """A number that can be compared, drawn and formatted; None for null, NaN, infinity, and what is no number."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def cell(row: Mapping[str, Any], name: str, form: str, scale: float = 1) -> str:
    """A cell of a table: the number `name` of a row times `scale`, "-" where it is missing or not finite."""
    value = finite(row.get(name))
    return "-" if value is None else format(value * scale if scale != 1 else value, form)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def table(headers: list[str], rows: list[list[str]], left: bool = False) -> str:
    """A plain text table: the first column flush left, the others flush right (`left`: all flush left)."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(row: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if left or i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return "\n".join([line(headers), "  ".join("-" * w for w in widths), *map(line, rows)])
