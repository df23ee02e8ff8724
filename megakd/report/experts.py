"""What a model's experts are like: how alike, their spectra, and what every shape would miss at shares of their size.

Measured from safetensors one projection at a time; `survey` gives plain numbers, `experts_text` and `plot_experts` show
them.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megakd.compress.fewer import METHODS, fewer_experts_error
from megakd.compress.forms import USUAL, Candidate
from megakd.compress.permute import likeness
from megakd.compress.predict import measure
from megakd.errors import UserError
from megakd.models.hub import is_student, load_config, model_of
from megakd.models.shared_core import PROJECTIONS
from megakd.models.sources import Sources
from megakd.models.spec import MoESpec, active_experts, spec_for
from megakd.names import holds_model
from megakd.outputs import check_file
from megakd.system.files import publishing, write_json
from megakd.system.logging import Progress
from megakd.system.text import table

MARK = "made by megakd inspect --experts"
SHOWN_LAYERS = 3  # without --layers
SPECTRA = 8  # experts whose singular values are computed
TOP = (16, 8, 4)  # the largest 16th, 8th, 4th of singular values
OUTLYING = 6.0  # of an expert's norm, in robust standard deviations from the median; and by a tenth at least
ROW_CHUNK = 2**25  # numbers of all experts' rows that are in float32 at once
PLOT_TYPES = (".png", ".svg", ".pdf")


def survey(
    folder: Path, layers_text: str | None, shares_text: str | None, plot: Path | None, written: Path | None
) -> dict[str, Any]:
    """Measure the experts of some layers as the options say; all of it as plain numbers, also in the file `written`."""
    config, spec, sources = _moe_model(folder)
    layers = _layers(layers_text, list(spec.layers), folder)
    shares = _shares(shares_text or "1/8,1/4,1/2")
    if plot is not None and plot.suffix not in PLOT_TYPES:
        raise UserError(f"--plot {plot}: what it ends in must be one of {', '.join(PLOT_TYPES)}")
    for file in (plot, written):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: {file.parent} is no folder")
        if file is not None:
            check_file(file, MARK)
    hidden, inner = spec.sizes
    result: dict[str, Any] = {
        "made_by": MARK,
        "model": str(folder),
        "model_type": config.model_type,
        "moe_layers": len(spec.layers),
        "experts": spec.experts,
        "active": active_experts(config),
        "hidden": hidden,
        "expert_hidden": inner,
        "layers": [],
    }
    progress = Progress("inspect", len(layers) * len(PROJECTIONS), "projections")
    for layer in layers:
        found: dict[str, Any] = {"layer": layer}
        few = []
        for projection in PROJECTIONS:
            weights = sources.experts(spec, layer, projection)
            # likeness compares the first expert with the second and the last
            few.append(weights[[0, min(1, len(weights) - 1), -1]].clone())
            found[projection] = measure_projection(
                weights, projection, active_experts(config), shares, _steps(progress, f"layer {layer} {projection}")
            )
            del weights  # before the next one is read
        if spec.experts > 1:
            alike = likeness(*few)
            found["units"] = {"cosine": alike.cosine, "chance": alike.chance, "copies": bool(alike.copies)}
        result["layers"].append(found)
    progress.close()
    if written is not None:
        write_json(written.resolve(), result)
    if plot is not None:
        plot_experts(result, plot)
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
    for shape in USUAL:
        for label, share in shares.items():
            fitting = [c for c in candidates if c.form.shape == shape and c.parameters <= share * dense]
            best_of = min(fitting, key=lambda c: (c.error, c.parameters), default=None)
            errors.append({"shape": shape, "share": label, **({} if best_of is None else _plain(best_of, dense))})
    for method in METHODS:
        for label, share in shares.items():
            left = int(share * experts + 1e-9)
            kept = {"experts": left, "parameters": left / experts} if left >= active else None
            if kept is not None:
                kept["relative_error"] = fewer_experts_error(method, norms, cosines, left)
            errors.append({"shape": method, "share": label, **(kept or {})})
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
        "curves": {shape: _envelope([c for c in candidates if c.form.shape == shape], dense) for shape in USUAL},
    }


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` numbers, evenly spaced, the first one among them."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


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
    labels = [e["share"] for e in result["layers"][0][PROJECTIONS[0]]["errors"] if e["shape"] == USUAL[0]]
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
            shown = (*USUAL, *METHODS)
            errors += [[place, label, *(_error_cell(by[shape, label]) for shape in shown)] for label in labels]
    top = [f"top 1/{part}" for part in TOP]
    parts = [
        head,
        table(["pairs of experts", "mean cosine", "max", "of", "norm min", "median", "max", "outliers"], alike),
        *(_units_line(found) for found in result["layers"] if "units" in found),
        "\nspectra: stable rank, and energy in the largest singular values, of single experts and of their mean",
        table(["", "stable rank", *top, "mean: stable rank", *top, "its energy"], spectra),
        "\nrelative error of the weights at shares of the parameters, predicted, at the best ranks (input + output)",
        table(["", "share", *USUAL, *METHODS], errors),
        "prune: the experts of the largest norms stay, dropped ones count whole; merge: means of experts that are "
        "close as stored\ncompress chooses by tokens instead, and tells the error of each layer's output",
    ]
    return "\n".join(parts)


def _error_cell(error: dict[str, Any]) -> str:
    if "relative_error" not in error:
        return "too small"
    if "experts" in error:
        return f"{error['relative_error']:.3f} ({error['experts']} experts)"
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
            for shape, line in zip(USUAL, ("-", "--", ":"), strict=True):
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
    with publishing(file.resolve()) as temporary:
        figure.savefig(temporary, dpi=120, format=file.suffix[1:], metadata={"Title": MARK})
    plt.close(figure)


def _moe_model(folder: Path) -> tuple[Any, MoESpec, Sources]:
    """Config, spec and tensors of a model folder of a known family that has experts; UserError for all else."""
    if not holds_model(folder):
        raise UserError(f"{folder}: --experts measures a model folder (config.json and safetensors)")
    config = load_config(folder)
    if is_student(config):
        raise UserError(f"{folder}: its experts are compressed already; --experts measures the teacher they come from")
    spec = spec_for(config, str(folder))
    return config, spec, Sources(folder, model_of(config, str(folder)))


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
