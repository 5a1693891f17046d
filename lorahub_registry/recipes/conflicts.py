"""What no field can see alone: parts of a recipe that do not go together.

It works on plain data and lets pass what it does not understand, so that these problems are
reported together with the fields' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorahub_registry.recipes.methods import METHODS
from lorahub_registry.recipes.template import names_used

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Conflict:
    """A problem, and the key it is about."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"{written(self.path)}: {self.text}"


def written(path: Path) -> str:
    """``adapters[1].coefficient``; the recipe itself is ``recipe``."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".") or "recipe"


def conflicts(recipe: Mapping[str, Any]) -> Iterator[Conflict]:
    """The disagreements in ``recipe``, plain data as YAML gives it."""
    listed = recipe.get("adapters")
    entries = (
        [{"ref": e} if isinstance(e, str) else e for e in listed or ()]
        if isinstance(listed, list | tuple)
        else []
    )
    entries = [e if isinstance(e, Mapping) else {} for e in entries]
    method = METHODS.get(str(_at(recipe, "method", "type")))
    yield from _twice(entries)
    if method is not None:
        name, learned = method.name(), method.coefficients == "learned"
        for i, entry in enumerate(entries):
            given = entry.get("coefficient") is not None
            if learned and given:
                yield Conflict(
                    ("adapters", i, "coefficient"),
                    f"method {name} learns the coefficients; remove this one, or use linear",
                )
            elif not learned and "search" in entry:
                yield Conflict(
                    ("adapters", i),
                    f"method {name} needs a coefficient for each adapter, and a search gives "
                    "none; name the adapters",
                )
            elif not learned and not given and entry:
                yield Conflict(("adapters", i), f"method {name} needs its coefficient here")
        if learned and _at(recipe, "data", "train") is None:
            yield Conflict(("data", "train"), f"is missing; method {name} learns from its rows")
        entrywise = getattr(method, "form", None) == "entries"
        if entrywise and _at(recipe, "output", "rank") in (None, "full"):
            yield Conflict(
                ("output", "rank"),
                f"method {name} changes single entries, which leaves no low rank to write in "
                "full; give rank: 64 or rank: energy 0.9 (energy 1 is exact)",
            )
    if _at(recipe, "data", "test", "select") == "diverse":
        yield Conflict(
            ("data", "test", "select"), "test rows are not chosen by the base; take random"
        )
    yield from _answer_shown(recipe)
    one, other = recipe.get("license"), _at(recipe, "publish", "license")
    if one is not None and other is not None and one != other:
        yield Conflict(("publish", "license"), f"is {other!r}, but license says {one!r}")


def _twice(entries: list[Mapping[str, Any]]) -> Iterator[Conflict]:
    for key, what in (("name", "is the name of"), ("ref", "is the same adapter as")):
        first: dict[str, int] = {}
        for i, entry in enumerate(entries):
            value = entry.get(key)
            if not isinstance(value, str):
                continue
            if value in first:
                yield Conflict(
                    ("adapters", i, key), f"{value!r} {what} adapters[{first[value]}] already"
                )
            first.setdefault(value, i)


def _answer_shown(recipe: Mapping[str, Any]) -> Iterator[Conflict]:
    template = _at(recipe, "data", "template")
    try:
        used = names_used(template) if isinstance(template, str) else frozenset()
    except ValueError:
        return
    for split in ("train", "test"):
        answer = _at(recipe, "data", split, "output")
        if isinstance(answer, str) and answer in used and answer not in {"input", "output"}:
            yield Conflict(
                ("data", "template"), f"shows the answer ({answer!r} of {split}) in the prompt"
            )


def _at(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data
