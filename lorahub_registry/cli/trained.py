"""How an adapter was trained, as ``show`` tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorahub_registry.errors import OutputError
from lorahub_registry.registry.records import StoredAdapter

_TOLD = (
    "objective", "lora", "training", "data", "tokens", "steps", "epochs", "stopped", "best_step",
    "together", "datasets", "notes", "versions",
)  # fmt: skip


def facts(stored: StoredAdapter) -> dict[str, Any] | None:
    """What JSON holds of it; None of what was not trained here.

    From its lineage, and from ``results.json`` in its folder where that is still there
    (``problem``: why it cannot be read).
    """
    lineage = stored.mixture
    if lineage is None or lineage.members:
        return None
    found: dict[str, Any] = {
        "method": lineage.method.removeprefix("train "),
        "seed": lineage.seed,
        "verdict": lineage.verdict,
        "factory_digest": lineage.recipe_digest,
    }
    try:
        results = _results(stored)
    except OutputError as error:
        return found | {"problem": str(error)}
    if results is None:
        return found
    found |= {key: results[key] for key in _TOLD if key in results}
    for key in ("loss", "validation_loss"):
        curve = results.get(key)
        found[key] = {"first": curve[0], "last": curve[-1]} if curve else None
    return found


def _results(stored: StoredAdapter) -> dict[str, Any] | None:
    from lorahub_registry.card import RESULTS_NAME, is_trained, read_results

    place = stored.record.local_path
    if place is None or not (Path(place) / RESULTS_NAME).is_file():
        return None
    results = read_results(Path(place))
    return results if is_trained(results) else None


def lines(stored: StoredAdapter) -> list[str]:
    """What people read of it."""
    known = facts(stored)
    if known is None:
        return []
    head = f"by {known['method']}"
    if "steps" in known:
        lora, training = known["lora"], known["training"]
        head += (
            f", {known['steps']} steps ({known['epochs']:.3g} epochs) of "
            f"{training['batch_size'] * training['gradient_accumulation_steps']} rows, "
            f"learning rate {training['learning_rate']:g}, dropout {lora['lora_dropout']:g}"
        )
    found = [f"{head}, seed {known['seed']}: {known['verdict']}"]
    if known.get("stopped"):
        found.append(f"stopped {known['stopped']}")
    if known.get("best_step") is not None:
        found.append(f"the weights are those of step {known['best_step']}")
    for split, data in known.get("data", {}).items():
        if data:
            found.append(
                f"{split:<12}{data['name']}: {data['rows']:,} rows, {data['tokens']:,} tokens "
                f"({data['output_tokens']:,} in outputs)"
            )
    for key, name in (("loss", "loss"), ("validation_loss", "validation")):
        if curve := known.get(key):
            found.append(f"{name:<12}{_point(curve['first'])} to {_point(curve['last'])}")
    if "problem" in known:
        found.append(known["problem"])
    return found


def _point(point: list[Any]) -> str:
    step, loss = point
    return f"{'not finite' if loss is None else f'{loss:.4f}'} (step {step})"
