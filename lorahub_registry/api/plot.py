"""The figure of an adapter's weights; matplotlib without a display, imported late."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.errors import OutputError, UsageError

if TYPE_CHECKING:
    from lorahub_registry.weights.inspect import Weights

_PNG = b"\x89PNG\r\n\x1a\n"


def check_png(path: Path) -> None:
    """Whether a figure may be written to ``path``; a figure that is there will be replaced.

    Raises:
        UsageError: its name does not end in .png.
        OutputError: no such folder, or something other than a PNG is there.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: figures are PNG files", hint=f"write {path.stem}.png")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder", hint="make it first")
    if path.is_dir() or (path.exists() and path.open("rb").read(8) != _PNG):
        raise OutputError(f"{path} is there and is no PNG file", hint="name another file")


def plot(weights: Weights, path: Path, *, title: str) -> None:
    """Norms by layer and kind of module, and the share of energy by rank, as a PNG.

    Raises:
        UsageError, OutputError: see :func:`check_png`; or it cannot be written.
    """
    check_png(path)
    figure = _figure(weights, title)
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png", dpi=120)
        os.chmod(part, 0o644)
        os.replace(part, path)
        part = None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _figure(weights: Weights, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lorahub_registry.weights.inspect import by_kind, energy_by_rank

    modules = {m.name: m for m in weights.modules}
    kinds = by_kind(modules)
    height = max(4.0, 1.5 + 0.3 * len(kinds))
    figure = Figure(figsize=(12, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)

    columns = max(len(row.modules) for row in kinds)
    grid = [[math.nan] * columns for _ in kinds]
    for line, row in zip(grid, kinds, strict=True):
        line[: len(row.modules)] = [modules[n].norm if n else math.nan for n in row.modules]
    image = left.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    left.set_yticks(range(len(kinds)), [row.label for row in kinds])
    left.set_xlabel("layers that are adapted, in order")
    left.set_title("norm of ΔW")
    figure.colorbar(image, ax=left)

    for row in kinds:
        shares = energy_by_rank([modules[n] for n in row.modules if n])
        right.plot(range(1, len(shares) + 1), shares, linewidth=0.8, alpha=0.6, label=row.label)
    shares = weights.energy_by_rank
    right.plot(range(1, len(shares) + 1), shares, color="black", linewidth=2, label="all")
    right.set_xlabel("rank")
    right.set_ylim(0, 1.02)
    right.set_title("share of the energy ‖ΔW‖² that a rank keeps")
    if len(kinds) <= 16:
        right.legend(fontsize="small")
    return figure
