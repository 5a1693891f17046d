"""Weights: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from lorahub_registry.cli.output import Output, clean, with_output


class _Lists(click.Command):
    """Takes ``--adapters A B``: all words up to the next option, which click's options cannot."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write the option's name before each of its words."""
        spread, inside = [], False
        for word in args:
            if word.startswith("-"):
                inside = word == "--adapters"
                if inside:
                    continue
            elif inside:
                spread.append("--adapters")
            spread.append(word)
        return super().parse_args(ctx, spread)


@click.command(cls=_Lists)
@click.argument("place", metavar="FOLDER|REF")
@click.argument("target", required=False, metavar="[DEST]", type=click.Path(path_type=Path))
@click.option("--to", "layout", type=click.Choice(["peft", "mixlora"]),
              help="Write MixLoRA, LoRAMoE or MoLA to DEST: for PEFT, or for m-LoRA.")  # fmt: skip
@click.option("--gate", metavar="FILE",
              help="LoRA-Flow gates in FOLDER or REF: make a mixture of them.")  # fmt: skip
@click.option("--adapters", multiple=True, metavar="LANGUAGE TASK",
              help="Their adapters: folders in FOLDER or REF, in the gates' order.")  # fmt: skip
@click.option("--out", "folder", type=click.Path(path_type=Path),
              help="The mixture's folder; default: named like the gates, here.")  # fmt: skip
@click.option("--base", metavar="ID|FOLDER",
              help="The base, where the adapters do not say it; a folder is checked.")  # fmt: skip
@click.option("--temperature", type=float,
              help="Of the gates; default: 1, or what is known of published ones.")  # fmt: skip
@click.option("--license", metavar="ID",
              help="Of what is made; default: what the sources' cards agree on.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what an earlier run wrote.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=600.0,
              show_default=True, help="Seconds after which a pickle is given up.")  # fmt: skip
@with_output
def convert(
    place: str,
    target: Path | None,
    layout: Literal["peft", "mixlora"] | None,
    gate: str | None,
    adapters: tuple[str, ...],
    folder: Path | None,
    base: str | None,
    temperature: float | None,
    license: str | None,
    force: bool,
    timeout_s: float,
    out: Output,
) -> None:
    """Make safetensors of a pickle, or MixLoRA and its kin anew (--to).

    Alone, it writes safetensors beside a pickled adapter_model.bin. The pickle is read in a child process that builds tensors and nothing else, bounded in time
    and memory. No other command reads one.

    With --gate, published LoRA-Flow gates and their adapters become a mixture that chooses token
    by token, in a new folder with a card, and are registered; nothing is measured. Of a Hub repo,
    only what is named is pulled. The adapters stand in the order of the gates: the language, then
    the task. Quiet prints the folder.

    With --to, a MixLoRA, LoRAMoE or MoLA adapter is written to DEST in another layout. peft is
    safetensors under today's names, which PeftModel.from_pretrained loads, all three of them,
    after "import lorahub_registry.runtime"; it gets a card, which keeps the source's, and can be
    pushed. mixlora is the adapter_model.bin that the packages mixlora and moe_peft read. Either
    layout is taken, of any age; see docs/mixlora.md.

    \b
    Examples:
      lorareg convert uukuguy/Mistral-7B-OpenOrca-lora
      lorareg convert Bowen232/LoRA-Flow --gate Gates/zh_math.pt --adapters LoRAs/zh_lora LoRAs/math_lora
      lorareg convert ./m-lora-checkpoint my-mixlora --to peft --license apache-2.0
    """  # noqa: E501
    if layout is None and target is not None:
        raise click.UsageError("DEST goes with --to")
    if gate is not None:
        if layout is not None:
            raise click.UsageError("--to and --gate exclude each other")
        _gates(place, gate, adapters, out, folder=folder, base=base, temperature=temperature,
               license=license, force=force, timeout_s=timeout_s)  # fmt: skip
        return
    given = {"--adapters": adapters, "--out": folder, "--base": base,
             "--temperature": temperature is not None}  # fmt: skip
    if alone := [option for option, value in given.items() if value]:
        raise click.UsageError(f"{alone[0]} goes with --gate")
    if force and layout is None:
        raise click.UsageError("--force goes with --gate or --to")
    if license is not None and layout != "peft":
        raise click.UsageError("--license goes with --gate or --to peft")
    if layout is not None:
        if target is None:
            raise click.UsageError(f"--to {layout} wants a second folder, to write to")
        _experts(place, target, layout, out, license=license, timeout_s=timeout_s, force=force)
        return
    from lorahub_registry.api.convert import convert as run
    from lorahub_registry.cli.shown import row, short_ref
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        stored = run(place, registry=registry, timeout_s=timeout_s, progress=out)
    path = f"{stored.record.local_path}/adapter_model.safetensors"
    out.record(row(stored), path, quiet=short_ref(stored))
    out.done("written and indexed; the .bin is still there")


def _experts(
    place: str, target: Path, layout: Literal["peft", "mixlora"], out: Output, **options: Any
) -> None:
    from lorahub_registry.adapters.experts import of_mix, told
    from lorahub_registry.api.convert_experts import convert_experts

    made = convert_experts(place, target, layout, progress=out, **options)
    rows = [("kind", made.mix.kind), *told(of_mix(made.mix))]
    page = "\n".join(f"{title:<12}{clean(text)}" for title, text in rows)
    out.record(made.report(), page, quiet=str(made.path))
    for note in made.notes:
        out.warn(note)
    out.done(f"{made.tensors} tensors written to {made.path}"
             + (" and indexed" if layout == "peft" else ""))  # fmt: skip


def _gates(
    place: str,
    gate: str,
    adapters: tuple[str, ...],
    out: Output,
    *,
    folder: Path | None,
    **options: Any,
) -> None:
    from lorahub_registry.api.gates import convert_gates

    made = convert_gates(place, gate, adapters, out=folder, progress=out, **options)
    out.record({"path": str(made.path), **made.report}, _page(made.report), quiet=str(made.path))
    out.done(f"written to {made.path} and indexed")


def _page(report: dict[str, Any]) -> str:
    gates, adapters = report["gates"], report["members"]
    wide = max(len(clean(a["name"])) for a in adapters)
    biases = "with biases" if gates["biases"] else "without biases"
    lines = [
        f"gates     {clean(gates['file'])}: {gates['layers']} layers, {gates['width']} wide, "
        f"{biases}, temperature {gates['temperature']:g}",
        f"base      {clean(report['base']['name'])}",
    ]
    for a in adapters:
        ranks = ", ".join(map(str, a["ranks"]))
        lines.append(f"adapter   {clean(a['name']):<{wide}}  rank {ranks}")
    return "\n".join(lines)
