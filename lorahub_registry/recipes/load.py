"""From text to a :class:`Recipe`, or to all that is wrong with it, line by line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorahub_registry.errors import RecipeError
from lorahub_registry.recipes.conflicts import Conflict, conflicts, written
from lorahub_registry.recipes.model import Recipe
from lorahub_registry.recipes.problems import problem
from lorahub_registry.recipes.yamltext import MAX_BYTES, Located, YamlProblem, read_yaml
from lorahub_registry.refs import expand

MAX_PROBLEMS = 100


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and where it was read from.

    Attributes:
        recipe: what it says, paths as written.
        path: the file, absolute.
        text: its exact text.
    """

    recipe: Recipe
    path: Path
    text: str

    @property
    def folder(self) -> Path:
        """What the recipe's relative paths count from."""
        return self.path.parent

    def resolve(self, path: str) -> Path:
        """``path``, as the recipe writes it, absolute; ``~`` is expanded, ``${ENV}`` is not."""
        return expand(path, beside=self.folder)


def load(path: Path | str) -> RecipeFile:
    """Read a recipe's file.

    Raises:
        RecipeError: there is no such file, or all that is wrong with it.
    """
    file = expand(str(path))
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
        text = raw[:MAX_BYTES].decode("utf-8-sig") if len(raw) <= MAX_BYTES else ""
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe", hint="give the path of a YAML file; see examples/"
        ) from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _refused(str(path), (f"line {line}: not UTF-8 text",)) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise _refused(str(path), (f"line 1: larger than {MAX_BYTES // 1024} KiB",))
    return RecipeFile(parse(text, source=str(path)), file, text)


def parse(text: str, *, source: str = "recipe") -> Recipe:
    """Read a recipe's text.

    Args:
        text: YAML.
        source: what messages call it: the file's name.

    Raises:
        RecipeError: its ``problems`` name line, key and fault of everything that is wrong.
    """
    try:
        located = read_yaml(text)
    except YamlProblem as error:
        raise _refused(source, (f"line {error.line}: {error}",)) from None
    return _validated(located, source, lines=True)


def from_mapping(data: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """A recipe from plain data, such as a notebook builds; problems carry no lines.

    Raises:
        RecipeError: as :func:`parse`.
    """
    return _validated(Located(dict(data)), source, lines=False)


def _validated(located: Located, source: str, *, lines: bool) -> Recipe:
    data = located.data
    if not isinstance(data, dict):
        kind = {type(None): "empty", list: "a list"}.get(type(data), "one value")
        what = f"a recipe is a mapping of keys (version, name, base, …); this is {kind}"
        raise _refused(source, (f"line {located.line(())}: {what}" if lines else what,))
    found = [
        (line, f"{written(path)}: given twice (first on line {first})")
        for line, path, first in located.repeated
    ]
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # A list whose items are all wrong is not empty, whatever pydantic counts.
        details = [
            d
            for d in error.errors(include_url=False)
            if not (d["type"] == "too_short" and d["input"])
        ]
        faults = [problem(d, data) for d in details if d["type"] != "conflict"]
        faults += conflicts(data)
        if not faults:
            faults = [Conflict((), d["msg"]) for d in details]
        found += [(located.line(f.path), str(f)) for f in faults]
    if found or recipe is None:
        found.sort(key=lambda item: item[0])
        told = dict.fromkeys(f"line {at}: {text}" if lines else text for at, text in found)
        raise _refused(source, tuple(told))
    return recipe


def _refused(source: str, problems: tuple[str, ...]) -> RecipeError:
    if len(problems) > MAX_PROBLEMS:
        more = f"and {len(problems) - MAX_PROBLEMS} more"
        problems = (*problems[:MAX_PROBLEMS], more)
    return RecipeError(f"{source}: not a valid recipe:", problems=problems)
