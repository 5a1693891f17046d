"""Registry: add, remove, tag, and the database file."""

from __future__ import annotations

from pathlib import Path

import click

from lorahub_registry.cli.output import Output, with_output
from lorahub_registry.errors import LoraregError, OutputError


@click.command()
@click.argument("places", nargs=-1, required=True, metavar="PATH|REF...")
@click.option("--base", help="The base they sit on, where their configs do not tell.")
@with_output
def add(places: tuple[str, ...], base: str | None, out: Output) -> None:
    """Index adapters in folders, however deep, or index known ones again.

    Files stay where they are. What looks like an adapter and is none is named with the reason.

    \b
    Examples:
      lorareg add ~/adapters
      lorareg add ./my-lora --base mistralai/Mistral-7B-v0.1
    """
    from lorahub_registry.api.index import add as run
    from lorahub_registry.cli.shown import COLUMNS, rows
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        result = run(places, registry=registry, base=base, progress=out)
    for _, error in result.refused:
        out.warn(f"left out: {error}")
    known = [*result.added, *result.unchanged]
    out.table(rows(known), COLUMNS, quiet="ref")
    out.done(
        f"{len(result.added)} added or changed, {len(result.unchanged)} unchanged, "
        f"{len(result.refused)} left out"
    )
    if not known:
        raise LoraregError(
            "none of what is there can be used", hint="the warnings above say why, one by one"
        )


@click.command()
@click.argument("ref")
@click.option("--files", is_flag=True, help="Delete its files, too.")
@click.option("--yes", is_flag=True, help="Do not ask before deleting files.")
@with_output
def remove(ref: str, files: bool, yes: bool, out: Output) -> None:
    """Forget an adapter; its files stay unless --files says otherwise.

    \b
    Example:
      lorareg remove zog
    """
    from lorahub_registry.api.index import remove as run
    from lorahub_registry.cli.shown import short_ref
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        stored = registry.get(ref)
        if files and not yes:
            click.confirm(f"Delete the files in {stored.record.local_path}?", abort=True, err=True)
        run(ref, registry=registry, files=files)
    facts = {"id": stored.ref, "files_deleted": files}
    out.record(facts, stored.ref, quiet=short_ref(stored))
    out.done("forgotten, files deleted" if files else "forgotten; its files are where they were")


@click.command()
@click.argument("ref")
@click.option("--skill", "skills", multiple=True, required=True, help="May be repeated.")
@click.option("--remove", "remove_", is_flag=True, help="It does not have them.")
@with_output
def tag(ref: str, skills: tuple[str, ...], remove_: bool, out: Output) -> None:
    """Say what an adapter is good at.

    \b
    Examples:
      lorareg tag zog --skill names --skill stories
      lorareg tag zog --skill names --remove
    """
    from lorahub_registry.cli.shown import row, short_ref
    from lorahub_registry.registry.store import Registry

    with Registry(progress=out) as registry:
        stored = registry.tag(ref, skills, remove=remove_)
    names = sorted({s.name for s in stored.record.skills})
    out.record(row(stored), f"{short_ref(stored)}: {', '.join(names) or 'no skills'}",
               quiet=short_ref(stored))  # fmt: skip


@click.group()
def db() -> None:
    """The registry's file: where it is, how it is, a copy, an upgrade."""


@db.command()
@with_output
def path(out: Output) -> None:
    """Print where the registry is.

    \b
    Example:
      lorareg db path
    """
    from lorahub_registry.settings import Settings

    found = str(Settings.from_environment().database)
    out.record({"path": found}, found, quiet=found)


@db.command()
@with_output
def status(out: Output) -> None:
    """Show revision, size and counts.

    \b
    Example:
      lorareg db status --json
    """
    from lorahub_registry.registry import migrate
    from lorahub_registry.registry.store import Registry
    from lorahub_registry.settings import Settings

    file = Settings.from_environment().database
    found = migrate.status(file)
    facts: dict[str, object] = {
        "path": str(file),
        "revision": found.revision,
        "newest": found.head,
        "state": found.state,
        "bytes": file.stat().st_size if file.exists() else 0,
    }
    if found.state == "current":
        with Registry() as registry:
            facts.update(registry.counts())
    human = "\n".join(f"{key:<10}{value}" for key, value in facts.items())
    out.record(facts, human, quiet=str(found.state))


@db.command()
@click.argument("to", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace the file that is there.")
@with_output
def backup(to: Path, force: bool, out: Output) -> None:
    """Write a consistent copy, also while others write.

    \b
    Example:
      lorareg db backup registry-copy.sqlite
    """
    from lorahub_registry.registry import migrate
    from lorahub_registry.settings import Settings

    if to.is_file() and not force:
        raise OutputError(f"{to} exists", hint="--force replaces it, or name another file")
    migrate.backup(Settings.from_environment().database, to)
    out.record({"path": str(to)}, str(to), quiet=str(to))


@db.command()
@with_output
def upgrade(out: Output) -> None:
    """Bring the registry to this program's revision; a copy is kept.

    \b
    Example:
      lorareg db upgrade
    """
    from lorahub_registry.registry import migrate
    from lorahub_registry.settings import Settings

    file = Settings.from_environment().database
    before = migrate.status(file)
    now = migrate.ensure(file, out)
    facts = {"path": str(file), "from": before.revision, "to": now.revision}
    text = f"{file} is at revision {now.revision}"
    out.record(facts, text, quiet=str(now.revision))


COMMANDS: list[click.Command] = [add, remove, tag, db]
