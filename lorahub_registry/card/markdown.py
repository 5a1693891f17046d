"""Values as Markdown that they cannot leave."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


def cell(value: Any) -> str:
    """``value`` where Markdown and HTML mean nothing: fit for a table's cell."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def plusminus(spread: Mapping[str, float | None]) -> str:
    """``mean ± std``; a dash where there is no number."""
    return " ± ".join(
        "–" if spread[key] is None else f"{spread[key]:.4f}" for key in ("mean", "std")
    )


def code(value: Any) -> str:
    """``value`` as inline code that it cannot end."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    ticks = fence(text, least=1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fence(text: str, least: int = 3) -> str:
    """Backticks, more than stand in a row in ``text``."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def literal(value: Any) -> str:
    """``value`` as a string of Python's, in one line."""
    return json.dumps(str(value))


def option(value: Any) -> str:
    """The value of an option as YAML has it, fit for a table's cell."""
    if isinstance(value, list | tuple):
        return ", ".join(map(option, value))
    return cell(str(value).lower() if isinstance(value, bool) else value)


def point(step_and_loss: Sequence[float | None]) -> str:
    """A point of a loss curve in words."""
    step, loss = step_and_loss
    return f"{'not finite' if loss is None else f'{loss:.4f}'} at step {step}"
