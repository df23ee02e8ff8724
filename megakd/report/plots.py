"""Draw the error of every matrix that compress fitted: a map of layers and experts for each projection."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_errors(report: dict[str, Any], path: Path) -> None:
    """A PNG of `compress.json`'s errors; what inputs were measured for is drawn by the errors of outputs."""
    parts = report["parts"]
    key = "weighted_errors" if all("weighted_errors" in part for part in parts) else "errors"
    projections = list(dict.fromkeys(part["projection"] for part in parts))
    layers = sorted({part["layer"] for part in parts})
    errors = {(part["layer"], part["projection"]): part[key] for part in parts}
    top = max(max(row) for row in errors.values())
    height = 1.6 + 0.12 * max(len(layers), 8)
    figure, axes = plt.subplots(1, len(projections), figsize=(4.2 * len(projections), height), layout="constrained")
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
    figure.colorbar(image, ax=list(axes), label=f"relative error of {what}")
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
