"""What tests share: a teacher that is made in a second, runs over it, and processes started as a user would."""

import gc
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
os.environ["OMP_NUM_THREADS"] = "1"  # inherited by every process that a test starts
CARDS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for tests marked gpu, in processes of their own
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import psutil
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from megakd.cli import run_verb
from megakd.data.documents import python_documents
from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.models.tiny import tiny_moe_config, train_tokenizer
from megakd.run import Run
from megakd.system.dist import NVIDIA_DRIVER
from megakd.system.launcher import free_port
from megakd.system.signals import STOP_SIGNALS
from megakd.system.verbs import Verbs
from tests.forks import RARELY, Forked
from tests.jobs import Slurm
from tests.machines import Machines

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
VOCABULARY = 400


THINGS = {
    "gpu": "on_card",
    "cluster": "slurm",
    "hosts": "two_hosts",
    "vllm": "vllm_python",
}  # mark → the fixture that skips where the thing is not there


def pytest_configure() -> None:
    """Ctrl-C and hang-ups are not ignored, as below nohup and in what a script starts in the background."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """What collecting has imported stays: two million objects that no later collection of garbage need look at."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*RARELY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long first: with `-n 2` no process is left with a long test at the end.

    A test of a thing that most machines lack has both its mark and its fixture: `-m` finds it, and it skips itself.
    """
    for item in items:
        asks = getattr(item, "fixturenames", ())
        for mark, fixture in THINGS.items():
            if (item.get_closest_marker(mark) is not None) != (fixture in asks):
                raise pytest.UsageError(f"{item.nodeid}: mark {mark} and fixture {fixture} go together")
    marks = ("demo", "ranks")
    order = {item.path: len(marks) for item in items}
    for item in items:
        order[item.path] = min(
            order[item.path], *(marks.index(m.name) for m in item.iter_markers() if m.name in marks), 9
        )
    items.sort(key=lambda item: order[item.path])


def for_each(
    names: str, values: Iterable[Any], ids: Any = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """pytest.mark.parametrize as a loop in one test, for hundreds of cases of a millisecond; a failure names its case.

    Not for tests whose fixtures one case changes for the next. ids is there for parametrize's sake.
    """
    split = [name.strip() for name in names.split(",")]
    cases = [dict(zip(split, value if len(split) > 1 else (value,), strict=True)) for value in values]
    assert cases, names

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def loop(**others: Any) -> None:
            for case in cases:
                try:
                    test(**others, **case)
                except BaseException as error:
                    error.add_note(f"where {case}")
                    raise

        whole = inspect.signature(test)
        left = [parameter for name, parameter in whole.parameters.items() if name not in split]
        loop.__signature__ = whole.replace(parameters=left)  # type: ignore[attr-defined]
        return loop

    return decorate


@pytest.fixture(autouse=True)
def stop_signals() -> Iterator[None]:
    """As before once a test has ended: a stop leaves them ignored, and a shell that inherits that cannot trap them."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def on_card() -> dict[str, str]:
    """The environment of a process that may use this machine's GPU; skips where there is none."""
    if not NVIDIA_DRIVER.exists() or CARDS == "":
        pytest.skip("no NVIDIA GPU on this machine, or CUDA_VISIBLE_DEVICES hides it")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return environment if CARDS is None else {**environment, "CUDA_VISIBLE_DEVICES": CARDS}


@pytest.fixture(scope="session")
def vllm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment with vLLM (tools/make/vllm_env.sh); skips where none is named."""
    python = os.environ.get("MEGAKD_VLLM_PYTHON") or (find_spec("vllm") and sys.executable)
    if not python:
        pytest.skip("MEGAKD_VLLM_PYTHON is not set: tools/make/vllm_env.sh DIR makes an environment with vLLM")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("vllm-cache")))
        yield Path(python)


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Two hosts that this machine makes of itself, for a whole session; skips where it cannot.

    They take minutes: `make cluster-test` asks for them, with MEGAKD_TEST_CLUSTER=1.
    """
    if not os.environ.get("MEGAKD_TEST_CLUSTER"):
        pytest.skip("takes minutes: make cluster-test, or MEGAKD_TEST_CLUSTER=1")
    made = Machines(tmp_path_factory.mktemp("machines"))
    reason = made.refused()
    if reason:
        pytest.skip(reason)
    made.watch()
    yield made
    made.take_down()


@pytest.fixture
def two_hosts(machines: Machines) -> Iterator[Path]:
    """A folder with the `hostfile` of two hosts that answer ssh, and `bin/ssh`; nothing is left on them."""
    machines.up()
    yield machines.folder
    machines.check()


