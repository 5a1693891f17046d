"""Methods that learn their coefficients from ``data.train``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from lorahub_registry.recipes.fields import Float, Int
from lorahub_registry.recipes.method import MethodBase, MethodInfo

Optimizer = Literal["NGOpt", "CMA", "DE", "PSO", "OnePlusOne", "RandomSearch", "Cobyla"]
"""Searches without gradients, by the names that nevergrad's registry gives them."""
Budget = Annotated[
    Int,
    Field(
        ge=1,
        le=100_000,
        description="How many candidates are evaluated; each costs one pass over data.train.",
    ),
]
Bounds = Annotated[Float, Field(gt=0, description="Coefficients stay within ± this.")]
L1 = Annotated[Float, Field(ge=0, description="Weight of the mean of |c| in the objective.")]
Workers = Annotated[
    Int,
    Field(
        ge=1,
        le=1024,
        description="Candidates that the search proposes before it sees a result; another "
        "number can choose another search.",
    ),
]


class Learn(MethodBase):
    """Coefficients searched for on ``data.train``, without gradients.

    The objective is the rows' token-weighted mean NLL plus ``l1`` times the mean of |c|.
    """

    info = MethodInfo(
        title="Learned coefficients",
        summary="One coefficient an adapter, searched for on example rows without gradients.",
        paper="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
        link="https://arxiv.org/abs/2307.13269",
    )
    coefficients = "learned"
    objective: ClassVar[Literal["token_mean"]] = "token_mean"

    type: Literal["learn"] = Field(
        default="learn", description="Coefficients learned from data.train."
    )
    form: Literal["delta", "factor"] = Field(
        default="delta",
        description="What a coefficient multiplies: each adapter's delta (exact sum), or its "
        "factors A and B apart, as LoraHub does (has cross terms).",
    )
    optimizer: Optimizer = Field(
        default="NGOpt",
        description="The search, by nevergrad's name. NGOpt chooses one by size, budget and "
        "num_workers.",
    )
    budget: Budget = 40
    bounds: Bounds = 1.5
    init: Float = Field(default=0.0, description="Where every coefficient starts.")
    l1: L1 = 0.05
    num_workers: Workers = 1

    @field_validator("init")
    @classmethod
    def _within_bounds(cls, init: float, info: ValidationInfo) -> float:
        bounds = info.data.get("bounds")
        if bounds is not None and abs(init) > bounds:
            raise ValueError(f"must lie within ± bounds ({bounds:g}), got {init:g}")
        return init


class LoraHub(MethodBase):
    """The published LoraHub search, as a preset.

    Fixed: the factor-wise product ``(Σ c·B)(Σ c·A)``, the start at 0, and the published objective
    (mean cross-entropy over batches, divided by the number of examples, plus ``l1`` times the
    mean of |c|). The defaults are the published ones: NGOpt, 40 candidates, bounds ± 1.5, l1 0.05.
    """

    info = MethodInfo(
        title="LoraHub",
        summary="The published search: factor-wise sums under the published objective.",
        paper="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
        link="https://arxiv.org/abs/2307.13269",
    )
    coefficients = "learned"
    form: ClassVar[Literal["factor"]] = "factor"
    init: ClassVar[float] = 0.0
    objective: ClassVar[Literal["published"]] = "published"

    type: Literal["lorahub"] = Field(
        default="lorahub", description="The published LoraHub search, as a preset."
    )
    optimizer: Optimizer = Field(default="NGOpt", description="The search, by nevergrad's name.")
    budget: Budget = 40
    bounds: Bounds = 1.5
    l1: L1 = 0.05
    num_workers: Workers = 1
