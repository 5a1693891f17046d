"""Bases in the registry: which row a name means, and which rows a family name takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.engine import Connection

from lorahub_registry.adapters.bases import BaseName, infer_base
from lorahub_registry.registry.engine import insert_many
from lorahub_registry.registry.schema import BaseAlias, BaseFamily, BaseFolder, BaseModel

_FEW = 20


class Bases:
    """Finds or makes the rows of base models, within one transaction.

    A name is, in this order: a base's name (in any case), an alias, the last part of a base's
    name where it has no owner itself, or else a new base. A name with owner takes over a base
    that was known by the last part alone.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ids: dict[str, int] = {}
        self._bare: set[str] = set()
        self._complete = False
        self._next: int | None = None
        self._families: dict[str, int] = {}
        self._family_of: dict[int, int] = {}

    def resolve(self, name: str) -> int:
        """The row's id of the base called ``name``."""
        folded = name.casefold()
        if folded not in self._ids:
            self._learn(folded)
        if folded not in self._ids:
            self._ids[folded] = self._adopt(name) or self._make(name)
        return self._ids[folded]

    def family_of(self, base_id: int) -> int:
        """The id of the family that a base is of."""
        if base_id not in self._family_of:
            query = select(BaseModel.family_id).where(BaseModel.id == base_id)
            self._family_of[base_id] = self._connection.execute(query).scalar_one()
        return self._family_of[base_id]

    def declare(self, base_id: int, declared: str | None) -> None:
        """Keep a config's own words as another name of the base, where they name a model."""
        folded = (declared or "").strip().casefold()
        if folded and folded not in self._ids and infer_base(declared)[0] is not None:
            self._learn(folded)
            if folded not in self._ids:
                self._alias(folded, base_id)

    def _learn(self, folded: str) -> None:
        """Look a name up; after some names all others come at once."""
        if self._complete:
            return
        if len(self._ids) >= _FEW:
            self._complete = True
            self._all()
        elif (found := self._find(folded)) is not None:
            self._ids[folded] = found

    def _find(self, folded: str) -> int | None:
        connection = self._connection
        found = connection.scalar(
            select(BaseModel.id).where(BaseModel.folded == folded)
        ) or connection.scalar(select(BaseAlias.base_id).where(BaseAlias.alias == folded))
        if found is None and "/" not in folded:
            found = connection.scalar(
                select(BaseModel.id).where(BaseModel.last == folded).order_by(BaseModel.id)
            )
        return found

    def _all(self) -> None:
        """What :meth:`_find` would say of every name."""
        bases = select(BaseModel.last, BaseModel.folded, BaseModel.id, BaseModel.family_id)
        rows = self._connection.execute(bases.order_by(BaseModel.id)).all()
        aliases = self._connection.execute(select(BaseAlias.alias, BaseAlias.base_id))
        short: dict[str, int] = {}
        for last, folded, id_, family_id in rows:
            self._family_of[id_] = family_id
            short.setdefault(last, id_)
            if last == folded:
                self._bare.add(last)
        self._ids = short | {row[0]: row[1] for row in aliases} | {row[1]: row[2] for row in rows}

    def _adopt(self, name: str) -> int | None:
        """Give a base without owner its full name; the short one stays as an alias."""
        last = name.rsplit("/", 1)[-1].casefold()
        if "/" not in name or (self._complete and last not in self._bare):
            return None
        base_id = self._connection.scalar(select(BaseModel.id).where(BaseModel.folded == last))
        if base_id is not None:
            self._connection.execute(
                update(BaseModel).where(BaseModel.id == base_id).values(**_names(name))
            )
            self._alias(last, base_id)
        return base_id

    def _make(self, name: str) -> int:
        if self._next is None:
            self._next = int(self._connection.scalar(select(func.max(BaseModel.id))) or 0) + 1
        id_, self._next = self._next, self._next + 1
        self._family_of[id_] = self._family(name)
        row = {"id": id_, "family_id": self._family_of[id_], **_names(name)}
        insert_many(self._connection, BaseModel.__table__, [row])
        if row["last"] == row["folded"]:
            self._bare.add(row["last"])
        elif self._complete:
            self._ids.setdefault(row["last"], id_)
        return id_

    def _family(self, name: str) -> int:
        parsed = BaseName.parse(name)
        parts = (parsed.words, parsed.sizes, parsed.versions)
        signature = "|".join(" ".join(part) for part in parts)
        if signature not in self._families:
            known = select(BaseFamily.id).where(BaseFamily.signature == signature)
            row = {
                "signature": signature,
                "key": parsed.key,
                "sizes": list(parsed.sizes),
                "versions": list(parsed.versions),
            }
            if self._connection.scalar(known) is None:
                insert_many(self._connection, BaseFamily.__table__, [row])
            self._families[signature] = self._connection.execute(known).scalar_one()
        return self._families[signature]

    def _alias(self, alias: str, base_id: int) -> None:
        row = {"alias": alias, "base_id": base_id}
        insert_many(self._connection, BaseAlias.__table__, [row])
        self._ids[alias] = base_id


@dataclass(frozen=True)
class Taken:
    """The bases that a name takes: whole families, and single ones of other families.

    Attributes:
        names: of all of them, in order.
        single: base → its family.
    """

    names: tuple[str, ...]
    families: tuple[int, ...]
    single: Mapping[int, int]


def matching(connection: Connection, text: str) -> Taken:
    """The bases that ``text`` (a family name, an id, a path) takes.

    One that is called exactly so, or was declared so, is always among them.
    """
    query = BaseName.parse(text)
    folded = text.strip().casefold()
    alike = (
        select(BaseFamily)
        .where(BaseFamily.key == query.key)
        .with_only_columns(BaseFamily.id, BaseFamily.sizes, BaseFamily.versions)
    )
    families = tuple(
        id_
        for id_, sizes, versions in connection.execute(alike)
        if BaseName(query.words, tuple(sizes), tuple(versions)).answers(query)
    )
    declared = select(BaseAlias.base_id).where(BaseAlias.alias == folded)
    rows = connection.execute(
        select(BaseModel.id, BaseModel.name, BaseModel.family_id)
        .where(
            or_(
                BaseModel.family_id.in_(families),
                BaseModel.folded == folded,
                BaseModel.id.in_(declared),
            )
        )
        .order_by(BaseModel.folded)
    ).all()
    single = {id_: family for id_, _name, family in rows if family not in families}
    return Taken(tuple(row[1] for row in rows), families, single)


def _names(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "folded": name.casefold(),
        "last": name.rsplit("/", 1)[-1].casefold(),
    }


def place(connection: Connection, folder: str, **values: Any) -> None:
    """Note ``values`` of a folder that holds a base; the others stay."""
    changed = connection.execute(
        update(BaseFolder).where(BaseFolder.folder == folder).values(**values)
    )
    if not changed.rowcount:
        row = {"folder": folder, "base_id": None, "stamp": "", "digest": "", **values}
        connection.execute(insert(BaseFolder).values(**row))
