"""Weights: merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from lorahub_registry.cli.output import Output, clean, with_output


@click.command()
@click.option("--base", required=True, help="A folder, a Hub id, or a family name.")
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="REF[=C]",
              help="A folder, a name or a Hub ref; C: its coefficient, default 1.")  # fmt: skip
@click.option("--out", "place", required=True, type=click.Path(path_type=Path),
              help="The new folder.")  # fmt: skip
@click.option("--check", is_flag=True,
              help="Load it, and compare its logits with the unmerged model's.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True,
              help="Where sums are made and rounded; auto: cuda where there is one.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what an earlier run wrote there.")
@with_output
def merge(
    base: str,
    adapters: tuple[str, ...],
    place: Path,
    check: bool,
    device: str,
    force: bool,
    out: Output,
) -> None:
    """Merge adapters into a full model.

    The new model has the base's shards, names and types: W + Σ c·s·B·A, summed in float32 and
    rounded once. The model is never held in memory, and a run that was stopped goes on where it
    was. DoRA, biases and saved modules are merged where the adapter is alone and its coefficient
    1. Where an adapter changes one end of tied embeddings, both are written.

    Half-precision bases cannot hold small deltas: how much they keep is told and stands in
    lorareg.json. Quiet prints the folder.

    \b
    Examples:
      lorareg merge --base ./Mistral-7B-v0.1 --adapter ./my-mixture --out ./merged --check
      lorareg merge --base mistral-7b --adapter zog=0.7 --adapter upper=0.4 --out ./merged
    """
    from lorahub_registry.api.merge import merge as run
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        report = run(
            base,
            [_term(text) for text in adapters],
            place,
            check=check,
            device=device,
            force=force,
            registry=registry,
            progress=out,
        )
    out.record({"path": str(place), **report}, _human(report), quiet=str(place))
    out.done(f"written to {place}")


def _term(text: str) -> tuple[str, float]:
    """REF and coefficient: what stands after the last ``=``; a folder's name may have one, too."""
    ref, equals, number = text.rpartition("=")
    if not equals or not ref:
        return text, 1.0
    try:
        coefficient = float(number)
    except ValueError:
        coefficient = math.nan
    if math.isfinite(coefficient):
        return ref, coefficient
    if Path(text).expanduser().exists():
        return text, 1.0
    raise click.UsageError(f"--adapter {text}: {number!r} is no coefficient")


def _human(report: dict[str, Any]) -> str:
    terms = [f"{a['coefficient']:g} · {clean(a['name'])}" for a in report["adapters"]]
    lines = [
        f"{clean(report['base']['name'])} + {' + '.join(terms)}",
        f"  {len(report['modules'])} tensors changed, norm of the delta {report['delta_norm']:.4g}",
        f"  {report['dtype']} keeps {1 - report['rounding_error']:.4%} of it",
    ]
    if found := report["check"]:
        lines.append(
            f"  logits: {found['largest_difference']:.2g} of their scale away from the unmerged "
            f"model's, {found['effect']:.2g} from the base's"
        )
    return "\n".join(lines)
