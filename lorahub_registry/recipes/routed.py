"""Methods whose mixtures decide while they run: by token, by module, by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes.fields import Float, Int, Name, Text, did_you_mean
from lorahub_registry.recipes.learned import GRADIENT, Learn
from lorahub_registry.recipes.method import MethodBase, MethodInfo
from lorahub_registry.recipes.training import RunOptions

Path = tuple[str | int, ...]
LEARN, UNIFORM = "learn", "uniform"
_EACH_LAYER = 256  # groups of layers at most: where there are fewer layers, one each


class RoutedMethod(MethodBase):
    """What all of them share.

    The mixture is written twice: into ``output.path`` as a plain LoRA with the mean coefficients
    baked in, which anything loads, and into its folder ``dynamic`` as what decides.
    """

    dynamic: ClassVar[bool] = True
    form: ClassVar[Literal["delta"]] = "delta"

    @property
    def rivals(self) -> tuple[Learn, ...]:
        """Static coefficients to compare the mixture with, learned on the same rows.

        One an adapter, and one for whatever the mixture decides for apart, so that it wins by
        deciding and not by having more coefficients. No penalty holds them back, as none holds
        gates.
        """
        model = Learn(optimizer=GRADIENT, l1=0)
        if self.apart == "layer":
            layers = Learn(optimizer=GRADIENT, l1=0, per="layer_group", layer_groups=_EACH_LAYER)
            return model, layers
        return (model, Learn(optimizer=GRADIENT, l1=0, per="module")) if self.apart else (model,)

    @property
    def apart(self) -> Literal["layer", "module"] | None:
        """What of the model it decides for apart; None: it decides for all at once."""
        return None

    def problems(self, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """(where in the recipe, what is wrong) with adapters of these names."""
        if len(names) < 2:
            yield (
                ("adapters",),
                f"{self.type} chooses among two or more adapters, and there is {len(names)}",
            )

    def check_names(self, names: Sequence[str]) -> None:
        """Whether it can mix adapters of these names.

        Raises:
            RecipeError: it needs more of them, or speaks of one that is not there.
        """
        from lorahub_registry.recipes.conflicts import written  # which knows all methods

        for path, text in self.problems(names):
            raise RecipeError(
                f"{written(path)}: {text}", hint=f"the adapters are {', '.join(names)}"
            )


class GateTraining(RunOptions):
    """How gates are trained; the defaults are the paper's."""

    learning_rate: Float = Field(default=1e-3, gt=0, description="AdamW's, at its highest.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="How it goes on after the warmup: to zero, or constant."
    )
    warmup_ratio: Float = Field(
        default=0.2, ge=0, lt=1, description="Share of the steps over which it grows from zero."
    )
    weight_decay: Float = Field(default=0.1, ge=0, description="AdamW's, decoupled.")
    adam_beta2: Float = Field(
        default=0.95, gt=0, lt=1, description="How slowly AdamW forgets the gradients' squares."
    )
    batch_size: Int = Field(default=4, ge=1, le=65_536, description="Rows of one forward.")
    num_train_epochs: Int = Field(
        default=5, ge=1, le=100_000, description="How often all rows are seen."
    )


