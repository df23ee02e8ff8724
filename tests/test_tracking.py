import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megakd.config.run import RunConfig
from megakd.config.train import LogConfig
from megakd.engine.checkpoint import published
from megakd.errors import UserError
from megakd.run import Run
from megakd.system.files import read_json_lines
from megakd.system.logging import Progress, say
from megakd.system.text import clock, short, table
from megakd.tracking import MetricLog, check_tracking, log_evaluation, wandb_id, wandb_mode
from megakd.train.metrics import StageWatch, StepRecord
from tests.forks import Forked

QUIET = LogConfig(tensorboard=False, wandb="disabled")


def metric_log(folder: Path, config: LogConfig = QUIET, step: int = 0) -> MetricLog:
    return MetricLog(folder, config, "a name", "run-id", {"optim": {"lr": 0.1}}, step)


def row(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "stage": "experts"}


def write(log: MetricLog, step: int, loss: float) -> None:
    log.write(step, {"loss": loss, "stage": "experts"})


@pytest.mark.parametrize(
    "number, expected",
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (0.5, "0.5"),
        (1000, "1k"),
        (1234567, "1.23M"),
        (2e9, "2G"),
        (3.5e12, "3.5T"),
        (-1500, "-1.5k"),
    ],
)
def test_short(number, expected):
    assert short(number) == expected


@pytest.mark.parametrize("number", [999.9, 999_999, 999_999_999, 999.9e9])
def test_short_rounds_over_to_the_next_unit(number):
    text = short(number)
    assert "e" not in text
    value = float(text.rstrip("kMGT")) * {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
    assert value == pytest.approx(number, rel=5e-3)


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0, "0:00"),
        (7.4, "0:07"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3599.7, "1:00:00"),
        (36610, "10:10:10"),
        (360000, "100:00:00"),
    ],
)
def test_clock(seconds, expected):
    assert clock(seconds) == expected


def test_table():
    found = table(["name", "value"], [["a", "1.5"], ["longer name", "10.25"]])
    assert [line.rstrip() for line in found.splitlines()] == [
        "name         value",
        "-----------  -----",
        "a              1.5",
        "longer name  10.25",
    ]
    assert table(["a", "bc"], []).splitlines() == ["a  bc", "-  --"]


def test_progress_line_shows_counts_and_share():
    progress = Progress("tokenize", 350_000, "tokens", done=100_000)
    progress.update(20_000)
    line = progress.line("note")
    assert line.startswith("tokenize   34%  120k/350k tokens  ") and "tokens/s  ETA " in line and line.endswith("note")


def test_progress_leaves_what_was_done_before_out_of_the_rate():
    progress = Progress("tokenize", 1000, "tokens", done=900)
    assert "0 tokens/s  ETA ?" in progress.line()
    progress.start -= 100  # begun 100 s ago
    progress.update(50)
    assert "0.5 tokens/s  ETA 1:40" in progress.line()


def test_progress_knows_what_others_do_and_times_its_own():
    progress = Progress("generate-logits", 1000, "tokens", done=100, own=300)
    progress.start -= 100
    progress.add_others(400)
    assert "50%  500/1k tokens  0 tokens/s  ETA ?" in progress.line()
    progress.update(100)
    assert "60%  600/1k tokens  1 tokens/s  ETA 3:20" in progress.line()


def test_progress_beyond_its_total_has_no_time_left():
    """The last window goes past the budget."""
    progress = Progress("tokenize", 100, "tokens")
    progress.start -= 100
    progress.update(110)
    assert "100%" in progress.line() and "ETA 0:00" in progress.line()


def test_progress_ends_with_a_summary_unless_quiet(capsys):
    for quiet in (False, True):
        progress = Progress("tokenize", 10, "tokens", quiet=quiet)
        progress.update(10)
        progress.close("3 shards")
        output = capsys.readouterr()
        assert output.out == ""
        assert (
            output.err == ""
            if quiet
            else output.err.startswith("tokenize: 10 tokens in ") and output.err.endswith("3 shards\n")
        )


