"""What mixtures are made of, and what is made of an adapter."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import Connection

from lorahub_registry.errors import AmbiguousRef, UnknownRef, UsageError
from lorahub_registry.registry import lookup, reader
from lorahub_registry.registry.records import MemberRecord, MixtureRecord
from lorahub_registry.registry.schema import Adapter, Mixture, MixtureMember, Recipe


def put(
    connection: Connection, adapter_id: int, mixture: MixtureRecord, known: Mapping[str, int]
) -> None:
    """Store how the adapter ``adapter_id`` came about, in place of what was stored before.

    Args:
        known: member name → its row; the others are looked for.
    """
    members = [
        vars(member)
        | {
            "adapter_id": known.get(member.name) or _member(connection, member),
            "position": position,
        }
        for position, member in enumerate(mixture.members)
    ]
    connection.execute(delete(Mixture).where(Mixture.adapter_id == adapter_id))
    connection.execute(
        insert(Mixture).values(
            adapter_id=adapter_id,
            recipe_id=_recipe(connection, mixture),
            name=mixture.name,
            method=mixture.method,
            seed=mixture.seed,
            verdict=mixture.verdict,
        )
    )
    if members:
        connection.execute(
            insert(MixtureMember), [{"mixture_id": adapter_id, **member} for member in members]
        )


def made_of(connection: Connection, adapter_id: int) -> list[int]:
    """The mixtures that have this adapter as a member, by name."""
    query = (
        select(Mixture.adapter_id)
        .where(
            Mixture.adapter_id.in_(
                select(MixtureMember.mixture_id).where(MixtureMember.adapter_id == adapter_id)
            )
        )
        .order_by(Mixture.name, Mixture.adapter_id)
    )
    return list(connection.scalars(query))


def _recipe(connection: Connection, mixture: MixtureRecord) -> int:
    known = select(Recipe.id).where(Recipe.digest == mixture.recipe_digest)
    found = connection.scalar(known)
    if found is not None:
        return found
    connection.execute(
        insert(Recipe).values(digest=mixture.recipe_digest, yaml=mixture.recipe_yaml)
    )
    return connection.execute(known).scalar_one()


def _member(connection: Connection, member: MemberRecord) -> int | None:
    """The row of a member: the given one if it is there, else that of its bytes, else its ref."""
    if member.adapter_id is not None:
        return connection.scalar(select(Adapter.id).where(Adapter.id == member.adapter_id))
    if member.digest is not None:
        same = select(Adapter.id).where(Adapter.digest == member.digest)
        found = connection.scalar(same.order_by(Adapter.superseded, Adapter.id))
        if found is not None:
            return found
    try:
        found = lookup.find(connection, member.ref)
    except (UnknownRef, AmbiguousRef, UsageError):
        return None
    # Another digest is another adapter, whatever it is called.
    [stored] = reader.load(connection, [found])
    known = stored.record.digest
    return found if member.digest is None or known is None or known == member.digest else None
