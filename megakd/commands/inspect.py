"""Explain what lies at a path: a run (its stages, and which rule each parameter gets), shards, a checkpoint, a model.

With --experts, what the experts of a Mixture-of-Experts model are like, before anything about compressing them is
decided: how alike they are, their spectra, and the relative error that every shape would have at shares of their
parameters. Read from safetensors one projection at a time; half a minute each at Qwen3-30B-A3B's sizes on one core.

examples:
  megakd inspect runs/a                            which parameters train at which rate, stage by stage
  megakd inspect runs/a/data/logits/train          what the shards hold; one record in words
  megakd inspect runs/a/data/logits/train --verify read every byte again; recompute the teacher's NLL of some labels
  megakd inspect runs/a/checkpoints/all/step-000150
  megakd inspect models/Qwen3-30B-A3B              parameters and bytes by kind of tensor, without reading them
  megakd inspect models/Qwen3-30B-A3B --experts --layers 0,23,47 --plot experts.png --json experts.json
  megakd inspect demo --experts --layers all --shares 1/6,1/3
"""

import argparse
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megakd.config import LogitsConfig, flatten
from megakd.data.batches import collate
from megakd.data.records import TeacherTargets
from megakd.data.shards import ShardSet
from megakd.data.tokens import load_tokenizer
from megakd.engine.optim import assign_rules
from megakd.errors import UserError
from megakd.files import publishing, read_json, write_json
from megakd.log import Progress, short, table
from megakd.models.align import likeness
from megakd.models.hub import Checkpoint, empty_model, load_config, load_model, resolve, weights_fingerprint
from megakd.models.planner import Candidate, measure, spread
from megakd.models.shared_core import PROJECTIONS, SHAPES
from megakd.models.spec import SPECS, MoESpec, spec_for
from megakd.models.teacher import Teacher, batch_targets
from megakd.run import Run

CHECKED_SAMPLES = 8
MOST_NLL_DIFFERENCE = 0.2  # nats; rounding costs 0.02 to 0.05 in float32, other tokens or another teacher cost nats
SHOWN_LAYERS = 3  # without --layers
SPECTRA = 8  # experts whose singular values are computed
TOP = (16, 8, 4)  # the largest 16th, 8th, 4th of singular values
OUTLYING = 6.0  # of an expert's norm, in robust standard deviations from the median; and by a tenth at least
ROW_CHUNK = 2**25  # numbers of all experts' rows that are in float32 at once
PLOT_TYPES = (".png", ".svg", ".pdf")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path)
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
        "--plot", type=Path, metavar="FILE.png", help="--experts: draw spectra and errors (.svg, .pdf too)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="--experts: write all that was measured")