def test_progress_ends_with_the_tokens_that_its_rate_is_about(capsys):
    """Of two workers each said the tokens of both and its own rate."""
    progress = Progress("generate-logits", 1000, "tokens", done=100)
    progress.start -= 10
    progress.update(300)
    progress.add_others(600)
    progress.close()
    assert capsys.readouterr().err == "generate-logits: 300 of 1k tokens in 0:10, 30 tokens/s\n"


def test_say_goes_to_stderr(capsys):
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_metrics_are_rows_of_a_file(tmp_path):
    log = metric_log(tmp_path)
    for step in (1, 2, 3):
        write(log, step, 1 / step)
    log.close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == [row(1, 1.0), row(2, 0.5), row(3, 1 / 3)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_after_the_resumed_step_are_forgotten(tmp_path):
    for start, end, loss in ((0, 5, 1.0), (3, 6, 2.0), (6, 7, 3.0)):
        log = metric_log(tmp_path, step=start)
        for step in range(start + 1, end + 1):
            write(log, step, loss)
        log.close()
    expected = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0]
    assert read_json_lines(tmp_path / "metrics.jsonl") == [row(step, loss) for step, loss in enumerate(expected, 1)]
    metric_log(tmp_path, step=0).close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("resumed", [1, 2])
def test_a_row_that_a_kill_cut_short_spoils_no_later_one(tmp_path, resumed):
    cut = json.dumps(row(3, 0.25))[:20]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(s, 1.0)) + "\n" for s in (1, 2)) + cut)
    log = metric_log(tmp_path, step=resumed)
    write(log, resumed + 1, 2.0)
    write(log, resumed + 2, 2.0)
    log.close()
    rows = [row(s, 1.0) for s in range(1, resumed + 1)] + [row(s, 2.0) for s in (resumed + 1, resumed + 2)]
    assert read_json_lines(tmp_path / "metrics.jsonl") == rows


def test_stage_watch_divides_by_the_steps_tokens_and_counts_damage(tmp_path, capsys):
    """Damage is logged from the first damaged sample on, as the number since the stage began in this process."""
    log = metric_log(tmp_path)
    watch = StageWatch("experts", 4, 0, 2, log)
    for step, (tokens, damaged) in enumerate([(10, 0), (8, 1), (0, 3), (10, 0)], 1):
        watch.data_ready()
        sums = {"total": 2.0 * tokens, "ce": tokens}
        watch.step_done()
        watch.write(StepRecord(step, 6 + step, 100 * step, tokens, sums, 0.1, 0.5, damaged))
    log.close()
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [r.get("damaged_samples") for r in rows] == [None, 1, 4, 4]
    assert [(r["step"], r["tokens"], r["loss"], r["ce"]) for r in rows] == [
        (7, 100, 2.0, 1.0), (8, 200, 2.0, 1.0), (9, 300, 0.0, 0.0), (10, 400, 2.0, 1.0),
    ]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    parts = [line.split(" | ") for line in said]
    assert [part[:3] for part in parts] == [
        [f"experts {done}", "loss 2.0000 ce 1.0000", "lr 1.00e-01"] for done in ("2/4 50%", "4/4 100%")
    ]
    silent = StageWatch("experts", 4, 0, 1, None)  # of another rank
    silent.step_done()
    silent.write(StepRecord(1, 1, 10, 10, {"total": 2.0}, 0.1, 0.5, 2))
    assert capsys.readouterr().err == ""


