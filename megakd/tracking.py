"""Metrics of a run to metrics.jsonl, TensorBoard and W&B."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megakd.config.run import RunConfig
from megakd.config.train import LogConfig
from megakd.errors import UserError, foreign, reason
from megakd.system.extras import require
from megakd.system.files import append_json, publishing, read_json_lines
from megakd.system.logging import say
from megakd.system.text import finite


class MetricLog:
    """Writes each step's metrics everywhere under the same names; resumed at `step`, forgets what came after it."""

    def __init__(self, folder: Path, config: LogConfig, name: str, run_id: str, frozen: dict[str, Any], step: int):
        self.file = folder / "metrics.jsonl"
        rows = read_json_lines(self.file, "step")
        if any(row["step"] > step for row in rows):
            with publishing(self.file) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in rows if r["step"] <= step), encoding="utf-8")
        check_libraries(config)
        self.trackers: list[Tracker] = []
        if config.tensorboard:
            self.trackers.append(Tracker("TensorBoard", lambda: _Board(folder / "tensorboard", "train", step)))
        if (mode := wandb_mode(config)) != "disabled":
            self.trackers.append(Tracker("W&B", lambda: _Wandb(folder, config, name, run_id, frozen, mode, "train")))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        # JSON has no NaN: what is not finite is written as null, and on no curve
        written = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        append_json(self.file, {"step": step, **written})
        numbers = {k: v for k, v in written.items() if isinstance(v, int | float)}
        for tracker in self.trackers:
            tracker.write(step, numbers)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


class Tracker:
    """TensorBoard or W&B for numbers of steps; it never raises: where it fails it says so once and writes no more.

    Slurm signals every process of a job, so W&B's own process may be gone while the training still has to save.
    """

    def __init__(self, name: str, start: "Callable[[], _Board | _Wandb]"):
        self.name, self.target = name, None
        self._try(lambda: setattr(self, "target", start()))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if (target := self.target) is not None:
            self._try(lambda: target.write(step, numbers))

    def close(self) -> None:
        if (target := self.target) is not None:
            self._try(target.close)
            self.target = None

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # W&B passes on the exit code of its process
            say(f"{self.name} failed: {reason(error)}; going on without it; metrics.jsonl and evals.jsonl are complete")
            target, self.target = self.target, None
            if isinstance(target, _Wandb):
                target.abandon()


