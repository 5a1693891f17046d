"""Find: which adapter a prompt is for."""

from __future__ import annotations

from pathlib import Path

import click

from lorahub_registry.cli.output import Output, with_output
from lorahub_registry.errors import UsageError

_LEARNING = ("--rows", "--input", "--output", "--template")
_ROUTING = ("--top-k", "--temperature", "--skill")


@click.command()
@click.argument("prompt", required=False)
@click.option("--base", help="The base: a family, a Hub id or a path; with --learn the "
              "adapter's own, where the registry knows it.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), default=5, show_default=True,
              help="At most so many adapters; their probabilities add up to 1.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=0.1,
              show_default=True, help="The smaller, the more goes to the nearest.")  # fmt: skip
@click.option("--skill", help="Only adapters with this skill.")
@click.option("--learn", metavar="REF", help="Instead: learn what this adapter is for.")
@click.option("--rows", type=click.Path(path_type=Path), metavar="FILE",
              help="With --learn: examples of it, .jsonl, .json, .csv or .parquet.")  # fmt: skip
@click.option("--input", "input_", default="input", show_default=True, metavar="COLUMN",
              help="With --learn: the rows' prompt.")  # fmt: skip
@click.option("--output", default="output", show_default=True, metavar="COLUMN",
              help="With --learn: the rows' answer, which is not looked at.")  # fmt: skip
@click.option("--template", metavar="JINJA",
              help="With --learn: what makes a row's prompt, as in a recipe; default: the input "
              "and a space.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto",
              show_default=True, help="Where the base runs.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
              default="auto", show_default=True,
              help="The base's compute type; auto: as it is stored.")  # fmt: skip
@with_output
@click.pass_context
def route(
    ctx: click.Context,
    prompt: str | None,
    base: str | None,
    top_k: int,
    temperature: float,
    skill: str | None,
    learn: str | None,
    rows: Path | None,
    input_: str,
    output: str,
    template: str | None,
    device: str,
    dtype: str,
    out: Output,
) -> None:
    """Tell which adapters a prompt is for.

    An adapter is for the prompts that lie near those of its own rows, as its base sees them. Where
    those lie, their centroid, is learned once, by --learn; then PROMPT is compared with the
    centroids of all adapters of the base, and no adapter is loaded or even pulled.

    SIMILARITY is 1 at the mean of an adapter's rows, 0 as far from it as the adapters' means are
    from each other, and negative farther out. DISTANCE is 1 where its own rows lie on average: a
    prompt that is twice as far from the nearest may be for none of them, which is said. Of an
    adapter trained again into another folder only the newest takes part.

    \b
    Examples:
      lorareg route --learn sql-lora --rows sql.jsonl --input question --output query
      lorareg route "Write a SQL query that counts users" --base mistral-7b
      lorareg route "2 + 2 =" --base mistral-7b --skill math --top-k 1 --quiet
    """
    _check(ctx, prompt, base, learn, rows)
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        if learn is not None:
            assert rows is not None
            _learn(learn, rows, base, input_, output, template, device, dtype, registry, out)
            return
        from lorahub_registry.api.route import route as run

        found = run(
            prompt or "",
            base=base or "",
            top_k=top_k,
            temperature=temperature,
            skill=skill,
            device=device,
            dtype=dtype,
            registry=registry,
            progress=out,
        )
    columns = {"name": "<", "probability": ">", "similarity": ">", "distance": ">",
               "skills": "<", "ref": "<"}  # fmt: skip
    shown = [vars(one) | {"skills": list(one.skills)} for one in found]
    if out.format == "human":
        for one in shown:
            one |= {
                key: f"{one[key]:.3f}" if one[key] is not None else "-"
                for key in ("probability", "similarity", "distance")
            }
    out.table(shown, columns, quiet="ref")


def _learn(
    ref: str,
    rows: Path,
    base: str | None,
    input_: str,
    output: str,
    template: str | None,
    device: str,
    dtype: str,
    registry: object,
    out: Output,
) -> None:
    from lorahub_registry.api.centroids import learn_centroid
    from lorahub_registry.cli.shown import row, short_ref
    from lorahub_registry.recipes.template import DEFAULT

    stored, known = learn_centroid(
        ref,
        rows,
        base=base,
        input=input_,
        output=output,
        template=template or DEFAULT,
        device=device,
        dtype=dtype,
        registry=registry,  # type: ignore[arg-type]
        progress=out,
    )
    facts = {
        "rows": known.rows,
        "layer": known.layer,
        "template": known.template,
        "rows_digest": known.rows_digest,
        "base": known.base,
        "base_digest": known.base_digest,
    }
    name = short_ref(stored)
    text = f"{name}: {known.rows} rows, hidden state {known.layer} of {known.base}"
    out.record({**row(stored), "centroid": facts}, text, quiet=name)


def _check(
    ctx: click.Context, prompt: str | None, base: str | None, learn: str | None, rows: Path | None
) -> None:
    """Whether it is one of the two calls, and not some of both."""
    said = {
        name
        for parameter in ctx.command.params
        for name in parameter.opts
        if parameter.name
        and ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
    }
    odd = sorted(said.intersection(_ROUTING if learn is not None else _LEARNING))
    if learn is not None and prompt is not None:
        raise UsageError("--learn takes no PROMPT", hint="learn first, then route")
    if odd:
        which = "does not go with --learn" if learn is not None else "goes with --learn REF only"
        raise UsageError(f"{odd[0]} {which}", hint="see lorareg route --help")
    if learn is not None and rows is None:
        raise UsageError("--learn needs --rows FILE: examples of what the adapter is for")
    if learn is None and prompt is None:
        raise UsageError("there is no prompt", hint='lorareg route "Write a SQL query" --base B')
    if learn is None and not base:
        raise UsageError("--base is missing: adapters of which base?", hint="--base mistral-7b")


COMMANDS: list[click.Command] = [route]