@pytest.fixture
def slurm(machines: Machines, tmp_path: Path) -> Iterator[Slurm]:
    """The same hosts as the nodes of a Slurm whose controller is this machine; nothing is left on them."""
    missing = machines.missing("sbatch", "slurmctld", "slurmd", "munged")
    if missing:
        pytest.skip(missing)
    machines.up(slurm=True)
    used = Slurm(machines, tmp_path)
    yield used
    try:
        used.cancel_all()
    finally:
        machines.check()


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Some 60 documents of real English."""
    found = []
    for document in python_documents():
        found.append(document[:1500])
        if len(found) == 60:
            return found
    raise AssertionError(f"only {len(found)} documents")


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(documents, VOCABULARY)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Path:
    """A Hugging Face folder: 2 layers of 4 experts, trained for some seconds so that it has something to teach."""
    return make_teacher(tmp_path_factory.mktemp("teacher"), tokenizer, documents, seed=0, steps=150)


def make_teacher(
    folder: Path, tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int, steps: int, **changes: Any
) -> Path:
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(tiny_moe_config(VOCABULARY, **{**SMALL, **changes}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    ids = torch.tensor([i for text in tokenizer(documents, verbose=False)["input_ids"] for i in text])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 33, (16,))
        windows = torch.stack([ids[start : start + 33] for start in starts])
        logits = model(windows[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, teacher: Path, documents: list[str]) -> Path:
    """A whole run in seconds: 32-token windows, 4 shards, two stages of 4 and 6 steps on the local engine."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    value = {
        "name": "test",
        "model": {"teacher": str(teacher), "dtype": "float32"},
        "compress": {"rank": 4, "sweeps": 3, "calibration_tokens": 0},
        "data": {
            "source": str(folder / "text.jsonl"),
            "sequence_length": 32,
            "tokens": 8000,
            "holdout_fraction": 0.1,
            "holdout_tokens": 1000,
            "shard_tokens": 2000,
        },
        "logits": {"top_k": 16, "temperatures": [1.0, 2.0], "dtype": "float32", "batch_size": 8},
        "objective": {"alpha": 0.7, "temperature": 2.0},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "batch_tokens": 512, "micro_batch": 4},
        "stages": [
            {
                "name": "experts",
                "tokens": 2048,
                "lr_multipliers": [
                    {"pattern": "shared_core|wrapper", "lr_multiplier": 1.0},
                    {"pattern": ".*", "lr_multiplier": 0.0},
                ],
            },
            {
                "name": "all",
                "tokens": 3072,
                "lr": 5e-4,
                "lr_multipliers": [
                    {"pattern": "embed_tokens|lm_head", "lr_multiplier": 0.1},
                    {"pattern": "norm", "lr_multiplier": 0.5},
                ],
            },
        ],
        "engine": {"kind": "local"},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1, "tensorboard": False, "wandb": "disabled"},
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A run with student-0, tokens and logits; read-only: make siblings of it (`sibling`)."""
    folder = tmp_path_factory.mktemp("runs") / "prepared"
    run_verb(["new", str(folder), "--from", str(recipe)])
    for verb in ("compress", "tokenize", "generate-logits"):  # in this process, which has loaded the libraries
        run_verb([verb, str(folder)])
    return folder


@pytest.fixture(scope="session")
def one_host(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """one_host("engine.config=zero3", …): what two undisturbed ranks on this machine train, once for all tests."""

    @cache
    def train(*overrides: str) -> Run:
        run = Run.create(prepared, overrides, tmp_path_factory.mktemp("one-host") / "run")
        forked_ranks(2, "train", run.folder)
        return run

    return train


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> Iterator[ShardSet]:
    """The training samples of `prepared`, with their targets."""
    shards = ShardSet(prepared / "data" / "logits" / "train")
    yield shards
    shards.close()


@pytest.fixture
def sibling(prepared: Path, tmp_path: Path) -> Callable[..., Run]:
    """sibling("optim.lr=1e-3", …): a new run over the same student and data."""
    count = 0

    def make(*overrides: str) -> Run:
        nonlocal count
        count += 1
        return Run.create(prepared, overrides, tmp_path / f"run-{count}")

    return make


def megakd(*argv: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """`megakd ARGV` in a process of its own; its output, after checking the exit code."""
    done = subprocess.run(
        command(*argv), capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=600
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, (
        f"megakd {' '.join(map(str, argv))}: exit {done.returncode}, expected {code}\n{output}"
    )
    return output


def forked(*argv: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """The same in a process forked from one that has loaded the libraries (tests/forks.py)."""
    return forked_ranks(1, *argv, code=code, env=env)


def start_ranks(ranks: int, *program: object, env: dict[str, str] | None = None, **streams: Any) -> list[Forked]:
    """A program on `ranks` forked processes that meet, as a launcher starts them; one alone has no launcher."""
    if ranks == 1:
        return [Forked(*program, env=env, **streams)]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger"}
    places = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks))
    return [Forked(*program, env={**world, **place, **(env or {})}, **streams) for place in places]


def forked_ranks(ranks: int, *argv: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """`megakd ARGV` by `start_ranks`: the output of all after checking their exit codes."""
    return run_to_end(ranks, "megakd", *argv, code=code, env=env)


def run_to_end(ranks: int, *program: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """The same of any program; where one ends with another exit code the others are killed."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        processes = start_ranks(ranks, *program, env=env, stdout=out, stderr=err)
        try:
            deadline = time.monotonic() + 600
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() not in (None, code) for process in processes):
                    break  # the others would wait for it
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()
        out.seek(0), err.seek(0)
        output, codes = out.read() + err.read(), [process.wait() for process in processes]
    assert codes == [code] * ranks, f"{' '.join(map(str, program))}: exit {codes}, expected {code}\n{output}"
    return output


