"""Inspect: what differs between two models, and how well a LoRA would hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.api.extract import two_models, warn_of_unknown
from lorahub_registry.errors import NotApplied, UnknownRef
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import expand, looks_like_path
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.weights.inspect import ModuleWeights, Weights

RANKS = (4, 16, 64, 256)


@dataclass(frozen=True)
class ModelDifference:
    """What :func:`difference` found.

    Attributes:
        base, tuned: their names.
        weights: of the difference in every linear module but the head, all singular values.
        relative: module → norm of the difference as a share of the base's own; None where that is
            zero.
        kept: rank → share of the energy that an extraction of this rank keeps.
        outside: share of the whole difference's energy that is in no such module.
        rest: kind of parameter → how many changed, their energy, rows added.
        words: the same as a list of words.
    """

    base: str
    tuned: str
    weights: Weights
    relative: Mapping[str, float | None]
    kept: Mapping[int, float]
    outside: float
    rest: Mapping[str, Mapping[str, Any]]
    words: str


def is_model(ref: str, registry: Registry) -> bool:
    """Whether ``ref`` means a model: a folder of one, or a Hub id that is no known adapter."""
    folder = expand(ref)
    if folder.is_dir() or looks_like_path(ref):
        return (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file()
    try:
        registry.get(ref)
    except UnknownRef:
        return "/" in ref or bool(registry.bases_matching(ref))
    return False


def difference(
    base: str | Path,
    tuned: str | Path,
    *,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> ModelDifference:
    """Norms and spectra of tuned − base, module by module; one matrix is in memory at a time.

    Raises:
        BaseModelError: see :func:`lorahub_registry.api.extract.extract`.
        NotApplied: they are the same.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return difference(base, tuned, registry=opened, progress=progress)
    from lorahub_registry.weights.extract import Difference, How, base_norm, chosen
    from lorahub_registry.weights.inspect import Weights, of_values
    from lorahub_registry.weights.ranks import Ranks
    from lorahub_registry.weights.rest import in_words, look, summary

    with two_models(base, tuned, registry, progress) as (models, one, other):
        warn_of_unknown(models, progress)
        pairs = chosen(models)
        modules: list[ModuleWeights] = []
        relative: dict[str, float | None] = {}
        with progress.task("Comparing", len(pairs), "module") as task:
            for pair in pairs:
                task.describe(pair.module)
                source = Difference(models, pair, How(Ranks(rank="full")))
                found = of_values(pair.module, source.shape, source.spectrum(min(source.shape)))
                own = base_norm(models, pair)
                modules.append(found)
                relative[pair.module] = found.norm / own if own else None
                task.advance()
        left = look(models, pairs, progress=progress)
    weights = Weights(tuple(modules))
    inside, outside = weights.norm**2, math.fsum(entry.energy for entry in left)
    if not inside + outside and not left:
        raise NotApplied(f"{one.facts.name} and {other.facts.name} are the same, number by number")
    shares = weights.energy_by_rank
    return ModelDifference(
        one.facts.name,
        other.facts.name,
        weights,
        relative,
        {rank: shares[rank - 1] for rank in RANKS if rank <= len(shares)},
        outside / (inside + outside) if inside + outside else 0.0,
        summary(left),
        in_words(left),
    )
