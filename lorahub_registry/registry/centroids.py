"""Where adapters' rows lie in a base's hidden space, to tell which adapter a prompt is for."""

from __future__ import annotations

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import Connection

from lorahub_registry.errors import RegistryError
from lorahub_registry.registry import reader
from lorahub_registry.registry.marks import skill_name
from lorahub_registry.registry.records import CentroidRecord, StoredAdapter
from lorahub_registry.registry.schema import Adapter, AdapterSkill, Centroid, Skill

Placed = tuple[tuple[StoredAdapter, CentroidRecord], ...]
"""Adapters, without their long parts, each with a centroid of its own."""
_FIELDS = tuple(CentroidRecord.__dataclass_fields__)


def put(connection: Connection, adapter_id: int, centroid: CentroidRecord) -> None:
    """Store a centroid, in place of the one that the adapter had on the same base.

    Raises:
        RegistryError: it names no base, or its vector is no float32s.
    """
    if not centroid.base_digest or not centroid.vector or len(centroid.vector) % 4:
        raise RegistryError("a centroid needs its base's digest, and a vector of float32")
    connection.execute(
        delete(Centroid).where(
            Centroid.adapter_id == adapter_id, Centroid.base_digest == centroid.base_digest
        )
    )
    connection.execute(insert(Centroid).values(adapter_id=adapter_id, **vars(centroid)))


def load(connection: Connection, skill: str | None = None) -> Placed:
    """Every centroid of a current adapter, with that adapter, by the adapter's name.

    Args:
        skill: only of adapters that have it.
    """
    query = (
        select(Centroid.adapter_id, *(getattr(Centroid, name) for name in _FIELDS))
        .join(Adapter, Adapter.id == Centroid.adapter_id)
        .where(Adapter.superseded.is_(False))
        .order_by(Adapter.name, Adapter.id, Centroid.base_digest)
    )
    if skill is not None:
        having = (
            select(AdapterSkill.adapter_id)
            .join(Skill, Skill.id == AdapterSkill.skill_id)
            .where(Skill.name == skill_name(skill))
        )
        query = query.where(Adapter.id.in_(having))
    rows = connection.execute(query).all()
    adapters = {a.id: a for a in reader.load(connection, list({row[0]: None for row in rows}))}
    return tuple((adapters[row[0]], CentroidRecord(*row[1:])) for row in rows)
