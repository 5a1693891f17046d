"""How one adapter is trained: its form as LoRA, and its run. PEFT's and transformers' names."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from lorahub_registry.recipes.fields import (
    MAX_RANK,
    Bool,
    Float,
    Int,
    Strict,
    did_you_mean,
    one_line,
)

ALL_LINEAR: Literal["all-linear"] = "all-linear"
_INITS = ("gaussian", "pissa", "pissa_niter_16", "olora")


def _targets(value: Any) -> tuple[str, ...] | str:
    if value == ALL_LINEAR:
        return ALL_LINEAR
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(v, str) for v in listed):
        raise ValueError(f"needs {ALL_LINEAR} or a list of module names, as [q_proj, v_proj]")
    if not listed:
        raise ValueError(f"needs at least one module name, or {ALL_LINEAR}")
    names = tuple(one_line(v) for v in listed)
    if ALL_LINEAR in names:
        raise ValueError(f"{ALL_LINEAR} stands alone, not in a list")
    if len(set(names)) < len(names):
        raise ValueError("names a module twice")
    return names


def _init(value: Any) -> bool | str:
    if value is True:
        return True
    if isinstance(value, str):
        niter = re.fullmatch(r"pissa_niter_([1-9][0-9]{0,2})", value)
        if niter or value in {"gaussian", "pissa", "olora"}:
            return value
    near = did_you_mean(value, _INITS) if isinstance(value, str) else ""
    raise ValueError(f"must be true, gaussian, pissa, pissa_niter_N or olora; got {value!r}{near}")


Targets = Annotated[
    tuple[str, ...] | Literal["all-linear"],
    BeforeValidator(_targets),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
            ]
        }
    ),
]
Init = Annotated[
    bool | str,
    PlainValidator(_init),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": True},
                {"enum": ["gaussian", "pissa", "olora"]},
                {"type": "string", "pattern": r"^pissa_niter_[1-9][0-9]{0,2}$"},
            ]
        }
    ),
]


class LoraOptions(Strict):
    """The adapter's form, as PEFT's ``LoraConfig`` names it."""

    r: Int = Field(default=8, ge=1, le=MAX_RANK, description="Rank of each module's factors.")
    lora_alpha: Float = Field(
        default=16.0, gt=0, description="The delta is scaled by lora_alpha / r (rsLoRA: / √r)."
    )
    lora_dropout: Float = Field(
        default=0.0, ge=0, lt=1, description="Dropout of what enters A, in training only."
    )
    target_modules: Targets = Field(
        default=ALL_LINEAR,
        description="Which modules get one: names, or `all-linear` for every linear layer but the "
        "output head.",
    )
    use_rslora: Bool = Field(default=False, description="Scale by lora_alpha / √r (rsLoRA).")
    use_dora: Bool = Field(
        default=False, description="Learn each module's magnitudes beside its direction (DoRA)."
    )
    init_lora_weights: Init = Field(
        default=True,
        description="How A and B start: true (Kaiming, zero), gaussian, or from the base's own "
        "weights: pissa, pissa_niter_N (fast SVD, N iterations) or olora.",
    )
    loraplus_lr_ratio: Float | None = Field(
        default=None, gt=0, description="B's learning rate over A's (LoRA+); default: the same."
    )

    @model_validator(mode="after")
    def _agrees(self) -> LoraOptions:
        if self.use_dora and self.changes_base:
            raise ValueError(
                f"use_dora and init_lora_weights: {self.init_lora_weights} do not go together: "
                "its start takes a part out of the base, and DoRA's magnitudes are the base's"
            )
        return self

    @property
    def scaling(self) -> float:
        """What B·A is multiplied by: lora_alpha / r, with rsLoRA lora_alpha / √r."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def changes_base(self) -> bool:
        """Whether it starts from a part of the base's weights (PiSSA, OLoRA)."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"


class RunOptions(Strict):
    """A run of AdamW over rows, as transformers' ``TrainingArguments`` names it."""

    learning_rate: Float = Field(default=2e-4, gt=0, description="AdamW's, at its highest.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How it goes on after the warmup: to zero, or constant."
    )
    warmup_ratio: Float = Field(
        default=0.0, ge=0, lt=1, description="Share of the steps over which it grows from zero."
    )
    weight_decay: Float = Field(default=0.0, ge=0, description="AdamW's, decoupled.")
    adam_beta2: Float = Field(
        default=0.999, gt=0, lt=1, description="How slowly AdamW forgets the gradients' squares."
    )
    max_grad_norm: Float | None = Field(
        default=1.0, gt=0, description="Longer gradients are cut to this norm; null: they are not."
    )
    batch_size: Int = Field(
        default=8, ge=1, le=65_536, description="Rows (packs, where packing) of one forward."
    )
    gradient_accumulation_steps: Int = Field(
        default=1, ge=1, le=65_536, description="Forwards of one optimizer step."
    )
    num_train_epochs: Int = Field(
        default=3, ge=1, le=100_000, description="How often all rows are seen."
    )
    max_steps: Int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps; wins over num_train_epochs.",
    )
    group_by_length: Bool = Field(
        default=False, description="Put rows of like length into one batch: less padding."
    )


class TrainingOptions(RunOptions):
    """An adapter's run."""

    packing: Bool = Field(
        default=False,
        description="Lay several rows into one of max_length, apart from each other (causal only).",
    )
    eval_steps: Int | None = Field(
        default=None, ge=1, description="Measure data.validation every so many steps."
    )
    early_stopping_patience: Int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations in a row without gain; the best is kept.",
    )
    early_stopping_threshold: Float = Field(
        default=0.0, ge=0, description="The least gain in validation NLL that counts as one."
    )
    seed: Int | None = Field(
        default=None, ge=0, lt=2**32, description="Of its start and its order; default: seed."
    )