def test_tensorboard_holds_the_same_numbers(tmp_path):
    """Also those of a resumed run: steps that were done again stand there once."""
    config = LogConfig(tensorboard=True, wandb="disabled")
    for start, end, loss in ((0, 4, 1.0), (2, 5, 0.123)):
        log = metric_log(tmp_path, config, start)
        for step in range(start + 1, end + 1):
            log.write(step, {"loss": loss / step, "tokens": 100 * step, "stage": "experts"})
        log.close()
        time.sleep(1.1)  # event files are read in the order of their names: the second, then a count that is no number
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == ["train/loss", "train/tokens"]
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    for key in ("loss", "tokens"):
        found = board.Scalars(f"train/{key}")
        assert [event.step for event in found] == [1, 2, 3, 4, 5]
        assert [event.value for event in found] == pytest.approx([r[key] for r in rows], rel=1e-6)  # float32 there


def test_wandb_offline_writes_under_the_run(tmp_path, monkeypatch, capfd):
    import wandb

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    log = metric_log(folder, LogConfig(tensorboard=False, wandb="offline", wandb_project="a-project"))
    for step in (1, 2, 3):
        write(log, step, 1 / step)
    log.close()
    assert wandb.run is None
    assert {p.name for p in folder.iterdir()} == {"metrics.jsonl", "wandb"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    [path] = folder.glob("wandb/offline-run-*/run-run-id.wandb")
    content, deadline = path.read_bytes(), time.monotonic() + 20
    while str(1 / 3).encode() not in content and time.monotonic() < deadline:  # another process writes it
        time.sleep(0.1)
        content = path.read_bytes()
    # protobuf: names and JSON values stand there as they are
    for text in ("a-project", "a name", "optim", "train/loss", str(1 / 3)):
        assert text.encode() in content, text
    assert b"train/stage" not in content  # no number
    output = capfd.readouterr()
    assert "wandb" not in output.out + output.err


@pytest.mark.parametrize("name", ["team/a", "R=64: second", "a#b", " ", "→", "x" * 500])
def test_name_that_is_no_id_for_wandb_is_made_one(name):
    config = RunConfig(name=name)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", wandb_id(config)) and wandb_id(config) != wandb_id(RunConfig(seed=1))


def test_two_folders_of_one_recipe_have_two_wandb_ids_and_keep_them(tmp_path):
    first, second = (Run.create("demo", ["log.wandb=offline"], tmp_path / name) for name in "ab")
    assert wandb_id(first.config) != wandb_id(second.config) and first.config == second.config
    assert wandb_id(Run.open(first.folder).config) == wandb_id(first.config)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert wandb_id(Run.open(tmp_path / "moved", ["log.every_steps=3"]).config) == wandb_id(first.config)
    assert wandb_id(Run.create(tmp_path / "moved", [], tmp_path / "c").config) != wandb_id(first.config)


def test_project_that_wandb_refuses_is_refused_by_new(tmp_path):
    with pytest.raises(UserError, match=r"log\.wandb_project"):
        Run.create("demo", ["log.wandb_project=team/a"], tmp_path / "run")


@pytest.mark.parametrize(
    "field, variable, mode",
    [
        ("offline", None, "offline"),
        ("online", "offline", "offline"),
        ("online", "dryrun", "offline"),
        ("online", "Disabled", "disabled"),
        ("offline", "online", "online"),
        ("disabled", "online", "disabled"),
    ],
)
def test_wandb_mode_of_the_environment_counts_where_wandb_is_not_disabled(monkeypatch, field, variable, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_mode(LogConfig(wandb=field)) == mode


def test_unknown_wandb_mode_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE=shared: expected online, offline or disabled"):
        wandb_mode(LogConfig(wandb="offline"))


def test_online_wandb_without_a_login_is_one_line_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"log\.wandb=online: no login to W&B is known"):
        check_tracking(LogConfig(tensorboard=False, wandb="online"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracking(LogConfig(tensorboard=False, wandb="online"))


def helpers(pid: int) -> list[psutil.Process]:
    """W&B's own process below a process."""
    return [each for each in psutil.Process(pid).children(recursive=True) if "wandb" in each.name()]


def end_helper(number: int) -> None:
    """End the process that W&B has here; waited for by its owner, else Python warns of it much later."""
    import wandb

    process = wandb.setup().ensure_service()._proc._process
    process.send_signal(number)
    process.wait(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_wandb_whose_process_is_gone_raises_nothing_and_keeps_what_it_had(tmp_path, number, capfd):
    """Slurm sends a stop signal to every process: `log` and `finish` raised in the training that had to save."""
    config = LogConfig(tensorboard=False, wandb="offline")
    log = metric_log(tmp_path, config)
    write(log, 1, 0.0625)
    [recorded] = tmp_path.glob("wandb/offline-run-*/run-run-id.wandb")
    deadline = time.monotonic() + 20
    while b"0.0625" not in recorded.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    end_helper(number)
    for step in (2, 3, 4):
        write(log, step, 1 / step)
    log.close()
    assert capfd.readouterr().err.count("W&B failed") == 1 and b"0.0625" in recorded.read_bytes()
    again = metric_log(tmp_path, config, 4)  # in this process, which has a new one of W&B's started
    write(again, 5, 0.2)
    again.close()
    assert [r["step"] for r in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert capfd.readouterr().err == "" and not helpers(os.getpid())


def test_wandb_whose_process_is_gone_at_the_end_raises_nothing(tmp_path, capfd):
    log = metric_log(tmp_path, LogConfig(tensorboard=False, wandb="offline"))
    write(log, 1, 1.0)
    end_helper(signal.SIGKILL)
    log.close()
    assert capfd.readouterr().err.count("W&B failed") == 1


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_failing_wandb_does_not_end_a_training(tmp_path, monkeypatch, capfd, place):
    import wandb

    def fail(*_: object, **__: object) -> None:
        raise SystemExit(1) if place == "finish" else RuntimeError("no space\nleft")

    monkeypatch.setattr(wandb if place == "init" else wandb.Run, place, fail)
    log = metric_log(tmp_path, LogConfig(tensorboard=False, wandb="offline"))
    for step in (1, 2):
        write(log, step, 1.0)
    log.close()
    assert capfd.readouterr().err.count("W&B failed: ") == 1
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 2


def test_failing_tensorboard_does_not_end_a_training(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("")  # no folder
    log = metric_log(tmp_path, LogConfig(tensorboard=True, wandb="disabled"))
    for step in (1, 2):
        write(log, step, 1.0)
    log.close()
    assert capfd.readouterr().err.count("TensorBoard failed: ") == 1
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 2


def test_failing_trackers_do_not_end_watch(tmp_path, monkeypatch, capfd):
    import wandb

    (tmp_path / "tensorboard").write_text("")
    monkeypatch.setattr(wandb, "init", None)
    log_evaluation(
        tmp_path, RunConfig(name="a", log=LogConfig(tensorboard=True, wandb="offline")), 3, {"perplexity": 2}
    )
    said = capfd.readouterr().err
    assert said.count("W&B failed: ") == said.count("TensorBoard failed: ") == 1


@pytest.mark.parametrize("number, stop", [(signal.SIGTERM, True), (signal.SIGKILL, True), (signal.SIGKILL, False)])
def test_training_saves_and_ends_well_after_wandbs_process_was_ended(sibling, number, stop):
    run = sibling("log.wandb=offline", "checkpoint.every_steps=20", "stages.1.tokens=10240")
    process = Forked("megakd", "train", run.folder, stderr=subprocess.PIPE)
    said = ""
    for line in process.stderr:
        said += line
        if "experts 2/4" in line:
            for helper in helpers(process.pid):
                helper.send_signal(number)
            if stop:
                process.send_signal(number if number == signal.SIGTERM else signal.SIGUSR1)
            break
    said += process.communicate()[1] or ""
    assert process.returncode == (85 if stop else 0), said
    assert said.count("W&B failed: ") == 1 and "Traceback" not in said
    saved = published(run.path("checkpoints"))[-1].progress.step
    assert [row["step"] for row in read_json_lines(run.path("metrics.jsonl"))] == list(range(1, saved + 1))
    assert stop or saved == 24
