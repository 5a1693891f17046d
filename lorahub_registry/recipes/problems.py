"""Validation errors in plain words: which key, what is wrong with it, what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from lorahub_registry.recipes.conflicts import Conflict, Path
from lorahub_registry.recipes.entries import RefEntry, SearchEntry
from lorahub_registry.recipes.fields import did_you_mean
from lorahub_registry.recipes.methods import METHODS
from lorahub_registry.recipes.mixlora import MixLora
from lorahub_registry.recipes.model import Recipe


@dataclass(frozen=True)
class Grammar:
    """What is validated, and how to read where pydantic saw a fault.

    Attributes:
        model: of the whole file.
        labels: where a union puts a label of its own after the path, ``*`` standing for any
            index; and which model each label means (None: one value, no keys).
        sections: in words where a key may have been meant to stand → the model there.
        more: keys of a model that are gone once it is validated.
    """

    model: type[BaseModel]
    labels: Mapping[Path, Mapping[str, type[BaseModel] | None]]
    sections: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    more: Mapping[type[BaseModel] | None, Sequence[str]] = field(default_factory=dict)

    def parts(self, loc: Path) -> Iterator[tuple[int | str, Mapping[str, Any] | None]]:
        """Each part of ``loc``, with what it may mean where it is a label."""
        path: Path = ()
        labelled = False
        for part in loc:
            if path in self.labels and not labelled:
                labelled = True
                yield part, self.labels[path]
            else:
                path, labelled = (*path, "*" if isinstance(part, int) else part), False
                yield part, None


RECIPE = Grammar(
    Recipe,
    {("method",): METHODS, ("adapters", "*"): {"ref": RefEntry, "search": SearchEntry}},
)


def problem(error: ErrorDetails, data: Any, grammar: Grammar = RECIPE) -> Conflict:
    """What ``error`` of validating ``data`` says to somebody who wrote that data."""
    loc = error["loc"]
    path = _path(loc, data, grammar)
    if error["type"] == "extra_forbidden":
        return Conflict(path, _unknown_key(str(loc[-1]), _model_at(loc[:-1], grammar), grammar))
    if error["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        return _unknown_method(path, error)
    say = _WORDS.get(error["type"])
    return Conflict(path, say(error) if say else error["msg"])


def _unknown_key(key: str, model: type[BaseModel] | None, grammar: Grammar) -> str:
    known = [*(model.model_fields if model else ()), *grammar.more.get(model, ())]
    if model is MixLora and key in {"routing_strategy", "num_experts"}:
        return (
            "unknown key; in a recipe the experts are the adapters, and routing is top_k; "
            "routing_strategy and num_experts are a factory's"
        )
    places = [where for where, other in grammar.sections.items() if key in other.model_fields]
    if places:
        return f"unknown key; it stands {places[0]}"
    near = did_you_mean(key, known)
    return f"unknown key{near or ('; known here: ' + ', '.join(known) if known else '')}"


def _unknown_method(path: Path, error: ErrorDetails) -> Conflict:
    known = ", ".join(METHODS)
    given = error["input"].get("type") if isinstance(error["input"], Mapping) else None
    if given is None:
        return Conflict((*path, "type"), f"is missing; the methods are {known}")
    near = did_you_mean(str(given), METHODS)
    return Conflict((*path, "type"), f"no method {given!r}{near or ';'} the methods are {known}")


def _path(loc: Path, data: Any, grammar: Grammar) -> Path:
    """``loc`` without the labels of unions, as far as the data goes, and one key beyond."""
    path: list[str | int] = []
    for part in [part for part, label in grammar.parts(loc) if label is None]:
        inside = (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        )
        if not inside and not isinstance(data, Mapping):
            break
        path.append(part)
        data = data[part] if inside else None
    return tuple(path)


def _model_at(loc: Path, grammar: Grammar) -> type[BaseModel] | None:
    """The model whose keys stand at ``loc``, labels of unions included."""
    model: type[BaseModel] | None = grammar.model
    for part, label in grammar.parts(loc):
        if label is not None:
            model = label.get(str(part))
        elif not isinstance(part, int):
            field = model.model_fields.get(part) if model else None
            model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model in an annotation: itself, an item's, or one of a union's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for a in get_args(annotation) if (m := _model_in(a))), None)


def got(value: Any) -> str:
    """``value`` as a message shows it."""
    if value is None:
        return "it is empty"
    if isinstance(value, bool):
        return f"got {str(value).lower()}"
    if isinstance(value, Mapping):
        return "got a mapping"
    if isinstance(value, list | tuple):
        return "got a list"
    text = repr(value)
    return f"got {text if len(text) <= 80 else text[:77] + '…'}"


def _needs(what: str, hint: str = "") -> Callable[[ErrorDetails], str]:
    return lambda e: f"needs {what}, {got(e['input'])}{hint}"


def _text_needed(error: ErrorDetails) -> str:
    quote = isinstance(error["input"], bool | int | float)
    return f"needs text, {got(error['input'])}{'; put it in quotes' if quote else ''}"


def _bound(words: str, key: str) -> Callable[[ErrorDetails], str]:
    return lambda e: f"must be {words} {e['ctx'][key]:g}, {got(e['input'])}"


def _choice(error: ErrorDetails) -> str:
    known = [o.strip("'") for o in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
    value = error["input"]
    near = did_you_mean(value, known) if isinstance(value, str) else ""
    one_of = f"one of {', '.join(known)}" if len(known) > 1 else known[0]
    return f"must be {one_of}; {got(value)}{near}"


_LIST = _needs("a list")
_MAPPING = _needs("a mapping of keys")
_WHOLE = _needs("a whole number")
_NUMBER = _needs("a number")
_TRUTH = _needs("true or false")

_WORDS: dict[str, Callable[[ErrorDetails], str]] = {
    "missing": lambda _: "is missing",
    "value_error": lambda e: str(e["ctx"]["error"]),
    "literal_error": _choice,
    "string_type": _text_needed,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": _needs("a finite number"),
    "bool_type": _TRUTH,
    "bool_parsing": _TRUTH,
    "tuple_type": _LIST,
    "list_type": _LIST,
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "too_short": lambda _: "needs at least one",
    "greater_than": _bound("more than", "gt"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than": _bound("less than", "lt"),
    "less_than_equal": _bound("at most", "le"),
}
