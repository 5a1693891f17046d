"""Whether what a folder holds is what was written into it, by the digests in its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import FOLDER, PEFT_TYPE, folder_to_run
from lorahub_registry.adapters.facts import digest_of, read_config, read_facts
from lorahub_registry.adapters.tensors import PICKLE_NAME, WEIGHTS_NAME
from lorahub_registry.card import RECIPE_NAME, RESULTS_NAME, is_converted, is_trained, read_results
from lorahub_registry.errors import BrokenAdapter, LoraregError


def add_digests(results: dict[str, Any], folder: Path) -> None:
    """Put into ``results`` the content digests of the tensors in ``folder`` and ``dynamic/``."""
    results["digest"] = digest_of(folder)
    if "routing" in results:
        results["routing"]["digest"] = digest_of(folder / FOLDER)


def check_tensors(folder: Path, said: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Compare ``folder``'s tensors with the digest in ``said``; results of before have none.

    Args:
        results: all of them, which tell how it was made.

    Raises:
        BrokenAdapter: they are others.
    """
    found = digest_of(folder)
    if found is None or said.get("digest") in {None, found}:
        return  # a file that is missing is told where files are gathered
    made, again = "composed", "compose"
    if is_trained(results):
        made, again = "trained", "train"
    elif is_converted(results):
        made, again = "converted", "convert"
    raise BrokenAdapter(
        f"{folder / WEIGHTS_NAME}: these are not the tensors that were {made}, and what "
        f"{RESULTS_NAME} says is not of them",
        hint=f"{again} again with --force",
    )


def damage(folder: Path) -> str:
    """What is wrong with the ``dynamic/`` of the mixture in ``folder``; "" where nothing is.

    By its headers: who asks wants no gigabytes read.
    """
    try:
        read_facts(folder / FOLDER)
        _present(folder / FOLDER)
    except LoraregError as error:
        return str(error)
    return ""


def check_dynamic(folder: Path) -> None:
    """Whether the part of a mixture that decides is whole, and the one that was composed.

    Of MixLoRA's experts alone it is the digest that tells: our own type is signed in itself.

    Args:
        folder: the mixture's, or its ``dynamic/``; of anything else nothing is looked at.

    Raises:
        BrokenAdapter: its tensors are missing, or others.
    """
    inner = folder_to_run(folder)
    if inner.name != FOLDER:
        return
    _present(inner)
    # Results alone are some other tool's.
    beside = inner.parent
    made = (CONFIG_NAME, RECIPE_NAME, RESULTS_NAME)
    if not all((beside / name).is_file() for name in made):
        return
    if read_config(inner).peft_type != PEFT_TYPE:
        results = read_results(beside)
        check_tensors(inner, results.get("routing", {}), results)


def _present(inner: Path) -> None:
    if not any((inner / name).is_file() for name in (WEIGHTS_NAME, PICKLE_NAME)):
        raise BrokenAdapter(
            f"{inner / WEIGHTS_NAME}: no such file, so no mixture", hint="compose it again"
        )
