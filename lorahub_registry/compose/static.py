"""The methods with given coefficients, as rows of one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.fields import OutputRank
from lorahub_registry.recipes.static import Entrywise, Static
from lorahub_registry.weights.lowrank import (
    Deltas,
    LowRank,
    factor_sum,
    same_shape,
    weighted_sum,
)
from lorahub_registry.weights.sparsify import (
    Part,
    Prune,
    at_random,
    by_magnitude,
    mask_seed,
    merge,
)
from lorahub_registry.weights.truncate import Truncated, truncate_dense

SUMS: dict[str, Callable[[Sequence[Deltas], Sequence[float]], dict[str, LowRank]]] = {
    "linear": weighted_sum,
    "factor": factor_sum,
}
"""Method → the function of the adapters' factors that it is."""
PRUNES: dict[str, Prune] = {
    "ties": by_magnitude,
    "dare_linear": at_random,
    "dare_ties": at_random,
    "magnitude_prune": by_magnitude,
}
"""Method → how it prunes entries of ΔW; those that elect signs have ``majority_sign_method``."""


@dataclass(frozen=True)
class Given:
    """A mixture with given coefficients.

    Attributes:
        deltas: module → its delta, sorted by name; on the CPU where entries were pruned.
        cut: modules that had to be truncated to have one, and what that cost.
    """

    deltas: Deltas
    cut: Mapping[str, Truncated] = field(default_factory=dict)


def mix(
    method: Static,
    adapters: Mapping[str, Deltas],
    coefficients: Sequence[float],
    *,
    rank: OutputRank,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Given:
    """The mixture that ``method`` makes.

    Args:
        adapters: name → deltas; DARE's masks depend on the name.
        coefficients: one an adapter, in the same order.
        rank: what methods that change single entries truncate to, ``full`` to the module's own.
        device: where those work, one dense module at a time.

    Raises:
        IncompatibleAdapters: a module whose shapes differ.
        ValueError: another number of coefficients than adapters.
    """
    name = method.name()
    if not isinstance(method, Entrywise):
        return Given(SUMS[name](list(adapters.values()), coefficients))
    given = list(zip(adapters.items(), coefficients, strict=True))
    modules = sorted({module for deltas in adapters.values() for module in deltas})
    cut = {}
    with progress.task("Mixing", len(modules), "module") as task:
        for module in modules:
            parts = [
                Part(deltas[module].to(device), c, mask_seed(seed, adapter, module))
                for (adapter, deltas), c in given
                if module in deltas
            ]
            same_shape(module, *(part.delta for part in parts))
            dense = merge(
                parts,
                PRUNES[name],
                method.density,
                getattr(method, "majority_sign_method", None),
            )
            found = truncate_dense(dense, rank=rank.rank, energy=rank.energy, seed=seed)
            made = found.delta.to("cpu")
            kind = parts[0].delta.kind
            cut[module] = Truncated(LowRank(made.a, made.b, kind), found.energy, found.lost)
            task.advance()
    return Given({module: one.delta for module, one in cut.items()}, cut)
