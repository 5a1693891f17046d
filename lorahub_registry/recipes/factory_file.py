"""A factory's YAML, in and out. ``defaults`` are merged under each adapter before it is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from lorahub_registry.recipes.conflicts import Conflict, factory_conflicts
from lorahub_registry.recipes.conflicts import Path as Keys
from lorahub_registry.recipes.dump import dumped
from lorahub_registry.recipes.expert_training import MixLoraTraining
from lorahub_registry.recipes.factory import AdapterData, Factory, TrainSplit
from lorahub_registry.recipes.fields import did_you_mean
from lorahub_registry.recipes.load import (
    InFolder,
    Language,
    RecipeFile,
    located,
    parse,
    read_text,
    validated,
)
from lorahub_registry.recipes.pin import last_part
from lorahub_registry.recipes.problems import Grammar, got
from lorahub_registry.recipes.training import LoraOptions, TrainingOptions
from lorahub_registry.recipes.yamltext import Located

SECTIONS = ("lora", "method", "training", "data")
"""What ``defaults`` may hold, each a mapping that is merged under every adapter's own."""

FACTORIES = Language(
    Factory,
    "factory",
    Grammar(
        Factory,
        {("adapters", "*", "data", "validation"): {"file": TrainSplit, "share": None}},
        {
            "at the top": Factory,
            "under lora": LoraOptions,
            "under method": MixLoraTraining,
            "under training": TrainingOptions,
            "under data": AdapterData,
        },
        {Factory: ["defaults"]},
    ),
    factory_conflicts,
)


@dataclass(frozen=True)
class FactoryFile(InFolder):
    """A factory and where it was read from.

    Attributes:
        factory: what it says, paths as written.
        path: the file, absolute.
        text: its exact text.
    """

    factory: Factory
    path: Path
    text: str


def load_factory(path: Path | str) -> FactoryFile:
    """Read a factory's file.

    Raises:
        RecipeError: there is no such file, or all that is wrong with it, line by line.
    """
    file, text = read_text(path, noun="factory")
    return FactoryFile(parse_factory(text, source=str(path)), file, text)


def load_any(path: Path | str) -> RecipeFile | FactoryFile:
    """Read a file that is one or the other: a recipe has a ``method``, a factory has none.

    Raises:
        RecipeError: there is no such file, or all that is wrong with it.
    """
    file, text = read_text(path, noun="file")
    data = located(text, str(path), noun="file").data
    if isinstance(data, dict) and "method" in data:
        return RecipeFile(parse(text, source=str(path)), file, text)
    return FactoryFile(parse_factory(text, source=str(path)), file, text)


def parse_factory(text: str, *, source: str = "factory") -> Factory:
    """Read a factory's text; ``source`` is what messages call it.

    Raises:
        RecipeError: its ``problems`` name line, key and fault of everything that is wrong.
    """
    return _checked(located(text, source, noun="factory"), source, lines=True)


def factory_from_mapping(data: Mapping[str, Any], *, source: str = "factory") -> Factory:
    """A factory from plain data, such as a notebook builds; problems carry no lines.

    Raises:
        RecipeError: as :func:`parse_factory`.
    """
    return _checked(Located(dict(data)), source, lines=False)


def factory_yaml(factory: Factory) -> str:
    """``factory`` as YAML, every default written out; :func:`parse_factory` reads it back."""
    return dumped(_plain(factory))


