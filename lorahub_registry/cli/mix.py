"""Mix: compose, recipes, the quickstart."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from lorahub_registry.cli.output import Output, clean, size, with_output


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Get and check what it names; write no mixture.")
@click.option("--no-push", is_flag=True, help="Do not publish, whatever the recipe says.")
@click.option("--force", is_flag=True, help="Replace a mixture at the output's place.")
@click.option("--lock", type=click.Path(path_type=Path), metavar="FILE",
              help="A lorareg.lock that everything must agree with.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Measure N candidates at once, each in a process of one thread with a base of "
              "its own; the result is the same for any N.")  # fmt: skip
@with_output
def compose(
    recipe: Path,
    dry_run: bool,
    no_push: bool,
    force: bool,
    lock: Path | None,
    jobs: int | None,
    out: Output,
) -> None:
    """Mix adapters by a recipe, prove the mixture, publish it if asked to.

    Learns or takes the coefficients, writes a plain PEFT adapter with its card, scores it
    against the base, every single adapter and the uniform average, and says in words whether it
    helps. A search that was stopped goes on where it was when the same command is given again.

    \b
    Examples:
      lorareg compose recipe.yaml --dry-run
      lorareg compose recipe.yaml
    """
    from lorahub_registry.registry.store import Registry

    if dry_run:
        from lorahub_registry.api.plan import plan

        with Registry(progress=out) as registry:
            facts = plan(recipe, registry=registry, lock=lock, progress=out)
        out.record(facts, _plan_page(facts), quiet=str(facts["output"]))
        return
    from lorahub_registry.api.mix import compose as run

    with Registry(progress=out) as registry:
        mixture = run(
            recipe, registry=registry, push=not no_push, force=force, lock=lock, jobs=jobs,
            progress=out,
        )  # fmt: skip
    facts = {"path": str(mixture.path), "url": mixture.url, **mixture.results}
    out.record(facts, proof_page(mixture.results), quiet=str(mixture.path))
    out.done(
        f"written to {mixture.path}" + (f", published at {mixture.url}" if mixture.url else "")
    )


@click.group()
def recipe() -> None:
    """Recipes: check one, or print their schema."""


@recipe.command()
@click.argument("file", type=click.Path(path_type=Path))
@with_output
def validate(file: Path, out: Output) -> None:
    """Report everything that is wrong with a recipe, line by line.

    \b
    Example:
      lorareg recipe validate recipe.yaml
    """
    from lorahub_registry.recipes import digest, load

    found = load(file).recipe
    facts = {"path": str(file), "name": found.name, "digest": digest(found)}
    out.record(facts, f"{file}: a valid recipe", quiet=str(file))


@recipe.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors.

    \b
    Example:
      lorareg recipe schema > recipe.schema.json
    """
    import json

    from lorahub_registry.recipes import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@click.command()
@click.option("--out", "folder", type=click.Path(path_type=Path), default="quickstart",
              show_default=True, help="The folder that it makes.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of everything that is random.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an earlier quickstart there.")
@with_output
def quickstart(folder: Path, seed: int, force: bool, out: Output) -> None:
    """See the whole idea in about two minutes, without a Hub.

    Trains a tiny base and six adapters on sentences that it makes itself, registers them in a
    registry of their own, mixes them for a task that none was trained on, proves the mixture
    and lets it talk.

    \b
    Example:
      lorareg quickstart --out demo
    """
    from lorahub_registry.api.quickstart import quickstart as run

    done = run(folder, seed=seed, force=force, progress=out)
    facts = {
        "folder": str(done.folder),
        "home": str(done.home),
        "mixture": str(done.mixture.path),
        "seconds": done.seconds,
        "answers": done.answers,
        **done.mixture.results,
    }
    out.record(facts, _quickstart_page(done), quiet=str(done.mixture.path))


