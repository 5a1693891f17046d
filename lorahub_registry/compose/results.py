"""What ``results.json`` says of a mixture."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from lorahub_registry import __version__
from lorahub_registry.adapters.dynamic import FOLDER, PEFT_TYPE
from lorahub_registry.compose.fit import Fitted
from lorahub_registry.compose.routed import Routed
from lorahub_registry.compose.run import Composition
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.generation import NORMALISATION
from lorahub_registry.recipes.model import Recipe


def results(recipe: Recipe, base: LoadedBase, made: Composition) -> dict[str, Any]:
    """Everything that ``results.json`` says; no paths, no dates, no names of machines.

    Args:
        recipe: as it is published: pinned, its paths shortened.
    """
    found: dict[str, Any] = {
        "name": recipe.name,
        "base": {"name": base.name, "revision": base.revision},
        "method": recipe.method.model_dump(mode="json"),
        "about": asdict(recipe.method.info),
        "form": recipe.method.form,
        "seed": recipe.seed,
        "seq2seq": base.seq2seq,
        "auto_class": "AutoModelForSeq2SeqLM" if base.seq2seq else "AutoModelForCausalLM",
        "members": [
            {
                "name": m.name,
                "ref": m.ref,
                "digest": m.digest,
                "coefficient": made.coefficients[m.name],
            }
            for m in made.members
        ],
        "tokens": made.tokens,
        "output": {
            "rank": recipe.output.rank.written(),
            "ranks": made.written.ranks,
            "dtype": recipe.output.dtype,
            "energy_kept": made.written.total_kept,
            "energy_kept_least": made.written.kept,
            "truncation_error": made.written.truncation_error,
            "cast_error": made.written.cast_error,
            "largest_change_nats": made.change,
        },
        "notes": made.notes,
        "versions": {
            "lorareg": __version__,
            **{p: version(p) for p in ("torch", "transformers", "peft", "nevergrad")},
        },
        "device": str(base.device.type),
        "dtype": str(base.model.dtype).removeprefix("torch."),
    }
    if made.fitted:
        found |= _search(made.fitted)
    if made.routed:
        found["routing"] = _routing(made.routed)
    if made.proof:
        found["output"]["nll_before_writing"] = made.proof.exact_nll
        found["test"] = [asdict(m) for m in made.proof.table]
        found["verdict"] = asdict(made.proof.verdict)
        found["overlap"] = made.overlap
        if "exact_match" in recipe.evaluate:
            found["exact_match"] = NORMALISATION
    return found


def _routing(routed: Routed) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "type": routed.router.type,
        **asdict(routed.router),
        "folder": FOLDER,
        "peft_type": getattr(routed.router, "peft_type", PEFT_TYPE),
        "mean": {
            layer: dict(zip(routed.experts, row, strict=True)) for layer, row in routed.mean.items()
        },
    }
    if routed.loss:
        facts["loss"] = [list(point) for point in routed.loss]
    if routed.static:
        facts["static"] = routed.static
    return facts


def _search(fitted: Fitted) -> dict[str, Any]:
    learned = fitted.learned
    facts: dict[str, Any] = {
        "search": [asdict(e) for e in learned.evaluations],
        "stopped": asdict(learned.stop),
        "skipped": learned.skipped,
        "measured": fitted.how,
    }
    if len(fitted.sets) > 1:
        facts["coefficients"] = fitted.by_set()
    if fitted.screened:
        facts["screened"] = {
            "alone": fitted.screened.alone,
            "together": fitted.screened.together,
        }
    if fitted.spread:
        facts["spread"] = fitted.spread
    return facts
