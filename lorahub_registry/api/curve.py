"""The picture of a training run in an adapter's card: losses against steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorahub_registry.card import LOSS_NAME


def draw_loss(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``results["loss"]`` and ``results["validation_loss"]`` as a PNG.

    Points without a finite loss are left out of the picture.
    """
    # Late, and without a display: half a second that only training takes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, style, label in (("loss", "-", "training"), ("validation_loss", "o-", "validation")):
        finite = [(step, value) for step, value in results[key] if value is not None]
        if finite:
            # One point alone is no line.
            mark = "o" if len(finite) == 1 else style
            axes.plot(*zip(*finite, strict=True), mark, markersize=4, linewidth=1.2, label=label)
    if results["best_step"] is not None:
        axes.axvline(results["best_step"], color="gray", linestyle=":", label="kept")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss, nats a token")
    if results["stopped"]:
        axes.set_title(f"stopped {results['stopped']}", fontsize="medium")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(folder / LOSS_NAME, format="png", dpi=110, metadata={"Software": None})
