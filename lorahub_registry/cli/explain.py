"""Prove: which adapter of a dynamic mixture speaks at which token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lorahub_registry.cli.output import Output, clean, lines, with_output
from lorahub_registry.cli.voices import show, summary
from lorahub_registry.errors import UsageError

if TYPE_CHECKING:
    from lorahub_registry.api.explain import Explained
    from lorahub_registry.api.voices import Voices


@click.command()
@click.argument("ref")
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=32, show_default=True,
              help="The longest continuation; 0 for the prompt alone.")  # fmt: skip
@click.option("--layer", default="mean", show_default=True, metavar="LAYER",
              help="Whose coefficients colour the text: a layer's number or name, or the mean over "
              "all.")  # fmt: skip
@click.option("--base", help="Where its base is: a folder or a Hub id.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto",
              show_default=True, help="Where the base runs.")  # fmt: skip
@with_output
def explain(
    ref: str,
    prompt: str,
    max_new_tokens: int,
    layer: str,
    base: str | None,
    device: str,
    out: Output,
) -> None:
    """Show which adapter of a dynamic mixture speaks where.

    PROMPT, in the mixture's template, and its greedy continuation (in bold) are coloured by the
    adapter that is the loudest while a token is read: the one with the largest coefficient there,
    as it is applied. Nothing is taken off, whatever level a gate started from; so one adapter may
    lead from end to end, and the colour is the stronger the further it is ahead of the next, which
    shows where the others come near. A negative coefficient takes an adapter off: where none is
    above zero, or two are equal, there is no colour.

    The tables say for each adapter at how many tokens it is the loudest, and where it is lowest and
    highest; and each layer's mean coefficients. Without colours there is a table of runs of tokens.

    \b
    Examples:
      lorareg explain ./my-mixture "Once upon a time"
      lorareg explain my-mixture "2 + 2 =" --layer 12 --max-new-tokens 0
    """
    from lorahub_registry.api.explain import explain as run
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        found = run(
            ref, prompt, max_new_tokens=max_new_tokens, layer=None if layer == "mean" else layer,
            base=base, device=device, registry=registry, progress=out,
        )  # fmt: skip
    if found.prompt is not None:
        _once(found, found.prompt, out)
        return
    layers = None if layer == "mean" else _layers(found.voices, layer)
    if out.format != "human":
        facts = _facts(found, layers)
        first = max(facts["adapters"], key=lambda one: one["loudest_at"])
        out.record(facts, "", quiet=clean(first["name"]))
        return
    show(found.voices, layers, found.of)


def _layers(voices: Voices, wanted: str) -> list[str]:
    layers = voices.matching(wanted)
    if not layers:
        names = [name or "outside the layers" for name in voices.layers]
        raise UsageError(
            f"--layer {wanted}: no layer with adapters is called so",
            hint=f"mean, or a number or name of {names[0]} … {names[-1]}",
        )
    return layers


def _once(found: Explained, shares: dict[str, float], out: Output) -> None:
    """A router of prompts: adapters with their probabilities."""
    rows = [{"adapter": name, "probability": value} for name, value in shares.items()]
    if out.format == "json":
        facts = {"name": found.name, "router": found.router, "answer": found.answer}
        out.record({**facts, "adapters": rows}, "", quiet="")
        return
    out.table(rows, {"adapter": "<", "probability": ">"}, quiet="adapter")
    if out.format == "human" and found.answer:
        click.echo(f"\n{lines(found.answer)}")


def _facts(found: Explained, layers: list[str] | None) -> dict[str, Any]:
    """Everything, for JSON."""
    from lorahub_registry.api.voices import loudest

    voices = found.voices
    names = voices.adapters
    over_all, chosen = voices.at(), voices.at(layers)
    tokens = []
    for i, text in enumerate(voices.tokens):
        first = loudest(chosen[i])[0]
        tokens.append(
            {
                "text": text,
                "part": "prompt" if i < voices.prompt else "answer",
                "loudest": None if first is None else names[first],
                "coefficients": dict(zip(names, over_all[i], strict=True)),
            }
            | ({} if layers is None else {"layer": dict(zip(names, chosen[i], strict=True))})
        )
    return {
        "name": found.name,
        "router": found.router,
        "answer": found.answer,
        "layer": layers,
        "adapters": summary(voices, chosen),
        "tokens": tokens,
        "layers": {
            layer: dict(zip(names, line, strict=True)) for layer, line in voices.means().items()
        },
    }


COMMANDS: list[click.Command] = [explain]
