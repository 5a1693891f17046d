"""The mixture as a PEFT folder, loaded again by stock PEFT and checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.nll import keeps_logits, token_losses
from lorahub_registry.evaluate.tokens import Batch
from lorahub_registry.recipes.fields import OutputRank
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.files import load_deltas, save_adapter
from lorahub_registry.weights.lowrank import Deltas, LowRank, truncate


@dataclass(frozen=True)
class Written:
    """What was written, and what truncation cost.

    Attributes:
        kept: least share of energy that any module kept; 1 for a full sum.
        total_kept: share over all modules together.
    """

    ranks: dict[int, int]
    kept: float
    total_kept: float


def write_mixture(
    folder: Path, deltas: Deltas, base: LoadedBase, *, rank: OutputRank, dtype: str
) -> Written:
    """Write ``deltas``, truncated as asked, into ``folder``.

    Raises:
        NotApplied: the deltas are all zero.
    """
    energies = {name: delta.norm() ** 2 for name, delta in deltas.items()}
    total = sum(energies.values())
    if not total > 0:
        raise NotApplied("the mixture's delta is zero: it would change nothing")
    out: dict[str, LowRank] = {}
    least, lost = 1.0, 0.0
    for name, delta in deltas.items():
        if rank.full:
            out[name] = delta
            continue
        cut = truncate(delta, rank=rank.rank, energy=rank.energy)
        out[name] = cut.delta
        least = min(least, cut.kept)
        lost += (1 - cut.kept) * energies[name]
    modules = base.linear_modules()
    save_adapter(
        folder,
        {name: LowRank(d.a.cpu(), d.b.cpu()) for name, d in out.items()},
        base=base.name,
        base_revision=base.revision,
        task_type=base.task_type,
        dtype=dtype,
        all_modules=modules.keys(),
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in out),
    )
    return Written(read_facts(folder).ranks, least, 1 - lost / total)


@contextmanager
def stock_peft(base: LoadedBase, folder: Path) -> Iterator[Any]:
    """The adapter in ``folder`` on the base, loaded by stock PEFT; taken off again afterwards.

    Raises:
        NotApplied: PEFT did not find a place for every tensor, or a tensor for every place.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = PeftModel.from_pretrained(base.model, str(folder), adapter_name="mixture")
    try:
        if missing := [w for w in caught if "missing adapter keys" in str(w.message)]:
            raise NotApplied(f"{folder}: stock PEFT says: {missing[0].message}")
        wrapped.eval()
        yield wrapped
    finally:
        wrapped.unload()
        # PEFT leaves its config on the base, and warns about it at the next load.
        if hasattr(base.model, "peft_config"):
            del base.model.peft_config


def check_applied(base: LoadedBase, folder: Path, batches: Sequence[Batch]) -> float:
    """Whether the written file does in stock PEFT what its tensors say.

    Returns:
        Largest change of a label's loss against the base, in nats.

    Raises:
        NotApplied: nothing changed, or PEFT's outputs are not those of the written deltas.
    """
    batch = min(batches, key=lambda b: b.labels.numel())
    sliced = keeps_logits(base.model)
    with torch.inference_mode():
        before = token_losses(base.model, batch, sliced=sliced)
        with applied(base.model, load_deltas(folder, read_facts(folder))):
            ours = token_losses(base.model, batch, sliced=sliced)
        with stock_peft(base, folder) as wrapped:
            theirs = token_losses(wrapped, batch, sliced=sliced)
    change = float((theirs - before).abs().max())
    if not change > 0:
        raise NotApplied(f"{folder}: loaded by stock PEFT, it changes nothing")
    # fp32: two orders of summation; half precision: the rounding of its own activations.
    tolerance = 1e-3 if base.exact_dtype else 0.1
    gap = float((theirs - ours).abs().max()) / max(1.0, float(ours.abs().max()))
    if not gap <= tolerance:
        raise NotApplied(f"{folder}: stock PEFT computes something else from it (by {gap:.2g})")
    return change
