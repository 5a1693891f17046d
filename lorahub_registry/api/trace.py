"""The picture of a search in a mixture's card: the objective against evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from lorahub_registry.card import TRACE_NAME


def draw_trace(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the trace of ``results["search"]`` into a mixture's folder, as a PNG.

    Candidates without a finite objective are left out of the picture.
    """
    # Late, and without a display: half a second that only a learned mixture takes.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seen = [(n, e["objective"]) for n, e in enumerate(results["search"], 1)]
    finite = [(n, value) for n, value in seen if value is not None]
    numbers, values = [n for n, _ in finite], [value for _, value in finite]
    best = list(accumulate(values, min))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(numbers, values, "o", markersize=3, alpha=0.5, label="candidate")
    axes.step(numbers, best, where="post", label="best so far")
    # The first steps of a search may overshoot: what matters is near the end.
    spread = max(best[0] - best[-1], 1e-3)
    axes.set_ylim(best[-1] - 0.1 * spread, best[-1] + 1.5 * spread)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("objective on data.train")
    axes.set_title(results["stopped"]["text"], fontsize="medium")
    axes.legend()
    figure.savefig(folder / TRACE_NAME, format="png", dpi=110, metadata={"Software": None})
