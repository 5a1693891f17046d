"""Centroids go in, come out the same, and leave with their adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorahub_registry.errors import RegistryError, UnknownRef
from lorahub_registry.registry.store import Registry
from tests.registry.making import SECOND, adapter, centroid, hub, skills


def known(registry: Registry, skill: str | None = None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for stored, one in registry.centroids(skill=skill):
        found.setdefault(stored.record.name, []).append(one.base_digest)
    return found


def test_what_goes_in_comes_out(registry: Registry) -> None:
    registry.put(adapter("bob/b"))
    registry.put(adapter("ann/a"))
    wanted = centroid(1.5, -0.25, 3e-30)
    registry.put_centroid("b", wanted)
    stored = registry.put_centroid("a", replace(wanted, rows=7))
    assert stored.record.name == "a"
    assert [(s.record.name, c) for s, c in registry.centroids()] == [
        ("a", replace(wanted, rows=7)),
        ("b", wanted),
    ]


def test_one_a_base_and_the_newest_counts(registry: Registry) -> None:
    registry.put(adapter("bob/b"))
    registry.put_centroid("b", centroid(1, 2))
    registry.put_centroid("b", centroid(1, 2, 3, base_digest="other"))
    registry.put_centroid("b", centroid(4, 5))
    found = [one for _, one in registry.centroids()]
    assert found == [centroid(1, 2, 3, base_digest="other"), centroid(4, 5)]


def test_a_skill_narrows_however_many_sources_say_it(registry: Registry) -> None:
    registry.put(adapter("bob/b", skills=skills("code") + skills("code", source="dataset")))
    registry.put(adapter("ann/a", skills=skills("math")))
    for name in "ab":
        registry.put_centroid(name, centroid())
    assert known(registry, " Code") == {"b": ["sha256:base"]}
    assert known(registry, "chat") == {}
    assert set(known(registry)) == {"a", "b"}


def test_it_goes_with_its_adapter_and_stays_when_that_is_indexed_again(registry: Registry) -> None:
    registry.put(adapter("bob/b"))
    registry.put_centroid("b", centroid())
    registry.put(adapter("bob/b", description="other words"))
    assert set(known(registry)) == {"b"}
    registry.remove("bob/b")
    registry.put(adapter("bob/b"))
    assert known(registry) == {}


def test_an_adapter_that_a_newer_one_replaced_is_not_asked(registry: Registry) -> None:
    registry.put(adapter("bob/b", local_path="/cache/b", weights="local"))
    registry.put_centroid("b", centroid())
    registry.put(adapter(hub("bob/b", SECOND)))
    assert known(registry) == {}


def test_what_is_no_centroid_is_refused(registry: Registry) -> None:
    registry.put(adapter("bob/b"))
    for bad in (centroid(base_digest=""), centroid(vector=b""), centroid(vector=b"abc")):
        with pytest.raises(RegistryError, match="centroid"):
            registry.put_centroid("b", bad)
    with pytest.raises(UnknownRef):
        registry.put_centroid("nobody", centroid())
    assert known(registry) == {}
