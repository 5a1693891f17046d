"""Weights: extract, resize."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.cli.output import Output, with_output
from lorahub_registry.errors import UsageError

if TYPE_CHECKING:
    from lorahub_registry.api.extract import Rest
    from lorahub_registry.api.factored import Factored

_RANKS = (
    click.option("--rank", metavar="N|full", help="Of every module; full loses nothing."),
    click.option("--energy", type=float, metavar="SHARE",
                 help="The smallest rank of each module that keeps this share, as 0.95."),
    click.option("--max-size", metavar="SIZE",
                 help="Of all factors, as 100MB; ranks go where they keep most."),
)  # fmt: skip
_WRITTEN = (
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                 default="auto", show_default=True, help="Of the factors; auto: as is stored."),
    click.option("--plot", "plot_to", type=click.Path(path_type=Path), metavar="FILE.png",
                 help="Draw norms and the energy that ranks keep."),
    click.option("--force", is_flag=True, help="Replace an output of an earlier run."),
)  # fmt: skip
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def _options(
    options: Sequence[Callable[[Callable[..., Any]], Any]],
) -> Callable[[Callable[..., Any]], Any]:
    """Several of click's options as one decorator, in this order."""

    def add(command: Callable[..., Any]) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.option("--base", required=True, metavar="B", help="A folder, a Hub id, or a known name.")
@click.option("--tuned", required=True, metavar="T", help="The model that was trained from it.")
@click.option("--out", "to", required=True, type=click.Path(path_type=Path),
              help="The adapter's folder.")  # fmt: skip
@_options(_RANKS)
@click.option("--include", multiple=True, metavar="NAME",
              help="Modules to take: a name, its end (q_proj), a pattern (*.layers.0.*). "
              "Default: all linear ones but the head.")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="NAME", help="Modules to leave out.")
@click.option("--rest", type=click.Choice(["save", "ignore", "error"]),
              help="What of norms, biases, embeddings, the head and added tokens. "
              "Default: tell how much of the difference they hold.")  # fmt: skip
@click.option("--component", type=click.Choice(["whole", "orthogonal"]), default="whole",
              show_default=True,
              help="orthogonal: without what lies along each base matrix.")  # fmt: skip
@click.option("--clamp-quantile", type=float, metavar="Q",
              help="Cut the factors' entries at this quantile of their sizes.")  # fmt: skip
@click.option("--exact", is_flag=True, help="All singular directions of large matrices, too.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="Where matrices are decomposed.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the directions that the search for singular ones starts from.")  # fmt: skip
@_options(_WRITTEN)
@with_output
def extract(
    base: str,
    tuned: str,
    to: Path,
    rank: str | None,
    energy: float | None,
    max_size: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rest: Rest | None,
    component: Literal["whole", "orthogonal"],
    clamp_quantile: float | None,
    exact: bool,
    dtype: str,
    device: str,
    seed: int,
    plot_to: Path | None,
    force: bool,
    out: Output,
) -> None:
    """Make a LoRA of the difference between a tuned model and its base.

    Applied to the base, it adds just the best approximation of the difference by its rank, which is
    64 where neither --rank, --energy nor --max-size says otherwise. One tensor at a time is in
    memory; a run that was stopped goes on with the same command. The adapter is indexed; quiet
    prints its name.

    \b
    Examples:
      lorareg extract --base mistralai/Mistral-7B-v0.1 --tuned ./my-mistral --out my-lora
      lorareg extract --base ./mistral --tuned ./my-mistral --energy 0.95 --out my-lora
    """
    from lorahub_registry.api.extract import extract as run
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        made = run(
            base,
            tuned,
            to,
            rank=read_rank(rank),
            energy=energy,
            max_bytes=_size(max_size),
            include=include,
            exclude=exclude,
            rest=rest or "tell",
            component=component,
            clamp_quantile=clamp_quantile,
            exact=exact,
            dtype=dtype,
            device=device,
            seed=seed,
            plot_to=plot_to,
            force=force,
            registry=registry,
            progress=out,
        )
    print_factored(made, out)


@click.command()
@click.argument("ref")
@click.option("--out", "to", required=True, type=click.Path(path_type=Path),
              help="The new adapter's folder.")  # fmt: skip
@_options(_RANKS)
@_options(_WRITTEN)
@with_output
def resize(
    ref: str,
    to: Path,
    rank: str | None,
    energy: float | None,
    max_size: str | None,
    dtype: str,
    plot_to: Path | None,
    force: bool,
    out: Output,
) -> None:
    """Give an adapter another rank.

    REF is a folder, a name, or a Hub ref, which is pulled. Each delta is cut to the nearest of the
    new rank, which also becomes α; the old adapter stays as it is. The new one is indexed; quiet
    prints its name.

    \b
    Examples:
      lorareg resize sql-lora --rank 16 --out sql-16
      lorareg resize sql-lora --energy 0.99 --out sql-small
    """
    from lorahub_registry.api.resize import resize as run
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        made = run(
            ref,
            to,
            rank=read_rank(rank),
            energy=energy,
            max_bytes=_size(max_size),
            dtype=dtype,
            plot_to=plot_to,
            force=force,
            registry=registry,
            progress=out,
        )
    print_factored(made, out)


def print_factored(made: Factored, out: Output) -> None:
    """An adapter that was made of factors, and what they keep."""
    from lorahub_registry.cli.shown import row, short_ref

    facts = {**row(made.adapter), "report": made.report}
    out.record(
        facts,
        _human(made.report, (made.path / WEIGHTS_NAME).stat().st_size),
        quiet=short_ref(made.adapter),
    )
    out.done(f"{made.path}: indexed as {short_ref(made.adapter)}")


def read_rank(text: str | None, option: str = "--rank") -> int | Literal["full"] | None:
    """What ``option`` means.

    Raises:
        UsageError: neither a number nor ``full``.
    """
    if text is None:
        return None
    if text == "full":
        return "full"
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{option} {text}: neither a number nor full", hint=f"{option} 64")
    return int(text)


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if not found:
        raise UsageError(f"--max-size {text}: no size", hint="--max-size 100MB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _human(report: Mapping[str, Any], size: int) -> str:
    modules = report["modules"]
    ranks = sorted({m["rank"] for m in modules.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    worst = report["worst"]
    lines = [
        f"modules        {len(modules)}, rank {span}",
        f"energy kept    {100 * report['kept']:.2f}%",
        f"error          {report['error']:.4f} of the norm",
        f"least kept     {100 * modules[worst]['kept']:.2f}% in {worst}",
    ]
    lines.append(f"size           {size / 1e6:,.2f} MB")
    if "rest" in report:
        lines.append(f"outside        {100 * report['rest']['share']:.2g}% of the energy")
    return "\n".join(lines)