def proof_page(results: dict[str, Any]) -> str:
    """Coefficients, the table and the verdict, for people."""
    lines = _coefficients(results)
    if "stopped" in results:
        lines += ["", f"{len(results['search'])} candidates; {results['stopped']['text']}"]
    if "test" in results:
        wide = max(len(row["name"]) for row in results["test"])
        exact = results["test"][0]["exact_match"] is not None
        lines += ["", f"{'':<{wide}}  {'NLL':>8}  {'':>8}{'  EXACT' if exact else ''}".rstrip()]
        for row in results["test"]:
            error = row["nll_stderr"]  # None over a single row
            nll = f"{row['nll']:8.4f}" if row["nll"] is not None else "not finite"
            text = f"{row['name']:<{wide}}  {nll}  "
            text += f"±{error:7.4f}" if error is not None else " " * 8
            lines.append(text + (f"  {row['exact_match']:5.1%}" if exact else ""))
        lines += [f"on {results['test'][0]['n']} held-out rows of {clean(results['task'])}", ""]
        verb = "" if results["verdict"]["win"] else "is "  # a win says "beats"
        lines.append(f"{results['name']} {verb}{results['verdict']['text']}")
    return "\n".join(lines)


def _coefficients(results: dict[str, Any]) -> list[str]:
    """One line an adapter, with what the repeated searches found where there are any."""
    sets, spread = results.get("coefficients"), results.get("spread")
    lines, wide = [], max(len(m["name"]) for m in results["members"])
    for i, m in enumerate(results["members"]):
        text = f"{m['coefficient']:+.4f}  {clean(m['name']):<{wide}}"
        if spread and not sets and spread["coefficients"]:
            text += f"  ({_around(spread['coefficients'][i], '+')})"
        lines.append(text.rstrip())
    if sets:
        lines.append(f"(means of {len(sets)} sets; results.json has each)")
    if spread:
        runs, failed = spread["runs"], sum("failed" in run for run in spread["runs"])
        text = f"in brackets: {len(runs)} {spread['by']}, mean ± standard deviation"
        if "test_nll" in spread:
            text += f"; NLL on the held-out rows {_around(spread['test_nll'])}"
        lines += ["", text + (f"; {failed} failed" if failed else "")]
    return lines


def _around(spread: dict[str, float | None], sign: str = "") -> str:
    mean, std = spread["mean"], spread["std"]
    return f"{mean:{sign}.4f} ± {std:.4f}" if mean is not None and std is not None else "–"


def _plan_page(facts: dict[str, Any]) -> str:
    lines = [f"base      {facts['base']}  ({facts['parameters']:,} parameters)"]
    for member in facts["adapters"]:
        ref = member["ref"] if member["ref"] != member["name"] else ""
        lines.append(f"adapter   {member['name']}  rank {member['rank']}  {ref}".rstrip())
    steps = f"{facts['steps']} steps of training and " if facts["steps"] else ""
    rows = f"{facts['train_rows']} rows ({facts['train_tokens']:,} tokens)"
    search = f"{steps}at most {facts['evaluations']} evaluations of {rows}"
    lines += [
        f"method    {facts['method']}, {search if facts['evaluations'] else 'nothing to learn'}",
        f"proof     {facts['models']} models on {facts['test_rows']} rows "
        f"({facts['test_tokens']:,} tokens)",
        f"memory    about {size(facts['memory_bytes'])} of weights; not counted: "
        f"{facts['not_counted']['memory']}",
        f"time      about {max(1, facts['seconds']):.0f} s on {facts['device']} at a measured "
        f"{facts['gflops']:.0f} GFLOP/s; not counted: {facts['not_counted']['time']}",
        f"output    {facts['output']}",
    ]
    if facts["lock"]:
        lines.append(f"lock      {facts['lock']['path']} agrees")
    return "\n".join(lines)


def _quickstart_page(done: Any) -> str:
    lines = [proof_page(done.mixture.results), "", "What they say, none of them trained on this:"]
    for prompt, answers in done.answers.items():
        lines.append(f"  {prompt}")
        wide = max(map(len, answers))
        lines += [f"    {name:<{wide}}  {text}" for name, text in answers.items()]
    found = shutil.which("lorareg")
    path = [] if found else [f"  export PATH={Path(sys.executable).parent}:$PATH"]
    lines += [
        "",
        f"The mixture  {done.mixture.path}",
        f"Its card     {done.mixture.path / 'README.md'}",
        f"The recipe   {done.recipe}",
        "",
        "Try next:",
        *path,
        f"  export LORAREG_HOME={done.home}",
        "  lorareg search --base quickstart-base --skill translation",
        f"  lorareg show {done.mixture.name}",
        f'  lorareg generate {done.mixture.name} "{next(iter(done.answers))}" --against base',
        f"  lorareg compose {done.recipe} --dry-run",
    ]
    return "\n".join(lines)


COMMANDS: list[click.Command] = [compose, recipe, quickstart]
