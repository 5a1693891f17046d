"""Find: search the registry, fill it from the Hub, and get what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorahub_registry.adapters.dynamic import PEFT_TYPE
from lorahub_registry.adapters.kinds import PEFT_TYPES
from lorahub_registry.adapters.mixlora import KINDS
from lorahub_registry.errors import UsageError
from lorahub_registry.progress import Progress, silent
from lorahub_registry.refs import AdapterRef
from lorahub_registry.registry.records import Found, Query
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings

if TYPE_CHECKING:
    from lorahub_registry.hub.pull import PullResult
    from lorahub_registry.hub.sync import SyncResult


def search(
    text: str = "",
    *,
    base: str | None = None,
    skill: str | Sequence[str] = (),
    rank: str | int | None = None,
    targets: str | Sequence[str] = (),
    license: str | None = None,
    peft_type: str | None = None,
    min_score: Mapping[str, float] | None = None,
    sort: str | None = None,
    limit: int = 20,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> Found:
    """What the registry knows; nothing is asked of the Hub.

    Args:
        base: a family name, Hub id or path; all bases it may mean are taken, and named through
            ``progress``.
        skill: all of them must be there.
        rank: ``16``, ``"8..64"``, ``"8.."`` or ``"..64"``.
        min_score: task (or ``task/metric``) → least value.
        sort: ``downloads``, ``updated``, ``rank``, ``name`` or ``score:TASK``.

    Raises:
        UsageError: a rank or sort key that cannot be read.
    """
    query = Query(
        text=text,
        base=base,
        skills=(skill,) if isinstance(skill, str) else tuple(skill),
        rank=rank_range(rank),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        license=license,
        peft_type=peft_type,
        min_scores=dict(min_score or {}),
        sort=sort,
        limit=limit,
    )
    if registry is None:
        with Registry(progress=progress) as opened:
            return opened.search(query)
    return registry.search(query)


def unknown_type(peft_type: str, registry: Registry) -> str | None:
    """That no adapter has this type and nothing is called so; None where one has, or may.

    Args:
        peft_type: as of :func:`search`.
    """
    from lorahub_registry.recipes.fields import did_you_mean
    from lorahub_registry.recipes.methods import METHODS

    known = [*METHODS, *PEFT_TYPES, *KINDS, PEFT_TYPE]
    if peft_type.lower() in {name.lower() for name in known}:
        return None
    if registry.search(Query(peft_type=peft_type, limit=0)).total:
        return None
    return f"no adapter here is of type {peft_type!r}{did_you_mean(peft_type, known)}"


def rank_range(rank: str | int | None) -> tuple[int | None, int | None]:
    """``"8..64"`` → (8, 64), ``"8.."`` → (8, None), ``"..64"`` → (None, 64), ``16`` → (16, 16).

    Raises:
        UsageError: it is none of these.
    """
    if rank is None:
        return None, None
    low, dots, high = str(rank).strip().partition("..")
    ends = (low, high) if dots else (low, low)
    if not any(ends) or not all(end == "" or (end.isascii() and end.isdigit()) for end in ends):
        raise UsageError(f"{rank!r} is not a rank", hint="write 16, 8..64, 8.. or ..64")
    lowest, highest = (int(end) if end else None for end in ends)
    return lowest, highest


def pull(
    ref: str,
    *,
    registry: Registry | None = None,
    base: str | None = None,
    all_files: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PullResult:
    """Every adapter of a Hub repo, or of one of its folders, pinned and checked.

    Args:
        ref: ``owner/name[/sub/folder][@revision]``.
        base: the base they sit on, where their configs only name somebody's own path.
        all_files: not only what adapters need.
        dry_run: only say what would come.

    Raises:
        UsageError: ``ref`` is not of that form.
        HubError: the Hub refused, has no such thing, or cannot be reached.
    """
    if registry is None and not dry_run:
        with Registry(progress=progress) as opened:
            return pull(ref, registry=opened, base=base, all_files=all_files, progress=progress)
    from lorahub_registry.hub.pull import pull as get

    return get(
        AdapterRef.parse(ref),
        settings=Settings.from_environment(),
        registry=registry,
        base=base,
        all_files=all_files,
        dry_run=dry_run,
        progress=progress,
    )


def sync(
    base: str,
    *,
    author: str | None = None,
    limit: int | None = None,
    registry: Registry | None = None,
    progress: Progress = silent,
) -> SyncResult:
    """Index the Hub's adapters of a base from their listing, config and header alone.

    Args:
        base: the base's Hub id.
        author: only this owner's.
        limit: at most so many repos, the last changed first.

    Raises:
        HubError: the Hub refused, or cannot be reached. One bad repo is no error.
    """
    if registry is None:
        with Registry(progress=progress) as opened:
            return sync(base, author=author, limit=limit, registry=opened, progress=progress)
    from lorahub_registry.hub.sync import sync as run

    return run(
        base,
        author=author,
        limit=limit,
        registry=registry,
        settings=Settings.from_environment(),
        progress=progress,
    )
