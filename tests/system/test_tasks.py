"""Tasks shared through a folder: order, several processes, a killed one, one that fails."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from megakd.errors import UserError
from megakd.system import tasks
from megakd.system.files import remove, write_json
from megakd.system.tasks import Task, claimed, run_tasks


def chain(folder: Path, count: int, seconds: float = 0.0) -> list[Task]:
    """Task i waits for i - 1 and writes who did it; listed last first, so that order must come from `needs`."""

    def make(index: int) -> Task:
        output = folder / f"{index}.json"

        def work() -> None:
            time.sleep(seconds)
            assert not output.exists(), "done twice"
            write_json(output, {"process": os.getpid(), "time": time.monotonic()})

        return Task(f"task {index}", output, (folder / f"{index - 1}.json",) if index else (), work)

    return [make(index) for index in reversed(range(count))]


def test_needs_decide_the_order(tmp_path):
    assert run_tasks("test", chain(tmp_path, 5), tmp_path / "4.json", tmp_path / "locks") == 5
    times = [json.loads((tmp_path / f"{i}.json").read_text())["time"] for i in range(5)]
    assert times == sorted(times)


def test_what_is_there_is_not_done_again(tmp_path):
    run_tasks("test", chain(tmp_path, 3), tmp_path / "2.json", tmp_path / "locks")
    assert run_tasks("test", chain(tmp_path, 4), tmp_path / "3.json", tmp_path / "locks") == 1


def test_the_last_task_may_remove_what_the_others_made(tmp_path):
    """A process that comes late, or was in between, neither fails nor begins again."""
    parts, finished = tmp_path / "parts", tmp_path / "all.json"

    def finish() -> None:
        write_json(finished, {})
        remove(parts)

    tasks = chain(parts, 3)
    tasks.append(Task("all", finished, tuple(task.output for task in tasks), finish))
    assert run_tasks("test", tasks, finished, parts / "locks") == 4
    assert run_tasks("test", tasks, finished, tmp_path / "locks") == 0 and not parts.exists()
    with claimed(parts / "locks" / "0.json.lock") as mine:
        assert not mine
    context = multiprocessing.get_context("fork")
    finished.unlink()
    processes = [context.Process(target=run_tasks, args=("test", tasks, finished, parts / "locks")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def work_at(folder: Path, count: int, seconds: float) -> None:
    tasks = [task._replace(needs=()) for task in chain(folder, count, seconds)]
    tasks.append(
        Task("all", folder / "all.json", tuple(t.output for t in tasks), lambda: write_json(folder / "all.json", {}))
    )
    run_tasks("test", tasks, folder / "all.json", folder / "locks")


def test_processes_share_and_nothing_is_done_twice(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work_at, args=(tmp_path, 8, 0.05)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    done_by = {json.loads((tmp_path / f"{i}.json").read_text())["process"] for i in range(8)}
    assert len(done_by) > 1


def test_a_killed_process_lets_go(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work_at, args=(tmp_path, 1, 60.0))
    process.start()
    lock = tmp_path / "locks" / "0.json.lock"
    deadline = time.monotonic() + 30
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    with claimed(lock) as mine:
        assert not mine
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run_tasks("test", chain(tmp_path, 1), tmp_path / "0.json", tmp_path / "locks") == 1


def test_an_error_ends_this_process_and_leaves_the_task_to_do(tmp_path):
    def fail() -> None:
        raise UserError("layer 3 is broken")

    task = Task("broken", tmp_path / "a.json", (), fail)
    for _ in range(2):
        with pytest.raises(UserError, match="layer 3"):
            run_tasks("test", [task], task.output, tmp_path / "locks")


def test_waiting_looks_at_folders_and_not_at_every_file_and_less_often(tmp_path, monkeypatch):
    """Workers that waited asked a shared file system twice a second about every output and need."""
    listed, waits = [], []
    listing = os.listdir
    monkeypatch.setattr(tasks.os, "listdir", lambda path: listed.append(path) or listing(path))

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 6:
            write_json(tmp_path / "all.json", {})

    monkeypatch.setattr(tasks.time, "sleep", wait)
    monkeypatch.setattr(Task, "done", property(lambda _: pytest.fail("a look at one file")))
    waiting = [Task(f"{i}", tmp_path / f"{i}.json", (tmp_path / "never.json",), lambda: None) for i in range(50)]
    assert run_tasks("test", waiting, tmp_path / "all.json", tmp_path / "locks") == 0
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0] and len(listed) == 7
