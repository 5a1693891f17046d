"""What no field can see alone: parts of a recipe or a factory that do not go together.

It works on plain data and lets pass what it does not understand, so that these problems are
reported together with the fields' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lorahub_registry.recipes.method import MethodBase
from lorahub_registry.recipes.methods import METHODS
from lorahub_registry.recipes.routed import RoutedMethod
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
        finds = "decides" if method.dynamic else "learns"
        for i, entry in enumerate(entries):
            given = entry.get("coefficient") is not None
            if method.coefficients != "given":
                if given:
                    yield Conflict(
                        ("adapters", i, "coefficient"),
                        f"method {name} {finds} the coefficients; remove this one, or use linear",
                    )
            elif "search" in entry:
                yield Conflict(
                    ("adapters", i),
                    f"method {name} needs a coefficient for each adapter, and a search gives "
                    "none; name the adapters",
                )
            elif not given and entry:
                yield Conflict(
                    ("adapters", i),
                    f"method {name} needs its coefficient here (coefficient: NUMBER)",
                )
        yield from _names(method, recipe, entries)
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


def _names(
    method: type[MethodBase], recipe: Mapping[str, Any], entries: list[Mapping[str, Any]]
) -> Iterator[Conflict]:
    """What a method says of adapters, where they all have names by the recipe."""
    found = any("search" in entry for entry in entries)
    if not issubclass(method, RoutedMethod) or not entries or found:
        return
    names = [entry.get("name") for entry in entries]
    try:
        made = method.model_validate(recipe["method"])
    except ValidationError:
        return  # told by the fields themselves
    named = all(isinstance(name, str) for name in names)
    for path, text in made.problems([str(name) for name in names]):
        if named or path[0] != "method":
            yield Conflict(path, text)


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


def factory_conflicts(factory: Mapping[str, Any]) -> Iterator[Conflict]:
    """The disagreements in ``factory``, plain data with its ``defaults`` merged."""
    listed = factory.get("adapters")
    entries = [
        e if isinstance(e, Mapping) else {}
        for e in (listed if isinstance(listed, list | tuple) else ())
    ]
    first: dict[str, int] = {}
    for i, entry in enumerate(entries):
        at: Path = ("adapters", i)
        name = entry.get("name")
        # Names are folders, and some file systems do not tell a from A.
        if isinstance(name, str) and first.setdefault(name.lower(), i) != i:
            yield Conflict(
                (*at, "name"),
                f"{name!r} is the name of adapters[{first[name.lower()]}] already; each adapter "
                "gets a folder of its name",
            )
        validation = _at(entry, "data", "validation")
        if _at(entry, "training", "eval_steps") is not None and validation is None:
            yield Conflict(
                (*at, "training", "eval_steps"),
                "needs data.validation: rows to measure on, or a share of train as 0.1",
            )
        if _at(entry, "training", "early_stopping_patience") is not None:
            if _at(entry, "training", "eval_steps") is None:
                yield Conflict(
                    (*at, "training", "early_stopping_patience"),
                    "counts evaluations: say by eval_steps how often there is one",
                )
        elif _at(entry, "training", "early_stopping_threshold"):
            yield Conflict(
                (*at, "training", "early_stopping_threshold"), "is for early_stopping_patience"
            )
        if _at(entry, "training", "packing") is True:
            if _at(entry, "data", "max_length") is None:
                yield Conflict(
                    (*at, "training", "packing"), "needs data.max_length, the length of a pack"
                )
            if _at(entry, "training", "group_by_length") is True:
                yield Conflict(
                    (*at, "training", "group_by_length"),
                    "and packing do not go together: packs are of one length",
                )
        yield from _experts(entry, at)
        for shown in _answer_shown(entry):
            yield Conflict((*at, *shown.path), shown.text)


def _experts(entry: Mapping[str, Any], at: Path) -> Iterator[Conflict]:
    """What does not go with a method that makes experts."""
    if not isinstance(entry.get("method"), Mapping):
        return
    start = _at(entry, "lora", "init_lora_weights")
    if isinstance(start, str) and (start == "olora" or start.startswith("pissa")):
        yield Conflict(
            (*at, "lora", "init_lora_weights"),
            f"{start} takes a part out of the base, which experts share: use true or gaussian",
        )
    switch = _at(entry, "method", "routing_strategy") == "mixlora-switch"
    if switch and _at(entry, "training", "packing") is True:
        yield Conflict(
            (*at, "training", "packing"),
            "does not go with mixlora-switch, which counts the tokens of each row: use "
            "group_by_length",
        )


def _answer_shown(recipe: Mapping[str, Any]) -> Iterator[Conflict]:
    template = _at(recipe, "data", "template")
    try:
        used = names_used(template) if isinstance(template, str) else frozenset()
    except ValueError:
        return
    for split in ("train", "validation", "test"):
        answer = _at(recipe, "data", split, "output")
        if isinstance(answer, str) and answer in used and answer not in {"input", "output"}:
            yield Conflict(
                ("data", "template"), f"shows the answer ({answer!r} of {split}) in the prompt"
            )


def _at(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data