class LoraFlow(RoutedMethod):
    """Gates that weigh the adapters anew for every token, trained on ``data.train``.

    Each gate is ``softmax(W x / temperature) + b``. Only gates are trained; the adapters stay as
    they are.
    """

    info = MethodInfo(
        title="LoRA-Flow",
        summary="Small gates, trained on a few hundred rows, weigh the adapters for each token.",
        paper="LoRA-Flow: Dynamic LoRA Fusion for Large Language Models in Generative Tasks",
        link="https://arxiv.org/abs/2402.11455",
    )
    coefficients = "learned"

    type: Literal["lora_flow"] = Field(
        default="lora_flow", description="Token gates trained on data.train."
    )
    per: Literal["layer", "module", "model"] = Field(
        default="layer",
        description="What has a gate of its own: every decoder layer (it sees what enters the "
        "layer), every module (it sees the module's input), or the model (the first layer's).",
    )
    temperature: Float = Field(
        default=1.0, gt=0, description="What the softmax's logits are divided by."
    )
    init: Name = Field(
        default="learn",
        description="What the gates say before they are trained: `learn` for static coefficients "
        "learned on data.train first, one set for each gate, an adapter's name for that adapter "
        "alone (as the paper does), or `uniform`.",
    )
    training: GateTraining = Field(
        default=GateTraining(), description="How the gates are trained; defaults as published."
    )

    @property
    def apart(self) -> Literal["layer", "module"] | None:
        """See :attr:`RoutedMethod.apart`."""
        return None if self.per == "model" else self.per

    def problems(self, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """See :meth:`RoutedMethod.problems`."""
        yield from super().problems(names)
        if self.init not in {LEARN, UNIFORM, *names}:
            near = did_you_mean(self.init, [LEARN, UNIFORM, *names])
            yield (
                ("method", "init"),
                f"must be learn, uniform or an adapter's name; got {self.init!r}{near}",
            )


class Arrow(RoutedMethod):
    """For each token and module the adapters along whose main direction the input lies.

    It needs no data: an adapter's prototype on a module is the top right singular vector of its
    delta. Prototypes are exact, ranks may differ.
    """

    info = MethodInfo(
        title="Arrow",
        summary="Each module sends each token to the adapters whose prototypes it is nearest to.",
        paper="Towards Modular LLMs by Building and Reusing a Library of LoRAs",
        link="https://arxiv.org/abs/2405.11157",
    )
    coefficients = "routed"

    type: Literal["arrow"] = Field(
        default="arrow", description="Nearest prototypes, token by token; needs no data."
    )
    top_k: Int = Field(
        default=3,
        ge=1,
        le=1000,
        description="How many adapters speak at a token; all, where fewer.",
    )
    temperature: Float = Field(
        default=1.0, gt=0, description="What the similarities are divided by, before the softmax."
    )
    general: tuple[Name, ...] = Field(
        default=(),
        description="Names of adapters in the recipe that hold general knowledge: the mean of "
        "their deltas is taken off each other adapter (GenKnowSub), and they do not speak.",
    )

    @property
    def apart(self) -> Literal["layer", "module"] | None:
        """See :attr:`RoutedMethod.apart`."""
        return "module"

    @model_validator(mode="after")
    def _each_once(self) -> Arrow:
        if len(set(self.general)) < len(self.general):
            raise ValueError("general names an adapter twice")
        return self

    def problems(self, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """See :meth:`RoutedMethod.problems`."""
        for i, name in enumerate(self.general):
            if name not in names:
                text = f"no adapter is called {name!r}{did_you_mean(name, names)}"
                yield ("method", "general", i), text
        speak = [name for name in names if name not in self.general]
        if len(speak) < 2 and len(names) > 1:
            yield (
                ("method", "general"),
                f"leaves {len(speak)} to choose among; two or more must stay",
            )
        yield from super().problems(names)


class PromptRouter(RoutedMethod):
    """For each prompt the adapters whose own rows lie nearest to it in the base's hidden space.

    Decided once a prompt, before its answer. Nothing is trained: each adapter is known by the
    prompts of its own rows, from ``examples`` or from what `lorareg route --learn` has stored.
    """

    info = MethodInfo(
        title="Prompt router",
        summary="Each prompt is answered by the adapters whose own rows it is most like.",
        paper="LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks",
        link="https://arxiv.org/abs/2402.09997",
    )
    coefficients = "routed"

    type: Literal["prompt_router"] = Field(
        default="prompt_router", description="Nearest adapters' rows, once a prompt."
    )
    top_k: Int = Field(
        default=1, ge=1, le=1000, description="How many adapters answer a prompt; all, where fewer."
    )
    temperature: Float = Field(
        default=0.1, gt=0, description="What the similarities are divided by, before the softmax."
    )
    examples: Mapping[Name, Text] = Field(
        default={},
        description="Adapter's name → a file of its own rows, counted from the recipe's folder; "
        "default: what the registry has stored of it.",
    )

    def problems(self, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
        """See :meth:`RoutedMethod.problems`."""
        yield from super().problems(names)
        for name in self.examples:
            if name not in names:
                text = f"no adapter is called {name!r}{did_you_mean(name, names)}"
                yield ("method", "examples", name), text
