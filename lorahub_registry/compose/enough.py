"""Whether the rows carry so many coefficients: told from files, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

from lorahub_registry.adapters.compat import Member
from lorahub_registry.compose.forms import Layout
from lorahub_registry.errors import DataError
from lorahub_registry.recipes.learned import Learn, LoraHub


def least_size(method: Learn | LoraHub, members: Sequence[Member]) -> int:
    """How many coefficients are searched for; where screening decides that, at least so many."""
    keep = method.screen.keep if method.screen else len(members)
    groups = getattr(method, "layer_groups", 1)
    if keep >= len(members) or method.per == "module":
        layout = Layout({m.name for a in members for m in a.facts.modules}, method.per, groups)
        each = sorted(len({layout(m.name) for m in a.facts.modules}) for a in members)
        return sum(each[:keep])
    return keep  # which layers make a group depends on who stays


def check_rows(method: Learn | LoraHub, size: int, rows: int, tokens: int) -> tuple[str, ...]:
    """Whether so many rows are enough.

    Args:
        size: how many coefficients there are.
        tokens: of the rows' outputs.

    Returns:
        What there is to warn of.

    Raises:
        DataError: fewer rows than folds; or more coefficients than the rows have output tokens,
            where each layer group or module has its own: the rows would not determine them.
    """
    if method.folds and method.folds > rows:
        raise DataError(
            f"folds: {method.folds} needs as many training rows, and there are {rows}",
            hint="give more rows, or fewer folds",
        )
    if method.per != "model" and size > tokens:
        raise DataError(
            f"per: {method.per} has {size} coefficients, and {rows} training rows with "
            f"{tokens} output tokens do not determine them",
            hint="give more rows, or take per: model or fewer layer_groups",
        )
    if size > rows:
        return (
            f"{size} coefficients are learned from {rows} rows: more than they carry; "
            "look at the spread (folds: 5) before trusting them",
        )
    return ()
