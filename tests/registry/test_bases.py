"""Base models: when two names are one base, and which bases a family name takes."""

from __future__ import annotations

import pytest

from lorahub_registry.adapters.bases import infer_base
from lorahub_registry.registry.records import BaseRecord, Query
from lorahub_registry.registry.store import Registry
from tests.registry.making import MISTRAL, adapter, local

PATH = "/opt/x/Mistral-7B-v0.1"


def declared(text: str) -> BaseRecord:
    """The base as it is read from a config."""
    name, how = infer_base(text)
    return BaseRecord(name, how, text)


def fill(registry: Registry, *bases: str) -> None:
    for i, base in enumerate(bases):
        registry.put(adapter(f"bob/a{i}", base=declared(base)))


def found(registry: Registry, base: str) -> list[str]:
    return sorted(a.record.name for a in registry.search(Query(base=base)).adapters)


@pytest.mark.parametrize("order", [(MISTRAL, PATH), (PATH, MISTRAL)])
def test_a_local_path_and_the_full_name_are_one_base(
    registry: Registry, order: tuple[str, str]
) -> None:
    fill(registry, *order)
    assert [a.record.base.name for a in registry.list()] == [MISTRAL, MISTRAL]
    assert registry.counts()["bases"] == 1
    assert registry.bases_matching(PATH) == (MISTRAL,)


def test_the_short_name_stays_an_alias_when_the_full_one_comes(registry: Registry) -> None:
    fill(registry, "Mistral-7B-v0.1", MISTRAL, "mistral-7b-V0.1", MISTRAL.lower())
    assert registry.counts()["bases"] == 1
    assert registry.bases_matching("Mistral-7B-v0.1") == (MISTRAL,)


def test_other_owners_are_other_bases_of_one_family(registry: Registry) -> None:
    fill(registry, MISTRAL, "mirror/Mistral-7B-v0.1")
    assert registry.counts()["bases"] == 2
    assert registry.bases_matching(MISTRAL) == ("mirror/Mistral-7B-v0.1", MISTRAL)


def test_generic_paths_name_no_base(registry: Registry) -> None:
    fill(registry, "./model", "./checkpoint-100")
    assert [a.record.base.name for a in registry.list()] == [None, None]
    assert registry.bases_matching("./model") == ()
    assert found(registry, "./model") == []


def test_many_bases_in_one_go_resolve_as_one_by_one(registry: Registry, tmp_path) -> None:  # type: ignore[no-untyped-def]
    names = [f"{owner}Model-{i}b" for i in range(40) for owner in ("", "org/", "/mnt/m/", "org/")]
    records = [adapter(f"bob/a{i}", base=declared(name)) for i, name in enumerate(names)]
    registry.put_many(records)
    with Registry(tmp_path / "other.sqlite") as other:
        for record in records:
            other.put(record)
        assert registry.counts()["bases"] == other.counts()["bases"] == 40
        assert [a.record.base for a in registry.list()] == [a.record.base for a in other.list()]


def test_a_family_name_takes_its_family_and_nothing_else(registry: Registry) -> None:
    fill(
        registry,
        MISTRAL,
        PATH,
        "unsloth/mistral-7b-bnb-4bit",
        "mistralai/Mistral-7B-Instruct-v0.2",
        "mistralai/Mixtral-8x7B-v0.1",
        "mistralai/Mistral-7B-v0.3",
        "mistralai/Mistral-Nemo-Base-2407",
    )
    assert found(registry, "mistral-7b") == ["a0", "a1", "a2", "a5"]
    answer = registry.search(Query(base="mistral-7b"))
    assert answer.bases == (
        MISTRAL,
        "mistralai/Mistral-7B-v0.3",
        "unsloth/mistral-7b-bnb-4bit",
    )
    assert answer.total == 4
    assert found(registry, "mistral-7b-v0.1") == ["a0", "a1"]
    assert found(registry, "mistral-7b-instruct") == ["a3"]
    assert found(registry, "llama-2-7b") == []


def test_a_base_called_exactly_so_is_taken_whatever_its_words(registry: Registry) -> None:
    fill(registry, "org/7b", "org/13b")
    assert registry.bases_matching("ORG/7b") == ("org/7b",)
    assert found(registry, "org/7b") == ["a0"]
    assert registry.search(Query(base="org/7b", text="a0")).total == 1
    assert registry.search(Query(base="org/7b", skills=("code",))).total == 1


def test_giving_a_base_moves_the_adapter_in_every_search(registry: Registry) -> None:
    registry.put(local("/w/zog", base=BaseRecord(None, "unknown", "./model")))
    registry.set_base("zog", "meta-llama/Llama-2-7b-hf")
    assert found(registry, "llama-2-7b") == ["zog"]
    assert registry.search(Query(base="llama-2-7b", skills=("code",))).total == 1
    first = registry.get("zog")
    assert registry.set_base("zog", "meta-llama/Llama-2-7b-hf") == first
    registry.set_base("zog", MISTRAL)
    assert registry.search(Query(base="llama-2-7b", skills=("code",))).total == 0
    assert registry.search(Query(base="mistral", skills=("code",))).total == 1


def test_the_folder_of_a_base_is_remembered_while_it_is_there(registry, tmp_path):
    folder = tmp_path / "my-base"
    folder.mkdir()
    assert registry.base_folder("my-base") is None
    registry.place_base("my-base", folder)
    assert registry.base_folder("my-base") is None, "no config.json there, so no base"
    (folder / "config.json").write_text("{}")
    assert registry.base_folder("My-Base") == folder


def test_the_digest_of_a_base_is_kept_while_its_files_do_not_change(registry, tmp_path):
    folder = tmp_path / "my-base"
    registry.remember_digest(folder, "as it was", "abc")
    assert registry.known_digest(folder, "as it was") == "abc"
    assert registry.known_digest(folder, "changed since") is None
    registry.place_base("my-base", folder)
    assert registry.known_digest(folder, "as it was") == "abc", "both facts are kept"
