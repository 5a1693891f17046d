"""From checked adapters, a loaded base and rows to a written and proven mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.compose.bench import Means
from lorahub_registry.compose.encoder import Encoder, Rows
from lorahub_registry.compose.experts import make_experts
from lorahub_registry.compose.fit import Fitted, fit
from lorahub_registry.compose.prove import Proof, prove
from lorahub_registry.compose.routed import Routed, route
from lorahub_registry.compose.static import Given, mix
from lorahub_registry.compose.write import (
    Written,
    check_applied,
    check_decides,
    write_mixture,
)
from lorahub_registry.errors import BaseModelError, IncompatibleAdapters, NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.hidden import centroid
from lorahub_registry.evaluate.measure import TestSet, check_text
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.learned import Searched
from lorahub_registry.recipes.mixlora import MixLora
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.routed import RoutedMethod
from lorahub_registry.recipes.rows import overlap
from lorahub_registry.recipes.static import Static
from lorahub_registry.runtime.places import width_of
from lorahub_registry.weights.files import load_deltas
from lorahub_registry.weights.lowrank import Deltas


@dataclass(frozen=True)
class Composition:
    """What came out.

    Attributes:
        members: those in the mixture, in the recipe's order; screening may leave some out.
        coefficients: by member name; the mean where an adapter has several.
        proof: None where the recipe has no test rows.
        overlap: how many test rows are also training rows, or examples of a router's.
        tokens: how rows became tokens, with how many prompts were cut.
        change: largest change of a label's loss that the written adapter makes, in nats.
        fitted: None where the coefficients were given.
        routed: of a mixture that decides while it runs; what is written is then its plain LoRA.
    """

    members: tuple[Member, ...]
    coefficients: dict[str, float]
    written: Written
    change: float
    tokens: dict[str, Any]
    fitted: Fitted | None = None
    routed: Routed | None = None
    proof: Proof | None = None
    overlap: int = 0
    notes: list[str] = field(default_factory=list)


def compose(
    recipe: Recipe,
    members: Sequence[Member],
    base: LoadedBase,
    rows: Rows,
    folder: Path,
    *,
    means: Means | None = None,
    progress: Progress = silent,
) -> Composition:
    """Mix, write into ``folder`` (which exists and is empty), check and prove.

    Args:
        means: how a search is carried out; None: in this process, without a journal.

    Raises:
        NotApplied: the mixture would change nothing, or PEFT computes something else from it.
        BrokenAdapter: a member's tensors are not finite.
        DataError: rows that cannot be tokenised, or are too few.
    """
    _check_modules(members, base)
    encoder = Encoder(recipe, base, progress)
    rows, train = encoder.train(rows)
    test = encoder(rows.test, "test")
    fitted = routed = None
    if isinstance(recipe.method, RoutedMethod):
        if isinstance(recipe.method, MixLora):
            routed = make_experts(
                recipe, members, base, train, folder, means=means, progress=progress
            )
        else:
            routed = route(
                recipe, members, base, train, folder, centroids=_centroids(base, encoder, rows),
                means=means, progress=progress,
            )  # fmt: skip
        for text in routed.notes:
            encoder.note(text)
        coefficients, adapters = routed.coefficients, list(routed.adapters)
        mixture = Given(routed.plain)
    elif isinstance(recipe.method, Searched):
        fitted = fit(recipe, members, base, train, test, means=means, progress=progress)
        encoder.notes += fitted.warned
        for note in fitted.notes():
            encoder.note(note)
        members, coefficients = fitted.members, fitted.mean()
        adapters = [load_deltas(m.folder, m.facts) for m in members]
        mixture = Given(fitted.mixture)
    else:
        adapters = [load_deltas(m.folder, m.facts) for m in members]
        coefficients = {m.name: float(m.coefficient or 0.0) for m in members}
        mixture = _given(recipe, members, adapters, base, progress)
    written = write_mixture(
        folder,
        mixture.deltas,
        base,
        rank=recipe.output.rank,
        dtype=recipe.output.dtype,
        cut=mixture.cut,
        progress=progress,
    )
    test_batches = base.batches(test)
    too_long = sum(len(row.output) > recipe.max_new_tokens for row in test)
    if too_long and "exact_match" in recipe.evaluate:
        encoder.note(
            f"{too_long} of {len(test)} references are longer than max_new_tokens "
            f"({recipe.max_new_tokens}) and count as missed"
        )
    looked_at = test_batches or base.batches(train or check_text(base))
    change = check_applied(base, folder, looked_at)
    if routed:
        change = check_decides(base, folder / FOLDER, looked_at)
    proof = None
    if test:
        held_out = TestSet(
            test, test_batches, recipe.evaluate, recipe.max_new_tokens, recipe.data.eos
        )
        names = [m.name for m in members]
        proof = prove(
            base, names, adapters, mixture.deltas, folder, held_out,
            dynamic=folder / FOLDER if routed else None, static=routed.rivals if routed else {},
            progress=progress,
        )  # fmt: skip
        for row in proof.table:
            if math.isfinite(row.nll):
                continue
            if row.kind == "mixture":
                raise NotApplied("the written mixture's loss is not a number on the test rows")
            encoder.note(f"{row.name} has no finite loss on the test rows")
    # What a router of prompts knows adapters by is seen before the test, too.
    shown = [row for own in rows.examples.values() for row in own]
    shared = overlap([*rows.train, *shown], rows.test)
    if shared:
        also = "training rows or examples" if shown else "training rows"
        encoder.note(f"{shared} of {len(rows.test)} test rows are also {also}")
    return Composition(
        members=tuple(members),
        coefficients=coefficients,
        written=written,
        change=change,
        tokens=encoder.facts(),
        fitted=fitted,
        routed=routed,
        proof=proof,
        overlap=shared,
        notes=encoder.notes,
    )


def _centroids(base: LoadedBase, encoder: Encoder, rows: Rows) -> dict[str, torch.Tensor]:
    """Where each adapter's own rows lie, for a router of prompts; empty for other methods.

    Raises:
        BaseModelError: what was stored of one is of another width.
    """
    found = {name: torch.tensor(vector) for name, vector in rows.known.items()}
    for name, own in rows.examples.items():
        tokens = encoder(own, f"{name}'s own")
        found[name] = centroid(base, [row.prompt for row in tokens])
    for name, vector in found.items():
        if len(vector) != (width := width_of(base.model)):
            raise BaseModelError(
                f"{name}: what is stored of its rows has {len(vector)} numbers, and {base.name} is "
                f"{width} wide",
                hint=f"lorareg route --learn {name} --rows … stores it again",
            )
    return found


def _check_modules(members: Sequence[Member], base: LoadedBase) -> None:
    """Whether the base has every module that a member changes."""
    there = base.adaptable_modules()
    for member in members:
        for module in member.facts.modules:
            if module.name not in there:
                raise IncompatibleAdapters(
                    f"{member.name} does not fit {base.name}: the base has no linear "
                    f"module or embedding {module.name}",
                    hint="the adapter was made for another base",
                )


def _given(
    recipe: Recipe,
    members: Sequence[Member],
    adapters: Sequence[Deltas],
    base: LoadedBase,
    progress: Progress,
) -> Given:
    method = recipe.method
    assert isinstance(method, Static)
    return mix(
        method,
        {m.name: deltas for m, deltas in zip(members, adapters, strict=True)},
        [float(m.coefficient or 0.0) for m in members],
        rank=recipe.output.rank,
        seed=recipe.seed,
        device=base.device if base.device.type == "cuda" else "cpu",
        progress=progress,
    )
