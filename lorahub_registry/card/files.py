"""The card's folder: the facts beside it, and writing it there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorahub_registry.card.front import holds_experts, is_converted, is_trained
from lorahub_registry.card.page import render
from lorahub_registry.errors import OutputError

RESULTS_NAME = "results.json"
RECIPE_NAME = "recipe.yaml"
TRACE_NAME = "trace.png"
GATES_NAME = "gates.png"
FACTORY_NAME = "factory.yaml"
LOSS_NAME = "loss.png"
LOG_NAME = "training.jsonl"


def read_results(folder: Path) -> dict[str, Any]:
    """The facts beside a mixture, a trained adapter or a converted one (see :func:`is_trained`,
    :func:`holds_experts`).

    Raises:
        OutputError: there are none: it is none of these, or not whole.
    """
    path = folder / RESULTS_NAME
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise OutputError(
            f"{folder} holds no {RESULTS_NAME}, so it is nothing that lorareg mixed or trained",
            hint="cards are written for what `lorareg compose`, `lorareg train` or "
            "`lorareg convert` (--gate, --to peft) made",
        ) from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict) or not (
        "members" in found or is_trained(found) or holds_experts(found)
    ):
        raise OutputError(f"{path}: the results of no mixture, no training and no conversion")
    return found


def write_card(folder: Path, *, repo: str | None = None) -> Path:
    """Write ``README.md`` into the folder of a mixture or an adapter, from its other files.

    Args:
        repo: the Hub id it will have, for the code that loads it.

    Raises:
        OutputError: the folder holds no results, or not all of it.
    """
    path, facts = folder / "README.md", read_results(folder)
    path.write_text(render(facts, _recipe(folder, facts), repo=repo), encoding="utf-8")
    return path


def is_generated(folder: Path) -> bool:
    """Whether the card in ``folder`` is as it was generated, for whatever repo; or is missing."""
    path = folder / "README.md"
    if not path.is_file():
        return True
    text = path.read_text("utf-8", errors="replace")
    named = re.search(r'from_pretrained\(base, "([^"]*)"\)', text)
    facts = read_results(folder)
    return named is not None and text == render(facts, _recipe(folder, facts), repo=named[1])


def _recipe(folder: Path, facts: Mapping[str, Any]) -> str:
    """The YAML that made it; "" of what a command made."""
    if is_converted(facts):
        return ""
    path = folder / (FACTORY_NAME if is_trained(facts) else RECIPE_NAME)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: cannot be read ({error})") from None
