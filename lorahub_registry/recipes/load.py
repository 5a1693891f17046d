"""From text to a :class:`Recipe`, or to all that is wrong with it, line by line.

A factory is read by the same functions; :class:`Language` is what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes.conflicts import Conflict, conflicts, written
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.problems import RECIPE, Grammar, problem
from lorahub_registry.recipes.routed import RoutedMethod
from lorahub_registry.recipes.yamltext import MAX_BYTES, Located, YamlProblem, read_yaml
from lorahub_registry.refs import expand

MAX_PROBLEMS = 100
M = TypeVar("M", bound=BaseModel)


class InFolder:
    """What was read from a file, and means other files by paths from there."""

    path: Path

    @property
    def folder(self) -> Path:
        """What its relative paths count from."""
        return self.path.parent

    def resolve(self, path: str) -> Path:
        """``path``, as it is written there, absolute; ``~`` is expanded, ``${ENV}`` is not."""
        return expand(path, beside=self.folder)


@dataclass(frozen=True)
class RecipeFile(InFolder):
    """A recipe and where it was read from.

    Attributes:
        recipe: what it says, paths as written.
        path: the file, absolute.
        text: its exact text.
        lines: of its keys, where it was read from a file.
    """

    recipe: Recipe
    path: Path
    text: str
    lines: Located | None = None

    def check_names(self, names: Sequence[str]) -> None:
        """Whether the method can mix adapters of these names, which only resolving gives.

        Raises:
            RecipeError: it needs more of them, or speaks of one that is not there.
        """
        method = self.recipe.method
        if not isinstance(method, RoutedMethod):
            return
        found = [Conflict(path, text) for path, text in method.problems(names)]
        if found:
            lines = self.lines
            said = [f"line {lines.line(one.path)}: {one}" if lines else str(one) for one in found]
            raise RecipeError(
                f"{self.path.name}: not a valid recipe:",
                problems=tuple(said),
                hint=f"the adapters are {', '.join(names)}",
            )


def load(path: Path | str) -> RecipeFile:
    """Read a recipe's file.

    Raises:
        RecipeError: there is no such file, or all that is wrong with it.
    """
    file, text = read_text(path)
    lines = located(text, str(path))
    return RecipeFile(validated(RECIPES, lines, str(path)), file, text, lines)


def parse(text: str, *, source: str = "recipe") -> Recipe:
    """Read a recipe's text.

    Args:
        text: YAML.
        source: what messages call it: the file's name.

    Raises:
        RecipeError: its ``problems`` name line, key and fault of everything that is wrong.
    """
    return validated(RECIPES, located(text, source), source)


def from_mapping(data: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """A recipe from plain data, such as a notebook builds; problems carry no lines.

    Raises:
        RecipeError: as :func:`parse`.
    """
    return validated(RECIPES, Located(dict(data)), source, lines=False)


@dataclass(frozen=True)
class Language(Generic[M]):
    """One kind of file: its model, and what is said about it.

    Attributes:
        noun: what messages call such a file.
        conflicts: the disagreements between its parts, in plain data.
    """

    model: type[M]
    noun: str
    grammar: Grammar
    conflicts: Callable[[Mapping[str, Any]], Iterable[Conflict]]


RECIPES = Language(Recipe, "recipe", RECIPE, conflicts)


def read_text(path: Path | str, *, noun: str = "recipe") -> tuple[Path, str]:
    """A YAML file's absolute path and its exact text.

    Raises:
        RecipeError: there is no such file, it cannot be read, is too large, or is not UTF-8.
    """
    file = expand(str(path))
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
        text = raw[:MAX_BYTES].decode("utf-8-sig") if len(raw) <= MAX_BYTES else ""
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such {noun}", hint="give the path of a YAML file; see examples/"
        ) from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _refused(str(path), (f"line {line}: not UTF-8 text",), noun) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise _refused(str(path), (f"line 1: larger than {MAX_BYTES // 1024} KiB",), noun)
    return file, text


def located(text: str, source: str, *, noun: str = "recipe") -> Located:
    """A YAML text's plain data, with the line of each part.

    Raises:
        RecipeError: it is not YAML, or more than plain data.
    """
    try:
        return read_yaml(text)
    except YamlProblem as error:
        raise _refused(source, (f"line {error.line}: {error}",), noun) from None


def validated(
    language: Language[M],
    read: Located,
    source: str,
    *,
    lines: bool = True,
    more: Sequence[Conflict] = (),
    placed: Callable[[Sequence[Conflict]], Sequence[Conflict]] = list,
) -> M:
    """What ``read`` says, as the language's model.

    Args:
        source: what messages call it.
        lines: whether problems name the line.
        more: what was found to be wrong before.
        placed: tells faults where they were written, if that is not where they stand.

    Raises:
        RecipeError: its ``problems`` are all that is wrong.
    """
    data, noun = read.data, language.noun
    if not isinstance(data, dict):
        kind = {type(None): "empty", list: "a list"}.get(type(data), "one value")
        what = f"a {noun} is a mapping of keys (version, name, base, …); this is {kind}"
        raise _refused(source, (f"line {read.line(())}: {what}" if lines else what,), noun)
    other = _other(data, noun)
    if other is not None:
        raise RecipeError(f"{source}: is a {other[0]}, not a {noun}", hint=f"{other[1]} {source}")
    found = [
        (line, f"{written(path)}: given twice (first on line {first})")
        for line, path, first in read.repeated
    ]
    found += [(read.line(f.path), str(f)) for f in more]
    made = None
    try:
        made = language.model.model_validate(data)
    except ValidationError as error:
        # A list whose items are all wrong is not empty, whatever pydantic counts.
        details = [
            d
            for d in error.errors(include_url=False)
            if not (d["type"] == "too_short" and d["input"])
        ]
        faults = [problem(d, data, language.grammar) for d in details if d["type"] != "conflict"]
        faults += language.conflicts(data)
        if not faults:
            faults = [Conflict((), d["msg"]) for d in details]
        found += [(read.line(f.path), str(f)) for f in placed(faults)]
    if found or made is None:
        found.sort(key=lambda item: item[0])
        told = dict.fromkeys(f"line {at}: {text}" if lines else text for at, text in found)
        raise _refused(source, tuple(told), noun)
    return made


def _other(data: Mapping[str, Any], noun: str) -> tuple[str, str] | None:
    """What ``data`` is where it is not a ``noun``, and the command for it."""
    if noun == "factory":
        return ("recipe", "lorareg compose") if "method" in data else None
    listed = data.get("adapters")
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    trained = "defaults" in data or any({"lora", "training"} & e.keys() for e in entries)
    return ("factory", "lorareg train") if trained and "method" not in data else None


def _refused(source: str, problems: tuple[str, ...], noun: str) -> RecipeError:
    if len(problems) > MAX_PROBLEMS:
        more = f"and {len(problems) - MAX_PROBLEMS} more"
        problems = (*problems[:MAX_PROBLEMS], more)
    return RecipeError(f"{source}: not a valid {noun}:", problems=problems)
