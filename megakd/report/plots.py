"""Draw the errors of compress: of every matrix that it fitted, and of each layer's output."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_errors(report: dict[str, Any], path: Path) -> None:
    """A PNG of `compress.json`'s errors: of each matrix, where matrices were fitted, and of each layer's output."""
    measured = [layer for layer in report["layers"] if "output_error" in layer]
    projections = list(dict.fromkeys(part["projection"] for part in report.get("parts", [])))
    panels = len(projections) + bool(measured)
    height = 1.6 + 0.12 * max(len(report["layers"]), 8)
    figure, axes = plt.subplots(
        1, panels, figsize=(4.2 * panels, height + (panels == 1)), layout="constrained", squeeze=False
    )
    if projections:
        _draw_matrices(report["parts"], projections, figure, list(axes[0, : len(projections)]))
    if measured:
        axis, errors = axes[0, -1], [layer["output_error"] for layer in measured]
        axis.barh([str(layer["layer"]) for layer in measured], errors, color="tab:blue")
        axis.invert_yaxis()
        axis.set_title(f"MoE output: mean {sum(errors) / len(errors):.3f}", fontsize=10)
        axis.set_xlabel("relative error on held-out tokens")
        axis.set_ylabel("layer")
        step = -(-len(measured) // 12)
        axis.set_yticks(range(0, len(measured), step))
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw_matrices(parts: list[dict[str, Any]], projections: list[str], figure: Any, axes: list[Any]) -> None:
    """A map of layers and experts for each projection; where inputs were measured, of the errors of outputs."""
    key = "weighted_errors" if all("weighted_errors" in part for part in parts) else "errors"
    layers = sorted({part["layer"] for part in parts})
    errors = {(part["layer"], part["projection"]): part[key] for part in parts}
    top = max(max(row) for row in errors.values())
    image = None
    for axis, projection in zip(axes, projections, strict=True):
        rows = [errors[layer, projection] for layer in layers]
        image = axis.imshow(rows, aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
        means = [sum(row) / len(row) for row in rows]
        axis.set_title(f"{projection}: mean {sum(means) / len(means):.3f}", fontsize=10)
        axis.set_xlabel("expert")
        step = -(-len(layers) // 12)
        axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes[0].set_ylabel("layer")
    assert image is not None
    what = "weights" if key == "errors" else "outputs on held-out tokens"
    figure.colorbar(image, ax=axes, label=f"relative error of {what}")
