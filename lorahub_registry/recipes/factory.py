"""A factory: many adapters, trained on one base in one run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorahub_registry.errors import UsageError
from lorahub_registry.recipes.conflicts import factory_conflicts
from lorahub_registry.recipes.entries import adapter_name
from lorahub_registry.recipes.expert_training import MixLoraTraining
from lorahub_registry.recipes.fields import (
    Bool,
    Column,
    Float,
    Int,
    License,
    Name,
    Strict,
    Text,
    Words,
    another_column,
    some_of_them,
)
from lorahub_registry.recipes.model import Metric
from lorahub_registry.recipes.rows import check_data_path
from lorahub_registry.recipes.template import CHAT, DEFAULT, check_template
from lorahub_registry.recipes.training import LoraOptions, TrainingOptions
from lorahub_registry.refs import AdapterRef, looks_like_path

__all__ = [
    "AdapterData",
    "AdapterPlan",
    "Factory",
    "FactoryOutput",
    "LoraOptions",
    "TrainSplit",
    "TrainingOptions",
]


def _dataset(text: str) -> str:
    if looks_like_path(text):
        return text
    try:
        ref = AdapterRef.parse(text)
    except UsageError:
        ref = None
    if ref is None or ref.subfolder:
        raise ValueError(f"must be owner/name, owner/name@revision or ./folder, got {text!r}")
    return text


class TrainSplit(Strict):
    """Rows from a file or from a dataset on the Hub, and which of them to take."""

    path: Annotated[Text, AfterValidator(check_data_path)] | None = Field(
        default=None,
        description="A .jsonl, .json, .csv or .parquet file, counted from the factory's folder.",
    )
    dataset: Annotated[Text, AfterValidator(_dataset)] | None = Field(
        default=None,
        description="owner/name of a dataset on the Hub (@revision pins it), or ./folder with "
        "one in it. Needs pip install 'lorareg[datasets]'.",
    )
    config: Text | None = Field(
        default=None, description="The dataset's configuration, where it has several."
    )
    split: Text = Field(default="train", description="The dataset's split.")
    input: Column = Field(default="input", description="The column that the prompt is made of.")
    output: Column = Field(
        default="output", description="The column of the answer.", validate_default=True
    )
    text: Column | None = Field(
        default=None,
        description="Instead of input and output: the column of plain text, all of which is "
        "learned.",
    )
    limit: Int | None = Field(default=None, ge=1, description="Take at most so many rows.")
    select: Literal["first", "random"] = Field(
        default="first", description="Which rows, where limit takes only some."
    )

    _another_column = field_validator("output")(another_column)
    _some_of_them = field_validator("select")(some_of_them)

    @model_validator(mode="after")
    def _one_source(self) -> TrainSplit:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(
                "takes path or dataset, not both"
                if self.path
                else "needs path: FILE or dataset: owner/name"
            )
        if self.dataset is None and (self.config is not None or self.split != "train"):
            raise ValueError("config and split are a dataset's; a file has none")
        # What stands for the default is no contradiction, so that a written factory reads back.
        if self.text is not None and (self.input, self.output) != ("input", "output"):
            raise ValueError("takes text, or input and output, not both")
        return self

    @property
    def objective(self) -> Literal["supervised", "lm"]:
        """What is learned: the answer after its prompt, or the whole text."""
        return "supervised" if self.text is None else "lm"

    @property
    def source(self) -> str:
        """The file or dataset, as it is written."""
        return self.path or self.dataset or ""


def _share_or_file(value: Any) -> str:
    return "file" if isinstance(value, dict | TrainSplit) else "share"


Validation = Annotated[
    Annotated[TrainSplit, Tag("file")]
    | Annotated[Annotated[Float, Field(gt=0, lt=1)], Tag("share")],
    Discriminator(_share_or_file),
]


class AdapterData(Strict):
    """What one adapter learns from, and how a row becomes a prompt."""

    train: TrainSplit = Field(description="Rows to learn from.")
    validation: Validation | None = Field(
        default=None,
        description="Rows to measure on during training, or the share of train (as 0.1) that is "
        "taken out of it for that.",
    )
    test: TrainSplit | None = Field(
        default=None, description="Held-out rows, on which it is compared with the base at the end."
    )
    template: Annotated[str, AfterValidator(check_template)] = Field(
        default=DEFAULT,
        description="The prompt: Jinja over the row's columns (the input column also as "
        "`input`), `alpaca` for Alpaca's words, or `chat` for the tokenizer's chat template. "
        "Plain text has none.",
    )
    max_length: Int | None = Field(
        default=None,
        ge=2,
        description="Most tokens of prompt and answer. Longer prompts lose their beginning, rows "
        "whose answer does not fit are left out, longer texts become several rows.",
    )
    eos: Bool = Field(
        default=False, description="Whether a causal model's answer ends with its EOS token."
    )

    @property
    def chat(self) -> bool:
        """Whether the tokenizer's chat template makes the prompts."""
        return self.template == CHAT


