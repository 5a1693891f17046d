"""A recipe: what to mix, how, on what data, what to measure, where to write and publish."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lorahub_registry.errors import UsageError
from lorahub_registry.recipes.conflicts import conflicts
from lorahub_registry.recipes.entries import Entry
from lorahub_registry.recipes.fields import (
    Bool,
    Column,
    Int,
    License,
    Name,
    OutputRank,
    Rank,
    Strict,
    Text,
    another_column,
    some_of_them,
)
from lorahub_registry.recipes.methods import Method
from lorahub_registry.recipes.rows import check_data_path
from lorahub_registry.recipes.template import CHAT, DEFAULT, check_template
from lorahub_registry.refs import AdapterRef

Metric = Literal["nll", "exact_match"]


class Split(Strict):
    """A file of rows, and which of them to take."""

    path: Annotated[Text, AfterValidator(check_data_path)] = Field(
        description="A .jsonl, .json, .csv or .parquet file, counted from the recipe's folder."
    )
    input: Column = Field(default="input", description="The column that the prompt is made of.")
    output: Column = Field(
        default="output", description="The column of the answer.", validate_default=True
    )
    limit: Int | None = Field(default=None, ge=1, description="Take at most so many rows.")
    select: Literal["first", "random", "diverse"] = Field(
        default="first",
        description="Which rows, where limit takes only some: the first, a seeded choice, or those "
        "that lie furthest apart in the base's hidden states (train only).",
    )

    _another_column = field_validator("output")(another_column)
    _some_of_them = field_validator("select")(some_of_them)


class Data(Strict):
    """What is learned from, what is measured on, and how a row becomes a prompt."""

    train: Split | None = Field(
        default=None,
        description="Rows that coefficients are learned from; methods that do not learn leave "
        "them unread.",
    )
    test: Split | None = Field(
        default=None,
        description="Held-out rows for the evaluation. Without them nothing is measured, and "
        "the mixture gets no verdict.",
    )
    template: Annotated[str, AfterValidator(check_template)] = Field(
        default=DEFAULT,
        description="The prompt: Jinja over the row's columns (the input column also as "
        "`input`), `alpaca` for Alpaca's words, or `chat` for the tokenizer's chat template.",
    )
    max_length: Int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of prompt and answer; longer prompts lose their beginning.",
    )
    eos: Bool = Field(
        default=False, description="Whether a causal model's answer ends with its EOS token."
    )

    @property
    def chat(self) -> bool:
        """Whether the tokenizer's chat template makes the prompts."""
        return self.template == CHAT


class Output(Strict):
    """Where the mixture is written, and as what."""

    path: Text = Field(description="A folder, counted from the recipe's; must be new or empty.")
    rank: Rank = Field(
        default=OutputRank(),
        description="How the sum is written: `full` (exact), a rank to truncate to, or "
        "`energy 0.99` for the smallest rank that keeps that share.",
        json_schema_extra={"default": "full"},
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="The written tensors' type; what it costs is reported."
    )


def _repo(text: str) -> str:
    try:
        ref = AdapterRef.parse(text)
    except UsageError:
        ref = None
    if ref is None or ref.subfolder or ref.revision:
        raise ValueError(f"must be owner/name, got {text!r}")
    return text


class Publish(Strict):
    """Where on the Hub the mixture goes once it is written and measured."""

    repo: Annotated[Text, AfterValidator(_repo)] = Field(description="owner/name on the Hub.")
    private: Bool = Field(default=False, description="Make the repo private if it is new.")
    create_pr: Bool = Field(default=False, description="Open a pull request; do not commit.")
    license: License | None = Field(
        default=None, description="The mixture's licence, as the Hub names it."
    )


class Recipe(Strict):
    """One mixture, as a user asks for it. Paths and refs are kept as they are written."""

    version: Literal[1] = Field(description="Of the recipe language.")
    name: Name = Field(description="What the mixture is called.")
    base: Text = Field(
        description="The base model: a Hub id, a family name or a path; @revision pins it."
    )
    adapters: tuple[Entry, ...] = Field(
        min_length=1, description="What to mix: adapters by name, or searches for them."
    )
    method: Method = Field(description="How to mix them; each type has its own options.")
    data: Data = Field(default=Data(), description="Rows to learn from and to measure on.")
    evaluate: tuple[Metric, ...] = Field(
        default=("nll",), min_length=1, description="What is measured on data.test."
    )
    max_new_tokens: Int = Field(
        default=64, ge=1, le=100_000, description="Longest answer generated for exact_match."
    )
    output: Output = Field(description="Folder, rank and dtype of what is written.")
    publish: Publish | None = Field(
        default=None, description="Push it to the Hub; without this it stays on this machine."
    )
    license: License | None = Field(
        default=None, description="The mixture's licence, published or not."
    )
    seed: Int = Field(default=0, ge=0, lt=2**32, description="Of the search and of random choices.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="Where the base runs."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="The base's compute type; auto: as it is stored."
    )
    allow_base: Bool = Field(
        default=False,
        description="Take adapters that were trained on another base than this one, where "
        "shapes fit; the card says so.",
    )

    @field_validator("evaluate")
    @classmethod
    def _each_once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(metrics)) < len(metrics):
            raise ValueError("names a metric twice")
        return metrics

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        if found := [str(c) for c in conflicts(self.model_dump(mode="json", exclude_none=True))]:
            raise PydanticCustomError("conflict", "{text}", {"text": "; ".join(found)})
        return self

    @property
    def declared_license(self) -> str | None:
        """The licence that the recipe asks for, whether under ``publish`` or beside it."""
        return self.license or (self.publish.license if self.publish else None)
