"""Weights: dare."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from lorahub_registry.cli.output import Output, clean, with_output

_SHOWN = 5


@click.command()
@click.option("--base", metavar="MODEL", help="What was tuned: a folder or a Hub id.")
@click.option("--tuned", metavar="MODEL", help="What came of it: a folder or a Hub id.")
@click.option("--adapter", metavar="REF", help="An adapter, in place of two models.")
@click.option("--out", "folder", type=click.Path(path_type=Path), required=True,
              help="The folder that it makes.")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0, 1, max_open=True), default=0.85,
              show_default=True, help="The share of entries that are dropped.")  # fmt: skip
@click.option("--strategy", type=click.Choice(["random", "magnitude"]), default="random",
              show_default=True,
              help="Which: each by chance, or the smallest of every tensor.")  # fmt: skip
@click.option("--no-rescale", is_flag=True, help="Leave what stays as it is, not ÷ (1 - rate).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the random masks.")  # fmt: skip
@click.option("--to-lora", metavar="RANK|full",
              help="Write no model but a LoRA of the dropped change.")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), metavar="N",
              help="Of the adapter that is written; default: each module's own.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True,
              help="Where a LoRA is computed (--to-lora, --adapter); auto: cuda where there is "
              "one. A model is dropped on the CPU.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what an earlier run wrote there.")
@with_output
def dare(
    base: str | None,
    tuned: str | None,
    adapter: str | None,
    folder: Path,
    rate: float,
    strategy: Literal["random", "magnitude"],
    no_rescale: bool,
    seed: int,
    to_lora: str | None,
    rank: int | None,
    device: str,
    force: bool,
    out: Output,
) -> None:
    """Drop most of what a tuning changed, and rescale the rest (DARE).

    Writes base + mask * (tuned - base) / (1 - rate), in the tuned model's files, types and
    tokenizer (arXiv:2311.03099). Models are read and written some rows at a time, never held;
    the result is the same for any shards and any number of cores, and a run that was stopped goes
    on where it was. lorareg.json tells what stayed of every tensor. What was dropped once with a
    seed is dropped again with it: give a second DARE another. Quiet prints the folder.

    With --adapter, every module's B·A is dropped so. What is left of it is no longer of low rank,
    and writing it as an adapter cuts most of it off: the error of what is written is measured and
    told, module by module. Where that is too much, merge the adapter into its base and drop there,
    or give a higher --rank.

    \b
    Examples:
      lorareg dare --base mistralai/Mistral-7B-v0.1 --tuned ./my-mistral --out thin
      lorareg dare --base ./mistral --tuned ./my-mistral --rate 0.9 --to-lora 64 --out thin-lora
      lorareg dare --adapter zog --rate 0.5 --rank 64 --out zog-dropped
    """
    if adapter and (base or tuned):
        raise click.UsageError("--adapter takes the place of --base and --tuned")
    if not adapter and not (base and tuned):
        raise click.UsageError("name --base and --tuned, or an --adapter")
    if rank and not adapter:
        raise click.UsageError("--rank is an adapter's; of two models, --to-lora RANK")
    if to_lora and adapter:
        raise click.UsageError("--to-lora is for two models; an adapter takes --rank")
    from lorahub_registry.api import dare as api
    from lorahub_registry.api.factored import Factored
    from lorahub_registry.cli.factors import print_factored, read_rank
    from lorahub_registry.registry.store import Registry

    options: dict[str, Any] = {
        "rate": rate, "strategy": strategy, "rescale": not no_rescale, "seed": seed,
        "device": device, "force": force, "progress": out,
    }  # fmt: skip
    with Registry(progress=out) as registry:
        if adapter:
            done = api.dare_adapter(adapter, folder, rank=rank, registry=registry, **options)
        else:
            done = api.dare(
                base or "", tuned or "", folder, to_lora=read_rank(to_lora, "--to-lora"),
                registry=registry, **options,
            )  # fmt: skip
    if to_lora and done.stored:
        out.say(_dropped(done.report))
        print_factored(Factored(done.stored, done.path, done.report), out)
        return
    out.record({"path": str(done.path), **done.report}, _page(done.report), quiet=str(done.path))
    out.done(f"written to {done.path}" + (" and indexed" if done.stored else ""))


def _dropped(report: dict[str, Any]) -> str:
    options = report["options"]
    chance = options["strategy"] == "random"
    how = f"at random, seed {options['seed']}" if chance else "the smallest"
    return (
        f"dropped   {options['rate']:.4g} of the entries, {how}; the others times "
        f"{report['scale']:.4g}"
    )


def _page(report: dict[str, Any]) -> str:
    total = report["total"]
    cuts = "tensors" not in report
    modules = report["modules"] if cuts else {}
    parts = {n: m["drop"] for n, m in modules.items()} if cuts else report["tensors"]
    lines = [
        f"{what:<9} {clean(report[what]['name'] or 'unknown')}"
        for what in ("base", "tuned", "adapter")
        if what in report
    ]
    lines += [
        _dropped(report),
        f"kept      {total['kept']:,} of {total['entries']:,} entries in {len(parts):,} "
        f"{'modules' if cuts else 'tensors'}, {total['energy_kept']:.2%} of the "
        "change's energy before rescaling",
        f"change    norm {total['norm']:.4g}",
    ]
    if cuts:
        lines.append(
            f"truncated with an error of {report['error']:.2%} of the dropped change: "
            "it is no longer of low rank"
        )
    most = sorted(parts.items(), key=lambda item: (-item[1]["norm"], item[0]))[:_SHOWN]
    wide = max(len(clean(name)) for name, _ in most)
    head = f"{'most changed':<{wide}}  {'NORM':>9}  {'ENERGY':>7}"
    lines += ["", head + ("  RANK   ERROR" if cuts else "")]
    for name, part in most:
        share = f"{part['energy_kept']:.2%}" if part["energy_kept"] is not None else "-"
        line = f"{clean(name):<{wide}}  {part['norm']:>9.4g}  {share:>7}"
        cut = modules.get(name)
        lines.append(line + (f"  {cut['rank']:>4}  {cut['error']:>6.2%}" if cut else ""))
    return "\n".join(lines)
