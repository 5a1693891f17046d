"""Full text: the index follows the tables, and no text of a user is an error."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text as sql

from lorahub_registry.registry import search as searching
from lorahub_registry.registry.engine import match_expression
from lorahub_registry.registry.records import Query
from lorahub_registry.registry.store import Registry
from tests.registry.making import adapter, hub, local, skills


def names(registry: Registry, text: str, limit: int = 20) -> list[str]:
    return [a.record.name for a in registry.search(Query(text=text, limit=limit)).adapters]


def intact(registry: Registry) -> None:
    """The index says of each row what the row says: SQLite's own check, and a rebuilt copy."""
    with registry._engine.begin() as connection:
        connection.execute(sql("INSERT INTO adapter_fts(adapter_fts) VALUES ('integrity-check')"))
        terms = "SELECT term, doc, col FROM spelled ORDER BY 1, 2, 3"
        connection.execute(
            sql("CREATE VIRTUAL TABLE temp.spelled USING fts5vocab(main, adapter_fts, instance)")
        )
        before = connection.execute(sql(terms)).all()
        connection.execute(sql("INSERT INTO adapter_fts(adapter_fts) VALUES ('rebuild')"))
        assert connection.execute(sql(terms)).all() == before
        connection.execute(sql("DROP TABLE temp.spelled"))
        rows = connection.execute(
            sql(
                "SELECT a.skill_names, (SELECT coalesce(group_concat(name, char(10)), '') FROM "
                "(SELECT DISTINCT s.name FROM adapter_skill x JOIN skill s ON s.id = x.skill_id "
                "WHERE x.adapter_id = a.id ORDER BY s.name)), a.downloads, "
                "coalesce(r.downloads, 0) FROM adapter a JOIN repo r ON r.id = a.repo_id"
            )
        ).all()
        assert all(row[0] == row[1] and row[2] == row[3] for row in rows)
        wrong = connection.scalar(
            sql(
                "SELECT count(*) FROM adapter_skill x JOIN adapter a ON a.id = x.adapter_id "
                "WHERE x.family_id IS NOT a.family_id OR x.downloads IS NOT a.downloads"
            )
        )
        assert wrong == 0


def test_every_part_is_found_and_forgotten(registry: Registry) -> None:
    registry.put(
        adapter("alice/sunflower", subfolder="deep/rose", name="tulip", description="grows daisies")
    )
    registry.tag("tulip", ["function-calling"])
    for word in ("alice", "sunflower", "rose", "tulip", "daisies", "function", "function-calling"):
        assert names(registry, word) == ["tulip"], word
    registry.tag("tulip", ["function-calling"], remove=True)
    assert names(registry, "calling") == []
    registry.put(adapter("alice/sunflower", subfolder="deep/rose", name="tulip"))
    assert names(registry, "daisies") == []
    registry.remove("tulip")
    assert names(registry, "tulip") == []


def test_a_name_counts_more_than_a_description(registry: Registry) -> None:
    registry.put(adapter("o/first", description="for sql sql sql and other things"))
    registry.put(adapter("o/sql", description="nothing to see"))
    assert names(registry, "sql") == ["sql", "first"]


def test_all_words_must_be_there_and_the_last_may_go_on(registry: Registry) -> None:
    registry.put(adapter("o/mistral-coder", description=""))
    registry.put(adapter("o/mistral-writer", description=""))
    assert names(registry, "mistral coder") == ["mistral-coder"]
    assert names(registry, "mistral wri") == ["mistral-writer"]
    assert names(registry, "mist coder") == []
    assert names(registry, "mi") == []


def test_accents_and_case_do_not_matter(registry: Registry) -> None:
    registry.put(adapter("o/x", description="Café für ALLE"))
    assert names(registry, "cafe FUR") == ["x"]


def test_the_folders_of_this_machine_are_not_searched(registry: Registry) -> None:
    registry.put(local("/home/alice/code/zog", description=""))
    assert names(registry, "alice") == []
    assert names(registry, "zog") == ["zog"]


@pytest.mark.parametrize(
    "text",
    ["mistral-7b", "c++", '"', '""', "NEAR(", "a AND", "NOT", "x*", "name:x", "^x", "(", "{a}:b"],
)
def test_operators_are_only_text(registry: Registry, text: str) -> None:
    registry.put(adapter("o/mistral-7b-c++"))
    registry.search(Query(text=text))


def test_what_looks_like_an_operator_is_found_as_a_word(registry: Registry) -> None:
    registry.put(adapter("o/x", description="the near and not of mistral-7b in c++"))
    for text in ("NEAR", "NOT AND", "mistral-7b", "c++", '"mistral"', "(near)"):
        assert names(registry, text) == ["x"], text
    for text in ("++", "  -- ", '"'):
        assert names(registry, text) == [], text


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(max_size=40))
def test_no_text_is_an_error(registry: Registry, text: str) -> None:
    registry.search(Query(text=text))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(
        alphabet=st.characters(
            min_codepoint=33, max_codepoint=0x2FF, categories=["L", "N", "P", "S"]
        ),
        min_size=1,
        max_size=20,
    )
)
def test_a_text_finds_itself(registry: Registry, text: str) -> None:
    registry.put(adapter("o/x", name="x", description=text))
    if match_expression(text) is not None:
        assert names(registry, text) == ["x"]


def test_the_index_follows_any_change(registry: Registry) -> None:
    chance = random.Random(0)
    words = ["code", "math", "chat", "sql"]
    for _ in range(120):
        repo = f"o/r{chance.randrange(6)}"
        match chance.randrange(4):
            case 0 | 1:
                registry.put(
                    adapter(
                        hub(repo, downloads=chance.choice([None, 5, 50, 5000])),
                        skills=skills(*chance.sample(words, 2)),
                        description=chance.choice(words),
                        base=chance.choice(["a/Mistral-7B", "b/Llama-2-7b"]),
                    )
                )
            case 2 if registry.repo("hub", repo):
                registry.tag(repo, chance.sample(words, 1), remove=chance.random() < 0.5)
            case 3 if registry.repo("hub", repo):
                registry.remove(repo)
    intact(registry)


def test_a_word_that_is_everywhere_gives_the_most_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_WEIGHED", 10)
    with Registry(path) as registry:
        registry.put_many(adapter(hub(f"o/r{i}", downloads=i), name=f"r{i}") for i in range(600))
        assert names(registry, "writes", 3) == ["r599", "r598", "r597"]
        assert len(names(registry, "writes", 590)) == 590
        found = registry.search(Query(text="writes", base="mistral", skills=("code",), limit=600))
        assert [a.record.name for a in found.adapters] == [f"r{i}" for i in reversed(range(600))]
        intact(registry)
