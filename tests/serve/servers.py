"""Servers that tests start as users do, and what they answer over HTTP."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megakd.system.launcher import free_port
from tests.conftest import command
from tests.serve.serving import SETTINGS

# of vLLM's server, for a small model on busy CPUs
SMALL = ("--enforce-eager", "--max-model-len", "64", "--gpu-memory-utilization", "0.15")


@contextmanager
def serving(work: Path, *argv: object, further: tuple[str, ...] = ()) -> Iterator[str]:
    """`megakd serve ARGV -- FURTHER`; its URL, once it answers /health."""
    port = free_port()
    with started([*command("serve", *argv), "--port", str(port), "--", *further], port, work) as url:
        yield url


@contextmanager
def started(line: Sequence[str], port: int, work: Path) -> Iterator[str]:
    """The URL of a server that a command starts, once it answers /health; SIGTERM must end it, and nothing is left."""
    url, log = f"http://127.0.0.1:{port}", work / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env={**os.environ, **SETTINGS}, start_new_session=True)
    try:
        end = time.monotonic() + 400
        while not healthy(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.3)
        yield url
        process.terminate()
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):  # what is left of it, after a failure
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def post(url: str, **body: Any) -> Any:
    """The answer to a completion that is asked for."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
