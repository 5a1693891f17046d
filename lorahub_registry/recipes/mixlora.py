"""Experts made of adapters that are there already, with a router that is trained (MixLoRA)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from lorahub_registry.recipes.fields import Bool, Float, Int, Name, did_you_mean
from lorahub_registry.recipes.method import MethodInfo
from lorahub_registry.recipes.routed import LEARN, Path, RoutedMethod
from lorahub_registry.recipes.training import RunOptions

AVERAGE = "average"


class RouterTraining(RunOptions):
    """How routers are trained."""

    learning_rate: Float = Field(
        default=1e-3,
        gt=0,
        description="AdamW's, at its highest; bases of a few hundred numbers' width take ten "
        "times as much.",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="How it goes on after the warmup: to zero, or constant."
    )
    warmup_ratio: Float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps over which it grows from zero."
    )
    batch_size: Int = Field(default=4, ge=1, le=65_536, description="Rows of one forward.")
    num_train_epochs: Int = Field(
        default=5, ge=1, le=100_000, description="How often all rows are seen."
    )


class MixLora(RoutedMethod):
    """Each adapter's feed-forward part becomes an expert; a router, trained on ``data.train``,
    sends each token to the ``top_k`` best ones, layer by layer.

    Experts stand inside the feed-forward module, on both sides of its activation, so the mixture
    is no sum of deltas. What the adapters change in the attention is one LoRA, the same for all
    tokens. Only routers are trained, unless ``train_experts`` says otherwise.
    """

    info = MethodInfo(
        title="MixLoRA",
        summary="The adapters' feed-forward parts are experts, which a trained router chooses "
        "among for each token.",
        paper="MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of "
        "Experts",
        link="https://arxiv.org/abs/2404.15159",
    )
    coefficients = "learned"

    type: Literal["mixlora"] = Field(
        default="mixlora", description="Experts from adapters, routers trained on data.train."
    )
    top_k: Int = Field(
        default=2,
        ge=2,
        le=1000,
        description="How many experts a token is sent to in each layer. Two or more: a single "
        "one's weight is always 1, from which no router learns.",
    )
    attention: Name = Field(
        default=AVERAGE,
        description="What the attention gets: `average` of the adapters' parts there, `learn` for "
        "their sum with static coefficients learned on data.train, or an adapter's name for that "
        "one's alone.",
    )
    train_experts: Bool = Field(
        default=False, description="Train the experts along with their routers."
    )
    router_aux_loss_coef: Float = Field(
        default=0.01,
        ge=0,
        description="How much routers are held to sending all experts as many tokens.",
    )
    router_init_range: Float = Field(
        default=0.02, gt=0, description="Standard deviation of the routers' start."
    )
    training: RouterTraining = Field(
        default=RouterTraining(), description="How the routers are trained."
    )

    @property
    def apart(self) -> Literal["layer", "module"] | None:
        """See :attr:`RoutedMethod.apart`."""
        return "layer"

    def problems(self, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """See :meth:`RoutedMethod.problems`."""
        yield from super().problems(names)
        if self.top_k > len(names) > 1:
            yield (
                ("method", "top_k"),
                f"is {self.top_k}, and the {len(names)} adapters are {len(names)} experts",
            )
        if self.attention not in {AVERAGE, LEARN, *names}:
            near = did_you_mean(self.attention, [AVERAGE, LEARN, *names])
            yield (
                ("method", "attention"),
                f"must be average, learn or an adapter's name; got {self.attention!r}{near}",
            )
