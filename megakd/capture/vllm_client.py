"""vLLM in a process and an environment of its own: which Python has it, its version, and hidden states from it."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.errors import UserError

SUPPORTED = "0.32"  # of vLLM, as in megakd/serve: pooling without scaling is asked for by arguments that change
WORKER = Path(__file__).with_name("vllm_worker.py")
VARIABLE = "MEGAKD_VLLM_PYTHON"
FIND = "from importlib.metadata import version; print(version('vllm'))"
OURS = ("model", "dtype", "max_model_len", "runner", "convert", "pooler_config", "quantization")
OURS += ("enable_prefix_caching", "enable_chunked_prefill")


class Vllm(NamedTuple):
    """An interpreter that has vLLM, the version of that, and options of vllm.LLM that the user gave."""

    python: str
    version: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """What manifests say: vllm 0.32.0."""
        return f"vllm {self.version}"


def vllm_of(engine: str, python: str | None, options: str | None) -> Vllm | None:
    """The vLLM that a run's logits.engine asks for; UserError for options of the command line without effect."""
    if engine == "vllm":
        return find_vllm(python, options)
    for option, value in (("--vllm-python", python), ("--vllm-options", options)):
        if value is not None:
            raise UserError(f"{option}: has no effect with logits.engine={engine}; make a run with logits.engine=vllm")
    return None


def find_vllm(python: str | None, options: str | None) -> Vllm:
    """The vLLM of `python`, else of MEGAKD_VLLM_PYTHON, else of this interpreter; options: JSON of the command line."""
    chosen = python or os.environ.get(VARIABLE) or sys.executable
    advice = f"name a Python that has it with --vllm-python or {VARIABLE} (tools/make/vllm_env.sh makes one)"
    try:
        done = subprocess.run([chosen, "-P", "-c", FIND], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"logits.engine=vllm: {chosen}: {error.strerror}; {advice}") from None
    if done.returncode:
        raise UserError(f"logits.engine=vllm: {chosen} has no vLLM; {advice}")
    version = done.stdout.strip().partition("+")[0]  # without +cpu
    if not version.startswith(f"{SUPPORTED}."):
        raise UserError(f"logits.engine=vllm: {chosen} has vLLM {version}, supported is {SUPPORTED}; {advice}")
    try:
        given = json.loads(options or "{}")
        assert isinstance(given, dict)
    except (ValueError, AssertionError):
        raise UserError(
            f"--vllm-options {options}: expected JSON like {json.dumps({'gpu_memory_utilization': 0.8})}"
        ) from None
    if refused := [name for name in OURS if name in given]:
        raise UserError(f"--vllm-options: {refused[0]} is set by the run; remove it")
    return Vllm(chosen, version, given)


class HiddenStates:
    """A worker that answers documents with their hidden states after the final norm, until `close`.

    It ends when its stdin does, so also when this process is killed.
    """

    def __init__(self, vllm: Vllm, folder: Path, dtype: torch.dtype, length: int, device: torch.device):
        """length: of the longest document. Returns when the model is loaded."""
        self.folder, self.vllm, self.dtype = folder, vllm, dtype
        options = {
            "model": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": length,
            "max_num_batched_tokens": max(length, 8192),
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,  # a document is one forward, as in transformers
            "gpu_memory_utilization": 0.8,  # the head and its logits are in this process
            "enforce_eager": True,
        }
        single = vllm.options.get("tensor_parallel_size", 1) == 1
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not single)), "VLLM_NO_USAGE_STATS": "1", **os.environ}
        if device.type == "cuda" and single:
            cards = os.environ.get("CUDA_VISIBLE_DEVICES")
            index = device.index if device.index is not None else torch.cuda.current_device()
            env["CUDA_VISIBLE_DEVICES"] = cards.split(",")[index] if cards else str(index)
        self.log = TemporaryFile()  # noqa: SIM115 (closed with this object)
        self.process = subprocess.Popen(
            [vllm.python, "-P", str(WORKER), json.dumps(options | vllm.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=env,
            start_new_session=True,  # Ctrl-C is for this process, which ends the worker
        )
        self._answer()

    def __call__(self, documents: Sequence[Sequence[int]]) -> Tensor:
        """[N, D] of all tokens of the documents, in order; each alone, its positions from 0."""
        lengths = [len(document) for document in documents]
        head = struct.pack(f"<I{len(lengths)}I", len(lengths), *lengths)
        ids = b"".join(struct.pack(f"<{len(document)}i", *document) for document in documents)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(head + ids)
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail("ended")
        rows_ND = self._answer()
        if len(rows_ND) != sum(lengths):
            self._fail(f"answered {len(rows_ND)} positions for {sum(lengths)} tokens")
        return rows_ND

    def _answer(self) -> Tensor:
        (failed,) = self._read(1)
        if failed:
            (size,) = struct.unpack("<I", self._read(4))
            self._fail(self._read(size).decode())
        rows, width = struct.unpack("<II", self._read(8))
        if not rows:
            return torch.zeros(0, width, dtype=self.dtype)
        data = self._read(rows * width * self.dtype.itemsize)
        return torch.frombuffer(data, dtype=self.dtype).view(rows, width)

    def _read(self, size: int) -> bytearray:
        data, start = bytearray(size), 0
        assert self.process.stdout is not None
        while start < size:
            count = self.process.stdout.readinto(memoryview(data)[start:])  # type: ignore[attr-defined]
            if not count:
                self._fail("ended")
            start += count
        return data

    def _fail(self, what: str) -> Any:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        self.close()
        last = f"; its last line: {lines[-1][:300]}" if what == "ended" and lines else ""
        raise UserError(f"{self.folder}: vLLM {self.vllm.version} ({self.vllm.python}): {what}{last}")

    def close(self) -> None:
        """Ends the worker; a second call changes nothing."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()
