"""A recipe's words made definite: every adapter found, read, pinned and named.

The registry stays as it is, but for what is pulled from the Hub: a run that fails leaves no trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorahub_registry.adapters.compat import Member
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.facts import read_facts
from lorahub_registry.api.index import refreshed
from lorahub_registry.errors import AmbiguousRef, LockError, RecipeError, UnknownRef
from lorahub_registry.progress import Progress, silent
from lorahub_registry.recipes import Recipe, RefEntry
from lorahub_registry.recipes.entries import RESERVED, SearchEntry
from lorahub_registry.refs import AdapterRef, expand, looks_like_path
from lorahub_registry.registry.index import record_of_folder
from lorahub_registry.registry.records import AdapterRecord, Query, StoredAdapter
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings


@dataclass(frozen=True)
class Resolved:
    """Adapters found.

    Attributes:
        members: in the order that they were named.
        records: member name → what its files say now.
        fresh: names of those that the registry does not know, or knows otherwise.
    """

    members: tuple[Member, ...]
    records: Mapping[str, AdapterRecord]
    fresh: frozenset[str]


def resolve_members(
    recipe: Recipe,
    *,
    beside: Path,
    base: str,
    registry: Registry,
    progress: Progress = silent,
) -> Resolved:
    """Every adapter of ``recipe``, searches resolved, in the recipe's order.

    Args:
        beside: what the recipe's relative paths count from.
        base: the resolved base's name, for searches and for names that several adapters have.

    Raises:
        UnknownRef, AmbiguousRef: an adapter that cannot be found, or not told apart.
        RecipeError: a search that finds nothing, or one adapter twice.
        LockError: a pulled file is no longer what was pulled.
    """
    found: list[tuple[RefEntry, StoredAdapter | AdapterRecord]] = []
    for entry in recipe.adapters:
        if isinstance(entry, SearchEntry):
            found += _searched(entry, base, registry, progress)
        else:
            found.append((entry, _find(entry.ref, beside, base, registry, progress)))
    return _resolved(found, registry, progress)


def resolve_refs(
    refs: Sequence[str], *, beside: Path, registry: Registry, progress: Progress = silent
) -> Resolved:
    """Adapters named one by one, without a recipe, in the same order.

    Args:
        refs: folders (counted from ``beside``), registered names, or Hub refs, which are pulled.

    Raises:
        As :func:`resolve_members`.
    """
    entries = [RefEntry(ref=ref) for ref in refs]
    found = [(entry, _find(entry.ref, beside, None, registry, progress)) for entry in entries]
    return _resolved(found, registry, progress)


def _resolved(
    found: Sequence[tuple[RefEntry, StoredAdapter | AdapterRecord]],
    registry: Registry,
    progress: Progress,
) -> Resolved:
    members: list[Member] = []
    records: list[AdapterRecord] = []
    fresh: list[bool] = []
    for entry, one in found:
        if isinstance(one, AdapterRecord):
            record, stored, changed = one, None, True
        else:
            stored = _here(one, registry, progress)
            record, changed = _now(stored, progress)
        member = _member(entry, record, stored)
        if any(member.folder == m.folder for m in members):
            raise RecipeError(
                f"{member.ref} stands twice among the adapters",
                hint="name it once, or let the search leave it out",
            )
        members.append(member)
        records.append(record)
        fresh.append(changed)
    named = _named(members, [entry for entry, _ in found])
    return Resolved(
        tuple(named),
        {m.name: record for m, record in zip(named, records, strict=True)},
        frozenset(m.name for m, changed in zip(named, fresh, strict=True) if changed),
    )


def _find(
    ref: str, beside: Path, base: str | None, registry: Registry, progress: Progress
) -> StoredAdapter | AdapterRecord:
    """What ``ref`` means; a record alone where it is a folder that the registry does not know."""
    folder = expand(ref, beside=beside)
    if looks_like_path(ref) or (folder / "adapter_config.json").is_file():
        try:
            return registry.get(str(folder))
        except UnknownRef:
            return record_of_folder(folder)
    try:
        return registry.get(ref)
    except AmbiguousRef:
        if base is None:
            raise
        stored = registry.get(ref, base=base)
        progress.say(f"{ref}: of several, the one on {base} is taken, {stored.ref}")
        return stored
    except UnknownRef:
        if "/" not in ref:
            raise
    from lorahub_registry.hub.pull import pull

    wanted = AdapterRef.parse(ref)
    settings = Settings.from_environment()
    pulled = pull(wanted, settings=settings, registry=registry, progress=progress).adapters
    if len(pulled) > 1:
        here = ", ".join(p.record.subfolder or "(root)" for p in pulled)
        raise AmbiguousRef(
            f"{ref} holds {len(pulled)} adapters: {here}",
            hint=f"name one: {wanted.repo}/{pulled[0].record.subfolder}",
        )
    return registry.get(str(wanted))


def _searched(
    entry: SearchEntry, base: str, registry: Registry, progress: Progress
) -> list[tuple[RefEntry, StoredAdapter | AdapterRecord]]:
    search = entry.search
    answer = registry.search(
        Query(
            text=search.text or "",
            base=base,
            skills=search.skill,
            rank=search.rank_bounds,
            targets=search.targets,
            license=search.license,
            peft_type=search.peft_type,
            min_scores=search.min_score,
            sort=search.sort,
            # Mixtures are left out below: a recipe must not find what it made itself.
            limit=entry.limit + registry.counts()["mixtures"],
        )
    )
    found = [a for a in map(_whole(registry), answer.adapters) if a.mixture is None]
    found = found[: entry.limit]
    if not found:
        raise RecipeError(
            f"the search among the recipe's adapters finds nothing for the base {base}",
            hint=f"lorareg sync --base {base}, or lorareg add FOLDER, fills the registry",
        )
    progress.say(f"search took {', '.join(a.record.name for a in found)}")
    return [(RefEntry(ref=a.record.name), a) for a in found]


def _whole(registry: Registry) -> Callable[[StoredAdapter], StoredAdapter]:
    return lambda stored: registry.get(stored.ref)


def _here(stored: StoredAdapter, registry: Registry, progress: Progress) -> StoredAdapter:
    """The same adapter with its files on this machine."""
    if stored.record.local_path is not None:
        return stored
    from lorahub_registry.hub.pull import pull as get

    settings = Settings.from_environment()
    get(AdapterRef.parse(stored.ref), settings=settings, registry=registry, progress=progress)
    return registry.get(stored.ref)


def _now(stored: StoredAdapter, progress: Progress) -> tuple[AdapterRecord, bool]:
    """The record of what lies there now, and whether it is another than the registry's."""
    now, record = refreshed(stored, progress=progress), stored.record
    if now.digest == record.digest and _config_sha(now) == _config_sha(record):
        return record, False
    if record.repo.kind != "local":
        raise LockError(
            f"{stored.ref}: its files are not those that were pulled",
            hint=f"delete its files and pull again: lorareg remove {stored.ref} --files",
        )
    progress.warn(f"{record.name}: its files changed since it was indexed; taken as they are now")
    return now, True


