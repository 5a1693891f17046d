"""What a mixture is made of stays known, whatever becomes of its members."""

from __future__ import annotations

from lorahub_registry.registry.records import MemberRecord
from lorahub_registry.registry.store import Registry
from tests.registry.making import FIRST, adapter, local, mixture


def member(ref: str, **fields: object) -> MemberRecord:
    return MemberRecord(ref=ref, name=ref.rsplit("/", 1)[-1], coefficient=0.5, **fields)  # type: ignore[arg-type]


def test_members_are_recognised_by_id_digest_or_ref(registry: Registry) -> None:
    one = registry.put(adapter("bob/one"))
    two = registry.put(adapter("bob/two", digest="sha256:2"))
    three = registry.put(adapter("bob/three"))
    stored = registry.add_mixture(
        local("/w/mix"),
        mixture(
            "mix",
            member("x", adapter_id=one.id),
            member("gone/away", digest="sha256:2"),
            member(f"bob/three@{FIRST}"),
            member("gone/away"),
            member("bob/two", digest="sha256:other"),
            member("not a ref//at all"),
        ),
    )
    assert stored.mixture is not None
    ids = [m.adapter_id for m in stored.mixture.members]
    assert ids == [one.id, two.id, three.id, None, None, None]
    assert registry.get("mix") == stored
    for adapter_id in ids[:3]:
        assert [m.id for m in registry.mixtures_of(adapter_id or 0)] == [stored.id]


def test_a_mixture_is_an_adapter_and_a_member_of_others(registry: Registry) -> None:
    registry.put(adapter("bob/one"))
    first = registry.add_mixture(local("/w/mix"), mixture("mix", member("bob/one")))
    second = registry.add_mixture(
        local("/w/of-mixes"), mixture("of-mixes", member("mix"), digest="d2")
    )
    assert [m.id for m in registry.mixtures_of(first.id)] == [second.id]
    assert [a.id for a in registry.list(mixtures=True)] == [first.id, second.id]


def test_a_removed_member_leaves_its_name_and_digest(registry: Registry) -> None:
    registry.put(adapter("bob/one", digest="sha256:1"))
    registry.add_mixture(local("/w/mix"), mixture("mix", member("bob/one", digest="sha256:1")))
    registry.remove("bob/one")
    lineage = registry.get("mix").mixture
    assert lineage is not None
    assert lineage.members == (member("bob/one", digest="sha256:1"),)


def test_composing_again_replaces_the_lineage_and_indexing_keeps_it(registry: Registry) -> None:
    registry.put(adapter("bob/one"))
    first = registry.add_mixture(local("/w/mix"), mixture("mix", member("bob/one")))
    other = mixture("mix2", member("bob/one"), digest="d2")
    again = registry.add_mixture(local("/w/mix"), other)
    assert again.id == first.id
    assert again.mixture is not None
    assert (again.mixture.name, again.mixture.recipe_digest) == ("mix2", "d2")
    assert registry.put(local("/w/mix", description="new")).mixture == again.mixture
    assert registry.counts()["mixtures"] == 1


def test_a_removed_mixture_takes_its_lineage_along(registry: Registry) -> None:
    one = registry.put(adapter("bob/one"))
    registry.add_mixture(local("/w/mix"), mixture("mix", member("bob/one")))
    registry.remove("mix")
    assert registry.mixtures_of(one.id) == ()
    assert registry.counts()["mixtures"] == 0
