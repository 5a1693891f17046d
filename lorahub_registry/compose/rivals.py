"""Static coefficients, learned on the same rows: what a dynamic mixture has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from lorahub_registry.adapters.compat import Member
from lorahub_registry.compose.bench import Means
from lorahub_registry.compose.fit import Fitted, fit
from lorahub_registry.compose.verdict import STATIC
from lorahub_registry.errors import DataError, NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.tokens import Encoded
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.learned import Learn
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.routed import RoutedMethod

_PER = {"layer_group": "layer"}  # there are as many groups as layers


def static_rivals(
    recipe: Recipe,
    members: Sequence[Member],
    base: LoadedBase,
    train: Sequence[Encoded],
    *,
    means: Means | None = None,
    progress: Progress = silent,
) -> tuple[dict[str, Fitted], list[str]]:
    """Learn what ``recipe.method.rivals`` says; without training rows there are none.

    Returns:
        Name in the table → what was learned, one coefficient an adapter first; and what there is
        to say of those that could not be.
    """
    method, found, notes = recipe.method, dict[str, Fitted](), list[str]()
    assert isinstance(method, RoutedMethod)
    for learn in method.rivals if train else ():
        name = rival_name(learn)
        wanted = recipe.model_copy(update={"method": learn})
        try:
            progress.say(f"learning the {name}, to compare with")
            with progress.task(f"The {name}"):
                # Quietly: it is advice on coefficients that nobody is going to publish.
                found[name] = fit(wanted, members, base, train, means=means)
        except (NotApplied, DataError) as error:
            notes.append(f"no {name} to compare with: {error}")
    return found, notes


def rival_name(learn: Learn) -> str:
    """``learned static coefficients (per layer)``."""
    return f"{STATIC} (per {_PER.get(learn.per, learn.per)})"
