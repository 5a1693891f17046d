"""Methods whose coefficients the recipe gives."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorahub_registry.recipes.method import MethodBase, MethodInfo


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