class _Board:
    """TensorBoard's files in a folder; what a resumed training writes again at `step` + 1 and later is purged."""

    def __init__(self, folder: Path, prefix: str, step: int | None = None):
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)
        self.prefix = prefix

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(f"{self.prefix}/{key}", value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of W&B, sent or recorded below a folder. own_steps: its step is a number like others, not its line."""

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        name: str,
        run_id: str,
        frozen: dict[str, Any],
        mode: Any,
        prefix: str,
        own_steps: bool = False,
    ):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.library, self.prefix, self.own_steps = wandb, prefix, own_steps
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            x_disable_stats=True,
            finish_timeout=SECONDS_TO_FINISH,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1,  # s; of its 15 nothing is on disk when a signal ends W&B's process
        )
        try:
            self.run = wandb.init(
                project=config.wandb_project, name=name.strip() or None, id=run_id, resume="allow", mode=mode,
                dir=str(folder), config=frozen, settings=settings,
            )  # fmt: skip
            if own_steps:
                self.run.define_metric(f"{prefix}/step", hidden=True)
                self.run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        except BaseException:
            self.abandon()
            raise

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        named = {f"{self.prefix}/{key}": value for key, value in numbers.items()}
        if self.own_steps:
            self.run.log({f"{self.prefix}/step": step, **named})
        else:
            self.run.log(named, step=step, commit=True)  # else W&B keeps the row until the next one comes

    def close(self) -> None:
        self.run.finish()
        self.library.teardown()  # here, and not when the interpreter ends: W&B would print a traceback then

    def abandon(self) -> None:
        """Close W&B's process in whatever state it is, so that a later run of this process starts a new one."""
        for end in (self.library.finish, self.library.teardown):
            with suppress(Exception, SystemExit):
                end()


SECONDS_TO_FINISH = 20  # for W&B to send the rest; a scheduler that stops a job waits about 30 s before it kills
# what WANDB_MODE may say, and what it means
WANDB_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def wandb_mode(config: LogConfig) -> str:
    """online, offline or disabled: WANDB_MODE where it is set, else log.wandb; log.wandb=disabled stays disabled."""
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    if config.wandb == "disabled" or not asked:
        return config.wandb
    if asked not in WANDB_MODES:
        raise UserError(f"WANDB_MODE={asked}: expected online, offline or disabled; set one of them, or unset it")
    return WANDB_MODES[asked]


def check_libraries(config: LogConfig) -> None:
    """UserError when what metrics are written with is not installed."""
    remedy = "set log.tensorboard=false log.wandb=disabled"
    if config.tensorboard:
        require("tensorboard", "log.tensorboard=true", remedy)
    if wandb_mode(config) != "disabled":
        require("wandb", _asked(config), remedy)


def check_tracking(config: LogConfig) -> None:
    """`check_libraries`, and UserError where metrics are to be sent to W&B and no login is known here."""
    check_libraries(config)
    if wandb_mode(config) == "online" and not _logged_in():
        remedy = "run `wandb login`, set WANDB_API_KEY, or set log.wandb=offline"
        raise UserError(f"{_asked(config)}: no login to W&B is known here; {remedy}")


def _asked(config: LogConfig) -> str:
    """Which setting chose W&B's mode."""
    mode = wandb_mode(config)
    return f"log.wandb={mode}" if mode == config.wandb else f"WANDB_MODE={mode}"


def _logged_in() -> bool:
    """Whether W&B has a key to send with: of the environment, of ~/.netrc, of this session; asks no server."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from wandb.sdk.lib.wbauth import authenticate_session

    with foreign("log.wandb=online: W&B", "correct it, or set log.wandb=offline"):
        host = wandb.setup().settings.base_url
        return authenticate_session(host=host, source="megakd", prompt=False, update_session=False) is not None


def log_evaluation(folder: Path, config: RunConfig, step: int, numbers: dict[str, float]) -> None:
    """Put numbers of a checkpoint as `eval/NAME` at its step, during a training that may go on in another process.

    Each call leaves files of its own, whole, so a kill loses nothing and processes do not meet.
    TensorBoard follows a folder's newest file alone (`DirectoryWatcher`): another one next to training's would end its
    curves, so these are a folder below. Of two processes that send to one W&B run each counts lines from its own start:
    the server keeps the last of a number; in its shared mode it ignores steps. So this is recorded offline under the
    run's id, with a step of its own, for `wandb sync` to append when training has ended; in a folder of its own, for
    sync sends what is in one by age, and a training that was resumed later would have its steps counted on from here.
    """
    check_libraries(config.log)
    if config.log.tensorboard:
        shown = {name: value for name, value in numbers.items() if finite(value) is not None}
        board = Tracker("TensorBoard", lambda: _Board(folder / "tensorboard" / "eval", "eval"))
        board.write(step, shown)
        board.close()
    if wandb_mode(config.log) != "disabled":
        place, frozen = folder / "watch", config.model_dump(mode="json")
        place.mkdir(exist_ok=True)
        run = Tracker(
            "W&B",
            lambda: _Wandb(place, config.log, config.name, wandb_id(config), frozen, "offline", "eval", own_steps=True),
        )
        run.write(step, numbers)
        run.close()


def wandb_id(config: RunConfig) -> str:
    """The id that all processes of a run give W&B: the name in letters that W&B takes, fingerprint, the folder's mark.

    Two folders of one recipe have two ids. A folder keeps its id when training resumes, and when it is moved.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name).strip("-")[:60] or "run"
    return "-".join(part for part in (name, config.fingerprint()[:8], config.mark) if part)
