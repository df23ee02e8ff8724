"""Run every part of MegaKD once on one GPU within six minutes, and compare numbers with float64 or with the CPU.

Start it with tools/bench/gpu_smoke.sh, which installs what the machine lacks. Each part is a process of its own with a
time limit, so that one failure does not stop the rest. Prints one JSON object: device, versions, and for every part its
state (ok, failed, skipped), seconds, and what it measured or the last lines of its error. Exit code 0: no part failed.

  python tools/bench/gpu_smoke.py --out FOLDER              all parts on the GPU
  python tools/bench/gpu_smoke.py --cpu --only loss,sar     some parts on the CPU, where float16 steps are skipped
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # instead of this folder, whose modules have names like `evaluate`
    sys.path[:1] = [str(ROOT), str(ROOT / "tools")]
MARK = "gpu_smoke result: "  # before what a part measured, on a line of its own
TOTAL, LAST_LINES = 360, 12
PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "numba", "zstandard", "pydantic", "triton")
DEMO = [
    "data.tokens=1e5", "data.holdout_tokens=4000", "data.shard_tokens=50000", "engine.ranks=1", "optim.micro_batch=16",
    "stages.0.tokens=20480", "stages.1.tokens=40960", "compress.calibration_tokens=4096", "checkpoint.every_steps=5",
    "log.tensorboard=false", "log.wandb=disabled",
]  # fmt: skip
STEPS = 12


class Part(NamedTuple):
    """What a part runs, with the device it runs on and a folder of its own; seconds: its limit."""

    run: Callable[[Any, Path], dict[str, Any]]
    seconds: int
    on_cpu: bool = True


class Skipped(Exception):
    """A part, or some of it, that this device cannot run."""


def experts(device: Any, folder: Path) -> dict[str, Any]:
    """Shared-core experts as the device runs them against expanded matrices in float64, values and gradients."""
    import torch
    from fake_cuda import FORMS, SHAPE, make_student

    from megakd.models.naive_experts import naive_experts

    found = {}
    for form, dtype in product(FORMS, (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        block = make_student(form).model.layers[0].mlp.experts
        core = block.held[0]
        torch.manual_seed(2)
        for parameter in (*block.parameters(), *core.parameters()):
            torch.nn.init.normal_(parameter, std=0.2)
        x = torch.randn(37, SHAPE["hidden_size"], dtype=torch.float64)
        weight, expert = torch.rand(37, SHAPE["num_experts"], dtype=torch.float64).softmax(-1).topk(2)
        results = []
        for call, place, kind in ((naive_experts, "cpu", torch.float64), (None, device, dtype)):
            for module in (block, core):
                module.to(place, kind)
            rows = x.to(place, kind).requires_grad_()
            arguments = rows, expert.to(place), weight.to(place, kind)
            out = block(*arguments) if call is None else call(block, *arguments)
            gradients = torch.autograd.grad(out.square().sum(), [rows, *block.parameters()])
            results.append([each.detach().double().cpu() for each in (out, *gradients)])
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(results[1], results[0], strict=True))
        _near(f"{form}, {dtype}", worst, {torch.float64: 1e-10, torch.float32: 1e-2}.get(dtype, 5e-2))
        found[f"{form}, {str(dtype)[6:]}"] = worst
    return {"largest relative error": found}


def loss(device: Any, folder: Path) -> dict[str, Any]:
    """The fused loss to cached logits and to a live teacher against autograd in float64, values and gradients."""
    import torch

    from megakd.capture.targets import targets_from_logits
    from megakd.config.data import LogitsConfig
    from megakd.data.records import TeacherTargets
    from megakd.losses.head import FusedHead
    from megakd.losses.reference import distill_loss
    from megakd.losses.signals import Dense, Sparse, Stored, Tail

    tokens, vocabulary, size = 700, 5000, 64
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, size).double(), torch.randn(vocabulary + 8, size).double() * 0.3
    theirs, labels = torch.randn(tokens, vocabulary).double() * 3, torch.randint(vocabulary, (tokens,))
    other, other_weight = torch.randn(tokens, 48).double(), torch.randn(vocabulary, 48).double() * 0.4
    found: dict[str, float] = {}
    tails_of: dict[str, tuple[Tail, ...]] = {
        "topk": ("ghost", "truncated"), "sampled": ("sampled",), "hybrid": ("hybrid",),
    }  # fmt: skip

    def compare(name: str, dtype: torch.dtype, call: Callable[..., Any], reference: Callable[..., Any], *sides: Any):
        results = []
        for function, place, kind in ((reference, "cpu", torch.float64), (call, device, dtype)):
            leaves = [side.to(place, kind).requires_grad_() for side in sides]
            total = function(*leaves)
            results.append([each.detach().double().cpu() for each in (total, *torch.autograd.grad(total, leaves))])
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(results[1], results[0], strict=True))
        _near(f"{name}, {dtype}", worst, 1e-4 if dtype == torch.float32 else 4e-2)
        found[f"{name}, {str(dtype)[6:]}"] = worst

    def head(w: Any) -> FusedHead:
        module = FusedHead(torch.nn.Parameter(w.detach()), min(len(w), vocabulary))
        del module._parameters["weight"]
        module.weight = w  # a leaf of the comparison, not of the module
        return module

    def cached(targets: TeacherTargets, there: TeacherTargets, stored: Stored, tail: Tail) -> list[Callable[..., Any]]:
        """The fused loss with targets on the device, and its reference with those on the CPU."""
        return [
            lambda h, w: head(w)(h, labels.to(device), Sparse(there, stored, tail), 0.7, 2.0).total,
            lambda h, w: distill_loss(h @ w[:vocabulary].T, labels, Sparse(targets, stored, tail), 0.7, 2.0).total,
        ]

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for profile, tails in tails_of.items():
            kept = LogitsConfig(profile=profile, top_k=32, draws=16, temperatures=(1.0, 2.0), draw_temperature=2.0)  # type: ignore
            targets = targets_from_logits(theirs.float(), labels, kept, torch.rand(tokens))
            stored = Stored(profile != "sampled", (1.0, 2.0) if profile != "sampled" else (), 2.0)
            there = TeacherTargets(*(field.to(device) for field in targets))
            for tail in tails:
                compare(f"cached, {tail}", dtype, *cached(targets, there, stored, tail), hidden, weight)
        compare(
            "live", dtype,
            lambda h, t, w, v: head(w)(h, labels.to(device), Dense(head(v), t), 0.7, 2.0).total,
            lambda h, t, w, v: _live_reference(h @ w[:vocabulary].T, t @ v.T, labels),
            hidden, other, weight, other_weight,
        )  # fmt: skip
    return {"largest relative error": found}


def _live_reference(student: Any, teacher: Any, labels: Any) -> Any:
    import torch

    log_q, log_p = (side.div(2.0).log_softmax(-1) for side in (student, teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    return 0.3 * torch.nn.functional.cross_entropy(student, labels, reduction="sum") + 0.7 * 4 * kl


def capture(device: Any, folder: Path) -> dict[str, Any]:
    """Targets of every profile against those that the CPU makes in float32, and 16-bit teachers that stay finite."""
    import torch
    from fake_cuda import LENGTH, VOCABULARY, make_batch, make_teacher

    from megakd.capture.teacher import Teacher, batch_targets
    from megakd.config.data import LogitsConfig

    batch, offsets, found = make_batch()._replace(targets=None), torch.rand(2, LENGTH), {}
    for profile, dtype in product(("topk", "sampled", "hybrid"), (torch.float32, torch.bfloat16, torch.float16)):
        kept = LogitsConfig(profile=profile, top_k=16, draws=16, temperatures=(1.0, 2.0))  # type: ignore[arg-type]
        expected = batch_targets(Teacher(make_teacher(), kept, VOCABULARY), batch, offsets, torch.device("cpu"))
        teacher = Teacher(make_teacher(), kept, VOCABULARY).to(device, dtype)
        made = batch_targets(teacher, batch, offsets, device)
        pairs = [(made.label_nll, expected.label_nll), (made.entropy, expected.entropy)]
        if profile != "sampled":
            pairs += [(made.logprobs, expected.logprobs), (made.log_tails, expected.log_tails)]
        worst = max(float((a - b).abs().max()) for a, b in pairs)
        _near(f"{profile}, {dtype}", worst, 1e-2 if dtype == torch.float32 else 0.3)
        found[f"{profile}, {str(dtype)[6:]}"] = worst
    return {"largest difference in nats": found}


def _objective(kind: str, device: Any, dtype: Any, away: bool = False, two: bool = False) -> Any:
    """A small objective as `assemble.build_objective` makes it: teacher and its routers on the device."""
    import fake_cuda as small

    from megakd.config.objective import CachedConfig, OnlineConfig, SarConfig
    from megakd.models.offload import offload
    from megakd.objectives.cached import CachedDistillation
    from megakd.objectives.online import OnlineDistillation
    from megakd.objectives.sar import SarDistillation

    other = small.OTHER_VOCABULARY if two else None
    if kind == "cached":
        settings = CachedConfig(temperature=2.0)
        return CachedDistillation(small.make_student("wrappers"), settings, {**small.FACTS, "draws": 0})
    teacher = small.make_teacher(other or small.VOCABULARY).to(dtype)
    if away:
        offload(teacher, device)
    else:
        teacher.to(device)
    if kind == "online":
        online = OnlineConfig(temperature=2.0, gap=0.5, importance=0.5, routing="capacity", initial_top_k=2)
        made: Any = OnlineDistillation(small.make_student("wrappers"), teacher, online, small.VOCABULARY, other)
    else:
        sar = SarConfig(temperature=2.0, routing="all", entropy=0.1, balance=0.1, drift_steps=3)
        made = SarDistillation(small.make_student("wrappers"), teacher, sar, small.VOCABULARY, other)
    for name, parameter in made.named_parameters():
        if not name.startswith("student."):
            parameter.data = parameter.data.to(device, parameter.dtype)
    return made


def _steps(kind: str, engine: str, device: Any, dtype: str, away: bool = False, two: bool = False) -> list[Any]:
    """Reports of STEPS optimizer steps on one batch; engine: local, or a file of ds_configs/ by its name."""
    import fake_cuda as small
    import torch

    from megakd.config.parsing import parse
    from megakd.data.batches import to_device
    from megakd.system.dist import World
    from megakd.train.build import build_engine

    local = engine == "local"
    settings: dict[str, Any] = {"kind": "local"}
    if not local:
        settings = {"config": engine, "deepspeed": json.loads((ROOT / "ds_configs" / f"{engine}.json").read_text())}
    config = parse({
        "name": "smoke", "model": {"dtype": dtype}, "data": {"sequence_length": small.LENGTH},
        "objective": {"kind": kind, "temperature": 2.0},
        "optim": {"lr": 1e-3, "warmup_steps": 0, "micro_batch": 2, "batch_tokens": 2 * small.LENGTH},
        "stages": [{"name": "all", "steps": STEPS}],
        "engine": {**settings, "offload_teacher": away},
    }, "gpu_smoke")  # fmt: skip
    torch.manual_seed(0)
    half = getattr(torch, dtype)
    objective = _objective(kind, device, half, away, two)
    if not local:
        for parameter in objective.parameters():
            parameter.data = parameter.data.to(half)
    made = build_engine(config, objective, config.stages[0], World(0, 1, device))
    batch = (small.make_pair if two else small.make_batch)()
    tokens, reports = int((batch.labels != -100).sum()), []
    for step in range(STEPS):
        objective.at(step / STEPS, step)
        reports.append(made.step([to_device(batch, device)], tokens, 1.0, norms=True))
        objective.observe(reports[-1].sums, tokens)
    made.close()
    return reports


def _check_steps(name: str, reports: list[Any], expected: list[Any]) -> dict[str, float]:
    """The first step is that of float32 on the CPU, and later ones learn; float16 may skip the first few."""
    done = [report for report in reports if not report.left_out]
    assert len(done) >= STEPS // 2, (
        f"{name}: {STEPS - len(done)} of {STEPS} updates were skipped: {reports[-1].left_out}"
    )
    first, last, wanted = reports[0].sums["total"], reports[-1].sums["total"], expected[0].sums["total"]
    _near(f"{name}, loss of the first step", abs(first - wanted) / abs(wanted), 5e-2)
    _near(f"{name}, gradient norm", abs(done[0].grad_norm / expected[0].grad_norm - 1), 0.15)
    assert last < first, f"{name}: the loss went from {first} to {last}"
    return {"first": first, "float32": wanted, "last": last}


def _learning(kind: str) -> Callable[[Any, Path], dict[str, Any]]:
    """Steps of an objective on the local engine in both 16-bit types, with one tokenizer and with two."""

    def run(device: Any, folder: Path) -> dict[str, Any]:
        import torch

        found: dict[str, Any] = {}
        for two in (False, True) if kind != "cached" else (False,):
            cpu = torch.device("cpu")
            expected = _steps(kind, "local", cpu, "float32", two=two)
            for dtype, away in product(_dtypes(device, found), (False, True) if kind == "sar" else (False,)):
                name = f"{dtype}{', two tokenizers' if two else ''}{', offloaded' if away else ''}"
                found[name] = _check_steps(name, _steps(kind, "local", device, dtype, away, two), expected)
        return found

    return run


def _dtypes(device: Any, found: dict[str, Any]) -> list[str]:
    if device.type == "cpu":
        found["float16"] = "skipped: float16 steps exist on GPUs alone"
        return ["bfloat16"]
    return ["float16", "bfloat16"]


def _deepspeed(engine: str) -> Callable[[Any, Path], dict[str, Any]]:
    """Steps under DeepSpeed on one rank, which must be those of the local engine; then a checkpoint, read again."""

    def run(device: Any, folder: Path) -> dict[str, Any]:
        import torch

        from megakd.system.dist import close_world, join_world

        found: dict[str, Any] = {}
        expected = {kind: _steps(kind, "local", torch.device("cpu"), "float32") for kind in ("cached", "sar")}
        join_world()
        for kind, dtype in product(expected, _dtypes(device, found)):
            name = f"{kind}, {dtype}"
            found[name] = _check_steps(name, _steps(kind, engine, device, dtype), expected[kind])
        close_world()
        return found

    return run


def demo(device: Any, folder: Path) -> dict[str, Any]:
    """The demo recipe, shortened, through every verb: its own, and plan, inspect, resume, sar with a live teacher."""
    run, sar = folder / "demo" / "kd", folder / "sar"
    _verb("demo", "--folder", folder / "demo", *DEMO)
    _verb("plan", run)
    _verb("inspect", run)
    # the same folder again: everything is found finished
    _verb("train", run)
    half = "float16" if device.type == "cuda" else "float32"
    _verb("new", sar, "--from", run, "name=sar", "objective.kind=sar", "engine.kind=local", f"model.dtype={half}",
          "engine.offload_teacher=true", "optim.batch_tokens=2048", "optim.micro_batch=4")  # fmt: skip
    _verb("train", sar)
    _verb("export", sar)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["kl_t1"] for row in rows if row.get("kl_t1") is not None]
    assert losses[-1] < losses[0], losses
    return {"kl_t1 first": losses[0], "kl_t1 last": losses[-1], "tokens per second": rows[-1].get("tokens_per_second")}


def _verb(*argv: object) -> None:
    print(f"$ megakd {' '.join(map(str, argv))}", flush=True)
    done = subprocess.run([sys.executable, "-m", "megakd", *map(str, argv)], cwd=ROOT)
    assert done.returncode == 0, f"megakd {argv[0]}: exit {done.returncode}"


def benches(device: Any, folder: Path) -> dict[str, Any]:
    """The benches that have a --device, quick."""
    found = {}
    for name in ("experts", "loss", "live"):
        file = folder / f"{name}.json"
        command = [sys.executable, str(ROOT / "tools/bench.py"), name, "--quick", "--device", device.type]
        done = subprocess.run([*command, "--json", str(file)], cwd=ROOT)
        assert done.returncode == 0, f"bench {name}: exit {done.returncode}"
        found[name] = len(json.loads(file.read_text()))
    return found


def fake(device: Any, folder: Path) -> dict[str, Any]:
    """tools/fake_cuda.py with this machine's torch."""
    done = subprocess.run([sys.executable, str(ROOT / "tools/fake_cuda.py")], cwd=ROOT)
    assert done.returncode == 0, f"fake_cuda: exit {done.returncode}"
    return {}


