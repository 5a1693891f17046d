"""Training an adapter as a mixture of LoRA experts (MixLoRA, arXiv:2404.15159)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from lorahub_registry.recipes.fields import (
    MAX_RANK,
    Bool,
    Float,
    Int,
    Strict,
    Text,
    did_you_mean,
)

_OF = {
    "mixlora": ("top_k",),
    "mixlora-dynamic": ("top_p",),
    "mixlora-switch": ("expert_capacity", "router_z_loss_coef", "ffn_dropout"),
}
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python",
    "gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish",
    "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish",
    "tanh", "xielu",
)  # fmt: skip
"""Transformers' ``ACT2FN``, which cannot be asked without torch."""


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"transformers knows no {name!r}{did_you_mean(name, ACTIVATIONS)}: one of "
            f"{', '.join(ACTIVATIONS)}, or leave it out for the base's own"
        )
    return name


class ExpertLora(Strict):
    """The experts' form, where it is not the adapter's own ``lora``."""

    r: Int | None = Field(default=None, ge=1, le=MAX_RANK, description="Rank of their factors.")
    lora_alpha: Float | None = Field(default=None, gt=0, description="As in lora.")
    lora_dropout: Float | None = Field(default=None, ge=0, lt=1, description="As in lora.")
    use_rslora: Bool | None = Field(default=None, description="As in lora.")
    use_dora: Bool | None = Field(default=None, description="As in lora: MixDoRA.")


class MixLoraTraining(Strict):
    """Experts in the feed-forward modules, chosen for each token by a router that is trained, too.

    The target modules of the feed-forward become experts; the attention's get plain LoRA. Defaults
    are the paper's.
    """

    type: Literal["mixlora"] = Field(description="Experts in the feed-forward modules.")
    num_experts: Int = Field(default=8, ge=2, le=4096, description="Experts of each layer.")
    routing_strategy: Literal["mixlora", "mixlora-dynamic", "mixlora-switch"] = Field(
        default="mixlora",
        description="Which experts see a token: the top_k likeliest (mixlora), the likeliest until "
        "their probabilities pass top_p (mixlora-dynamic), or the likeliest while it has room "
        "(mixlora-switch).",
    )
    top_k: Int | None = Field(
        default=None,
        ge=2,
        description="mixlora: experts of a token; default 2. One alone would have the weight 1 "
        "whatever the router says, which then learns nothing from the rows.",
    )
    top_p: Float | None = Field(
        default=None, gt=0, le=1, description="mixlora-dynamic: what they make up; default 0.8."
    )
    expert_capacity: Int | None = Field(
        default=None,
        ge=1,
        description="mixlora-switch: tokens of a row that an expert takes; default 32.",
    )
    expert_lora: ExpertLora = Field(
        default=ExpertLora(), description="The experts' form, where it is not lora's."
    )
    act_fn: Annotated[Text, AfterValidator(_activation)] | None = Field(
        default=None, description="Between the projections, as transformers names it; default: "
        "the base's own.",
    )  # fmt: skip
    router_loss: Bool = Field(
        default=True, description="Add a loss that holds the experts to equal loads."
    )
    router_aux_loss_coef: Float = Field(default=0.01, ge=0, description="How much of it.")
    router_z_loss_coef: Float | None = Field(
        default=None, ge=0, description="mixlora-switch: of the logits' size; default 0.001."
    )
    router_init_range: Float | None = Field(
        default=None,
        gt=0,
        description="Standard deviation of the router's start; default 0.02 (mixlora-switch: 1).",
    )
    jitter_noise: Float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="How much what the router sees is shaken in training; default 0 "
        "(mixlora-switch: 0.01).",
    )
    ffn_dropout: Float | None = Field(
        default=None, ge=0, lt=1, description="mixlora-switch: of what comes out; default 0."
    )

    @model_validator(mode="after")
    def _agrees(self) -> MixLoraTraining:
        for strategy, keys in _OF.items():
            for key in keys:
                if strategy != self.routing_strategy and getattr(self, key) is not None:
                    raise ValueError(f"{key} is of routing_strategy: {strategy}")
        if (self.top_k or 2) > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, of {self.num_experts} experts")
        return self
