"""Processes as a user starts them, forked from one that has loaded the libraries: what takes them seconds is imports.

A child is a process of its own: it is killed, gets signals and leaves with an exit code like `python -m megakd`, which
it runs from the start. Run as a script this file is the process that forks; it runs nothing itself.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

RARELY = 10_000, 10, 10  # objects before garbage is looked for; Python's 700 takes tests 3 % of their time
LARGEST = 1 << 20  # bytes of a request: a command line and an environment
FAMILIES = ("qwen3_moe", "llama", "mixtral", "olmoe", "deepseek_v3", "qwen2_moe")


class Forked:
    """A child, with what tests use of subprocess.Popen; text=True, and stderr=STDOUT as the default.

    program: "megakd" and the words behind it, or a Python file and its arguments. bare: forked from a process that has
    loaded torch, but neither megakd nor transformers, and has an empty sys.path but for the installed packages.
    """

    def __init__(
        self,
        *program: object,
        stdout: Any = None,
        stderr: Any = subprocess.STDOUT,
        env: dict[str, str] | None = None,
        bare: bool = False,
    ):
        self.server = _server(os.getpid(), bare)
        self.args = [str(word) for word in program]
        self.stdout, out = _stream(stdout)
        self.stderr, err = _stream(stderr) if stderr is not subprocess.STDOUT else (None, os.dup(out))
        request = {"argv": self.args, "env": {**os.environ, **(env or {})}, "cwd": os.getcwd()}
        self.returncode: int | None = None
        self.pid: int = _ask(self.server, request, out, err)
        os.close(out)
        os.close(err)
        self.process = os.pidfd_open(self.pid)  # readable once the child has ended, which costs no question

    def poll(self, seconds: float = 0.0) -> int | None:
        """Its exit code; None where it still runs after `seconds`."""
        if self.returncode is None and select.select([self.process], [], [], seconds)[0]:
            self.returncode = _ask(self.server, {"ended": self.pid})
            if self.returncode is not None:
                os.close(self.process)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str | None, str | None]:
        """What is left of one pipe, or of none; the pipe is closed, and of a closed one nothing is left."""
        assert self.stdout is None or self.stderr is None
        found = tuple(
            ("" if stream.closed else stream.read()) if stream else None for stream in (self.stdout, self.stderr)
        )
        self.wait(timeout)
        self._close()
        return found

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self.wait()

    def _close(self) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()


def _stream(where: Any) -> tuple[IO[str] | None, int]:
    """(what this process reads, the number of the file that the child writes)."""
    if where is subprocess.PIPE:
        mine, theirs = os.pipe()
        return open(mine, encoding="utf-8", errors="replace"), theirs
    if where is subprocess.DEVNULL or where is None:
        return None, os.open(os.devnull, os.O_WRONLY)
    return None, os.dup(where.fileno())


SERVERS: list[subprocess.Popen[bytes]] = []  # kept: subprocess warns of one that is dropped while it runs


@cache
def _server(owner: int, bare: bool) -> socket.socket:
    """One of a kind for each process of tests; it ends with it, when its socket is closed."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    with theirs:
        kind = ["-I", __file__, "bare"] if bare else [__file__, "megakd"]
        words = [sys.executable, *kind, str(theirs.fileno())]
        SERVERS.append(subprocess.Popen(words, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL))
    return mine


def _ask(server: socket.socket, request: dict[str, Any], *streams: int) -> Any:
    socket.send_fds(server, [json.dumps(request).encode()], streams)
    answer = server.recv(LARGEST)
    assert answer, "the process that forks has ended"
    return json.loads(answer)


def load() -> None:
    """What verbs import, what transformers puts off until a model is made, and the codec's compiled loops."""
    import megakd.commands

    for module in pkgutil.iter_modules(megakd.commands.__path__):
        importlib.import_module(f"megakd.commands.{module.name}")
    # which every engine imports, and which compiles a function: torch's inductor takes 3 s to import
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    for name in ("engine.deepspeed", "integrations.hf_trainer", "report.html", "tracking"):
        importlib.import_module(f"megakd.{name}")
    for family in FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    # what a process makes once, when it loads its first model and reads its first shard
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
    codec = importlib.import_module("tests.data.test_codec")
    for profile in ("topk", "sampled", "hybrid"):
        sample, layout = codec.example(codec.Case(profile, 7, 400))
        codec.decode("", codec.encode(sample, layout), layout)


def load_bare() -> None:
    """What transformers imports of others, but not huggingface_hub, which reads HF_HOME once."""
    for name in ("scipy.optimize", "tokenizers", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"):
        importlib.import_module(name)


def serve(asked: socket.socket) -> list[str]:
    """Fork until the socket is closed; returns in a child alone: what it is to run."""
    while True:
        message, streams, _, _ = socket.recv_fds(asked, LARGEST, 2)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "ended" in request:
            answer = None
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            if pid:
                answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                asked.close()
                return _become(request, streams)
            for stream in streams:
                os.close(stream)
        asked.send(json.dumps(answer).encode())


def _become(request: dict[str, Any], streams: list[int]) -> list[str]:
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
        os.close(stream)
    # anew: they remember whether the old ones could seek
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    return request["argv"]


def run(argv: list[str]) -> None:
    program = argv[0]
    sys.argv = argv
    if program == "megakd":
        from megakd.cli import main

        main()
    else:
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")


def end(argv: list[str]) -> NoReturn:
    """`run` and end as the interpreter does, except that it takes no module apart, which takes half a second."""
    code: object = 0
    try:
        run(argv)
    except SystemExit as error:
        code = error.code or 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    bare = sys.argv[1] == "bare"
    if not bare:
        del sys.path[0]  # this folder: a script's, where `data` or `config` would be found
    with contextlib.closing(socket.socket(fileno=int(sys.argv[2]))) as asked:
        (load_bare if bare else load)()
        gc.freeze()
        gc.set_threshold(*RARELY)
        program = serve(asked)
    end(program)