@pytest.fixture
def cheap(monkeypatch):
    """Verbs run in processes forked from one that has loaded the libraries."""

    def run(self: Verbs, *argv: str) -> int:
        forked(*argv)
        return 0

    monkeypatch.setattr(Verbs, "run", run)


def in_process(*argv: object, code: int = 0) -> str:
    """The same in this process, which has loaded the libraries; not for DeepSpeed, which wants one of its own."""
    output, found = io.StringIO(), 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            run_verb([str(each) for each in argv])
        except UserError as error:
            output.write(f"megakd: {error}\n")
            found = 2
    assert found == code, f"megakd {' '.join(map(str, argv))}: {found}, expected {code}\n{output.getvalue()}"
    return output.getvalue()


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "megakd", *map(str, argv)]


def kill_when(
    argv: list[object], ready: Callable[[], bool], timeout: float = 300, script: bool = False, ranks: int = 1
) -> bool:
    """Start `megakd ARGV`, kill -9 it and all it started once `ready()`; False when it ended before that.

    script: ARGV is a Python file and its arguments instead. ranks: so many processes that meet, all killed.
    """
    processes = [Forked(*argv)] if script else start_ranks(ranks, "megakd", *argv)
    deadline = time.monotonic() + timeout
    while all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if ready():
            family = [process.pid for process in processes]
            family += [child.pid for pid in family for child in psutil.Process(pid).children(recursive=True)]
            for pid in family:
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            for process in processes:
                process.wait()
            return True
        time.sleep(0.005)
    in_time = time.monotonic() < deadline
    for process in processes:
        process.wait() if in_time else process.kill()
    assert in_time, f"{argv} was not ready within {timeout} s"
    return False


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timing = ("tokens_per_second", "data_wait_share", "memory_gb")
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


def assert_goes_like(run: Path, undisturbed: Path) -> None:
    """On other numbers of ranks in between: the same samples and rates, losses within 1e-4, Adam's counts of steps."""
    found, expected = metrics(run), metrics(undisturbed)
    for name in ("stage", "step", "tokens", "lr"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    for name in ("loss", "ce", "kl", "kl_t1", "grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1e-4), name
    assert adam_steps(run) == adam_steps(undisturbed)


def adam_steps(run: Path) -> list[int]:
    """Adam's counts of steps of all parameter groups, in what ZeRO has saved of the first rank at the end of `all`."""
    last = max((run / "checkpoints" / "all").glob("step-*"))
    (file,) = (last / "state").rglob("*zero_pp_rank_0_*optim_states.pt")
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    state = state.get("optimizer_state_dict", state.get("base_optimizer_state"))["state"]
    return [int(each["step"]) for each in state.values()]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_ranks(ranks: int, *argv: object) -> str:
    """`megakd ARGV` on `ranks` real processes through launch/train.sh's launcher (argv starts with a run)."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "train.sh"), *map(str, argv)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHON": sys.executable, "RANKS": str(ranks)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def begin_texts_with_bos(folder: Path, name: str = "<s>") -> int:
    """Give the tokenizer of a folder a token of its own that it puts before every text; returns its id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": name})
    id = int(tokenizer.convert_tokens_to_ids(name))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, id)])
    tokenizer.save_pretrained(folder)
    return id
