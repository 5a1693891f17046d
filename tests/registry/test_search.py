"""Search: what narrows it, what orders it, and how far it counts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from lorahub_registry.errors import UsageError
from lorahub_registry.registry.records import Query, RepoRecord, ScoreRecord
from lorahub_registry.registry.search import COUNTED
from lorahub_registry.registry.store import Registry
from tests.registry.making import MISTRAL, adapter, hub, local, mixture, skills

LLAMA = "meta-llama/Llama-2-7b-hf"


def names(registry: Registry, **wanted: Any) -> list[str]:
    return [a.record.name for a in registry.search(Query(**wanted)).adapters]


@pytest.fixture
def filled(registry: Registry) -> Registry:
    """Four adapters that differ in everything."""
    registry.put_many(
        [
            adapter(hub("o/a", downloads=10), rank=8, targets=("q_proj",), skills=skills("code")),
            adapter(
                hub("o/b", downloads=30, license="MIT"),
                rank=64,
                skills=skills("code", "math") + skills("code", source="dataset"),
                scores=(ScoreRecord("humaneval", "pass@1", 20.0), ScoreRecord("t", "nll", 0.5)),
            ),
            adapter(
                hub("o/c", downloads=20, last_modified=datetime(2026, 1, 1, tzinfo=UTC)),
                base=LLAMA,
                peft_type="LOHA",
                targets=("model.layers.0.self_attn.q_proj", "gate_proj"),
                scores=(ScoreRecord("humaneval", "pass@1", 40.0), ScoreRecord("t", "nll", 2.5)),
                skills=skills("math"),
            ),
            local("/home/me/secret/d", rank=None, skills=()),
        ]
    )
    return registry


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["b", "c", "a", "d"]),
        ({"base": "mistral-7b"}, ["b", "a", "d"]),
        ({"base": "mistral-7b", "skills": ("code",)}, ["b", "a"]),
        ({"skills": ("Math",)}, ["b", "c"]),
        ({"skills": ("math", "code")}, ["b"]),
        ({"skills": ("math", "math")}, ["b", "c"]),
        ({"skills": ("nothing",)}, []),
        ({"rank": (9, None)}, ["b", "c", "d"][:2]),
        ({"rank": (None, 16)}, ["c", "a"]),
        ({"rank": (16, 16)}, ["c"]),
        ({"targets": ("q_proj",)}, ["b", "c", "a", "d"]),
        ({"targets": ("q_proj", "v_proj")}, ["b", "d"]),
        ({"targets": ("gate_proj",)}, ["c"]),
        ({"targets": ("nothing",)}, []),
        ({"license": "mit"}, ["b"]),
        ({"license": "mit", "base": "mistral", "skills": ("code",)}, ["b"]),
        ({"peft_type": "loha"}, ["c"]),
        ({"min_scores": {"humaneval": 20.0}}, ["b", "c"]),
        ({"min_scores": {"humaneval": 20.5}}, ["c"]),
        ({"min_scores": {"humaneval/pass@1": 30}}, ["c"]),
        ({"min_scores": {"pass@1": 10, "nll": 1}}, ["b"]),  # of a loss: at most
        ({"min_scores": {"other": 0}}, []),
        ({"limit": 2}, ["b", "c"]),
        ({"limit": 0}, []),
        ({"sort": "downloads"}, ["b", "c", "a", "d"]),
        ({"sort": "name"}, ["a", "b", "c", "d"]),
        ({"sort": "rank"}, ["b", "c", "a", "d"]),
        ({"sort": "score:humaneval"}, ["c", "b", "a", "d"]),
        ({"sort": "score:nll"}, ["b", "c", "a", "d"]),
        ({"sort": "score:humaneval", "limit": 1}, ["c"]),
        ({"sort": "score:humaneval", "base": "mistral-7b"}, ["b", "a", "d"]),
        ({"sort": "score:humaneval", "text": "math"}, ["c", "b"]),
        ({"sort": "name", "text": "math"}, ["b", "c"]),
        ({"sort": "downloads", "text": "math"}, ["b", "c"]),
        ({"text": "math", "base": "llama-2"}, ["c"]),
        ({"text": "math", "skills": ("code",)}, ["b"]),
        ({"text": "secret"}, []),
    ],
)
def test_searches(filled: Registry, wanted: dict[str, Any], expected: list[str]) -> None:
    assert names(filled, **wanted) == expected
    everything = filled.search(Query(**wanted | {"limit": 100}))
    assert everything.total == len(everything.adapters)
    assert filled.search(Query(**wanted)).total == everything.total
    assert not everything.more


def test_a_composed_mixture_is_found_by_its_method_too(registry: Registry) -> None:
    registry.add_mixture(local("/w/out", name="out"), mixture("mix"))
    for kind, expected in (("Learn", ["out"]), ("lora", ["out"]), ("mixlora", [])):
        assert names(registry, peft_type=kind) == expected


def test_most_recently_changed_comes_first(filled: Registry) -> None:
    # The local folder has no date of its own: it counts from when it was indexed.
    assert names(filled, sort="updated", base=LLAMA) == ["c"]
    order = names(filled, sort="updated")
    assert order.index("c") < order.index("b")


@pytest.mark.parametrize(
    "wanted",
    [{"sort": "size"}, {"sort": "score:"}, {"sort": "score"}, {"limit": -1}, {"rank": (9, 8)}],
)
def test_what_makes_no_sense_is_a_usage_error(registry: Registry, wanted: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        registry.search(Query(**wanted))


def test_an_unknown_sort_lists_those_there_are(registry: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        registry.search(Query(sort="size"))
    assert "downloads, updated, rank, name, score:TASK" in (caught.value.hint or "")


def test_the_bases_that_were_taken_are_named_even_where_nothing_fits(filled: Registry) -> None:
    answer = filled.search(Query(base="mistral-7b", skills=("nothing",)))
    assert (answer.adapters, answer.bases) == ((), (MISTRAL,))


def test_answers_leave_out_the_long_parts(filled: Registry) -> None:
    [row] = filled.search(Query(text="b", base="mistral-7b", skills=("math",))).adapters
    assert (row.record.config, row.record.modules, row.record.files) == ({}, (), ())
    assert row.record.skills
    assert row.record.scores
    assert filled.get(row.ref).record.config


def test_counting_stops_and_says_so(registry: Registry) -> None:
    registry.put_many(adapter(f"o/r{i}") for i in range(COUNTED + 5))
    for query in (Query(), Query(text="writes"), Query(base="mistral", skills=("code",))):
        answer = registry.search(query)
        assert (answer.total, answer.more, len(answer.adapters)) == (COUNTED, True, 20)


def test_a_repos_new_downloads_and_name_reach_its_adapters(filled: Registry) -> None:
    filled.put(adapter(hub("o/a", downloads=99), rank=8, targets=("q_proj",)))
    assert names(filled, base="mistral-7b", skills=("code",)) == ["a", "b"]
    assert names(filled)[0] == "a"
    with filled._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE repo SET name = 'renamed/thing' WHERE name = 'o/a'")
    assert names(filled, text="renamed") == ["a"]
    assert "a" not in names(filled, text="o")


def test_a_broken_repo_is_no_result(registry: Registry) -> None:
    registry.record_failure(RepoRecord("hub", "o/x", state="broken", error="no config"))
    assert names(registry) == []