PARTS = {
    "experts": Part(experts, 60),
    "loss": Part(loss, 60),
    "capture": Part(capture, 60),
    "cached": Part(_learning("cached"), 60),
    "online": Part(_learning("online"), 60),
    "sar": Part(_learning("sar"), 90),
    "zero0": Part(_deepspeed("zero0"), 90),
    "zero3": Part(_deepspeed("zero3"), 90),
    "zero3_offload": Part(_deepspeed("zero3_offload"), 90),
    "demo": Part(demo, 240),
    "benches": Part(benches, 90, on_cpu=False),
    "fake": Part(fake, 60),
}


def _near(name: str, error: float, most: float) -> None:
    assert error <= most, f"{name}: relative error {error:.3g}, at most {most:g} is expected"


def run_part(name: str, device: str, folder: Path) -> None:
    """In a process of its own: run a part, and print what it measured behind MARK."""
    import torch

    result = PARTS[name].run(torch.device(device, 0) if device == "cuda" else torch.device("cpu"), folder)
    print(MARK + json.dumps(result), flush=True)


def start_part(name: str, device: str, log: Path, limit: float) -> dict[str, Any]:
    """A part's state, seconds and result; it and whatever it started are killed after `limit` seconds."""
    if device == "cpu" and not PARTS[name].on_cpu:
        return {"state": "skipped", "reason": "measures a GPU"}
    if limit < 5:
        return {"state": "failed", "error": "no time was left"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-smoke-") as folder:
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--part",
            name,
            "--device",
            device,
            "--folder",
            folder,
        ]
        environment = {**os.environ, "DS_ACCELERATOR": device, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("w+") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a part that failed left behind
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    found: dict[str, Any] = {
        "state": "ok" if code == 0 else "failed",
        "seconds": round(time.perf_counter() - started, 1),
    }
    results = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    if code == 0:
        return found | {"result": json.loads(results[-1])}
    if code is None:
        lines.append(f"killed after {limit:.0f} seconds")
    return found | {"error": lines[-LAST_LINES:]}


def describe(device: str) -> dict[str, Any]:
    """Device and versions, without making a context on the GPU."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = platform.processor() or platform.machine()
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {"device": name, "kind": device, "versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="on the CPU; what needs a GPU is skipped")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="folder for gpu_smoke.json and gpu_smoke.log")
    parser.add_argument("--limit", type=float, default=TOTAL, help=f"seconds for all parts (default: {TOTAL})")
    for hidden in ("--part", "--device", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        try:
            run_part(args.part, args.device, Path(args.folder))
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            return 1
        return 0
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    device = "cpu" if args.cpu else "cuda"
    started, report = time.perf_counter(), describe(device)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        report["parts"] = parts = {}
        for name in names:
            left = args.limit - (time.perf_counter() - started)
            log = Path(scratch) / f"{name}.log"
            parts[name] = start_part(name, device, log, min(PARTS[name].seconds, left))
            with (out / "gpu_smoke.log").open("a" if name != names[0] else "w") as whole:
                whole.write(f"===== {name}\n{log.read_text(errors='replace') if log.exists() else ''}\n")
            print(f"{name}: {parts[name]['state']}", file=sys.stderr, flush=True)
            report["seconds"] = round(time.perf_counter() - started, 1)
            (out / "gpu_smoke.json").write_text(json.dumps(report, indent=1) + "\n")  # after each: a kill keeps it
    print(json.dumps(report, indent=1))
    return 1 if any(part["state"] == "failed" for part in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
