"""What goes in comes out, and nothing is lost when it is read again."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lorahub_registry.errors import RegistryError, UnknownRef, UsageError
from lorahub_registry.registry.records import (
    AdapterRecord,
    BaseRecord,
    FileRecord,
    Query,
    RepoRecord,
    ScoreRecord,
    SkillRecord,
)
from lorahub_registry.registry.store import PutCounts, Registry
from tests.registry.making import FIRST, MISTRAL, SECOND, adapter, hub, local, skills

PULLED = {
    "weights": "local",
    "local_path": "/cache/bob",
    "digest": "sha256:1",
    "files": (FileRecord("adapter_model.safetensors", 2000, "ff"),),
}


def test_what_was_put_is_read_back_word_for_word(registry: Registry) -> None:
    record = adapter(
        hub("bob/x", downloads=5, likes=2, tags=("peft", "lora"), card="# Card\n"),
        subfolder="a/b",
        scores=(ScoreRecord("humaneval", "pass@1", 31.5, n=164, few_shot=0, source="card"),),
        skills=(SkillRecord("code", "card", "tag"), SkillRecord("math", "dataset", "gsm8k")),
        base=BaseRecord(MISTRAL, "declared", MISTRAL, revision="main", digest="sha256:b"),
        use_rslora=True,
    )
    assert registry.put(record).record == record
    assert registry.get("bob/x/a/b").record == record


def test_the_same_record_twice_changes_nothing(registry: Registry) -> None:
    record = adapter(scores=(ScoreRecord("t", "m", 1.0, source="card"),))
    first = registry.put(record)
    assert registry.put(record) == first
    assert registry.put_many([record, record]) == PutCounts(unchanged=2)


def test_a_changed_record_changes_its_row_and_its_time(registry: Registry) -> None:
    first = registry.put(adapter())
    second = registry.put(adapter(description="writes Rust"))
    assert (second.id, second.record.description) == (first.id, "writes Rust")
    assert second.added_at == first.added_at
    assert second.updated_at > first.updated_at


def test_downloads_alone_are_no_change_of_the_adapter(registry: Registry) -> None:
    first = registry.put(adapter(hub("bob/x", downloads=1)))
    second = registry.put(adapter(hub("bob/x", downloads=900)))
    assert second.updated_at == first.updated_at
    assert second.record.repo.downloads == 900


def test_what_the_user_and_measurements_said_stays(registry: Registry) -> None:
    registry.put(adapter(skills=skills("code", "math")))
    registry.tag("code-lora", ["chat"])
    registry.score("code-lora", ScoreRecord("humaneval", "pass@1", 40.0, source="measured"))
    again = registry.put(adapter(skills=skills("sql"))).record
    assert [(s.name, s.source) for s in again.skills] == [("chat", "user"), ("sql", "card")]
    assert [s.value for s in again.scores] == [40.0]


def test_a_base_that_the_user_gave_stays(registry: Registry) -> None:
    registry.put(adapter(base="someone/else"))
    registry.set_base("code-lora", MISTRAL)
    again = registry.put(adapter(base="someone/else")).record.base
    assert (again.name, again.how, again.declared) == (MISTRAL, "given", "someone/else")
    assert [a.record.name for a in registry.search(Query(base="mistral-7b")).adapters] == [
        "code-lora"
    ]


def test_listing_again_does_not_forget_what_was_pulled(registry: Registry) -> None:
    pulled = registry.put(adapter(**PULLED))
    listed = adapter(digest=None, parameters=None, modules=(), ranks={}, rank=None)
    assert registry.put(listed) == pulled


def test_a_local_folder_is_what_its_files_are_now(registry: Registry) -> None:
    registry.put(local("/w/zog", digest="sha256:1", rank=8))
    assert registry.put(local("/w/zog", digest=None, rank=None)).record.rank is None


def test_when_the_repo_moves_on_a_listed_row_moves_with_it(registry: Registry) -> None:
    old = registry.put(adapter(hub("bob/x")))
    registry.tag("bob/x", ["chat"])
    new = registry.put(
        adapter(hub("bob/x", SECOND, last_modified=datetime(2025, 1, 1, tzinfo=UTC)))
    )
    assert (new.id, new.record.revision) == (old.id, SECOND)
    assert ("chat", "user") in [(s.name, s.source) for s in new.record.skills]
    assert registry.counts()["adapters"] == 1


def test_when_the_repo_moves_on_a_pulled_row_stays_but_is_not_found(registry: Registry) -> None:
    old = registry.put(adapter(hub("bob/x"), **PULLED))
    registry.tag("bob/x", ["chat"])
    new = registry.put(
        adapter(hub("bob/x", SECOND, last_modified=datetime(2025, 1, 1, tzinfo=UTC)))
    )
    assert registry.get(f"bob/x@{FIRST}").id == old.id != new.id
    assert "chat" in [s.name for s in new.record.skills]
    assert [a.id for a in registry.search(Query(base="mistral-7b")).adapters] == [new.id]
    assert [a.id for a in registry.search(Query(text="code")).adapters] == [new.id]


def test_an_older_state_of_a_repo_does_not_overwrite_a_newer_one(registry: Registry) -> None:
    now = datetime(2025, 1, 1, tzinfo=UTC)
    registry.put(adapter(hub("bob/x", SECOND, last_modified=now, license="mit")))
    before = hub("bob/x", FIRST, last_modified=now - timedelta(days=9), license="gpl-3.0")
    registry.put(adapter(before, **PULLED))
    repo = registry.repo("hub", "bob/x")
    assert repo is not None
    assert (repo.commit, repo.license) == (SECOND, "mit")
    assert registry.get("bob/x").record.revision == SECOND


def test_many_go_in_together_or_not_at_all(registry: Registry) -> None:
    good = [adapter(f"bob/a{i}") for i in range(30)]
    bad = adapter("bob/bad", parameters=2**70)
    with pytest.raises(RegistryError, match="too large"):
        registry.put_many([*good, bad])
    assert registry.counts()["adapters"] == 0
    assert registry.put_many(good) == PutCounts(added=30)
    assert registry.put_many([*good, adapter("bob/a1", rank=4)]) == PutCounts(
        changed=1, unchanged=30
    )


def test_many_and_one_by_one_give_the_same_registry(registry: Registry, tmp_path: Any) -> None:
    records = [
        adapter(
            hub(f"o{i % 7}/r{i % 11}", downloads=i),
            subfolder=f"s{i % 3}" * (i % 2),
            base=[MISTRAL, "Mistral-7B-v0.1", "meta-llama/Llama-2-7b-hf"][i % 3],
            skills=skills(*["code", "math", "chat"][: i % 4]),
            targets=("q_proj",) * (i % 2) + ("v_proj",),
        )
        for i in range(120)
    ]
    with Registry(tmp_path / "other.sqlite") as other:
        for record in records:
            other.put(record)
        registry.put_many(records)
        assert [a.record for a in registry.list()] == [a.record for a in other.list()]


@pytest.mark.parametrize(
    "text", ["caf\u00e9 \u4e2d\u6587", "half \ud800 pair", "nul \0 byte", "'\";--"]
)
def test_any_text_can_be_stored(registry: Registry, text: str) -> None:
    stored = registry.put(
        adapter(name="x", description=text, config={"k": text}, skills=skills(text))
    )
    assert registry.put(stored.record).updated_at == stored.updated_at


def test_a_failure_is_remembered_and_its_adapters_stay(registry: Registry) -> None:
    registry.put(adapter("bob/x"))
    registry.record_failure(
        RepoRecord("hub", "bob/x", commit=SECOND, state="broken", error="no config")
    )
    registry.record_failure(RepoRecord("hub", "bob/y", state="broken", error="a .bin alone"))
    repo = registry.repo("hub", "bob/x")
    assert repo is not None
    assert (repo.state, repo.error, repo.commit) == ("broken", "no config", SECOND)
    assert registry.get("bob/x").record.repo.state == "broken"
    assert registry.commits() == {"bob/x": SECOND, "bob/y": ""}
    assert registry.counts()["broken"] == 2


def test_tags_come_and_go(registry: Registry) -> None:
    first = registry.put(adapter(skills=skills("code")))
    tagged = registry.tag("code-lora", ["Math ", "code"])
    assert {(s.name, s.source) for s in tagged.record.skills} == {
        ("code", "card"),
        ("code", "user"),
        ("math", "user"),
    }
    assert tagged.updated_at > first.updated_at
    assert registry.tag("code-lora", ["math"]).updated_at == tagged.updated_at
    bare = registry.tag("code-lora", ["code", "math"], remove=True)
    assert bare.record.skills == ()
    assert not registry.search(Query(skills=("code",))).adapters
    with pytest.raises(UsageError):
        registry.tag("code-lora", ["  "])


def test_a_score_of_the_same_thing_replaces_the_older(registry: Registry) -> None:
    registry.put(adapter())
    registry.score("code-lora", ScoreRecord("gsm8k", "acc", 10.0))
    registry.score("code-lora", ScoreRecord("gsm8k", "acc", 12.0))
    stored = registry.score("code-lora", ScoreRecord("gsm8k", "acc", 15.0, few_shot=5))
    assert [(s.value, s.few_shot) for s in stored.record.scores] == [(12.0, None), (15.0, 5)]
    with pytest.raises(RegistryError, match="nan"):
        registry.score("code-lora", ScoreRecord("gsm8k", "acc", float("nan")))


def test_what_is_removed_is_gone_with_its_repo(registry: Registry) -> None:
    registry.put(adapter("bob/x", subfolder="a", name="a"))
    registry.put(adapter("bob/x", subfolder="b", name="b"))
    assert registry.remove("bob/x/a").record.subfolder == "a"
    assert registry.repo("hub", "bob/x") is not None
    registry.remove("b")
    assert registry.repo("hub", "bob/x") is None
    assert not registry.search(Query(text="bob")).adapters
    with pytest.raises(UnknownRef):
        registry.get("b")


def test_subfolders_that_are_gone_are_pruned_unless_pulled(registry: Registry) -> None:
    for name in ("a", "b"):
        registry.put(adapter("bob/x", subfolder=name, name=name))
    registry.put(adapter("bob/x", subfolder="c", name="c", **PULLED))
    assert registry.prune("hub", "bob/x", keep={"a"}) == 1
    assert [a.record.name for a in registry.list()] == ["a", "c"]


def test_a_cursor_is_kept_until_it_is_cleared(registry: Registry) -> None:
    assert registry.cursor("hub") is None
    registry.set_cursor("hub", "page 2")
    registry.set_cursor("hub", "page 3")
    assert registry.cursor("hub") == "page 3"
    registry.set_cursor("hub", None)
    assert registry.cursor("hub") is None


def test_the_list_can_be_narrowed(registry: Registry) -> None:
    registry.put_many([adapter("bob/x"), adapter("bob/y", **PULLED), local("/w/zog")])

    def names(**wanted: Any) -> list[str]:
        return [a.record.name for a in registry.list(**wanted)]

    assert names() == ["x", "y", "zog"]
    assert names(kind="local") == ["zog"]
    assert names(weights="local") == ["y", "zog"]
    assert names(limit=1) == ["x"]
    assert names(mixtures=True) == []


def test_records_are_values(registry: Registry) -> None:
    record: AdapterRecord = adapter()
    stored = registry.put(record)
    assert replace(stored.record) == record
    assert stored.ref == f"bob/code-lora@{FIRST}"


def test_measured_scores_go_when_the_tensors_they_were_measured_on_go(registry: Registry) -> None:
    first = registry.put(adapter("me/a", digest="one"))
    registry.score(first.ref, ScoreRecord("t", "nll", 1.5, source="measured"))
    registry.score(first.ref, ScoreRecord("t", "accuracy", 40.0, source="user"))
    again = registry.put(adapter("me/a", digest="one", description="other words"))
    assert {s.source for s in again.record.scores} == {"measured", "user"}
    changed = registry.put(adapter("me/a", digest="two"))
    assert {s.source for s in changed.record.scores} == {"user"}
