"""Train: many adapters on one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lorahub_registry.cli.output import Output, clean, size, with_output


@click.command()
@click.argument("factory", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True,
              help="Check everything, and estimate memory and time; train nothing.")  # fmt: skip
@click.option("--max-together", type=click.IntRange(min=1), metavar="N",
              help="Most adapters in one pass, in place of the factory's; less memory, the same "
              "adapters.")  # fmt: skip
@click.option("--force", is_flag=True,
              help="Replace what an earlier run wrote, and forget what one of another factory "
              "left unfinished.")  # fmt: skip
@click.option("--tensorboard", type=click.Path(path_type=Path), metavar="DIR",
              help="Write TensorBoard's event files there, too.")  # fmt: skip
@with_output
def train(
    factory: Path,
    dry_run: bool,
    max_together: int | None,
    force: bool,
    tensorboard: Path | None,
    out: Output,
) -> None:
    """Train many adapters on one base at once.

    The factory is a YAML file: one base, and the adapters, each with data, rank, learning rate and
    steps of its own. Micro-batches of several go through the base together; each adapter becomes
    what it would become alone. Every one is written as PEFT writes it, scored against the base,
    and entered into the registry with its card. A run that was stopped goes on from its last
    checkpoint when the same command is given again.

    \b
    Examples:
      lorareg train factory.yaml --dry-run
      lorareg train factory.yaml
    """
    from lorahub_registry.registry.store import Registry

    if dry_run:
        from lorahub_registry.api.estimate import plan_factory

        with Registry(progress=out) as registry:
            facts = plan_factory(
                factory, registry=registry, max_together=max_together, progress=out
            )
        out.record(facts, _plan_page(facts), quiet=facts["output"])
        return
    from lorahub_registry.api.train import train as run
    from lorahub_registry.errors import DataError

    with Registry(progress=out) as registry:
        done = run(
            factory,
            registry=registry,
            max_together=max_together,
            force=force,
            tensorboard=tensorboard,
            progress=out,
        )
    if not done.report:
        return  # the leading process tells
    paths = {name: str(done.path / name) for name in done.adapters}
    facts = {"path": str(done.path), **done.report, "results": list(done.results.values())}
    out.record(facts, _page(done), quiet="\n".join(paths.values()))
    out.done(f"{len(paths)} {'adapters' if len(paths) > 1 else 'adapter'} written to {done.path}")
    if done.failed:
        each = "; ".join(f"{name}: {why}" for name, why in done.failed.items())
        blown = any("finite" in why or "nats" in why for why in done.failed.values())
        number = len(done.failed)
        less = "a lower learning_rate or a longer warmup; " if blown else ""
        raise DataError(
            f"not made: {number} of {number + len(paths)} adapters: {each}",
            hint=f"{less}the others are whole: train this one again from a factory of its own",
        )


def _page(done: Any) -> str:
    """One line an adapter."""
    rows = [["ADAPTER", "METHOD", "STEPS", "LOSS", "BASE NLL", "ITS NLL", ""]]
    for name, found in done.results.items():
        test = found["test"] or [{"nll": None}, {"nll": None}]
        verdict = found["verdict"]["text"] if "verdict" in found else "not evaluated"
        rows.append(
            [
                clean(name),
                found["method"],
                f"{found['steps']}" + (" (early)" if found["stopped"] else ""),
                _number(found["loss"][-1][1] if found["loss"] else None),
                _number(test[0]["nll"]),
                _number(test[1]["nll"]),
                verdict,
            ]
        )
    rows += [[clean(name), "", "-", "-", "-", "-", why] for name, why in done.failed.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _plan_page(facts: dict[str, Any]) -> str:
    lines = [f"base      {facts['base']}  ({facts['parameters']:,} parameters)"]
    wide = max(len(clean(a["name"])) for a in facts["adapters"])
    for adapter in facts["adapters"]:
        dropped = f" ({adapter['dropped']} left out)" if adapter["dropped"] else ""
        experts = adapter["experts"]
        inside = ""
        if experts:
            inside = (
                f" ({experts['routing_strategy']}: {experts['num_experts']} experts of rank "
                f"{experts['rank']} in {experts['layers']} of them)"
            )
        lines.append(
            f"adapter   {clean(adapter['name']):<{wide}}  rank {adapter['rank']:<4} "
            f"{adapter['modules']} modules{inside}, {adapter['parameters']:,} parameters; "
            f"{adapter['rows']} rows{dropped}, {adapter['steps']} steps, "
            f"{adapter['tokens']:,} tokens"
        )
    lines += [
        f"memory    about {size(facts['memory_bytes'])}",
        f"time      about {max(1, facts['seconds']):.0f} s on {facts['device']} at a measured "
        f"{facts['gflops']:.0f} GFLOP/s; loading and scoring not counted",
        f"output    {facts['output']}",
    ]
    return "\n".join(lines)


COMMANDS: list[click.Command] = [train]