def _member(entry: RefEntry, record: AdapterRecord, stored: StoredAdapter | None) -> Member:
    folder = Path(record.local_path or "")
    return Member(
        name=entry.name or record.name,
        key=stored.ref if stored else str(folder),
        # A folder's path says whose machine this is; a Hub ref, or a name, does not.
        ref=stored.ref if stored and record.repo.kind == "hub" else record.name,
        folder=folder,
        facts=read_facts(folder),
        base=record.base.name,
        base_digest=record.base.digest,
        digest=record.digest,
        coefficient=entry.coefficient,
        license=record.repo.license,
        revision=record.revision,
        adapter_id=stored.id if stored else None,
    )


def _config_sha(record: AdapterRecord) -> str | None:
    """Of adapter_config.json: its alpha and patterns scale the tensors."""
    return next((f.sha256 for f in record.files if f.name == CONFIG_NAME), None)


def _named(members: Sequence[Member], entries: Sequence[RefEntry]) -> list[Member]:
    """Names fit for tables and files, no two alike; explicit ones stay as they are."""
    taken = {e.name for e in entries if e.name} | RESERVED
    named = []
    for member, entry in zip(members, entries, strict=True):
        name = member.name
        if not entry.name:
            slug = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-._+") or "adapter"
            slug = f"a{slug}" if slug.isdigit() else slug
            name, number = slug, 2
            while name.lower() in RESERVED or name in taken:
                name, number = f"{slug}-{number}", number + 1
            taken.add(name)
        named.append(replace(member, name=name))
    return named
