"""Find: search, list, show, pull, sync."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.cli.output import Output, size, with_output
from lorahub_registry.errors import UnknownRef
from lorahub_registry.refs import expand

if TYPE_CHECKING:
    from lorahub_registry.registry.records import StoredAdapter
    from lorahub_registry.registry.store import Registry


def _scores(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """``gsm8k=40`` → {"gsm8k": 40.0}."""
    found = {}
    for text in values:
        task, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not task or not equals or math.isnan(number):
            raise click.BadParameter(f"{text!r} is not TASK=NUMBER, as gsm8k=40")
        found[task] = number
    return found


@click.command()
@click.argument("text", required=False, default="")
@click.option("--base", help="Base model: a family (mistral-7b), a Hub id or a path.")
@click.option("--skill", "skills", multiple=True, help="What it is good at; may be repeated.")
@click.option("--rank", help="Its rank: 16, 8..64, 8.. or ..64.")
@click.option("--targets", multiple=True, help="A module that it adapts; may be repeated.")
@click.option("--license", "license_", help="Its licence, as the Hub names it.")
@click.option("--peft-type",
              help="Its kind, as PEFT names it (LORA, IA3, …), one of lorareg's own (MIXLORA, "
              "LORAMOE, MOLA, LORA_MIXTURE), or a composing method (arrow, …).")  # fmt: skip
@click.option(
    "--min-score", multiple=True, callback=_scores, metavar="TASK=NUMBER",
    help="A score that it must reach; may be repeated.",
)  # fmt: skip
@click.option("--sort", metavar="KEY", help="downloads, updated, rank, name or score:TASK.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True,
              help="How many to show.")  # fmt: skip
@with_output
def search(
    text: str,
    base: str | None,
    skills: tuple[str, ...],
    rank: str | None,
    targets: tuple[str, ...],
    license_: str | None,
    peft_type: str | None,
    min_score: dict[str, float],
    sort: str | None,
    limit: int,
    out: Output,
) -> None:
    """Find adapters in the registry.

    Searches what `sync`, `pull` and `add` brought; nothing is asked of the Hub.

    \b
    Examples:
      lorareg search --base mistral-7b --skill code
      lorareg search "text to sql" --rank 8..64 --sort downloads
      lorareg search --min-score gsm8k=40 --sort score:gsm8k
    """
    from lorahub_registry.api.find import search as run
    from lorahub_registry.api.find import unknown_type
    from lorahub_registry.cli.shown import COLUMNS, rows
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        found = run(
            text,
            base=base,
            skill=skills,
            rank=rank,
            targets=targets,
            license=license_,
            peft_type=peft_type,
            min_score=min_score,
            sort=sort,
            limit=limit,
            registry=registry,
        )
        known = registry.counts()["adapters"] if not found.adapters else 0
        typo = unknown_type(peft_type, registry) if peft_type and not found.adapters else None
    if base and found.bases != (base,):
        names = ", ".join(found.bases) or "none that is known"
        out.say(f"base {base}: {names}")
    out.table(rows(found.adapters), COLUMNS, quiet="ref")
    if found.total > len(found.adapters):
        out.say(f"{len(found.adapters)} of {found.total}; --limit shows more")
    if typo:
        out.say(typo)
    elif not found.adapters:
        out.say(f"nothing found among {known} adapters" if known else "the registry is empty")
        _how_to_fill(out, base)


@click.command("list")
@click.option("--mixtures", is_flag=True, help="Only what was composed here.")
@click.option("--local", is_flag=True, help="Only what is on this machine.")
@click.option("--limit", type=click.IntRange(min=1), help="How many to show.")
@with_output
def list_(mixtures: bool, local: bool, limit: int | None, out: Output) -> None:
    """List what the registry knows.

    \b
    Examples:
      lorareg list --local
      lorareg ls --mixtures --json
    """
    from lorahub_registry.cli.shown import COLUMNS, rows
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        known = registry.list(mixtures=mixtures, limit=None if local else limit)
    if local:
        known = tuple(a for a in known if a.record.local_path)[:limit]
    out.table(rows(known), COLUMNS, quiet="ref")
    if not known:
        out.say("nothing there")
        _how_to_fill(out, None)


@click.command()
@click.argument("ref")
@click.option("--weights", "with_weights", is_flag=True,
              help="Read its tensors: norms, effective ranks, energy by rank.")  # fmt: skip
@click.option("--plot", "figure", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw them, too; implies --weights.")  # fmt: skip
@with_output
def show(ref: str, with_weights: bool, figure: Path | None, out: Output) -> None:
    """Show everything known of an adapter.

    REF is owner/repo[/sub/folder][@revision], a path, or a name. With --weights its tensors are
    read, too: how large each module's change is, layer by layer, over how many directions it
    spreads (effective rank), and which share of its energy, the squared norm, a smaller rank
    would keep; a folder need not be registered then.

    \b
    Examples:
      lorareg show zog
      lorareg show zog --weights --plot zog.png
      lorareg show uukuguy/speechless-multi-loras-r64/Intel/neural-chat-7b-v3-1-lora --json
    """
    from lorahub_registry.cli.shown import dynamic_problem, facts, page, short_ref
    from lorahub_registry.registry.store import Registry

    if figure is not None:
        from lorahub_registry.api.plot import check_png

        check_png(figure)
    with Registry(progress=out) as registry:
        if with_weights or figure is not None:
            from lorahub_registry.api.inspect import read

            stored = read(ref, registry=registry, progress=out)
        else:
            stored = _known(ref, registry)
        used_in = [m.record.name for m in registry.mixtures_of(stored.id)]
        problem = dynamic_problem(stored.record)
        known, text = facts(stored, used_in), page(stored, used_in, problem)
        known["dynamic_problem"] = problem or None
        if not stored.id:
            known |= {"added_at": None, "updated_at": None}  # it is not registered
        if with_weights or figure is not None:
            from lorahub_registry.api.inspect import weights
            from lorahub_registry.cli.inspect import weights_facts, weights_page

            found = weights(stored.ref, registry=registry, progress=out)
            known["weights"] = weights_facts(found)
            text += f"\n{weights_page(found)}"
    if figure is not None:
        from lorahub_registry.api.plot import plot

        with out.task("Drawing"):
            plot(found, figure, title=short_ref(stored))
    out.record(known, text, quiet=short_ref(stored))
    if figure is not None:
        out.done(f"drawn to {figure}")


def _known(ref: str, registry: Registry) -> StoredAdapter:
    """What is registered under ``ref``; of a folder that is here, how to have it registered."""
    try:
        return registry.get(ref)
    except UnknownRef as error:
        folder = expand(ref)
        if not folder.is_dir() or ("/" not in ref and not (folder / CONFIG_NAME).is_file()):
            raise
        raise UnknownRef(str(error), hint=f"it is on this machine: lorareg add {ref}") from None


@click.command()
@click.argument("ref", metavar="OWNER/REPO[/SUB/FOLDER][@REVISION]")
@click.option("--base", help="The base they sit on, where their configs do not tell.")
@click.option("--all-files", is_flag=True, help="Everything, not only what adapters need.")
@click.option("--dry-run", is_flag=True, help="Show what would come, and get nothing.")
@with_output
def pull(ref: str, base: str | None, all_files: bool, dry_run: bool, out: Output) -> None:
    """Get every adapter of a Hub repo, pinned and checked.

    Files go to the Hub client's own cache; the local path of each adapter is printed, as PEFT
    and vLLM take it. Interrupted, the same command goes on.

    \b
    Examples:
      lorareg pull uukuguy/speechless-multi-loras-r64
      lorareg pull owner/adapter@v1.0 --dry-run
    """
    from lorahub_registry.api.find import pull as run

    result = run(ref, base=base, all_files=all_files, dry_run=dry_run, progress=out)
    rows: list[dict[str, Any]]
    if dry_run:
        rows = [
            {
                "ref": f"{result.repo}/{a.subfolder}" if a.subfolder else result.repo,
                "files": len(a.files),
                "size": size(sum(f.size for f in a.files)),
                "bytes": sum(f.size for f in a.files),
            }
            for a in result.found
        ]
        out.table(rows, {"ref": "<", "files": ">", "size": ">"}, quiet="ref")
        missing = size(result.missing_bytes)
        out.say(f"{_adapters(rows)} at {result.commit[:12]}; {missing} would be downloaded")
        return
    rows = [
        {
            "path": str(a.folder),
            "ref": a.ref,
            "base": a.record.base.name,
            "base_how": a.record.base.how,
            "rank": a.record.rank,
        }
        for a in result.adapters
    ]
    out.table(rows, {"path": "<"}, quiet="path")
    where = f"{result.repo} at {result.commit[:12]}"
    out.done(f"{_adapters(rows)} of {where}, {size(result.total_bytes)}")


@click.command()
@click.option("--base", "bases", multiple=True, required=True, metavar="ID",
              help="A base's Hub id; may be repeated.")  # fmt: skip
@click.option("--author", help="Only this owner's.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many repos a base.")
@with_output
def sync(bases: tuple[str, ...], author: str | None, limit: int | None, out: Output) -> None:
    """Learn what adapters the Hub has for a base.

    Reads listings, configs and headers only, so that `search` finds what was never downloaded.
    Twice in a row changes nothing.

    \b
    Example:
      lorareg sync --base mistralai/Mistral-7B-v0.1 --limit 200
    """
    from lorahub_registry.api.find import sync as run

    rows: list[dict[str, Any]] = []
    for base in bases:
        result = run(base, author=author, limit=limit, progress=out)
        rows.append(
            {
                "base": base,
                "new": result.new,
                "updated": result.updated,
                "unchanged": result.unchanged,
                "refused": len(result.refused),
                "adapters": result.adapters,
                "requests": result.requests,
            }
        )
    columns = {"base": "<", **dict.fromkeys(list(rows[0])[1:], ">")}
    out.table(rows, columns, quiet="base")


def _adapters(rows: list[dict[str, Any]]) -> str:
    return f"{len(rows)} {'adapter' if len(rows) == 1 else 'adapters'}"


def _how_to_fill(out: Output, base: str | None) -> None:
    hub_id = base if base and "/" in base and not base.startswith(("/", ".")) else None
    out.say(f"fill it: lorareg sync --base {hub_id or 'OWNER/BASE'}   (what the Hub has)")
    out.say("         lorareg pull OWNER/REPO        (one repo)")
    out.say("         lorareg add FOLDER             (what is on this machine)")


COMMANDS: list[click.Command] = [search, list_, show, pull, sync]