class AdapterPlan(Strict):
    """One adapter to train."""

    name: Annotated[Name, AfterValidator(adapter_name)] = Field(
        description="What it is called; its folder under output.path."
    )
    skills: Words = Field(default=(), description="What it will be good at, for the registry.")
    description: Text | None = Field(default=None, description="In one sentence, for its card.")
    license: License | None = Field(
        default=None, description="Its licence, as the Hub names it; default: the factory's."
    )
    lora: LoraOptions = Field(default=LoraOptions(), description="Its form.")
    method: MixLoraTraining | None = Field(
        default=None, description="`{type: mixlora, …}` for experts; default: one plain LoRA."
    )
    training: TrainingOptions = Field(default=TrainingOptions(), description="Its run.")
    data: AdapterData = Field(description="What it learns from.")


class FactoryOutput(Strict):
    """Where the adapters are written, and as what."""

    path: Text = Field(
        description="A folder, counted from the factory's; each adapter gets one in it."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="The written tensors' type."
    )


class Factory(Strict):
    """One base, and the adapters to train on it. Paths and refs are kept as they are written.

    ``defaults`` of the YAML are already merged into each adapter, and so are the factory's
    licence and seed.
    """

    version: Literal[1] = Field(description="Of the factory language.")
    name: Name = Field(description="What the run is called.")
    base: Text = Field(
        description="The base model: a Hub id, a family name or a path; @revision pins it."
    )
    license: License | None = Field(
        default=None, description="The adapters' licence, as the Hub names it."
    )
    seed: Int = Field(
        default=0, ge=0, lt=2**32, description="Of every adapter that has none of its own."
    )
    adapters: tuple[AdapterPlan, ...] = Field(min_length=1, description="What to train.")
    evaluate: tuple[Metric, ...] = Field(
        default=("nll",), min_length=1, description="What is measured on data.test."
    )
    max_new_tokens: Int = Field(
        default=64, ge=1, le=100_000, description="Longest answer generated for exact_match."
    )
    max_together: Int | None = Field(
        default=None, ge=1, description="Most adapters in one pass; default: all."
    )
    gradient_checkpointing: Bool = Field(
        default=False, description="Keep less of each forward and compute it again: less memory."
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None,
        description="Load the base in so many bits. Needs pip install 'lorareg[bitsandbytes]'.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="The base's compute type; auto: as it is stored. Adapters are float32.",
    )
    tf32: Bool = Field(
        default=False, description="Allow TF32 products on NVIDIA devices: faster, less exact."
    )
    save_steps: Int = Field(default=100, ge=1, description="Rounds between checkpoints.")
    output: FactoryOutput = Field(description="Folder and dtype of what is written.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="Where the base runs."
    )

    @field_validator("adapters")
    @classmethod
    def _inherit(
        cls, adapters: tuple[AdapterPlan, ...], info: ValidationInfo
    ) -> tuple[AdapterPlan, ...]:
        license, seed = info.data.get("license"), info.data.get("seed")

        def whole(plan: AdapterPlan) -> AdapterPlan:
            own = plan.training.seed
            training = plan.training.model_copy(update={"seed": seed if own is None else own})
            return plan.model_copy(
                update={"license": plan.license or license, "training": training}
            )

        return tuple(whole(plan) for plan in adapters)

    @field_validator("evaluate")
    @classmethod
    def _each_once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(metrics)) < len(metrics):
            raise ValueError("names a metric twice")
        return metrics

    @model_validator(mode="after")
    def _parts_agree(self) -> Factory:
        plain = self.model_dump(mode="json", exclude_none=True)
        if found := [str(c) for c in factory_conflicts(plain)]:
            raise PydanticCustomError("conflict", "{text}", {"text": "; ".join(found)})
        return self
