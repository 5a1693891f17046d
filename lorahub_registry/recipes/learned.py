"""Methods that learn their coefficients from ``data.train``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from lorahub_registry.recipes.fields import Float, Int, Strict, Text, did_you_mean
from lorahub_registry.recipes.method import MethodBase, MethodInfo

GRADIENT = "gradient"
_COMMON = ("NGOpt", "CMA", "DE", "PSO", "OnePlusOne", "RandomSearch", "Cobyla")
_SERIAL = {"Cobyla"}


def _optimizer(name: str) -> str:
    if name in {GRADIENT, *_COMMON}:
        return name
    import nevergrad  # half a second: only for names that are not the common ones

    known = nevergrad.optimizers.registry
    if name not in known:
        near = did_you_mean(name, [GRADIENT, *_COMMON]) or did_you_mean(name, known)
        raise ValueError(
            f"{name!r} is no optimizer of nevergrad"
            + (near or f"; common ones are {', '.join(_COMMON)}")
        )
    return name


def _is_serial(optimizer: str) -> bool:
    """Whether it proposes no second candidate before it was told of the first."""
    if optimizer in {GRADIENT, *_COMMON}:
        return optimizer in {GRADIENT, *_SERIAL}
    import nevergrad

    return bool(nevergrad.optimizers.registry[optimizer].no_parallelization)


class Screen(Strict):
    """Of many adapters, which are worth searching over."""

    keep: Int = Field(ge=1, le=1000, description="How many adapters stay.")


class Searched(MethodBase):
    """What all methods share that search for coefficients."""

    coefficients = "learned"
    objective: ClassVar[Literal["token_mean", "published"]]

    optimizer: Annotated[Text, AfterValidator(_optimizer)] = Field(
        default="NGOpt",
        description="The search, by nevergrad's name. NGOpt chooses one by size, budget and "
        "num_workers.",
        json_schema_extra={"examples": list(_COMMON)},
    )
    budget: Int = Field(
        default=40,
        ge=1,
        le=100_000,
        description="How many candidates are evaluated at most; each costs one pass over "
        "data.train.",
    )
    bounds: Float = Field(default=1.5, gt=0, description="Coefficients stay within ± this.")
    l1: Float = Field(default=0.05, ge=0, description="Weight of the mean of |c| in the objective.")
    num_workers: Int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Candidates that the search proposes before it sees a result; another "
        "number can choose another search. How many run at once is `--jobs`.",
    )
    patience: Int | None = Field(
        default=None,
        ge=1,
        description="Stop when so many candidates in a row were better by no more than "
        "`tolerance`.",
    )
    tolerance: Float = Field(
        default=1e-3, ge=0, description="The least gain in the objective that `patience` counts."
    )
    target: Float | None = Field(
        default=None, description="Stop as soon as the objective is this or less."
    )
    screen: Screen | None = Field(
        default=None,
        description="Keep the best of many adapters before the search: by each one's own loss on "
        "data.train, then greedily by what it adds to those kept.",
    )
    folds: Int | None = Field(
        default=None,
        ge=2,
        le=100,
        description="Search again on each of so many parts of data.train left out, to tell how "
        "far coefficients and losses spread.",
    )
    seeds: Int | None = Field(
        default=None,
        ge=2,
        le=100,
        description="Search again with so many seeds, to tell how far coefficients and losses "
        "spread.",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Searched:
        if self.folds and self.seeds:
            raise ValueError("takes folds or seeds, not both")
        if self.num_workers > 1 and _is_serial(self.optimizer):
            raise ValueError(
                "num_workers is for optimizers that propose several candidates, "
                f"and {self.optimizer} does not"
            )
        return self


class Learn(Searched):
    """Coefficients searched for on ``data.train``, with or without gradients.

    The objective is the rows' token-weighted mean NLL plus ``l1`` times the mean of |c|. It ends
    with the best candidate that it saw.
    """

    info = MethodInfo(
        title="Learned coefficients",
        summary="One coefficient an adapter (or more), searched for on example rows.",
        paper="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
        link="https://arxiv.org/abs/2307.13269",
    )
    objective: ClassVar[Literal["token_mean"]] = "token_mean"

    type: Literal["learn"] = Field(
        default="learn", description="Coefficients learned from data.train."
    )
    form: Literal["delta", "factor"] = Field(
        default="delta",
        description="What a coefficient multiplies: each adapter's delta (exact sum), or its "
        "factors A and B apart, as LoraHub does (has cross terms).",
    )
    per: Literal["model", "layer_group", "module"] = Field(
        default="model",
        description="What has a coefficient of its own for each adapter: the whole model, each "
        "of `layer_groups` groups of layers, or every module. Many coefficients need many rows.",
    )
    layer_groups: Int = Field(
        default=4, ge=2, le=256, description="Groups of neighbouring layers; per: layer_group."
    )
    optimizer: Annotated[Text, AfterValidator(_optimizer)] = Field(
        default="NGOpt",
        description="The search: any name of nevergrad's, or `gradient`: the coefficients are "
        "few, so one backward pass tells how each should change. NGOpt chooses one of its own "
        "by size, budget and num_workers.",
        json_schema_extra={"examples": [GRADIENT, *_COMMON]},
    )
    gradient: Literal["lbfgs", "adam"] = Field(
        default="lbfgs", description="How `optimizer: gradient` steps: L-BFGS-B or Adam."
    )
    init: Float = Field(default=0.0, description="Where every coefficient starts.")

    @field_validator("init")
    @classmethod
    def _within_bounds(cls, init: float, info: ValidationInfo) -> float:
        bounds = info.data.get("bounds")
        if bounds is not None and abs(init) > bounds:
            raise ValueError(f"must lie within ± bounds ({bounds:g}), got {init:g}")
        return init

    @model_validator(mode="after")
    def _options_agree(self) -> Learn:
        if self.form == "factor" and self.per != "model":
            raise ValueError(f"per: {self.per} needs form: delta")
        # A resolved recipe writes every option out: only what differs from the default was meant.
        given = {k for k, f in type(self).model_fields.items() if getattr(self, k) != f.default}
        if "layer_groups" in given and self.per != "layer_group":
            raise ValueError("layer_groups is for per: layer_group")
        if "gradient" in given and self.optimizer != GRADIENT:
            raise ValueError(f"gradient is for optimizer: {GRADIENT}")
        if self.optimizer == GRADIENT and self.seeds:
            raise ValueError("seeds are for searches with random choices; take folds")
        return self


class LoraHub(Searched):
    """The published LoraHub search, as a preset.

    Fixed: the factor-wise product ``(Σ c·B)(Σ c·A)``, the start at 0, and the published objective
    (mean cross-entropy over batches, divided by the number of examples, plus ``l1`` times the
    mean of |c|). The defaults are the published ones: NGOpt, 40 candidates, bounds ± 1.5, l1 0.05.
    It ends with the search's own recommendation.
    """

    info = MethodInfo(
        title="LoraHub",
        summary="The published search: factor-wise sums under the published objective.",
        paper="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
        link="https://arxiv.org/abs/2307.13269",
    )
    form: ClassVar[Literal["factor"]] = "factor"
    per: ClassVar[Literal["model"]] = "model"
    init: ClassVar[float] = 0.0
    objective: ClassVar[Literal["published"]] = "published"

    type: Literal["lorahub"] = Field(
        default="lorahub", description="The published LoraHub search, as a preset."
    )

    @field_validator("optimizer")
    @classmethod
    def _without_gradients(cls, name: str) -> str:
        if name == GRADIENT:
            raise ValueError("the published search uses none; take method learn for gradients")
        return name
