"""Weights: a LoRA from the difference of two models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorahub_registry.api.bases import ResolvedBase, resolve_base
from lorahub_registry.api.factored import (
    Beside,
    Factored,
    Modules,
    dtype_name,
    named,
    read_ranks,
    write_factored,
)
from lorahub_registry.api.output import report_head
from lorahub_registry.api.plot import check_png
from lorahub_registry.errors import NotApplied, UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.registry.records import BaseRecord
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorahub_registry.weights.extract import Change, How
    from lorahub_registry.weights.rest import Left
    from lorahub_registry.weights.stream.pairs import Models
    from lorahub_registry.weights.stream.part import Part

Rest = Literal["tell", "save", "ignore", "error"]


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | Literal["full"] | None = None,
    energy: float | None = None,
    max_bytes: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rest: Rest = "tell",
    component: Literal["whole", "orthogonal"] = "whole",
    clamp_quantile: float | None = None,
    exact: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    plot_to: Path | None = None,
    force: bool = False,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Factored:
    """Write the difference of two models as a LoRA that adds just its truncated delta.

    Args:
        base, tuned: folders, Hub ids (pulled and pinned) or known names.
        out: a folder that is not there yet.
        rank: of every module; ``full`` loses nothing. 64 where neither it, ``energy`` nor
            ``max_bytes`` is given.
        energy: the smallest rank, module by module, that keeps this share of ‖ΔW‖².
        max_bytes: of all factors; ranks go where they keep most energy.
        include, exclude: modules, by name, end of name or pattern; all linear ones but the head by
            default.
        rest: what becomes of changes that are in no factor: ``tell`` how much they are, ``save``
            them beside (PEFT's ``modules_to_save`` and ``bias``), ``ignore``, or make an ``error``
            of them.
        component: ``orthogonal`` takes the part along each base matrix out.
        clamp_quantile: cut the factors' entries at this quantile of their sizes.
        exact: compute all singular directions of large matrices, too.
        dtype: of the factors; ``auto``: as the tuned model is stored, float32 for ``full``.
        plot_to: where a PNG of norms and energy goes.

    Raises:
        UsageError: an option that does not fit.
        BaseModelError: the models have no difference: of different architectures, quantised,
            damaged, or the tuned one is an adapter.
        NotApplied: they are the same.
        OutputError: the place cannot be written.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return extract(
                base, tuned, out, rank=rank, energy=energy, max_bytes=max_bytes, include=include,
                exclude=exclude, rest=rest, component=component, clamp_quantile=clamp_quantile,
                exact=exact, dtype=dtype, device=device, seed=seed, plot_to=plot_to, force=force,
                registry=opened, progress=progress,
            )  # fmt: skip
    from lorahub_registry.api.device import streaming_device
    from lorahub_registry.weights.extract import How

    if plot_to is not None:
        check_png(plot_to)
    how = How(
        ranks=read_ranks(rank, energy, max_bytes),
        component=component,
        clamp_quantile=clamp_quantile,
        exact=exact,
        device=streaming_device(device),
        seed=seed,
    )
    if clamp_quantile is not None and not 0 < clamp_quantile <= 1:
        raise UsageError(f"{clamp_quantile:g} is no quantile", hint="above 0, at most 1")
    if clamp_quantile is not None and rank == "full":
        raise UsageError("rank full has no factors to clamp, it writes the difference itself")
    with two_models(base, tuned, registry, progress) as (models, one, other):
        return run(
            models, one, other, Path(out), how, dtype=dtype, include=include, exclude=exclude,
            rest=rest, plot_to=plot_to, force=force, registry=registry, progress=progress,
        )  # fmt: skip


@contextmanager
def two_models(
    base: str | Path, tuned: str | Path, registry: Registry, progress: Progress
) -> Iterator[tuple[Models, ResolvedBase, ResolvedBase]]:
    """Both models found and opened, and what is known of each.

    Raises:
        BaseModelError: see :func:`lorahub_registry.weights.stream.pairs.open_models`.
    """
    from lorahub_registry.weights.stream.pairs import open_models

    found = [
        resolve_base(
            str(ref), registry=registry, beside=Path.cwd(), hashed=False, progress=progress
        )
        for ref in (base, tuned)
    ]
    one, other = found
    assert one.folder is not None
    assert other.folder is not None
    with open_models(one.folder, other.folder) as models:
        yield models, one, other


def warn_of_unknown(models: Models, progress: Progress) -> None:
    """Name tensors that no module has under their name: they are in no difference."""
    if models.unknown:
        progress.warn(f"{_unknown(models)}: not looked at")


def _unknown(models: Models) -> str:
    more = f" and {len(models.unknown) - 1} more" if len(models.unknown) > 1 else ""
    return (
        f"{models.unknown[0]}{more}: no module of {models.tuned.folder.name} has it under that name"
        " (transformers joins some when it loads them, as experts)"
    )


def run(
    models: Models,
    base: ResolvedBase,
    tuned: ResolvedBase,
    out: Path,
    how: How,
    *,
    dtype: str,
    include: Sequence[str],
    exclude: Sequence[str],
    rest: Rest,
    plot_to: Path | None,
    force: bool,
    registry: Registry,
    progress: Progress,
    change: Change | None = None,
    head: Mapping[str, Any] | None = None,
) -> Factored:
    """The extraction of models that are open.

    Args:
        change: what becomes of a difference before it is cut, and ``head``, how the report of that
            begins; its ``options`` are added to.
    """
    from lorahub_registry.weights.extract import Difference, chosen
    from lorahub_registry.weights.files import DTYPES
    from lorahub_registry.weights.rest import look, saved

    if models.unknown and rest in {"error", "save"}:
        raise NotApplied(_unknown(models), hint="leave --rest out, and be told of it")
    warn_of_unknown(models, progress)
    pairs = chosen(models, include, exclude)
    # Half precision does not hold the difference of two numbers of it.
    auto = "float32" if how.ranks.rank == "full" else dtype_name(pairs[0].tuned.dtype)
    kind = auto if dtype == "auto" else dtype
    how = replace(how, dtype=DTYPES[kind])
    options = {
        **named(how.ranks), "component": how.component, "clamp_quantile": how.clamp_quantile,
        "exact": how.exact, "dtype": kind, "device": how.device.split(":")[0], "seed": how.seed,
        "rest": rest,
    }  # fmt: skip
    facts = dict(head or report_head("extract", "transformers"))
    facts |= {"base": base.facts.named, "tuned": tuned.facts.named}
    facts["options"] = {**facts.get("options", {}), **options}

    def besides(part: Part, modules: Modules) -> Beside:
        if not any(m["norm"] for m in modules.values()):
            raise NotApplied(
                f"{models.tuned.folder} and {models.base.folder} have the same weights in all "
                f"{len(pairs)} modules: an adapter of their difference would do nothing",
                hint="is the tuned model the base itself, or were other modules tuned (--include)?",
            )
        left = [] if rest == "ignore" else look(models, pairs, part, progress=progress)
        told = _tell(modules, left, rest, progress, advice=head is None)
        if models.unknown:
            told["unknown"] = list(models.unknown)
        if rest != "save":
            return Beside(told)
        return Beside(told, *saved(models, left, pairs))

    facts_of_base = base.facts
    made = write_factored(
        out,
        [Difference(models, pair, how, change) for pair in pairs],
        how.ranks,
        how.dtype,
        facts,
        base=BaseRecord(
            facts_of_base.name, "given", facts_of_base.name, facts_of_base.revision,
            facts_of_base.digest,
        ),
        task_type=models.skeleton.task_type,
        all_modules=models.skeleton.kinds.keys(),
        fan_in_fan_out=any(p.kind == "conv1d" for p in pairs),
        beside=besides,
        key={"base": base.key, "tuned": tuned.key},
        made_of=[models.base.folder, models.tuned.folder],
        title="Extracting",
        plot_to=plot_to,
        force=force,
        registry=registry,
        progress=progress,
    )  # fmt: skip
    if base.local and base.folder is not None and "/" not in base.facts.name:
        registry.place_base(base.facts.name, base.folder)
    return made


def _tell(
    modules: Modules, left: Sequence[Left], rest: Rest, progress: Progress, *, advice: bool
) -> dict[str, Any]:
    """What no factor holds; it is warned of, or refused."""
    from lorahub_registry.weights.rest import in_words, summary

    taken = math.fsum(m["norm"] ** 2 for m in modules.values())
    outside = math.fsum(entry.energy for entry in left)
    told: dict[str, Any] = {}
    if rest != "ignore":
        told["rest"] = {"share": outside / (taken + outside), "kinds": summary(left)}
    if left and rest in {"tell", "error"}:
        text = (
            f"no factor holds the changes of {in_words(left)}: "
            f"{100 * told['rest']['share']:.2g}% of the whole difference's energy"
        )
        if rest == "error":
            raise NotApplied(text, hint="--rest save keeps them beside; --include takes matrices")
        progress.warn(f"{text}; --rest save keeps them beside" if advice else text)
    if rest == "save" and any(entry.added for entry in left):
        progress.warn(
            "the tuned model has another number of tokens: resize the base's embeddings "
            "(resize_token_embeddings) before loading this adapter"
        )
    return told