def factory_digest(factory: Factory) -> str:
    """The SHA-256 of its canonical JSON: the same for what means the same."""
    canonical = json.dumps(_plain(factory), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def factory_of_one(factory: Factory, name: str, *, base: str) -> Factory:
    """The factory that trains only adapter ``name``, fit to be published.

    Absolute paths and those under ``~`` keep their last part only.

    Args:
        base: the base that was used, with its revision.

    Raises:
        KeyError: no adapter has that name.
    """
    plans = [plan for plan in factory.adapters if plan.name == name]
    if not plans:
        raise KeyError(name)
    data = _plain(factory.model_copy(update={"adapters": (plans[0],)}))
    for split in data["adapters"][0]["data"].values():
        if isinstance(split, dict):
            for key in {"path", "dataset"} & split.keys():
                split[key] = last_part(split[key], folder="./" if key == "dataset" else "")
    data["output"]["path"] = last_part(data["output"]["path"])
    data["base"] = last_part(base, folder="./")
    return factory_from_mapping(data, source=f"{factory.name}, resolved")


def _plain(model: BaseModel) -> dict[str, Any]:
    """As plain data: defaults filled in; None only where it is not the default."""
    unread: set[str] = set()
    if isinstance(model, TrainSplit):
        unread |= {"split"} if model.dataset is None else set()
        unread |= {"input", "output"} if model.text is not None else set()
    made: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if name in unread or (value is None and field.default is None):
            continue
        if isinstance(value, BaseModel):
            made[name] = _plain(value)
        elif isinstance(value, tuple):
            made[name] = [_plain(v) if isinstance(v, BaseModel) else v for v in value]
        else:
            made[name] = value
    return made


def _checked(read: Located, source: str, *, lines: bool) -> Factory:
    if not isinstance(read.data, dict):
        return validated(FACTORIES, read, source, lines=lines)
    merged, inherited, faults = _merged(read.data)

    def placed(found: Sequence[Conflict]) -> list[Conflict]:
        return _where_written(found, read.data, inherited)

    whole = replace(read, data=merged)
    return validated(FACTORIES, whole, source, lines=lines, more=faults, placed=placed)


def _merged(data: dict[str, Any]) -> tuple[dict[str, Any], set[Keys], list[Conflict]]:
    """``data`` with its defaults in each adapter, what came from them, and what is wrong there."""
    data = dict(data)
    defaults, faults = data.pop("defaults", None), []
    if not isinstance(defaults, dict):
        if defaults is not None:
            faults = [Conflict(("defaults",), f"needs a mapping of keys, {got(defaults)}")]
        return data, set(), faults
    for key, value in defaults.items():
        if key not in SECTIONS:
            near = did_you_mean(key, SECTIONS) or "; known here: " + ", ".join(SECTIONS)
            faults.append(Conflict(("defaults", key), f"unknown key{near}"))
        elif not isinstance(value, dict):
            faults.append(Conflict(("defaults", key), f"needs a mapping of keys, {got(value)}"))
    sound = {k: v for k, v in defaults.items() if k in SECTIONS and isinstance(v, dict)}
    inherited: set[Keys] = set()
    if isinstance(data.get("adapters"), list | tuple):
        data["adapters"] = [
            _under(entry, sound, ("adapters", i), inherited) if isinstance(entry, dict) else entry
            for i, entry in enumerate(data["adapters"])
        ]
    return data, inherited, faults


def _under(
    own: dict[str, Any], default: dict[str, Any], path: Keys, inherited: set[Keys]
) -> dict[str, Any]:
    made = dict(own)
    for key, value in default.items():
        if key not in own:
            made[key] = value
            inherited.add((*path, key))
        elif isinstance(own[key], dict) and isinstance(value, dict):
            made[key] = _under(own[key], value, (*path, key), inherited)
    return made


def _where_written(
    found: Sequence[Conflict], data: dict[str, Any], inherited: set[Keys]
) -> list[Conflict]:
    """Faults of what adapters have from ``defaults``, told there and once."""
    told: list[Conflict] = []
    shared: dict[Conflict, list[int]] = {}
    for fault in found:
        path = fault.path
        written: Keys = ("defaults", *path[2:])
        from_defaults = any(path[:end] in inherited for end in range(3, len(path) + 1))
        if from_defaults and _there(data, written):
            shared.setdefault(Conflict(written, fault.text), []).append(cast(int, path[1]))
        else:
            told.append(fault)
    for fault, which in shared.items():
        few = "" if len(which) == len(data["adapters"]) else (
            f" (for {', '.join(f'adapters[{i}]' for i in which[:5])}"
            f"{', …' if len(which) > 5 else ''})"
        )  # fmt: skip
        told.append(Conflict(fault.path, fault.text + few))
    return told


def _there(data: Any, path: Keys) -> bool:
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True
