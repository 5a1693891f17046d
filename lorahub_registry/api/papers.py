"""What stands beside a trained adapter, and its entry in the registry."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorahub_registry.api.curve import draw_loss
from lorahub_registry.card import FACTORY_NAME, RESULTS_NAME, write_card
from lorahub_registry.lock import LOCK_NAME, Lock
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import (
    BaseRecord,
    MixtureRecord,
    ScoreRecord,
    SkillRecord,
    StoredAdapter,
)
from lorahub_registry.registry.store import Registry


def write_papers(
    folder: Path, results: Mapping[str, Any], factory_yaml: str, lock: Lock
) -> dict[str, Any]:
    """Write results, factory, lock, the loss curve and the card into an adapter's folder.

    Args:
        results: the facts of training; NaN and infinite numbers become null.
        factory_yaml: a factory of this adapter alone, resolved, without paths of this machine.

    Returns:
        The results as they were written.

    Raises:
        OutputError: a fact that the card needs is missing.
    """
    found: dict[str, Any] = finite(results)
    text = json.dumps(found, indent=2) + "\n"
    (folder / RESULTS_NAME).write_text(text, encoding="utf-8")
    (folder / FACTORY_NAME).write_text(factory_yaml, encoding="utf-8")
    (folder / LOCK_NAME).write_text(lock.dumps(), encoding="utf-8")
    if found["loss"] or found["validation_loss"]:
        draw_loss(folder, found)
    write_card(folder)
    return found


def enter(
    folder: Path,
    results: Mapping[str, Any],
    factory_yaml: str,
    recipe_digest: str,
    registry: Registry,
    *,
    base_folder: Path | None = None,
) -> StoredAdapter:
    """Put a trained adapter into the registry: skills, description, lineage, measured scores.

    Args:
        folder: where it stays.
        recipe_digest: of ``factory_yaml``; the registry keeps one text a digest, so that of the
            factory that it is one of several in will not do.
        base_folder: the base's, where it is a local one that the registry shall find again.
    """
    found = finite(results)
    base, test = found["base"], found["data"]["test"]
    verdict = found["verdict"]["text"] if "verdict" in found else "not evaluated"
    scores: list[ScoreRecord] = []
    for row in found["test"] or ():
        # The base is no adapter: its scores stand with the adapter's.
        task = found["task"] if row["kind"] == "adapter" else f"{found['task']}, {row['name']}"
        dataset = dataset_id(test["name"], test["sha256"])
        scores += scores_of(row, task, dataset, base["revision"], base["digest"])
    # The words of its card are ours: they tell of no skill.
    record = replace(
        record_of_folder(folder, name=found["name"]),
        base=BaseRecord(base["name"], "given", base["name"], base["revision"], base["digest"]),
        description=found["description"] or f"trained by {found['method']}: {verdict}",
        skills=tuple(SkillRecord(skill, "user", FACTORY_NAME) for skill in found["skills"]),
        scores=tuple(scores),
    )
    lineage = MixtureRecord(
        name=found["name"],
        method=f"train {found['method']}",
        recipe_yaml=factory_yaml,
        recipe_digest=recipe_digest,
        seed=found["seed"],
        verdict=verdict,
        members=(),
    )
    stored = registry.add_mixture(record, lineage)
    if base_folder is not None and "/" not in base["name"]:
        registry.place_base(base["name"], base_folder)
    return stored


def scores_of(
    row: Mapping[str, Any], task: str, dataset: str, revision: str | None, digest: str | None
) -> list[ScoreRecord]:
    """One row of a table of measured scores, as the registry keeps it.

    Args:
        revision: the base's; where it has none, its ``digest`` says which base was measured.
    """
    return [
        ScoreRecord(
            task=task,
            metric=metric,
            value=row[metric],
            dataset=dataset,
            n=row["n"],
            few_shot=0,
            stderr=row[f"{metric}_stderr"],
            source="measured",
            revision=revision or (digest or "")[:12],
        )
        for metric in ("nll", "exact_match")
        if row[metric] is not None
    ]


def dataset_id(name: str, sha256: str | None) -> str:
    """A file of rows by its name and content."""
    return f"{name}@{sha256[:12]}" if sha256 else name


def finite(value: Any) -> Any:
    """``value`` with null where JSON has no word: the error over one row, a loss that overflows."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