def main(args: argparse.Namespace) -> None:
    path: Path = resolve("demo") if str(args.path) == "demo" and not args.path.exists() else args.path
    if args.experts:
        print(experts_text(survey(path, args)))
        return
    for option in ("layers", "shares", "plot", "json"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for --experts; add it")
    if (path / "history.jsonl").exists():
        text = describe_run(Run.open(path))
    elif (path / "manifest.json").exists():
        shards = ShardSet(path)
        text = describe_shards(shards)
        if args.verify:
            shards.verify()
            text += f"\nverified: {len(shards)} samples, every byte"
            if shards.layout is not None:
                text += "\n" + verify_teacher(shards, args.teacher)
    elif (path / "progress.json").exists():
        text = f"checkpoint {path}\n" + table(
            ["progress", ""], [[k, str(v)] for k, v in read_json(path / "progress.json").items()], left=True
        )
        text += "\n\n" + describe_model(path / "weights")
    elif (path / "config.json").exists():
        text = describe_model(path)
    else:
        raise UserError(f"{path}: neither a run, nor shards, nor a checkpoint, nor a model folder")
    print(text)


def describe_run(run: Run) -> str:
    """The run's stages; for each rule, how many parameters it got, their elements, and one of them."""
    parts = [f"run {run.folder}: {run.config.name}, fingerprint {run.config.fingerprint()}"]
    if not (run.student_folder / "config.json").exists():
        return "\n".join([*parts, f"no student yet; run: megakd compress {run.folder}"])
    model = empty_model(run.student_folder)
    for stage in run.config.stages:
        assigned = assign_rules(model, stage.lr_multipliers)
        rows = []
        for index in [*range(len(stage.lr_multipliers)), None]:
            mine = [a for a in assigned if a.rule == index]
            if mine:
                pattern = "(no rule)" if index is None else stage.lr_multipliers[index].pattern
                count = sum(a.parameter.numel() for a in mine)
                rows.append([pattern, f"{mine[0].multiplier:g}", str(len(mine)), f"{count:,}", mine[0].name])
        lr = stage.lr or run.config.optim.lr
        parts.append(f"\nstage {stage.name}: {short(stage.tokens)} tokens, lr {lr:g}")
        parts.append(table(["rule", "x lr", "tensors", "parameters", "for example"], rows))
    return "\n".join(parts)


def describe_shards(shards: ShardSet) -> str:
    """What a folder of shards is, and its first sample in words."""
    rows = [[key, str(value)] for key, value in flatten(shards.facts)]
    rows += [["shards", str(len(shards.names))], ["samples", f"{len(shards):,}"], ["tokens", f"{shards.tokens:,}"]]
    rows += [["bytes a token", f"{shards.bytes / shards.tokens:.1f}"]]
    return table([str(shards.folder), ""], rows, left=True) + "\n\n" + _describe_sample(shards)


def _describe_sample(shards: ShardSet) -> str:
    sample = shards[0]
    lines = [f"sample {sample.key}: {len(sample.tokens)} tokens, documents begin at {sample.starts.tolist()[:8]}"]
    if sample.targets is None:
        return lines[0]
    show = _token_text(shards)
    for position in range(min(3, len(sample.tokens) - 1)):
        targets = sample.targets
        lines.append(
            f"after {show(sample.tokens[position])} comes {show(sample.tokens[position + 1])} "
            f"(NLL {targets.label_nll[position]:.2f}); {_describe_position(targets, position, show)}"
        )
    return "\n".join(lines)


def verify_teacher(shards: ShardSet, where: str | None) -> str:
    """Run the teacher over some samples; UserError when its NLL of their labels is not what the records say.

    A record that belongs to other tokens, or to another teacher, is off by whole nats; rounding by a few hundredths.
    """
    made_by = shards.facts["teacher"]
    if made_by["id"] == "unknown" or shards.facts.get("converted", {}).get("label_nll", "stored") != "stored":
        return "not compared with a teacher: the data was converted from a file that does not name it or its NLL"
    try:
        folder = resolve(where or made_by["id"], made_by["revision"])
    except UserError:
        return f"not compared with the teacher: {made_by['id']} is not here (say where with --teacher)"
    if weights_fingerprint(folder) != made_by["weights"]:
        raise UserError(
            f"{shards.folder}: made by weights {made_by['weights']}, {folder} has {weights_fingerprint(folder)}"
        )
    keep = LogitsConfig(top_k=1, temperatures=(1.0,))
    teacher = Teacher(
        load_model(folder, getattr(torch, shards.facts["dtype"])).eval(), keep, shards.facts["vocab_size"]
    )
    indices = sorted({len(shards) * i // CHECKED_SAMPLES for i in range(CHECKED_SAMPLES)})
    differences = []
    for index in indices:
        sample = shards[index]
        count = len(sample.tokens) - 1
        batch = collate([sample._replace(targets=None)], count)
        found = batch_targets(teacher, batch, torch.zeros(1, count), torch.device("cpu")).label_nll[0].numpy()
        assert sample.targets is not None
        differences.append(float(np.abs(found - sample.targets.label_nll).mean()))
        if differences[-1] > MOST_NLL_DIFFERENCE:
            raise UserError(
                f"{shards.place(index)}: the teacher's NLL of its labels is off by {differences[-1]:.2f} nats a token; "
                "it is not this teacher's answer to these tokens: run: megakd generate-logits RUN in a new run"
            )
    return f"the teacher's NLL of the labels of {len(indices)} samples: within {max(differences):.3f} nats on average"


def _describe_position(targets: TeacherTargets, position: int, show: Any) -> str:
    parts = []
    if targets.ids.shape[1]:
        logprobs = targets.logprobs[position]
        best = ", ".join(
            f"{show(targets.ids[position][i])} {np.exp(logprobs[i]):.1%}"
            for i in np.argsort(-logprobs)[: min(4, np.isfinite(logprobs).sum())]
        )
        tail, count = float(np.exp(targets.log_tails[position][0])), int(np.isfinite(logprobs).sum())
        parts.append(f"the teacher says {best}, …; {tail:.1%} outside the {count} stored")
    if targets.draw_ids.shape[1]:
        shares = targets.draw_shares[position]
        drawn = ", ".join(
            f"{show(targets.draw_ids[position][i])} {shares[i]:.0%}"
            for i in np.argsort(-shares)[: min(4, (shares > 0).sum())]
        )
        parts.append(f"draws: {drawn}, … ({int((shares > 0).sum())} distinct); entropy {targets.entropy[position]:.2f}")
    return "; ".join(parts)


def _token_text(shards: ShardSet) -> Any:
    teacher = shards.facts["teacher"]
    try:
        tokenizer = load_tokenizer(resolve(teacher["id"], teacher["revision"], weights=False))
    except UserError:
        return lambda token: f"#{token}"
    return lambda token: repr(tokenizer.decode([int(token)]))


def describe_model(folder: Path) -> str:
    """Parameters and bytes of a model folder, by kind of tensor; files' headers say it, tensors are not read."""
    checkpoint, config = Checkpoint(folder), load_config(folder)
    sizes: dict[str, tuple[int, int]] = {}
    for file in sorted(set(checkpoint.files.values())):
        found = tensor_sizes(checkpoint, file)
        missing = sorted(name for name, where in checkpoint.files.items() if where == file and name not in found)
        if missing:
            raise UserError(f"{folder / file}: no tensor {missing[0]} in it, though the index says so")
        sizes |= {name: found[name] for name, where in checkpoint.files.items() if where == file}
    kinds: dict[str, list[int]] = {}
    for name in checkpoint.files:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        entry = kinds.setdefault(kind, [0, 0, 0])
        for i, n in enumerate((1, *sizes[name])):
            entry[i] += n
    rows = [[kind, str(c), f"{n:,}", short(b)] for kind, (c, n, b) in kinds.items()]
    total = [sum(v[i] for v in kinds.values()) for i in range(3)]
    rows.append(["all", str(total[0]), f"{total[1]:,}", short(total[2])])
    text = table([f"{folder} ({config.model_type})", "tensors", "parameters", "bytes"], rows)
    if config.model_type in SPECS:
        spec = SPECS[config.model_type]
        layers, (hidden, inner), experts = spec.moe_layers(config), spec.sizes(config), spec.num_experts(config)
        count = len(layers) * experts * 3 * hidden * inner
        text += f"\n\n{len(layers)} layers of {experts} experts, {config.num_experts_per_tok} active, "
        text += f"hidden {hidden} → {inner}: {count / total[1]:.1%} of the parameters"
        text += f"\nwhat they are like: megakd inspect {folder} --experts"
    return text


def tensor_sizes(checkpoint: Checkpoint, file: str) -> dict[str, tuple[int, int]]:
    """(numbers, bytes) of every tensor of a file, from its header: 8 bytes of length, then JSON."""
    checkpoint._open(file)  # is it safetensors, and whole
    with (checkpoint.folder / file).open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    sizes = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        sizes[name] = (int(np.prod(entry["shape"], dtype=np.int64)), end - start)
    return sizes


def survey(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the experts of some layers as the options say; all of it as plain numbers, also written to --json."""
    config, spec, checkpoint = _moe_model(folder)
    layers = _layers(args.layers, spec.moe_layers(config), folder)
    shares = _shares(args.shares or "1/8,1/4,1/2")
    if args.plot is not None and args.plot.suffix not in PLOT_TYPES:
        raise UserError(f"--plot {args.plot}: what it ends in must be one of {', '.join(PLOT_TYPES)}")
    for file in (args.plot, args.json):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: {file.parent} is no folder")
    hidden, inner = spec.sizes(config)
    result: dict[str, Any] = {
        "model": str(folder),
        "model_type": config.model_type,
        "moe_layers": len(spec.moe_layers(config)),
        "experts": spec.num_experts(config),
        "active": config.num_experts_per_tok,
        "hidden": hidden,
        "expert_hidden": inner,
        "layers": [],
    }
    progress = Progress("inspect", len(layers) * len(PROJECTIONS), "projections")
    for layer in layers:
        found: dict[str, Any] = {"layer": layer}
        few = []
        for projection in PROJECTIONS:
            weights = checkpoint.experts(spec, config, layer, projection)
            # likeness compares the first expert with the second and the last
            few.append(weights[[0, min(1, len(weights) - 1), -1]].clone())
            found[projection] = measure_projection(
                weights, projection, config.num_experts_per_tok, shares, _steps(progress, f"layer {layer} {projection}")
            )
            del weights  # before the next one is read
        if spec.num_experts(config) > 1:
            alike = likeness(*few)
            found["units"] = {"cosine": alike.cosine, "chance": alike.chance, "copies": bool(alike.copies)}
        result["layers"].append(found)
    progress.close()
    if args.json is not None:
        write_json(args.json, result)
    if args.plot is not None:
        plot_experts(result, args.plot)
    return result


def measure_projection(
    weights: Tensor,
    projection: str,
    active: int,
    shares: dict[str, float],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """What the experts [E, d_out, d_in] of one projection are like, and what every shape would miss."""
    norms, cosines = norms_and_cosines(weights)
    experts = len(weights)
    middle = norms.median()
    spread_of_norms = 1.4826 * (norms - middle).abs().median()
    outlying = (norms - middle).abs() > torch.maximum(OUTLYING * spread_of_norms, 0.1 * middle)
    apart = cosines[~torch.eye(experts, dtype=torch.bool)]
    best = int(cosines.clone().fill_diagonal_(-2).argmax()) if experts > 1 else 0
    chosen = spread(experts, SPECTRA)
    spectra = torch.stack([singular_values(weights[e]) for e in chosen])
    mean = sum((weights[e].to(torch.float32) for e in range(experts)), torch.zeros(weights.shape[1:])) / experts
    energy = float(norms.square().mean())
    dense, candidates = weights.numel(), measure(weights, projection, active, progress=progress)
    errors = []
    for shape in SHAPES:
        for label, share in shares.items():
            fitting = [c for c in candidates if c.form.shape == shape and c.parameters <= share * dense]
            best_of = min(fitting, key=lambda c: (c.error, c.parameters), default=None)
            errors.append({"shape": shape, "share": label, **({} if best_of is None else _plain(best_of, dense))})
    return {
        "norms": _rounded(norms.tolist()),
        "outliers": torch.nonzero(outlying).flatten().tolist(),
        "cosine": {
            "mean": float(apart.mean()) if experts > 1 else 1.0,
            "max": float(apart.max()) if experts > 1 else 1.0,
            "pair": sorted(divmod(best, experts)),
        },
        "spectrum": {"experts": chosen, **_spectrum(spectra)},
        "mean_expert": {
            "energy": float(mean.square().sum(dtype=torch.float64)) / max(energy, 1e-300),
            **_spectrum(singular_values(mean)[None]),
        },
        "errors": errors,
        "curves": {shape: _envelope([c for c in candidates if c.form.shape == shape], dense) for shape in SHAPES},
    }


def norms_and_cosines(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(||W_e||, [E]; cosines of all pairs as vectors, [E, E]) in float64; some rows of all experts at a time."""
    experts = len(weights)
    gram = torch.zeros(experts, experts, dtype=torch.float64)
    for rows in weights.split(max(1, ROW_CHUNK // (experts * weights.shape[2])), dim=1):
        flat = rows.reshape(experts, -1).to(torch.promote_types(weights.dtype, torch.float32))
        gram += (flat @ flat.T).double()
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = norms.clamp(min=1e-300)
    return norms, gram / scale[:, None] / scale


def singular_values(matrix: Tensor) -> Tensor:
    """Descending, float64, roots of the eigenvalues of M M^T or M^T M; what is below 3e-4 of the first is rounding."""
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    exact = exact if exact.shape[0] <= exact.shape[1] else exact.mT
    return torch.linalg.eigvalsh(exact @ exact.mT).flip(0).double().clamp(min=0).sqrt()


def _spectrum(sigma: Tensor) -> dict[str, Any]:
    """Means over matrices of singular values [n, r]: stable rank |s|^2 / s_1^2, energy in the largest, s / s_1."""
    squares = sigma.square()
    total, count = squares.sum(1).clamp(min=1e-300), sigma.shape[1]
    first = squares[:, 0].clamp(min=1e-300)
    top = {f"1/{part}": float((squares[:, : -(-count // part)].sum(1) / total).mean()) for part in TOP}
    relative = (sigma / first.sqrt()[:, None]).mean(0)
    return {"stable_rank": float((total / first).mean()), "top": top, "singular_values": _rounded(relative.tolist())}


def _plain(candidate: Candidate, dense: int) -> dict[str, Any]:
    """A candidate as plain numbers; its error as the root: relative, of the weights."""
    form = candidate.form
    return {
        "input_rank": form.input_rank,
        "output_rank": form.output_rank,
        "groups": form.groups,
        "parameters": candidate.parameters / dense,
        "flops": candidate.flops,
        "relative_error": candidate.error**0.5,
    }


def _envelope(candidates: Sequence[Candidate], dense: int) -> list[list[float]]:
    """[share of the parameters, relative error] of those that no smaller one betters."""
    found: list[list[float]] = []
    for c in sorted(candidates, key=lambda c: (c.parameters, c.error)):
        if not found or c.error**0.5 < found[-1][1]:
            found.append([c.parameters / dense, c.error**0.5])
    return [_rounded(point) for point in found]


def experts_text(result: dict[str, Any]) -> str:
    """A survey in words and tables."""
    head = f"{result['model']}: {result['model_type']}, {result['moe_layers']} layers of {result['experts']} experts, "
    head += f"{result['active']} active, hidden {result['hidden']} → {result['expert_hidden']}"
    alike, spectra, errors = [], [], []
    labels = [e["share"] for e in result["layers"][0][PROJECTIONS[0]]["errors"] if e["shape"] == SHAPES[0]]
    for found in result["layers"]:
        for projection in PROJECTIONS:
            place, p = f"layer {found['layer']} {projection}", found[projection]
            norms = np.array(p["norms"])
            outliers = ", ".join(f"{e} ({norms[e]:.3g})" for e in p["outliers"][:4])
            more = f", {len(p['outliers']) - 4} more" if len(p["outliers"]) > 4 else ""
            pair = "{} {}".format(*p["cosine"]["pair"])
            cosine = [f"{p['cosine']['mean']:.4f}", f"{p['cosine']['max']:.4f}", pair]
            norm = [f"{x:.3g}" for x in (norms.min(), np.median(norms), norms.max())]
            alike.append([place, *cosine, *norm, outliers + more or "none"])
            row = [place]
            for one in (p["spectrum"], p["mean_expert"]):
                row += [f"{one['stable_rank']:.1f}", *(f"{share:.1%}" for share in one["top"].values())]
            spectra.append([*row, f"{p['mean_expert']['energy']:.1%}"])
            by = {(e["shape"], e["share"]): e for e in p["errors"]}
            errors += [[place, label, *(_error_cell(by[shape, label]) for shape in SHAPES)] for label in labels]
    top = [f"top 1/{part}" for part in TOP]
    parts = [
        head,
        table(["pairs of experts", "mean cosine", "max", "of", "norm min", "median", "max", "outliers"], alike),
        *(_units_line(found) for found in result["layers"] if "units" in found),
        "\nspectra: stable rank, and energy in the largest singular values, of single experts and of their mean",
        table(["", "stable rank", *top, "mean: stable rank", *top, "its energy"], spectra),
        "\nrelative error of the weights at shares of the parameters, predicted, at the best ranks (input + output)",
        table(["", "share", *SHAPES], errors),
    ]
    return "\n".join(parts)


def _error_cell(error: dict[str, Any]) -> str:
    if "relative_error" not in error:
        return "too small"
    ranks = [str(r) for r in (error["input_rank"], error["output_rank"]) if r]
    groups = f" x {error['groups']} groups" if error["groups"] > 1 else ""
    return f"{error['relative_error']:.3f} (r {'+'.join(ranks)}{groups})"


def _units_line(found: dict[str, Any]) -> str:
    units = found["units"]
    said = f"layer {found['layer']}: hidden units of two experts match with cosine {units['cosine']:.3f}"
    said += f" at best, {units['chance']:.3f} by chance: "
    if not units["copies"]:
        return said + "no permuted copies"
    in_order = found["gate"]["cosine"]["mean"] > 0.7 * units["cosine"]
    return said + ("copies, in the same order" if in_order else "permuted copies; compress aligns them")


def plot_experts(result: dict[str, Any], file: Path) -> None:
    """Spectra (single experts and, dashed, their mean) and errors against parameters, a column a projection."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained", sharey="row")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(result["layers"])))
    for column, projection in enumerate(PROJECTIONS):
        above, below = axes[0, column], axes[1, column]
        for colour, found in zip(colours, result["layers"], strict=True):
            for key, line in (("spectrum", "-"), ("mean_expert", "--")):
                sigma = np.maximum(found[projection][key]["singular_values"], 1e-9)  # experts may be zeros
                name = f"layer {found['layer']}{', mean of all' if line == '--' else ''}"
                above.plot(np.arange(1, len(sigma) + 1), sigma, line, color=colour, label=name, linewidth=1.2)
            for shape, line in zip(SHAPES, ("-", "--", ":"), strict=True):
                curve = np.array(found[projection]["curves"][shape]).reshape(-1, 2)
                below.plot(*curve.T, line, color=colour, label=f"layer {found['layer']} {shape}", linewidth=1.2)
        above.set_title(f"{projection}_proj", fontsize=11)
        above.set_yscale("log")
        above.set_ylim(1e-3, 1.2)
        above.set_xlabel("singular value")
        below.set_xlabel("share of the experts' parameters")
        below.set_xlim(0, 1)
        below.set_ylim(0, None)
        for one in (above, below):
            one.grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative to the largest")
    axes[1, 0].set_ylabel("relative error of the weights")
    if len(result["layers"]) <= 6:
        for one in axes[:, 2]:
            one.legend(fontsize=8, frameon=False)
    figure.suptitle(f"experts of {result['model']}", fontsize=12)
    with publishing(file) as temporary:
        figure.savefig(temporary, dpi=120, format=file.suffix[1:])
    plt.close(figure)


def _moe_model(folder: Path) -> tuple[Any, MoESpec, Checkpoint]:
    """Config, spec and tensors of a model folder of a known family that has experts; UserError for all else."""
    if not (folder / "config.json").exists() or (folder / "history.jsonl").exists():
        raise UserError(f"{folder}: --experts measures a model folder (config.json and safetensors)")
    config = load_config(folder)
    spec = spec_for(config, str(folder))
    if config.model_type != spec.model_type:
        raise UserError(f"{folder}: its experts are compressed already; --experts measures the teacher they come from")
    if not spec.moe_layers(config):
        raise UserError(f"{folder}: not a Mixture of Experts, all of its layers are dense")
    return config, spec, Checkpoint(folder)


def _layers(text: str | None, known: list[int], folder: Path) -> list[int]:
    if text == "all":
        return known
    if text is None:
        return sorted({known[i * (len(known) - 1) // max(SHOWN_LAYERS - 1, 1)] for i in range(SHOWN_LAYERS)})
    layers = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise UserError(f"--layers {text}: {part!r} is no layer; write numbers like 0,23,47, or all")
        layers.append(int(part))
        if layers[-1] not in known:
            where = (
                f"{known[0]} … {known[-1]}" if len(known) == known[-1] - known[0] + 1 else ", ".join(map(str, known))
            )
            raise UserError(f"--layers {text}: {folder} has no experts in layer {part.strip()}, but in {where}")
    return sorted(set(layers))


def _shares(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        try:
            share = float(Fraction(part.strip()))
        except (ValueError, ZeroDivisionError):
            share = 0.0
        if not 0 < share < 1:
            raise UserError(f"--shares {text}: {part!r} is no share; write fractions between 0 and 1 like 1/8,0.25")
        found[part.strip()] = share
    return found


def _steps(progress: Progress, note: str) -> Callable[[float], None]:
    """From the share of one projection that is done to what Progress counts."""
    before = 0.0

    def update(share: float) -> None:
        nonlocal before
        progress.update(share - before, note)
        before = share

    return update


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [float(f"{x:.6g}") for x in numbers]
