"""Measure MegaKD against what people use instead: interleaved runs in one process, medians of ratios.

  store    the teacher-target store against HDF5 + gzip, tar of npy, parquet: bytes, fidelity, speed on one core
  fit      the solvers of megakd compress: ALS against Adam, forms at equal numbers stored, a sweep at real size
  planner  what compress.budget predicts for every shape against fits, on proxies of experts
  mixture  mixtures of bases against the other shapes, at equal numbers stored
  experts  a layer of shared-core experts against the naive form and the dense experts, Qwen3-30B-A3B's sizes, one core
  generate transformers' generate of a compact student at batch 1, by each path of its experts, against the stock model
  loss     the loss behind the student's head against three matrix products, dense forms, TRL and Liger; V 151,936
  live     a step next to a live teacher, against the loop one writes by hand
  offline  a step with cached teacher logits, against the same step with a live teacher; 7B to 30B teachers predicted
  evaluate the validation set through the chunked head, against a plain forward pass and stored logits; V 151,936
  temperatures  tails between the declared temperatures against stored ones, on the demo's teacher or a real one
  size     quality against bytes on disk: quantised, compressed, and both; has options of its own (bench.py size --help)
  step     an optimizer step against cross entropy alone, what a run waits for data, DeepSpeed on one rank and on two

Prints a table; --json writes rows {"bench", "case", "metric", "value", "unit"}; --quick takes less than a minute.

examples:
  OMP_NUM_THREADS=1 python tools/bench.py store
  OMP_NUM_THREADS=1 python tools/bench.py store --quick --json store.json
  python tools/make/real_models.py smollm2 smollm2 && python tools/bench.py store --real smollm2
  python tools/bench.py experts --json experts.json
  python tools/bench.py experts --device cuda
  python tools/bench.py generate
  OMP_NUM_THREADS=1 python tools/bench.py loss
  OMP_NUM_THREADS=1 python tools/bench.py step
  python tools/bench.py step --device cuda --measured .
  OMP_NUM_THREADS=1 python tools/bench.py live
  OMP_NUM_THREADS=1 python tools/bench.py offline
  OMP_NUM_THREADS=1 python tools/bench.py evaluate
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # speeds are those of one core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts bytes, says each start and stop

import installed  # noqa: F401
import torch

# of the package tools/bench: a folder with an __init__.py comes before a file bench.py
from bench.evaluate import bench_evaluate
from bench.experts import bench_experts
from bench.fit import bench_fit
from bench.generate import bench_generate
from bench.live import bench_live
from bench.loss import bench_loss
from bench.mixture import bench_mixture
from bench.offline import bench_offline
from bench.planner import bench_planner
from bench.rows import show
from bench.size import main as measure_sizes
from bench.step import bench_step
from bench.store import bench_store
from bench.temperatures import bench_temperatures

from megakd.errors import UserError
from megakd.names import expand
from megakd.outputs import check_file
from megakd.system.files import write_json
from megakd.system.terminal import accept_any_encoding, one_line_errors


def main() -> None:
    if sys.argv[1:2] == ["size"]:
        measure_sizes(sys.argv[2:])
        return
    accept_any_encoding()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bench",
        choices=[
            *("store", "evaluate", "experts", "fit", "generate", "live", "loss", "mixture", "offline", "planner"),
            *("step", "temperatures"),
        ],
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: within a minute on 2 cores")
    parser.add_argument(
        "--real",
        type=expand,
        metavar="FOLDER",
        help="offline, store, temperatures: a model folder of tools/make/real_models.py smollm2",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="evaluate, experts, live, loss, step: cuda measures in 16 bits on a GPU (default: cpu)",
    )
    parser.add_argument(
        "--measured",
        type=expand,
        metavar="FOLDER",
        help="step: write tokens/s to FOLDER/measured.json, for `megakd plan RUN --gpus N --measured FILE`",
    )
    parser.add_argument("--json", type=expand, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    with one_line_errors("bench"):
        if args.real and args.bench not in ("offline", "store", "temperatures"):
            raise UserError("--real is for offline, store and temperatures: the other benchmarks need no model")
        if args.device != "cpu" and args.bench not in ("evaluate", "experts", "live", "loss", "step"):
            raise UserError(
                "--device is for evaluate, experts, live, loss and step: the other benchmarks run on the CPU"
            )
        if args.measured and (args.bench != "step" or not args.measured.is_dir()):
            raise UserError(f"--measured {args.measured}: is for step, and expects a folder that exists")
        if args.device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"--device {args.device}: torch sees no GPU here")
        rows_file = args.json and check_file(args.json, '"bench": ')
        benches = {"store": lambda quick: bench_store(quick, args.real), "fit": bench_fit}
        benches |= {"planner": bench_planner, "mixture": bench_mixture, "generate": bench_generate}
        benches["experts"] = lambda quick: bench_experts(quick, args.device)
        benches["evaluate"] = lambda quick: bench_evaluate(quick, args.device)
        benches["live"] = lambda quick: bench_live(quick, args.device)
        benches["loss"] = lambda quick: bench_loss(quick, args.device)
        benches["temperatures"] = lambda quick: bench_temperatures(quick, args.real)
        benches["offline"] = lambda quick: bench_offline(quick, args.real)
        benches["step"] = lambda quick: bench_step(quick, args.device, args.measured)
        rows = benches[args.bench](args.quick)
    print(show(rows))
    if rows_file:
        write_json(rows_file, [row._asdict() for row in rows])


if __name__ == "__main__":
    main()
