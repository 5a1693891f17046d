"""What stands in a recipe's ``adapters``: an adapter by name, or a search for some."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lorahub_registry.recipes.fields import Float, Int, Name, Strict, Text, Words

_SORTS = ("downloads", "updated", "rank", "name")


RESERVED = frozenset({"base", "mixture", "uniform"})
"""What the proof calls its own rows."""


def adapter_name(name: str) -> str:
    """``name`` if adapters may be called so.

    Raises:
        ValueError: it is reserved, or a bare number.
    """
    if name.lower() in RESERVED:
        raise ValueError(f"{name!r} is what the proof calls a row of its own; take another name")
    # X-LoRA of PEFT takes adapters named "0", "1", … for its own experts.
    if name.isdigit():
        raise ValueError(f"{name!r} is a bare number; put a letter before it")
    return name


class RefEntry(Strict):
    """One adapter; a string in a recipe is short for ``{ref: that string}``."""

    ref: Text = Field(
        description="owner/name[/sub/folder][@revision] on the Hub, a path (counted from the "
        "recipe's folder), or a name that the registry knows."
    )
    name: Annotated[Name, AfterValidator(adapter_name)] | None = Field(
        default=None, description="What it is called in this mixture; default: by its ref."
    )
    coefficient: Float | None = Field(
        default=None, description="Its multiplier, for methods that do not learn it."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"ref": value}
        if isinstance(value, dict | RefEntry):
            return value
        raise ValueError("needs an adapter: a name, {ref: …} or {search: …, limit: …}")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        whole = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [{"type": "string", "minLength": 1}, whole]}


def _rank_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def rank_bounds(text: str) -> tuple[int | None, int | None]:
    """``"8..64"`` → (8, 64); ``"8.."`` → (8, None); ``"16"`` → (16, 16).

    Raises:
        ValueError: it is no rank and no range of ranks.
    """
    low, dots, high = (part.strip() for part in text.partition(".."))
    ends = [low, high if dots else low]
    if any(ends) and all(re.fullmatch(r"[0-9]{0,6}", end) for end in ends):
        least, most = (int(end) if end else None for end in ends)
        if least is None or most is None or least <= most:
            return least, most
    raise ValueError(f"must be a rank or a range as 8..64, 8.. or ..64, got {text!r}")


def _check_bounds(text: str) -> str:
    rank_bounds(text)
    return text


def _check_sort(text: str) -> str:
    if text not in _SORTS and not re.fullmatch(r"score:\S.*", text):
        raise ValueError(f"must be one of {', '.join(_SORTS)} or score:TASK; got {text!r}")
    return text


class Search(Strict):
    """A search of the registry, on the recipe's base; what is left out does not narrow it."""

    text: Text | None = Field(default=None, description="Words in names and descriptions.")
    skill: Words = Field(default=(), description="Skills that it must have, all of them.")
    rank: (
        Annotated[
            str,
            BeforeValidator(_rank_text),
            AfterValidator(_check_bounds),
            WithJsonSchema({"type": ["string", "integer"], "examples": ["8..64", "8..", 16]}),
        ]
        | None
    ) = Field(default=None, description="Its rank: 16, 8..64, 8.. or ..64, both ends included.")
    targets: Words = Field(default=(), description="Modules that it must adapt, all of them.")
    license: Text | None = Field(default=None, description="Its licence, as the Hub names it.")
    peft_type: Text | None = Field(default=None, description="Its kind, as PEFT names it: LORA.")
    min_score: dict[Text, Float] = Field(
        default_factory=dict, description="Task (or task/metric) → the least score it must have."
    )
    sort: Annotated[Text, AfterValidator(_check_sort)] | None = Field(
        default=None,
        description="What comes first: downloads, updated, rank, name or score:TASK.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> Search:
        if self == Search.model_construct():
            raise ValueError("says nothing to search for; give a skill, a text or a min_score")
        return self

    @property
    def rank_bounds(self) -> tuple[int | None, int | None]:
        """The inclusive bounds of ``rank``; None leaves a side open."""
        return rank_bounds(self.rank) if self.rank else (None, None)


class SearchEntry(Strict):
    """Adapters that the registry finds, best first; pinned when the recipe runs."""

    search: Search = Field(description="What to look for.")
    limit: Int = Field(ge=1, le=1000, description="How many of those found to take.")


def _kind(value: Any) -> str:
    searches = isinstance(value, SearchEntry) or (isinstance(value, dict) and "search" in value)
    return "search" if searches else "ref"


Entry = Annotated[
    Annotated[RefEntry, Tag("ref")] | Annotated[SearchEntry, Tag("search")],
    Discriminator(_kind),
]
