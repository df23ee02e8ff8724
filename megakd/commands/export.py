"""Write the trained student as a Hugging Face folder: RUN/export, or RUN/export-dense with --dense.

Its model card, README.md, holds what compress and evaluate measured.

compact  the shared-core model; transformers loads it after `import megakd`, or without it with trust_remote_code=True;
         vLLM serves it where MegaKD is installed, for some families (docs/serving.md)
dense    expanded to the family's stock architecture in the hub's own layout; needs no MegaKD

--quantize stores weights in few bits, in RUN/export-int8 and so on: of a compact model the parts core, factors,
linear, experts and embedding, each at a precision of its own if you like. Files become small; memory does not, for
loading turns each weight into a number of the model's type again (docs/serving.md).

With objective.kind=sar the teacher's routers, which learned too, lie in router_update/ below it, under their names in
the teacher: router_update.safetensors, .pt and what is to be known of them, .json (tools/compat/apply_router_update.py
puts them into a teacher).

examples:
  megakd export runs/a
  megakd export runs/a --dense
  megakd export runs/a --quantize int4
  megakd export runs/a --quantize core=int4,factors=int8,linear=int8
  megakd export runs/a --checkpoint best        the one that `megakd watch` keeps
  megakd export runs/a --out models/a           a new or empty folder, or one that export wrote
"""

import argparse

from megakd.config.precisions import parse_quantize
from megakd.engine.checkpoint import best_weights
from megakd.errors import UserError
from megakd.names import expand
from megakd.run import Run
from megakd.serve.export import export, last_weights

SECTIONS = ("model", "objective")  # of the configuration


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dense", action="store_true", help="expand to the stock architecture")
    parser.add_argument(
        "--quantize", metavar="P", help="int8, fp8, int4, or precisions of parts: core=int4,linear=int8"
    )
    parser.add_argument("--checkpoint", help="a checkpoint folder, or best (default: the last one, else student-0)")
    parser.add_argument("--out", type=expand, help="where to write (default: RUN/export or RUN/export-dense)")
    parser.add_argument("--force", action="store_true", help="replace a model that export did not write, too")


def main(run: Run, args: argparse.Namespace) -> None:
    source = last_weights(run)
    if args.checkpoint:
        best = args.checkpoint == "best"
        source = best_weights(run.path("checkpoints")) if best else expand(args.checkpoint) / "weights"
    if not (source / "config.json").exists():
        raise UserError(
            f"{source}: no model here; give --checkpoint RUN/checkpoints/STAGE/step-N, "
            f"or run: megakd compress {run.folder}"
        )
    export(run, source, args.out, args.dense, args.force, parse_quantize(args.quantize) if args.quantize else None)
