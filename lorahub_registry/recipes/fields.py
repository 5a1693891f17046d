"""The kinds of value that a recipe's fields hold, and the base of its models.

Numbers may be quoted (``"40"``), words may not stand for numbers (``yes`` is no 1), and text is
one line without control characters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
)

from lorahub_registry.errors import UsageError
from lorahub_registry.refs import check_name

MAX_RANK = 65_536
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}\Z")
_ENERGY = re.compile(r"energy\s+(\S+)\Z")
_MEANT = {
    "gpu": "cuda",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "rank": "r",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "default": "defaults",
    "lr": "learning_rate",
}


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` was probably meant to be; None when none is near."""
    by_lower = {k.lower(): k for k in known}
    if _MEANT.get(word.lower()) in by_lower:
        return _MEANT[word.lower()]
    found = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'budget'?"``, or nothing."""
    near = nearest(word, known)
    return f", did you mean {near!r}?" if near else ""


def one_line(text: str) -> str:
    """``text`` if it is not blank and can stand in one line of any file.

    Raises:
        ValueError: it is blank, too long, or holds control characters or outer spaces.
    """
    if not text.strip():
        raise ValueError("is empty")
    if len(text) > 1000:
        raise ValueError(f"is {len(text)} characters long; 1000 are the most")
    if text != text.strip():
        raise ValueError(f"starts or ends with a space: {text!r}")
    if any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in text):
        raise ValueError(f"holds a line break or a control character: {text!r}")
    return text


def _number_not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"needs a number, got {str(value).lower()}")
    return value


def _bool_not_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"needs true or false, got {value}")
    return value


def _name(text: str) -> str:
    try:
        return check_name(text, what="it")
    except UsageError as error:
        raise ValueError(f"{text!r} cannot be a name: {error.hint}") from None


def _column(text: str) -> str:
    if not 0 < len(text) <= 1000:
        raise ValueError("must be a column's name, of 1 to 1000 characters")
    return text


def _license(text: str) -> str:
    if not _LICENSE.match(text):
        raise ValueError(f"{text!r} is not a licence id; write one as the Hub does: apache-2.0")
    return text


def another_column(output: str, info: ValidationInfo) -> str:
    """Of a split's ``output``: another column than its ``input``."""
    if output == info.data.get("input"):
        raise ValueError(f"is the same column as input ({output!r})")
    return output


def some_of_them(select: str, info: ValidationInfo) -> str:
    """Of a split's ``select``: it says which rows only where ``limit`` says how many."""
    if select != "first" and info.data.get("limit", 1) is None:
        raise ValueError(f"{select} takes some of the rows: say how many by limit")
    return select


Int = Annotated[int, BeforeValidator(_number_not_bool)]
Float = Annotated[float, BeforeValidator(_number_not_bool), Field(allow_inf_nan=False)]
Bool = Annotated[bool, BeforeValidator(_bool_not_number)]
Text = Annotated[str, AfterValidator(one_line)]
Column = Annotated[str, AfterValidator(_column)]
Name = Annotated[str, AfterValidator(_name)]
License = Annotated[str, AfterValidator(one_line), AfterValidator(_license)]


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Words = Annotated[
    tuple[Text, ...],
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""One word, or a list of them."""


@dataclass(frozen=True)
class OutputRank:
    """How the mixture's sum is written: ``full``, a fixed rank, or a share of its energy.

    Attributes:
        rank: at most this rank in each module (truncated SVD); None where it is not fixed.
        energy: the smallest rank whose squared singular values sum to this share, in (0, 1];
            None where it is not asked for. Both None: the full sum, exact.
    """

    rank: int | None = None
    energy: float | None = None

    @property
    def full(self) -> bool:
        """Whether nothing is cut off."""
        return self.rank is None and self.energy is None

    @classmethod
    def parse(cls, value: Any) -> OutputRank:
        """Read ``"full"``, a whole number, ``"energy 0.99"`` or ``{"energy": 0.99}``.

        Raises:
            ValueError: it is none of them, or out of range.
        """
        if isinstance(value, OutputRank):
            return value
        if isinstance(value, dict) and set(value) == {"energy"}:
            return cls(energy=_share(value["energy"]))
        if isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= MAX_RANK:
                raise ValueError(f"must be from 1 to {MAX_RANK}, got {value}")
            return cls(rank=value)
        text = value.strip() if isinstance(value, str) else ""
        if text == "full":
            return cls()
        if re.fullmatch(r"[0-9]{1,9}", text):
            return cls.parse(int(text))
        if found := _ENERGY.match(text):
            return cls(energy=_share(found[1]))
        raise ValueError(f"must be full, a whole number, or energy 0.99; got {value!r}")

    def written(self) -> str | int:
        """As a recipe writes it; :meth:`parse` reads it back."""
        if self.energy is not None:
            return f"energy {self.energy!r}"
        return "full" if self.rank is None else self.rank

    def __str__(self) -> str:
        return str(self.written())


def _share(value: Any) -> float:
    try:
        share = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"energy is a share above 0 and up to 1, got {value!r}")
    return share


Rank = Annotated[
    OutputRank,
    PlainValidator(OutputRank.parse),
    PlainSerializer(OutputRank.written),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "full"},
                {"type": "integer", "minimum": 1, "maximum": MAX_RANK},
                {"type": "string", "pattern": r"^energy\s+[0-9.eE+-]+$"},
                {
                    "type": "object",
                    "properties": {
                        "energy": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
                    },
                    "required": ["energy"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]
