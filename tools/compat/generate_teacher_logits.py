"""Cache a teacher's logits as scripts/generate_teacher_logits.py does: RUN/data/logits.

    python tools/compat/generate_teacher_logits.py --teacher_model Qwen/Qwen3-30B-A3B-Base --dataset wikitext \\
        --dataset_config wikitext-2-raw-v1 --output_dir ./teacher_logits --top_k 64 --batch_size 4
    python tools/compat/generate_teacher_logits.py distillation.dataset.name=HuggingFaceFW/fineweb \\
        distillation.dataset.streaming=true
    tools/compat/generate_teacher_logits_parallel.sh 4

It runs `megakd tokenize` and `megakd generate-logits`. --output_dir is a run's folder: training goes on there, or in
another one whose teacher.cache_dir it is. Logits are stored in shards (docs/data-format.md), not as HDF5;
tools/convert/convert_hdf5.py writes that. The configuration is conf/config.yaml of the working directory; which run,
and what may change later: tools/compat/run_from_conf.py.
"""

import os
import sys

import installed  # noqa: F401
import torch
from run_from_conf import build_parser, finish, open_run
from run_from_flags import count, one_line

from megakd.errors import UserError
from megakd.finish import missing_logits
from megakd.run import Run
from megakd.system.logging import say
from megakd.system.terminal import accept_any_encoding
from megakd.system.verbs import start, to_go_on

FLAGS = {  # → the key that it sets
    "teacher_model": "teacher.model_path",
    "dataset": "dataset.name",
    "dataset_config": "dataset.config",
    "top_k": "teacher.top_k",
    "batch_size": "teacher.batch_size",
}


def main(argv: list[str] | None = None) -> None:
    accept_any_encoding()
    with one_line("generate_teacher_logits"):
        parser = build_parser(__doc__)
        for name, key in FLAGS.items():
            parser.add_argument(f"--{name}", metavar=name.upper(), help=f"{key} of the configuration")
        parser.add_argument(
            "--num_gpus", type=count, default=1, metavar="N", help="processes, each on a GPU of its own"
        )
        args = parser.parse_intermixed_args(argv)
        devices = gpus(args.num_gpus)
        given = {key: getattr(args, name) for name, key in FLAGS.items()}
        run = open_run(args, [f"{key}={value}" for key, value in given.items() if value is not None])
        finish(run, ("tokenize",) if devices else ("tokenize", "generate-logits"))
        if devices:
            share(run, devices)
        print(f"logits: {run.path('data', 'logits')}")


def gpus(number: int) -> list[str]:
    """The GPUs of `number` workers, as CUDA_VISIBLE_DEVICES names them; none for one worker, and on a CPU ""."""
    there = torch.cuda.device_count()
    if number == 1:
        return []
    if not there:
        say(f"no GPU here: {number} processes share the CPU")
        return [""] * number
    if there < number:
        raise UserError(f"{number} workers, one per GPU, but this machine shows {there} GPUs; start {there}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(i) for i in range(there)])[:number]


def share(run: Run, devices: list[str]) -> None:
    """`megakd generate-logits` once per device, each on its part of the shards."""
    if missing_logits(run) is None:
        say(f"{run.path('data', 'logits')}: finished already")
        return
    workers = [
        start("generate-logits", str(run.folder), "--part", f"{i}/{len(devices)}", env={"CUDA_VISIBLE_DEVICES": device})
        for i, device in enumerate(devices)
    ]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        failed = ", ".join(f"worker {i} with exit code {code}" for i, code in enumerate(codes) if code)
        code = next(code for code in codes if code) % 256
        say(f"{failed} ended; {to_go_on(code)}")
        sys.exit(code)


if __name__ == "__main__":
    main()
