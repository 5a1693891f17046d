"""Sync, against a Hub on loopback."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from lorahub_registry.errors import HubError, UsageError
from lorahub_registry.hub.pull import pull
from lorahub_registry.hub.sync import SyncResult, sync
from lorahub_registry.refs import AdapterRef
from lorahub_registry.registry.records import Query
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings
from tests.hub.conftest import Told
from tests.hub.made import BASE, MODULES, adapter, card, config, weights
from tests.hub_server import HubServer


@pytest.fixture
def listed(hub: HubServer) -> list[str]:
    """Three repos that the Hub lists for the base, the last one the newest; and one it does not."""
    names = ["ann/chat", "bob/code", "cat/math"]
    for rank, name in enumerate(names, 4):
        files = {**adapter(rank=rank), "README.md": card(tags=["lora", name[4:]])}
        hub.add_repo(name, files, downloads=rank)
    hub.add_repo("dan/other", {**adapter(), "README.md": card(base="lab/other")})
    return names


def run(settings: Settings, registry: Registry, base: str = BASE, **options: Any) -> SyncResult:
    return sync(base, settings=settings, registry=registry, **options)


def counts(result: SyncResult) -> tuple[int, int, int, int]:
    return result.new, result.updated, result.unchanged, len(result.refused)


def dump(registry: Registry) -> list[str]:
    """Everything in the database."""
    with closing(sqlite3.connect(registry.path)) as connection:
        return list(connection.iterdump())


def test_what_is_listed_is_indexed_without_being_downloaded(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str]
) -> None:
    result = run(settings, registry)
    assert counts(result) == (3, 0, 0, 0)
    assert result.adapters == 3
    record = registry.get("bob/code").record
    assert (record.rank, record.ranks, record.parameters) == (5, {5: 2}, 4 * 8 * 5)
    assert (record.weights, record.digest, record.local_path) == ("listed", None, None)
    assert record.revision == record.repo.commit == hub.sha("bob/code")
    assert (record.base.name, record.base.how) == (BASE, "declared")
    assert (record.repo.license, record.repo.downloads) == ("apache-2.0", 5)
    assert {skill.name for skill in record.skills} == {"code"}
    assert [m["name"] for m in record.modules] == list(MODULES)
    assert record.bytes == len(weights(5))
    assert [(f.name, f.size) for f in record.files] == [
        ("adapter_config.json", len(config(5))),
        ("adapter_model.safetensors", len(weights(5))),
    ]
    assert registry.search(Query(base="mistral-7b", skills=("math",))).total == 1
    assert registry.counts()["adapters"] == 3


def test_two_calls_a_new_adapter_and_none_for_a_known_one(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str]
) -> None:
    first = run(settings, registry)
    assert first.requests == len(hub.requests) == 1 + 2 * 3
    assert all(r.range for r in hub.find("*/resolve/*"))
    hub.reset_log()
    second = run(settings, registry)
    assert second.requests == len(hub.requests) == 1
    hub.reset_log()
    hub.commit("ann/chat", {"adapter_model.safetensors": weights(4, fill=2)})
    third = run(settings, registry)
    assert counts(third) == (0, 1, 1, 0)  # the newest one of before is looked at again
    assert third.requests == len(hub.requests) == 1 + 2


def test_twice_in_a_row_changes_nothing(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str]
) -> None:
    hub.add_repo("eve/bad", {**adapter(r=9), "README.md": card()})
    run(settings, registry)
    before = dump(registry)
    assert counts(run(settings, registry)) == (0, 0, 1, 0)
    assert dump(registry) == before
    # Nor does it where the whole list is gone through.
    registry.set_cursor(cursor_of(registry), None)
    assert counts(run(settings, registry)) == (0, 0, 4, 0)
    assert dump(registry) == before


def cursor_of(registry: Registry) -> str:
    with closing(sqlite3.connect(registry.path)) as connection:
        [[name]] = connection.execute("SELECT name FROM sync_cursor").fetchall()
    return str(name)


def test_the_listing_is_read_until_what_is_known(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str]
) -> None:
    hub.page_size = 2
    assert counts(run(settings, registry)) == (3, 0, 0, 0)
    assert hub.count("/api/models") == 2
    hub.reset_log()
    hub.add_repo("fay/new", {**adapter(), "README.md": card()})
    assert counts(run(settings, registry)) == (1, 0, 1, 0)
    assert hub.count("/api/models") == 2  # the second page starts with what is older


def test_a_new_commit_replaces_what_was_listed(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str]
) -> None:
    hub.add_repo("gil/two", {**adapter("a"), **adapter("b"), "README.md": card()})
    run(settings, registry)
    sha = hub.commit("gil/two", {**adapter("a", 8), "b/adapter_config.json": None, "b/x": "y"})
    assert counts(run(settings, registry)) == (0, 1, 0, 0)
    assert registry.get("gil/two/a").record.rank == 8
    assert registry.get("gil/two/a").record.revision == sha
    assert registry.counts()["adapters"] == 4  # the one that is gone was forgotten


def test_every_folder_of_a_repo_is_indexed(
    hub: HubServer, settings: Settings, registry: Registry
) -> None:
    files = {**adapter("x/one"), **adapter("x/two", 8), **adapter(), "README.md": card()}
    hub.add_repo("me/many", files)
    result = run(settings, registry)
    assert (result.new, result.adapters, result.requests) == (1, 3, 1 + 2 * 3)
    assert registry.get("me/many/x/two").record.rank == 8
    assert registry.get("me/many").record.subfolder == ""


def test_one_folder_that_was_pulled_does_not_hide_the_others(
    hub: HubServer, settings: Settings, registry: Registry
) -> None:
    hub.add_repo("me/many", {**adapter("one"), **adapter("two"), "README.md": card()})
    pulled = pull(AdapterRef("me/many", "one"), settings=settings, registry=registry)
    assert run(settings, registry).updated == 1
    one = registry.get("me/many/one").record
    assert (one.weights, one.digest) == ("local", pulled.adapters[0].record.digest)
    assert one.local_path == str(pulled.adapters[0].folder)
    assert [f.sha256 for f in one.files if f.name.endswith("tensors")] == [
        f.sha256 for f in pulled.adapters[0].record.files if f.name.endswith("tensors")
    ]
    assert registry.get("me/many/two").record.weights == "listed"
    assert run(settings, registry).requests == 1


def test_a_long_header_costs_one_call_more(
    hub: HubServer, settings: Settings, registry: Registry
) -> None:
    modules = tuple(f"model.layers.{i}.mlp.up_proj" for i in range(600))
    data = weights(modules=modules)
    assert int.from_bytes(data[:8], "little") > 100_000
    files = {"adapter_config.json": config(), "adapter_model.safetensors": data}
    hub.add_repo("me/long", {**files, "README.md": card()})
    assert run(settings, registry).requests == 1 + 3
    assert registry.get("me/long").record.ranks == {4: 600}
    assert sum(len(r.range or "") > 0 for r in hub.find("*.safetensors")) == 2


def test_a_pickle_is_listed_unread(hub: HubServer, settings: Settings, registry: Registry) -> None:
    hub.add_repo(
        "me/old",
        {"adapter_config.json": config(), "adapter_model.bin": b"x", "README.md": card()},
    )
    assert run(settings, registry).requests == 2
    assert registry.get("me/old").record.weights == "pickle"
    assert not hub.find("*.bin")


def test_a_gated_repo_is_known_by_its_listing(
    hub: HubServer, settings: Settings, registry: Registry
) -> None:
    files = {**adapter(base="/root/x"), "README.md": card(tags=["lora", "sql"])}
    hub.add_repo("lab/gated", files, gated=True)
    result = run(settings, registry)
    assert counts(result) == (1, 0, 0, 1)
    record = registry.get("lab/gated").record
    assert (record.weights, record.rank, record.base.name) == ("listed", None, BASE)
    assert {skill.name for skill in record.skills} == {"sql"}
    assert "conditions" in record.repo.error
    assert result.requests == 2
    assert run(settings, registry).requests == 1


BAD: dict[str, dict[str, Any]] = {
    "json": {"adapter_config.json": "{", "adapter_model.safetensors": weights()},
    "list": {"adapter_config.json": "[]", "adapter_model.safetensors": weights()},
    "empty": {"adapter_config.json": "", "adapter_model.safetensors": weights()},
    "nan": {"adapter_config.json": '{"peft_type": "LORA", "r": NaN}', "adapter_model.bin": b"x"},
    "mlx": {"adapter_config.json": '{"lora_parameters": {}}', "adapter_model.bin": b"x"},
    "rank": adapter(r=64),
    "huge": adapter(r=10**9),
    "regex": adapter(rank_pattern={"(a+)+": 4}),
    "noheader": {"adapter_config.json": config(), "adapter_model.safetensors": b"nothing at all"},
    "big": {"adapter_config.json": config(), "adapter_model.safetensors": b"\xff" * 64},
    "cut": {"adapter_config.json": config(), "adapter_model.safetensors": weights()[:-9]},
    "short": {"adapter_config.json": config(), "adapter_model.safetensors": weights()[:60]},
    "noweights": {"adapter_config.json": config()},
    "elsewhere": {"model.safetensors": weights()},
    "hostile": {**adapter(), "../../x": "x"},
}


def test_one_bad_repo_never_stops_a_sync(
    hub: HubServer, settings: Settings, registry: Registry, told: Told, listed: list[str]
) -> None:
    for name, files in BAD.items():
        hub.add_repo(f"bad/{name}", {**files, "README.md": card()})
    nonsense: dict[str, Any] = {"sha": 7, "siblings": "none"}
    for name, value in nonsense.items():
        hub.add_repo(f"odd/{name}", {**adapter(), "README.md": card()}, overrides={name: value})
    hub.add_repo("zoe/last", {**adapter(), "README.md": card()}, last_modified="2020-01-01T00:00Z")
    result = run(settings, registry, progress=told)
    assert result.new == 4
    assert {r.ref for r in result.refused} >= {f"bad/{name}" for name in BAD}
    assert len(result.refused) == len(BAD) + len(nonsense)
    for name in BAD:
        repo = registry.repo("hub", f"bad/{name}")
        assert repo is not None
        assert repo.state == "broken"
        assert repo.error
    assert registry.get("zoe/last")
    assert len(told.said) == len(result.refused)


def test_odd_values_are_left_out(hub: HubServer, settings: Settings, registry: Registry) -> None:
    odd = {
        "downloads": "many", "likes": 10**30, "lastModified": "yesterday",
        "tags": [1, None, "code"], "cardData": ["no", "mapping"], "gated": {"x": 1},
    }  # fmt: skip
    hub.add_repo("me/odd", {**adapter(), "README.md": card()}, overrides=odd)
    assert counts(run(settings, registry)) == (1, 0, 0, 0)
    repo = registry.get("me/odd").record.repo
    assert (repo.downloads, repo.likes, repo.last_modified) == (None, None, None)
    assert repo.tags == ("code",)


def test_part_of_a_repo_may_be_bad(hub: HubServer, settings: Settings, registry: Registry) -> None:
    hub.add_repo("me/half", {**adapter("good"), **adapter("bad", r=64), "README.md": card()})
    result = run(settings, registry)
    assert counts(result) == (1, 0, 0, 1)
    assert result.refused[0].ref == "me/half/bad"
    repo = registry.get("me/half/good").record.repo
    assert repo.state == "ok"
    assert "says 64" in repo.error
    assert run(settings, registry).requests == 1


# On the way


def test_a_repo_that_failed_for_now_is_tried_again(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str], waits: list[float]
) -> None:
    hub.fail("/bob/code/resolve/*", status=503, times=4)
    result = run(settings, registry)
    assert counts(result) == (2, 0, 0, 1)
    assert waits == [1, 2, 4]
    assert registry.repo("hub", "bob/code") is None
    assert counts(run(settings, registry)) == (1, 0, 1, 0)
    assert registry.get("bob/code")
    assert run(settings, registry).requests == 1


def test_a_busy_hub_is_waited_for(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str], waits: list[float]
) -> None:
    hub.fail("/api/models", status=429, retry_after=3)
    hub.fail("*/adapter_config.json", status=429, headers={"RateLimit": '"resolvers";r=0;t=9'})
    assert counts(run(settings, registry)) == (3, 0, 0, 0)
    assert sorted(waits) == [4, 10]


def test_a_sync_that_is_broken_off_goes_on_where_it_was(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str], waits: list[float]
) -> None:
    hub.fail("/ann/chat/resolve/*", drop=True, times=None)  # the oldest one: it comes last
    with pytest.raises(HubError, match="broke off"):
        run(settings, registry)
    assert registry.counts()["adapters"] == 2
    hub.heal()
    hub.reset_log()
    result = run(settings, registry)
    assert counts(result) == (1, 0, 2, 0)
    assert hub.count("*/resolve/*") == 2


def test_an_unreachable_hub(
    hub: HubServer, settings: Settings, registry: Registry, waits: list[float]
) -> None:
    hub.stop()
    with pytest.raises(HubError, match="cannot be reached"):
        run(settings, registry)
    with pytest.raises(HubError, match="offline"):
        run(replace(settings, offline=True), registry)
    assert waits == []


# What is asked for


def test_a_limit_takes_the_newest_and_keeps_no_place(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str]
) -> None:
    result = run(settings, registry, limit=2)
    assert (result.new, result.requests) == (2, 1 + 4)
    assert registry.get("cat/math")
    assert counts(run(settings, registry)) == (1, 0, 2, 0)


def test_one_author_s_adapters(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str]
) -> None:
    assert counts(run(settings, registry, author="ann")) == (1, 0, 0, 0)
    assert registry.get("ann/chat")
    assert counts(run(settings, registry)) == (2, 0, 1, 0)


@pytest.mark.parametrize("base", ["mistral-7b", "a/b/c", "a/b@main", "/root/model"])
def test_a_base_has_to_be_a_hub_id(settings: Settings, registry: Registry, base: str) -> None:
    with pytest.raises(UsageError):
        run(settings, registry, base)


def test_a_base_that_nothing_is_listed_for(
    hub: HubServer, settings: Settings, registry: Registry, told: Told
) -> None:
    with pytest.raises(HubError, match="no such repo"):
        run(settings, registry, "lab/nothing")
    hub.add_repo("lab/model", {"config.json": "{}"})
    assert counts(run(settings, registry, "lab/model", progress=told)) == (0, 0, 0, 0)
    assert told.warned == ["the Hub lists no adapter of lab/model"]
    hub.rename("lab/model", "lab/renamed")
    with pytest.raises(HubError, match="is called lab/renamed") as caught:
        run(settings, registry, "lab/model")
    assert "lorareg sync --base lab/renamed" in (caught.value.hint or "")


def test_the_next_page_is_asked_for_at_the_same_hub(
    hub: HubServer, settings: Settings, registry: Registry, listed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lorahub_registry.hub.client import Hub

    url = Hub(settings)._here("https://elsewhere.example/api/models?cursor=x")
    assert url == f"{hub.url}/api/models?cursor=x"


def test_scores_of_the_card_are_taken(
    hub: HubServer, settings: Settings, registry: Registry
) -> None:
    metrics = [{"type": "acc", "value": 0.5}, {"type": "bad", "value": float("inf")}]
    result = {"task": {"type": "t"}, "dataset": {"name": "gsm8k"}, "metrics": metrics}
    said = {"cardData": {"base_model": BASE, "model-index": [{"results": [result]}]}}
    hub.add_repo("me/scored", {**adapter(), "README.md": card()}, overrides=said)
    assert counts(run(settings, registry)) == (1, 0, 0, 0)
    [score] = registry.get("me/scored").record.scores
    assert (score.dataset, score.metric, score.value) == ("gsm8k", "acc", 0.5)
