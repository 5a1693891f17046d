"""Which adapter a name means."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from lorahub_registry.errors import AmbiguousRef, UnknownRef, UsageError
from lorahub_registry.registry.store import Registry
from tests.registry.making import FIRST, SECOND, adapter, hub, local, mixture


def test_every_spelling_of_a_place_is_understood(registry: Registry) -> None:
    one = registry.put(adapter("bob/many", subfolder="a/one", name="one"))
    registry.put(adapter("bob/many", subfolder="two", name="two"))
    for ref in ("bob/many/a/one", f"bob/many/a/one@{FIRST}", "bob/many/a/one@aaaa", "one", one.ref):
        assert registry.get(ref).id == one.id
    assert registry.get("Bob/MANY/a/one").id == one.id


def test_the_only_adapter_of_a_repo_needs_no_subfolder(registry: Registry) -> None:
    stored = registry.put(adapter("bob/one", subfolder="checkpoint"))
    assert registry.get("bob/one").id == stored.id


def test_a_repo_of_several_lists_them(registry: Registry) -> None:
    for name in ("a", "b"):
        registry.put(adapter("bob/many", subfolder=name, name=name))
    with pytest.raises(AmbiguousRef, match=r"(?s)2 adapters.*bob/many/a@a{40}.*bob/many/b@a"):
        registry.get("bob/many")


def test_a_name_that_several_have_lists_them_up_to_a_few(registry: Registry) -> None:
    registry.put_many(adapter(f"user{i}/lora") for i in range(20))
    with pytest.raises(AmbiguousRef, match=r"(?s)20 adapters.*and 12 more") as caught:
        registry.get("lora")
    assert caught.value.hint


def test_without_revision_the_current_one_is_meant_else_a_pulled_one(registry: Registry) -> None:
    pulled = {"weights": "local", "local_path": "/cache/x"}
    old = registry.put(adapter(hub("bob/x"), **pulled))
    new = registry.put(
        adapter(hub("bob/x", SECOND, last_modified=datetime(2025, 1, 1, tzinfo=UTC)))
    )
    assert registry.get("bob/x").id == new.id
    assert registry.get("x").id == new.id
    registry.remove(new.ref)
    assert registry.get("bob/x").id == old.id


def test_a_revision_that_is_not_there_is_unknown(registry: Registry) -> None:
    registry.put(adapter("bob/x"))
    with pytest.raises(UnknownRef, match="bob/x@main"):
        registry.get("bob/x@main")


def test_a_beginning_of_two_revisions_is_ambiguous(registry: Registry) -> None:
    registry.put(adapter(hub("bob/x", "ab" + "0" * 38), weights="local", local_path="/1"))
    later = hub("bob/x", "ab" + "1" * 38, last_modified=datetime(2025, 1, 1, tzinfo=UTC))
    registry.put(adapter(later))
    with pytest.raises(AmbiguousRef):
        registry.get("bob/x@ab")
    assert registry.get("bob/x@ab1").record.revision.startswith("ab1")


def test_paths_are_found_however_they_are_written(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "zog"
    folder.mkdir(parents=True)
    root = registry.put(local(str(folder)))
    inside = registry.put(local(str(tmp_path / "lot"), subfolder="a/b", local_path=None, name="ab"))
    pulled = registry.put(adapter("bob/x", local_path="/cache/snap", weights="local"))
    monkeypatch.chdir(tmp_path)
    for ref in (str(folder), "./out/zog", "out/zog", "out/../out/zog/", "zog"):
        assert registry.get(ref).id == root.id
    assert registry.get(f"{tmp_path}/lot/a/b").id == inside.id
    assert registry.get("lot/a/b").id == inside.id
    assert registry.get("/cache/snap").id == pulled.id
    with pytest.raises(UnknownRef):
        registry.get("./out/arr")


def test_a_mixture_is_found_by_its_name(registry: Registry) -> None:
    stored = registry.add_mixture(local("/w/out", name="out"), mixture("zog-and-arr"))
    assert registry.get("zog-and-arr").id == stored.id


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("code-lorra", "did you mean code-lora?; .*lorareg add, pull or sync"),
        ("bob/code-lorra", "did you mean bob/code-lora?; .*lorareg pull bob/code-lorra"),
        ("nothing-like-it", "lorareg add, pull or sync"),
        ("./nowhere", "lorareg list"),
    ],
)
def test_an_unknown_name_tells_what_to_do(registry: Registry, ref: str, hint: str) -> None:
    registry.put(adapter("bob/code-lora"))
    with pytest.raises(UnknownRef) as caught:
        registry.get(ref)
    import re

    assert re.search(hint.replace("?;", r"\?;"), caught.value.hint or "")


def test_what_is_no_name_at_all_is_a_usage_error(registry: Registry) -> None:
    with pytest.raises(UsageError):
        registry.get("bob//../x")


def test_near_names_are_found_in_a_large_registry(registry: Registry) -> None:
    registry.put_many(adapter(f"u/other-{i}", name=f"zz{i}") for i in range(2100))
    registry.put(adapter("bob/code-lora"))
    with pytest.raises(UnknownRef) as caught:
        registry.get("code-lorra")
    assert "did you mean code-lora?" in (caught.value.hint or "")
