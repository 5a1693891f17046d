"""Which adapter a name means: an exact place, a path, or a plain name that only one has."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.engine import Connection

from lorahub_registry.errors import AmbiguousRef, UnknownRef, UsageError
from lorahub_registry.refs import AdapterRef, expand, looks_like_path
from lorahub_registry.registry import families
from lorahub_registry.registry.schema import Adapter, Mixture, Repo

_SHOWN = 8
_COMPARED = 2000
_COLUMNS = (
    Adapter.id,
    Adapter.name,
    Adapter.subfolder,
    Adapter.revision,
    Adapter.local_path,
    Adapter.superseded,
    Adapter.repo_id,
    Repo.kind,
    Repo.name.label("repo"),
    Repo.commit_id,
)


def find(connection: Connection, ref: str, base: str | None = None) -> int:
    """The id of the adapter that ``ref`` means.

    Args:
        base: of several that have one plain name, those that answer to this base are meant.

    Raises:
        UnknownRef: nothing is called so; the hint names what is nearest.
        AmbiguousRef: several are; the message lists them.
    """
    text = ref.strip()
    if looks_like_path(text):
        found = _by_path(connection, expand(text))
    elif "/" in text:
        found = _by_place_or_path(connection, text)
    else:
        found = _by_name(connection, text)
        if base is not None and len(found) > 1:
            found = _answering(connection, found, base) or found
    if not found:
        raise _unknown(connection, text)
    if len(found) > 1:
        lines = [f"  {_ref(row)}" for row in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"  … and {len(found) - _SHOWN} more")
        raise AmbiguousRef(
            "\n".join([f"{ref!r} is the name of {len(found)} adapters:", *lines]),
            hint="write one of these in full",
        )
    return int(found[0].id)


def _rows(connection: Connection, *where: ColumnElement[bool]) -> list[Any]:
    query = select(*_COLUMNS).join(Repo, Repo.id == Adapter.repo_id).where(*where)
    return list(connection.execute(query.order_by(Adapter.id)))


def _by_place_or_path(connection: Connection, text: str) -> list[Any]:
    """On the Hub, or else in a folder that was given without its leading dot."""
    try:
        ref = AdapterRef.parse(text)
    except UsageError:
        found = _by_path(connection, expand(text))
        if not found:
            raise
        return found
    return _by_place(connection, ref) or _by_path(connection, expand(text))


def _by_path(connection: Connection, path: Path) -> list[Any]:
    """A local folder, one inside it, or the folder that holds what was pulled."""
    places: list[ColumnElement[bool]] = []
    for spelling in dict.fromkeys([path, path.resolve()]):
        places.append(Adapter.local_path == str(spelling))
        for folder in (spelling, *spelling.parents):
            inside = spelling.relative_to(folder).as_posix()
            places.append(
                and_(
                    Repo.kind == "local",
                    Repo.name == str(folder),
                    Adapter.subfolder == ("" if inside == "." else inside),
                )
            )
    ids = {row.id: row for place in places for row in _rows(connection, place)}
    if ids:
        return _current(list(ids.values()))
    folders = {str(path), str(path.resolve())}
    return _rows(connection, Repo.kind == "local", Repo.name.in_(folders))


def _by_place(connection: Connection, ref: AdapterRef) -> list[Any]:
    rows = _rows(connection, Repo.kind == "hub", Repo.name == ref.repo)
    if not rows:
        # The Hub answers to a name in any case.
        same = func.lower(Repo.name) == ref.repo.lower()
        rows = _rows(connection, Repo.kind == "hub", same)
    here = [row for row in rows if row.subfolder == ref.subfolder]
    if not here and not ref.subfolder:
        here = rows
    if ref.revision is None:
        return _current(here)
    exact = [row for row in here if row.revision == ref.revision]
    return exact or [row for row in here if row.revision.startswith(ref.revision)]


def _by_name(connection: Connection, name: str) -> list[Any]:
    called = select(Mixture.adapter_id).where(Mixture.name == name)
    rows = _rows(connection, or_(Adapter.name == name, Adapter.id.in_(called)))
    return _current(rows)


def _answering(connection: Connection, rows: Sequence[Any], base: str) -> list[Any]:
    """Those of ``rows`` that a search on ``base`` would find."""
    taken = families.matching(connection, base)
    there = or_(Adapter.family_id.in_(taken.families), Adapter.base_id.in_(list(taken.single)))
    ids = set(
        connection.scalars(select(Adapter.id).where(Adapter.id.in_([r.id for r in rows]), there))
    )
    return [row for row in rows if row.id in ids]


def _current(rows: Sequence[Any]) -> list[Any]:
    """Of each adapter the row at its repo's commit, else one whose files are here, else any."""
    best: dict[tuple[int, str], Any] = {}
    for row in rows:
        key = (row.repo_id, row.subfolder)
        if key not in best or _worth(row) > _worth(best[key]):
            best[key] = row
    return list(best.values())


def _worth(row: Any) -> tuple[bool, bool, int]:
    return row.revision == row.commit_id, row.local_path is not None, row.id


def _ref(row: Any) -> str:
    path = f"{row.repo}/{row.subfolder}" if row.subfolder else row.repo
    return f"{path}@{row.revision}" if row.revision else path


def _unknown(connection: Connection, text: str) -> UnknownRef:
    body = text.partition("@")[0]
    near = _nearest(connection, body)
    hints = [f"did you mean {' or '.join(near)}?"] if near else []
    if looks_like_path(text):
        what = f"no adapter at {text} is in the registry"
    elif "/" in text:
        what = f"{text} is not in the registry"
        hints.append(f"fetch it with: lorareg pull {text}")
    else:
        what = f"the registry knows no adapter or mixture called {text!r}"
        hints.append("fill the registry with: lorareg add, pull or sync")
    return UnknownRef(what, hint="; ".join(hints) or "see what is there with: lorareg list")


def _nearest(connection: Connection, text: str) -> list[str]:
    """Up to three names like ``text``, among those that begin like it or are few enough."""
    if "/" in text:
        column: Any = Repo.name
        query = select(column).where(Repo.kind == "hub")
    else:
        column = Adapter.name
        query = select(column).distinct()
    few = connection.scalars(query.limit(_COMPARED + 1)).all()
    if len(few) > _COMPARED:
        start = text[:2]
        after = start[:-1] + chr(ord(start[-1]) + 1) if start else ""
        alike = query.where(column >= start, column < after).limit(_COMPARED)
        few = connection.scalars(alike).all()
    by_folded = {name.casefold(): name for name in few}
    close = difflib.get_close_matches(text.casefold(), by_folded, n=3, cutoff=0.6)
    return [by_folded[name] for name in close]
