"""Metrics of a run to metrics.jsonl, TensorBoard and W&B."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from megakd.config.run import RunConfig
from megakd.config.train import LogConfig
from megakd.errors import UserError, foreign
from megakd.system.extras import require
from megakd.system.files import append_json, publishing, read_json_lines
from megakd.system.text import finite


class MetricLog:
    """Writes each step's metrics everywhere under the same names; resumed at `step`, forgets what came after it."""

    def __init__(self, folder: Path, config: LogConfig, name: str, run_id: str, frozen: dict[str, Any], step: int):
        self.file = folder / "metrics.jsonl"
        rows = read_json_lines(self.file, "step")
        if any(row["step"] > step for row in rows):
            with publishing(self.file) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in rows if r["step"] <= step), encoding="utf-8")
        self.board = self.wandb = None
        check_libraries(config)
        if config.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if (mode := wandb_mode(config)) != "disabled":
            self.wandb = _open_wandb(folder, config.wandb_project, name, run_id, frozen, mode)

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
        from torch.utils.tensorboard.writer import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard" / "eval")) as board:
            for name, value in numbers.items():
                if finite(value) is not None:
                    board.add_scalar(f"eval/{name}", value, step)
    if wandb_mode(config.log) != "disabled":
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
