"""The mixture as a PEFT folder, loaded again by stock PEFT and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.errors import NotApplied
from lorahub_registry.evaluate.base import LoadedBase
from lorahub_registry.evaluate.nll import keeps_logits, token_losses
from lorahub_registry.evaluate.stock import stock_peft
from lorahub_registry.evaluate.tokens import Batch
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes.fields import OutputRank
from lorahub_registry.runtime.apply import applied
from lorahub_registry.weights.files import DTYPES, load_deltas, save_adapter
from lorahub_registry.weights.lowrank import Deltas, LowRank, weighted_sum
from lorahub_registry.weights.truncate import Truncated, truncate


@dataclass(frozen=True)
class Written:
    """What was written, and what that cost.

    Attributes:
        ranks: rank → number of modules.
        kept: least share of energy that any module kept in truncation; 1 for a full sum.
        total_kept: share over all modules together.
        truncation_error: norm of what truncation cut off, as a share of the delta's norm.
        cast_error: norm of what the written dtype changed, as a share of the delta's norm.
    """

    ranks: dict[int, int]
    kept: float
    total_kept: float
    truncation_error: float
    cast_error: float


def write_mixture(
    folder: Path,
    deltas: Deltas,
    base: LoadedBase,
    *,
    rank: OutputRank,
    dtype: str,
    cut: Mapping[str, Truncated] | None = None,
    progress: Progress = silent,
) -> Written:
    """Write ``deltas``, truncated as asked, into ``folder``.

    Args:
        rank: ``full`` is exact: no rank is more than the module's own dimensions.
        cut: modules that are truncated already, and what that cost.

    Raises:
        NotApplied: the deltas are all zero.
    """
    if not any(delta.b.any() and delta.a.any() for delta in deltas.values()):
        raise NotApplied("the mixture's delta is zero: it would change nothing")
    done: dict[str, Truncated] = dict(cut or {})
    out: dict[str, LowRank] = {}
    # QR and SVD in float64: on a GPU where there is one (Apple's has no float64).
    place = base.device if base.device.type == "cuda" else torch.device("cpu")
    with progress.task("Writing", len(deltas), "module") as task:
        for name, delta in deltas.items():
            if name not in done and (not rank.full or delta.rank > min(delta.shape)):
                done[name] = truncate(delta.to(place), rank=rank.rank, energy=rank.energy)
            out[name] = (done[name].delta if name in done else delta).to("cpu")
            task.advance()
    named = dict(base.model.named_modules())
    save_adapter(
        folder,
        out,
        base=base.name,
        base_revision=base.revision,
        task_type=base.task_type,
        dtype=dtype,
        all_modules=named.keys(),
        fan_in_fan_out=any(type(named[name]).__name__ == "Conv1D" for name in out),
    )
    total = math.fsum(t.energy for t in done.values())
    share = math.fsum(t.lost for t in done.values()) / total if total else 0.0
    return Written(
        ranks=read_facts(folder).ranks,
        kept=min((t.kept for t in done.values()), default=1.0),
        total_kept=1 - share,
        truncation_error=math.sqrt(share),
        cast_error=_cast_error(out, DTYPES[dtype]),
    )


def _cast_error(deltas: Deltas, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 0.0
    error = whole = 0.0
    for delta in deltas.values():
        cast = delta.to("cpu", dtype).to("cpu", delta.dtype)
        both = weighted_sum([{"": delta}, {"": cast}], [1.0, -1.0])[""]
        error += both.norm() ** 2
        whole += delta.norm() ** 2
    return float((error / whole) ** 0.5)


def check_applied(base: LoadedBase, folder: Path, batches: Sequence[Batch]) -> float:
    """Whether the written file does in stock PEFT what its tensors say.

    Returns:
        Largest change of a label's loss against the base, in nats.

    Raises:
        NotApplied: nothing changed, or PEFT's outputs are not those of the written deltas.
    """
    for batch in sorted(batches, key=lambda b: b.labels.numel()):
        before, ours, theirs = _three_ways(base, folder, batch)
        meant, done = ours - before, theirs - before
        # An embedding's tokens may stand in other rows only.
        if float(done.abs().max()) > 0 or float(meant.abs().max()) > 0:
            break
    if not float(done.abs().max()) > 0:
        raise NotApplied(
            "the written mixture, loaded by stock PEFT, changes nothing on these rows",
            hint="its adapters may be untrained, or change only tokens that the rows do not have",
        )
    # Relative to what it is meant to change, beside the rounding of the activations.
    share, floor = (5e-3, 1e-4) if base.exact_dtype else (0.1, 0.03)
    gap = float((done - meant).square().mean().sqrt())
    if not gap <= share * float(meant.square().mean().sqrt()) + floor:
        raise NotApplied(
            "stock PEFT computes something else from the written mixture "
            f"(by {gap:.2g} nats a token)"
        )
    return float(done.abs().max())


def check_decides(base: LoadedBase, folder: Path, batches: Sequence[Batch]) -> float:
    """Whether the dynamic mixture in ``folder`` does anything, as PEFT loads it.

    Returns:
        Largest change of a label's loss against the base, in nats.

    Raises:
        NotApplied: it changes nothing, or what it gives is not finite.
    """
    sliced = keeps_logits(base.model)
    change = 0.0
    with torch.inference_mode():
        for batch in sorted(batches, key=lambda b: b.labels.numel()):
            before = token_losses(base.model, batch, sliced=sliced)
            with stock_peft(base, folder) as model:
                after = token_losses(model, batch, sliced=sliced)
            change = float((after - before).abs().max())
            if change != 0:
                break
    if not change > 0 or not math.isfinite(change):
        raise NotApplied(
            "the dynamic mixture, loaded by PEFT, changes nothing on these rows"
            if change == 0
            else "the dynamic mixture's losses are not finite",
            hint="its adapters may be untrained, or overflow the base's dtype",
        )
    return change


def _three_ways(base: LoadedBase, folder: Path, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Losses of the labels: the base's, with the written tensors on it, and by stock PEFT."""
    sliced = keeps_logits(base.model)
    with torch.inference_mode():
        before = token_losses(base.model, batch, sliced=sliced)
        with applied(base.model, load_deltas(folder, read_facts(folder))):
            ours = token_losses(base.model, batch, sliced=sliced)
        with stock_peft(base, folder) as wrapped:
            theirs = token_losses(wrapped, batch, sliced=sliced)
    return before, ours, theirs
