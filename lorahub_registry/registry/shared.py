"""Lists that many adapters have in common, stored once each: targets and modules."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import Connection

from lorahub_registry.registry.columns import clean
from lorahub_registry.registry.engine import dumps, insert_many
from lorahub_registry.registry.schema import ModuleSet, TargetName, TargetSet


class SharedLists:
    """Finds or makes the rows of shared lists, within one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._targets: dict[tuple[str, ...], int] = {}
        self._modules: dict[str, int] = {}
        # One list object often serves many records; it is held, so that its id stays its own.
        self._seen: dict[int, tuple[object, int]] = {}

    def targets(self, names: Sequence[str]) -> int:
        """The id of this list of target modules."""
        key = tuple(names)
        if key not in self._targets:
            self._targets[key] = self._target_set([clean(name) for name in key])
        return self._targets[key]

    def modules(self, modules: Sequence[Mapping[str, Any]]) -> int:
        """The id of this list of modules."""
        seen = self._seen.get(id(modules))
        if seen is not None:
            return seen[1]
        value = [dict(module) for module in modules]
        digest = _digest(value)
        if digest not in self._modules:
            found = self._connection.scalar(select(ModuleSet.id).where(ModuleSet.digest == digest))
            self._modules[digest] = found or self._insert(
                insert(ModuleSet).values(digest=digest, modules=value)
            )
        if len(self._seen) < 10_000:
            self._seen[id(modules)] = (modules, self._modules[digest])
        return self._modules[digest]

    def _target_set(self, names: list[str]) -> int:
        digest = _digest(names)
        found = self._connection.scalar(select(TargetSet.id).where(TargetSet.digest == digest))
        if found is not None:
            return found
        id_ = self._insert(insert(TargetSet).values(digest=digest, targets=names))
        # q_proj is also the name of model.layers.0.self_attn.q_proj.
        every = {*names, *(name.rsplit(".", 1)[-1] for name in names)}
        rows = [{"name": name, "set_id": id_} for name in sorted(every)]
        insert_many(self._connection, TargetName.__table__, rows)
        return id_

    def _insert(self, statement: Any) -> int:
        key = self._connection.execute(statement).inserted_primary_key
        assert key is not None
        return int(key[0])


def _digest(value: object) -> str:
    return hashlib.sha256(dumps(value).encode()).hexdigest()
