"""The methods that a recipe may name: what each is called, where it comes from, its options.

One class a method; :data:`METHODS` is the table that help, docs and cards read. A new method is a
class and its place in :data:`AnyMethod`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from lorahub_registry.recipes.fields import Float, Int, Strict

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


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, for help, docs and cards.

    Attributes:
        title: in a few words.
        summary: one sentence: what it computes.
        paper: the title of the work it comes from.
        link: where that work is.
    """

    title: str
    summary: str
    paper: str
    link: str


class MethodBase(Strict):
    """What all methods share.

    Attributes:
        info: title and paper.
        coefficients: ``given`` in the recipe, one an adapter, or ``learned`` from its rows.
    """

    # A recipe must say the type; only Python code may leave it out.
    model_config = ConfigDict(json_schema_extra={"required": ["type"]})

    info: ClassVar[MethodInfo]
    coefficients: ClassVar[Literal["given", "learned"]]

    @classmethod
    def name(cls) -> str:
        """What a recipe writes as ``method.type``."""
        return str(get_args(cls.model_fields["type"].annotation)[0])

    @property
    def learns(self) -> bool:
        """Whether it needs ``data.train``."""
        return self.coefficients == "learned"


class Linear(MethodBase):
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
    coefficients = "given"

    type: Literal["linear"] = Field(
        default="linear", description="The exact weighted sum, coefficients given."
    )


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


AnyMethod = Linear | Learn | LoraHub
Method = Annotated[AnyMethod, Field(discriminator="type")]
METHODS: dict[str, type[MethodBase]] = {cls.name(): cls for cls in get_args(AnyMethod)}
"""``method.type`` → its class, in the order in which help lists them."""
