"""Explain what lies at a path: a run (its stages, and which rule each parameter gets), shards, a checkpoint, a model.

With --experts, what the experts of a Mixture-of-Experts model are like, before anything about compressing them is
decided: how alike they are, their spectra, and the relative error that every shape of shared cores, pruning and
merging would have at shares of their parameters. Read from safetensors one projection at a time; some minutes each at
Qwen3-30B-A3B's sizes on one core.

examples:
  megakd inspect runs/a                            which parameters train at which rate, stage by stage
  megakd inspect runs/a/data/logits/train          what the shards hold; one record in words
  megakd inspect runs/a/data/logits/train --verify read every byte again; recompute the teacher's NLL of some labels
  megakd inspect runs/a/data/logits/train/shard-00003.tar
  megakd inspect runs/a/checkpoints/all/step-000150
  megakd inspect models/Qwen3-30B-A3B              parameters and bytes by kind of tensor, without reading them
  megakd inspect models/Qwen3-30B-A3B --experts --layers 0,23,47 --plot experts.png --json experts.json
  megakd inspect demo --experts --layers all --shares 1/6,1/3
"""

import argparse

from megakd.data.shards import ShardSet
from megakd.errors import UserError
from megakd.names import expand, holds_run, model_folder
from megakd.report.describe import describe_model, describe_run, describe_shard, describe_shards, verify_teacher
from megakd.report.experts import experts_text, survey
from megakd.run import Run
from megakd.system.files import read_json
from megakd.system.text import table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a run, shards, a checkpoint or a model folder; demo: the shipped teacher")
    parser.add_argument(
        "--verify", action="store_true", help="shards: check every byte, and the teacher's NLL of labels"
    )
    parser.add_argument("--teacher", help="--verify: where the teacher lies now (default: where the manifest says)")
    parser.add_argument("--experts", action="store_true", help="model: measure its experts; takes minutes")
    parser.add_argument(
        "--layers", metavar="0,23,47", help="--experts: which layers, or all (default: a few spread ones)"
    )
    parser.add_argument("--shares", metavar="1/8,1/4,1/2", help="--experts: of the parameters (default: these)")
    parser.add_argument(
        "--plot", type=expand, metavar="FILE.png", help="--experts: draw spectra and errors (.svg, .pdf too)"
    )
    parser.add_argument("--json", type=expand, metavar="FILE", help="--experts: write all that was measured")


def main(args: argparse.Namespace) -> None:
    path = model_folder(args.path) or expand(args.path)
    if args.experts:
        print(experts_text(survey(path, args.layers, args.shares, args.plot, args.json)))
        return
    for option in ("layers", "shares", "plot", "json"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for --experts; add it")
    if holds_run(path):
        text = describe_run(Run.open(path))
    elif (path / "manifest.json").exists():
        shards = ShardSet(path)
        text = describe_shards(shards)
        if args.verify:
            shards.verify()
            text += f"\nverified: {len(shards)} samples, every byte"
            if shards.layout is not None:
                text += "\n" + verify_teacher(shards, args.teacher)
    elif path.suffix == ".tar" and path.is_file():
        if args.verify:
            raise UserError(f"{path}: --verify reads a folder of shards; give {path.parent}")
        text = describe_shard(path)
    elif (path / "progress.json").exists():
        text = f"checkpoint {path}\n" + table(
            ["progress", ""], [[k, str(v)] for k, v in read_json(path / "progress.json").items()], left=True
        )
        text += "\n\n" + describe_model(path / "weights")
    elif (path / "config.json").exists():
        text = describe_model(path)
    else:
        raise UserError(f"{path}: neither a run, nor shards, nor a shard (.tar), nor a checkpoint, nor a model folder")
    print(text)
