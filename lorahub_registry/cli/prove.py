"""Prove: scores and talking to an adapter."""

from __future__ import annotations

import math
import sys

import click

from lorahub_registry.cli.output import Output, clean, lines, with_output
from lorahub_registry.errors import UsageError


@click.command()
@click.argument("ref")
@click.option("--task", required=True, help="What was measured: gsm8k, my-task.")
@click.option("--metric", required=True, help="How: accuracy, nll, exact_match.")
@click.option("--value", required=True, type=float, help="The number itself.")
@click.option("--dataset", default="", help="On which data.")
@click.option("--n", type=click.IntRange(min=1), help="On how many rows.")
@click.option("--few-shot", type=click.IntRange(min=0), help="With how many examples.")
@click.option("--stderr", type=float, help="Its standard error.")
@with_output
def score(
    ref: str,
    task: str,
    metric: str,
    value: float,
    dataset: str,
    n: int | None,
    few_shot: int | None,
    stderr: float | None,
    out: Output,
) -> None:
    """Record a score of an adapter that you know from elsewhere.

    \b
    Example:
      lorareg score zog --task gsm8k --metric accuracy --value 41.2 --n 1319
    """
    from lorahub_registry.cli.shown import row, score_facts, short_ref
    from lorahub_registry.registry.records import ScoreRecord
    from lorahub_registry.registry.store import Registry

    if not task.strip() or not metric.strip():
        raise UsageError("a score needs a task and a metric", hint="--task gsm8k --metric accuracy")
    if stderr is not None and not 0 <= stderr < math.inf:
        raise UsageError(f"{stderr:g} is no standard error", hint="leave --stderr out")
    said = ScoreRecord(task, metric, value, dataset, n, few_shot, stderr, source="user")
    with Registry(progress=out) as registry:
        stored = registry.score(ref, said)
    facts = {**row(stored), "added": score_facts(said)}
    text = f"{short_ref(stored)}: {task} {metric} {value:g}"
    out.record(facts, text, quiet=short_ref(stored))


@click.command()
@click.argument("ref")
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option(
    "--against", default="", metavar="NAME,NAME", help="Others to ask: adapters, or base."
)
@click.option("--base", help="Where its base is: a folder or a Hub id.")
@click.option(
    "--template",
    help="Jinja over `input`, or chat; default: its recipe's own, or the prompt and a space.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True,
              help="The longest answer.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="0 takes the likeliest token.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the sampling.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto",
              show_default=True, help="Where the base runs.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
              default="auto", show_default=True,
              help="The base's compute type; auto: as it is stored.")  # fmt: skip
@with_output
def generate(
    ref: str,
    prompts: tuple[str, ...],
    against: str,
    base: str | None,
    template: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: str,
    out: Output,
) -> None:
    """Talk to an adapter or mixture, beside others.

    Without PROMPT each line of stdin is one.

    \b
    Examples:
      lorareg generate my-mixture "Once upon a time" --against base,zog
      lorareg generate ./my-lora "2 + 2 =" --base mistralai/Mistral-7B-v0.1
    """
    from lorahub_registry.api.talk import generate as run
    from lorahub_registry.registry.store import Registry

    texts = list(prompts)
    if not texts and not sys.stdin.isatty():
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise UsageError("there is no prompt", hint='lorareg generate REF "Once upon a time"')
    with Registry(progress=out) as registry:
        answers = run(
            ref,
            texts,
            against=[name.strip() for name in against.split(",") if name.strip()],
            base=base,
            template=template,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            dtype=dtype,
            registry=registry,
            progress=out,
        )
    rows = [
        {"prompt": text, "name": name, "text": answer}
        for text, named in zip(texts, answers, strict=True)
        for name, answer in named.items()
    ]
    if out.format == "human":
        click.echo("\n\n".join(_side_by_side(*pair) for pair in zip(texts, answers, strict=True)))
    else:
        out.table(rows, {}, quiet="text")


def _side_by_side(prompt: str, answers: dict[str, str]) -> str:
    """A prompt, and below it who says what; long answers go on below their name."""
    wide = max(map(len, answers))
    told = [clean(prompt)]
    for name, answer in answers.items():
        first, *rest = lines(answer).split("\n")
        told += [f"  {name:<{wide}}  {first}", *(f"  {'':<{wide}}  {line}" for line in rest)]
    return "\n".join(told)


COMMANDS: list[click.Command] = [generate, score]
