"""A recipe as it ran: resolved, pinned, and with nothing in it of the machine it ran on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath

from lorahub_registry.recipes.dump import plain
from lorahub_registry.recipes.entries import RefEntry
from lorahub_registry.recipes.load import from_mapping
from lorahub_registry.recipes.model import Recipe


def pinned(recipe: Recipe, *, base: str, adapters: Sequence[RefEntry]) -> Recipe:
    """``recipe`` with what it was resolved to, fit to be published.

    Args:
        recipe: what the user wrote.
        base: the base that was used, with its revision.
        adapters: what refs and searches came to, in the mixture's order.

    Absolute paths and those under ``~`` keep their last part only, so that nothing tells whose
    machine this was: ``/home/me/loras/sql`` becomes ``./sql``.

    Raises:
        RecipeError: the result is no valid recipe, as when one adapter is named twice.
    """
    data = plain(recipe)
    for split in (data["data"].get("train"), data["data"].get("test")):
        if split:
            split["path"] = last_part(split["path"])
    data["output"]["path"] = last_part(data["output"]["path"])
    if examples := data["method"].get("examples"):
        data["method"]["examples"] = {name: last_part(path) for name, path in examples.items()}
    data["base"] = last_part(base, folder="./")
    taken: set[str] = set()
    data["adapters"] = []
    for entry in adapters:
        ref = short = last_part(entry.ref, folder="./")
        number = 1
        while ref in taken and ref != entry.ref:
            number += 1
            ref = f"{short}-{number}"
        taken.add(ref)
        data["adapters"].append({**entry.model_dump(mode="json", exclude_none=True), "ref": ref})
    return from_mapping(data, source=f"{recipe.name}, resolved")


def last_part(text: str, *, folder: str = "") -> str:
    """``text``; of a path from a root, a drive or a home only its last part, in ``folder``."""
    if text.startswith("~") or PurePosixPath(text).is_absolute():
        last = text.rstrip("/").rsplit("/", 1)[-1]
    elif PureWindowsPath(text).drive or text.startswith("\\"):
        last = PureWindowsPath(text).name
    else:
        return text
    return folder + (last.lstrip("~") or "folder")
