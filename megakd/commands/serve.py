"""Start a server on an export, which answers under OpenAI's interface (docs/serving.md): RUN/export, or another one.

vllm          where this environment has it, or the one whose interpreter --python or MEGAKD_VLLM_PYTHON names
transformers  transformers' own server in this environment, for any family: pip install 'megakd[serve]'

Arguments behind -- go to the server unchanged. In requests the model's name is the folder, as the command shows it.

examples:
  megakd serve runs/a
  megakd serve runs/a --dense --port 8001
  megakd serve runs/a --python ~/vllm-env/bin/python -- --max-model-len 4096
  megakd serve runs/a --engine transformers
  megakd serve runs/a --print                 the command alone
  megakd serve runs/a --model models/a        what `megakd export --out` wrote
"""

import argparse

from megakd.errors import UserError
from megakd.names import expand
from megakd.run import Run
from megakd.serve.server import DTYPES, ENGINES, export_of, serve, server_for

PASSES_ON = True  # what is behind --, as args.further


def arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dense", action="store_true", help="RUN/export-dense instead of RUN/export")
    which.add_argument("--model", type=expand, metavar="FOLDER", help="a model's folder instead of RUN/export")
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="default: vllm where it is, else transformers"
    )
    parser.add_argument("--python", metavar="PATH", help="an interpreter that has vLLM (default: MEGAKD_VLLM_PYTHON)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: that of the export's config.json")
    parser.add_argument("--print", action="store_true", help="print the command, and start nothing")


def main(run: Run, args: argparse.Namespace) -> None:
    folder = args.model or export_of(run, args.dense)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no model here (no config.json)")
    python = args.python and str(expand(args.python))
    server = server_for(folder, args.engine, python, args.host, args.port, args.dtype, args.further)
    if args.print:
        print(server)
        return
    serve(server, args.host, args.port, str(folder))
