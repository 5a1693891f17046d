"""Methods whose coefficients the recipe gives."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lorahub_registry.recipes.fields import Float
from lorahub_registry.recipes.method import MethodBase, MethodInfo

MajoritySign = Annotated[
    Literal["total", "frequency"],
    Field(
        description="What elects an entry's sign: the sum of the adapters' entries (total), or of "
        "their signs (frequency)."
    ),
]


class Static(MethodBase):
    """What all methods with given coefficients share.

    Attributes:
        form: what is summed: whole deltas, factors, or single entries of deltas. Entries leave
            nothing of low rank, so that ``output.rank`` must say what to truncate to.
    """

    coefficients = "given"
    form: ClassVar[Literal["delta", "factor", "entries"]]


class Linear(Static):
    """The weighted sum of the adapters' deltas with the coefficients that the recipe gives.

    Exact: ``Σ c·s·B·A`` over the adapters, whatever their ranks, alphas and targets. PEFT's own
    ``linear`` multiplies A and B apart and is another thing.
    """

    info = MethodInfo(
        title="Linear",
        summary="The exact weighted sum of the adapters' deltas, with given coefficients.",
        paper="Editing Models with Task Arithmetic",
        link="https://arxiv.org/abs/2212.04089",
    )
    form = "delta"

    type: Literal["linear"] = Field(
        default="linear", description="The exact weighted sum, coefficients given."
    )


class Factor(Static):
    """LoraHub's product of sums, ``s·(Σ c·B)(Σ c·A)``, with the coefficients of the recipe.

    It has cross terms between adapters, and does not change when all signs do. All adapters need
    the same modules, ranks and scalings.
    """

    info = MethodInfo(
        title="Factor form",
        summary="Weighted sums of the factors A and B apart, multiplied: has cross terms.",
        paper="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
        link="https://arxiv.org/abs/2307.13269",
    )
    form = "factor"

    type: Literal["factor"] = Field(
        default="factor", description="LoraHub's factor-wise sum, coefficients given."
    )


class Entrywise(Static):
    """What all methods share that change single entries of ΔW."""

    form = "entries"

    density: Float = Field(
        default=0.5, gt=0, le=1, description="The share of each module's entries that stays."
    )


class Ties(Entrywise):
    """Of each adapter's ΔW the largest entries; of those, the ones whose sign wins; their mean.

    Module by module: each ΔW is trimmed to ``density`` of its entries by magnitude, every entry's
    sign is elected over the adapters, and the mean of the coefficients times the entries that
    agree is taken. An adapter of coefficient 0 still votes. Unlike PEFT's ``ties``, which works on
    A and B apart, it is PEFT's ``ties_svd``.
    """

    info = MethodInfo(
        title="TIES",
        summary="Entries of ΔW trimmed by size, signs elected, the mean of those that agree.",
        paper="TIES-Merging: Resolving Interference When Merging Models",
        link="https://arxiv.org/abs/2306.01708",
    )

    type: Literal["ties"] = Field(default="ties", description="TIES on ΔW, coefficients given.")
    majority_sign_method: MajoritySign = "total"


class DareLinear(Entrywise):
    """Entries of each adapter's ΔW dropped at random, the others divided by ``density``, summed.

    What is dropped depends on the recipe's seed, the adapter's name and the module's, and on
    nothing else.
    """

    info = MethodInfo(
        title="DARE",
        summary="Entries of ΔW dropped at random and the others scaled up, then summed.",
        paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
        "Free Lunch",
        link="https://arxiv.org/abs/2311.03099",
    )

    type: Literal["dare_linear"] = Field(
        default="dare_linear", description="DARE on ΔW, then the weighted sum."
    )


class DareTies(Entrywise):
    """DARE's random dropping in place of the trimming by size, then as ``ties``."""

    info = MethodInfo(
        title="DARE and TIES",
        summary="Entries of ΔW dropped at random, signs elected, the mean of those that agree.",
        paper="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
        "Free Lunch",
        link="https://arxiv.org/abs/2311.03099",
    )

    type: Literal["dare_ties"] = Field(
        default="dare_ties", description="DARE on ΔW, then TIES' election of signs."
    )
    majority_sign_method: MajoritySign = "total"


class MagnitudePrune(Entrywise):
    """Of each adapter's ΔW the largest entries, module by module, then the weighted sum."""

    info = MethodInfo(
        title="Magnitude pruning",
        summary="Entries of ΔW trimmed by size, then summed.",
        paper="Learning both Weights and Connections for Efficient Neural Networks",
        link="https://arxiv.org/abs/1506.02626",
    )

    type: Literal["magnitude_prune"] = Field(
        default="magnitude_prune", description="The largest entries of ΔW, summed."
    )


AnyStatic = Linear | Factor | Ties | DareLinear | DareTies | MagnitudePrune
