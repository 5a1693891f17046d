"""The loopback Hub as the unmodified client sees it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import get_session
from huggingface_hub.utils.sha import git_hash

from tests.hub_server import HubServer

BASE = "mistralai/Mistral-7B-v0.1"
CARD = {
    "base_model": BASE,
    "library_name": "peft",
    "license": "apache-2.0",
    "datasets": ["squad"],
    "language": ["en"],
    "pipeline_tag": "text-generation",
    "tags": ["lora", "code"],
}
EXPAND: list[Any] = "sha lastModified tags siblings cardData downloads likes library_name".split()


def safetensors(names: int = 2) -> bytes:
    """A safetensors file of float32 pairs."""
    header = {
        f"layer.{i}.lora_A.weight": {
            "dtype": "F32",
            "shape": [2],
            "data_offsets": [8 * i, 8 * i + 8],
        }
        for i in range(names)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(8)) * names


WEIGHTS = safetensors()
CONFIG = json.dumps({"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 8})
FILES: dict[str, Any] = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


@pytest.fixture
def adapter(hub: HubServer) -> str:
    """A repo with one adapter at its root, one in a subfolder, and a card."""
    sub = {f"math/{name}": data for name, data in FILES.items()}
    hub.add_repo("me/adapter", {**FILES, **sub}, card_data=CARD, downloads=7, likes=3)
    return "me/adapter"


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


# Who


def test_a_token_says_who_asks(hub: HubServer) -> None:
    token = hub.add_user("ann", orgs=["lab"], role="read")
    who = HfApi(endpoint=hub.url, token=token).whoami()
    assert who["name"] == "ann"
    assert [org["name"] for org in who["orgs"]] == ["lab"]
    assert who["auth"]["accessToken"]["role"] == "read"


def test_a_wrong_token_is_an_error_even_for_public_repos(hub: HubServer, adapter: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(endpoint=hub.url, token="hf_wrong").model_info(adapter)
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


# Listings


def test_a_listing_shows_what_the_card_says(hub: HubServer, api: HfApi, adapter: str) -> None:
    (model,) = api.list_models(
        filter=[f"base_model:adapter:{BASE}", "lora"], sort="last_modified", expand=EXPAND
    )
    assert model.id == adapter
    assert model.sha == hub.sha(adapter)
    assert (model.downloads, model.likes, model.library_name) == (7, 3, "peft")
    assert model.card_data is not None
    assert model.card_data.base_model == BASE
    assert {s.rfilename for s in model.siblings or []} == {*hub.files(adapter)}
    assert model.tags == [
        *("peft", "safetensors", "lora", "code", "text-generation", "dataset:squad", "en"),
        *(f"base_model:{BASE}", f"base_model:adapter:{BASE}", "license:apache-2.0", "region:us"),
    ]


def test_filters_must_all_match(hub: HubServer, api: HfApi, adapter: str) -> None:
    hub.add_repo("you/other", tags=["lora"], private=False)
    hub.add_repo("you/secret", tags=["lora"], private=True)

    def found(**query: Any) -> set[str]:
        return {model.id for model in api.list_models(**query)}

    assert found() == {"me/adapter", "you/other"}
    assert found(filter="lora") == {"me/adapter", "you/other"}
    assert found(filter=["lora", "peft"]) == {"me/adapter"}
    assert found(search="OTHER") == {"you/other"}
    assert found(author="me") == {"me/adapter"}
    assert found(filter="base_model:adapter:nobody/nothing") == set()


@pytest.mark.parametrize("sort", ["last_modified", "created_at", "downloads", "likes"])
def test_pages_give_every_model_once_in_order(hub: HubServer, api: HfApi, sort: Any) -> None:
    hub.page_size = 2
    for i in range(5):
        hub.add_repo(f"me/r{i}", card_data=CARD, downloads=i, likes=i)
    ids = [model.id for model in api.list_models(sort=sort, filter=["lora"], expand=["sha"])]
    assert ids == [f"me/r{i}" for i in (4, 3, 2, 1, 0)]
    assert hub.count("/api/models") == 3
    assert all(request.query["filter"] == ["lora"] for request in hub.find("/api/models"))


def test_a_limit_stops_asking(hub: HubServer, api: HfApi) -> None:
    for i in range(5):
        hub.add_repo(f"me/r{i}")
    assert len(list(api.list_models(limit=2))) == 2
    assert hub.count() == 1


def test_a_new_commit_comes_first_without_repeating_others(hub: HubServer, api: HfApi) -> None:
    hub.page_size = 1
    for i in range(3):
        hub.add_repo(f"me/r{i}", last_modified=f"2026-01-0{i + 1}T00:00:00Z")
    models = iter(api.list_models(sort="last_modified", expand=["lastModified"]))
    ids = [next(models).id]
    hub.commit("me/r0", {"new": "1"})  # moves to the front, which has been read already
    assert [*ids, *(model.id for model in models)] == ["me/r2", "me/r1"]
    assert next(iter(api.list_models(sort="last_modified", limit=1))).id == "me/r0"


@pytest.mark.parametrize("name", ["baseModels", "childrenModelCount", "usedStorage", "nonsense"])
def test_a_listing_refuses_expands_that_it_does_not_have(api: HfApi, name: Any) -> None:
    with pytest.raises(BadRequestError):
        list(api.list_models(expand=[name]))


def test_a_listing_can_be_full_of_nonsense(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("me/odd", {"../x": "1"}, overrides={"cardData": [1], "downloads": "many"})
    odd: Any = next(iter(api.list_models(expand=["cardData", "downloads", "siblings"])))
    assert (odd.card_data, odd.downloads) == ([1], "many")
    assert [s.rfilename for s in odd.siblings] == ["../x"]


@pytest.mark.parametrize(
    "front",
    ["a: [", "- just\n- a list", "a: &x [1]\nb: *x", "a: " + "[" * 3000],
    ids=["broken", "list", "alias", "deep"],
)
def test_a_card_that_cannot_be_read_is_shown_as_none(
    hub: HubServer, api: HfApi, front: str
) -> None:
    hub.add_repo("me/odd", {"README.md": f"---\n{front}\n---\n"})
    assert api.model_info("me/odd").card_data is None


# One model


def test_a_model_shows_itself_its_files_and_their_ids(
    hub: HubServer, api: HfApi, adapter: str
) -> None:
    info = api.model_info(adapter, files_metadata=True)
    files = {s.rfilename: s for s in info.siblings or []}
    config, weights = files["adapter_config.json"], files["adapter_model.safetensors"]
    assert (config.blob_id, config.lfs) == (git_hash(CONFIG.encode()), None)
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.size == weights.lfs.size == len(WEIGHTS)
    assert info.config == {"peft": {"base_model_name_or_path": BASE}}
    assert api.model_info(adapter, expand=["usedStorage"]).used_storage == sum(
        map(len, hub.files(adapter).values())
    )


def test_a_tree_lists_folders_and_pages(hub: HubServer, api: HfApi, adapter: str) -> None:
    hub.page_size = 2
    everything = {entry.path for entry in api.list_repo_tree(adapter, recursive=True)}
    assert everything == {"math", *hub.files(adapter)}
    assert hub.count("*/tree/*") == 3
    top = [entry.path for entry in api.list_repo_tree(adapter)]
    assert top == ["README.md", "adapter_config.json", "adapter_model.safetensors", "math"]
    below = [entry.path for entry in api.list_repo_tree(adapter, "math", expand=True)]
    assert below == ["math/adapter_config.json", "math/adapter_model.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(adapter, "nowhere"))


def test_paths_info_leaves_out_what_is_not_there(api: HfApi, adapter: str) -> None:
    infos = api.get_paths_info(adapter, ["math", "README.md", "nothing"], expand=True)
    assert [info.path for info in infos] == ["math", "README.md"]
    assert infos[1].last_commit is not None


def test_refs_commits_and_tags(hub: HubServer, api: HfApi, adapter: str) -> None:
    first = hub.sha(adapter)
    api.create_branch(adapter, branch="code/v2")
    second = hub.commit(adapter, {"README.md": None}, "drop the card", branch="code/v2")
    api.create_tag(adapter, tag="v1", revision=first)
    refs = api.list_repo_refs(adapter, include_pull_requests=True)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": first, "code/v2": second}
    assert {t.name: t.target_commit for t in refs.tags} == {"v1": first}
    assert [c.commit_id for c in api.list_repo_commits(adapter, revision="code/v2")] == [
        second,
        first,
    ]
    assert api.model_info(adapter, revision="v1").sha == first
    assert not api.file_exists(adapter, "README.md", revision="code/v2")
    api.delete_tag(adapter, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(adapter, revision="v1")


def test_the_same_calls_give_the_same_commits() -> None:
    def shas() -> list[str]:
        hub = HubServer()
        hub.add_repo("me/a", FILES)
        return [hub.sha("me/a"), hub.commit("me/a", {"x": "1"}), hub.force_push("me/a", FILES)]

    assert shas() == shas()
    assert len(set(shas())) == 3


def test_a_rewritten_history_loses_its_commits(hub: HubServer, api: HfApi, adapter: str) -> None:
    old = hub.sha(adapter)
    new = hub.force_push(adapter, FILES)
    assert api.model_info(adapter).sha == new
    with pytest.raises(RevisionNotFoundError):
        api.model_info(adapter, revision=old)


# Who may


def test_a_missing_and_a_private_repo_look_the_same(
    hub: HubServer, api: HfApi, anonymous: HfApi
) -> None:
    hub.add_repo("you/secret", FILES, private=True)
    for client, status in ((api, 404), (anonymous, 401)):
        for repo in ("you/secret", "you/missing"):
            with pytest.raises(RepositoryNotFoundError) as caught:
                client.model_info(repo)
            assert caught.value.response.status_code == status
            assert not isinstance(caught.value, GatedRepoError)
    owner = HfApi(endpoint=hub.url, token=hub.add_user("you"))
    assert owner.model_info("you/secret").private
    assert [model.id for model in owner.list_models()] == ["you/secret"]


def test_a_gated_repo_shows_itself_but_not_its_files(
    hub: HubServer, api: HfApi, anonymous: HfApi
) -> None:
    hub.add_repo("you/gated", FILES, gated="manual")
    for client, status in ((api, 403), (anonymous, 401)):
        assert client.model_info("you/gated").gated == "manual"
        with pytest.raises(GatedRepoError) as caught:
            client.hf_hub_download("you/gated", "adapter_config.json")
        assert caught.value.response.status_code == status
    hub.grant("you/gated", "me")
    assert Path(api.hf_hub_download("you/gated", "adapter_config.json")).read_text() == CONFIG


def test_a_disabled_repo_says_so(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("you/gone", FILES, disabled=True)
    with pytest.raises(DisabledRepoError):
        api.model_info("you/gone")


def test_a_renamed_repo_redirects(hub: HubServer, api: HfApi, adapter: str) -> None:
    hub.rename(adapter, "me/renamed")
    assert api.model_info(adapter, files_metadata=True).id == "me/renamed"
    assert Path(api.hf_hub_download(adapter, "adapter_config.json")).read_text() == CONFIG


# Files


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "sha"])
def test_a_file_comes_with_its_commit_and_identity(
    hub: HubServer, api: HfApi, adapter: str, revision: str
) -> None:
    api.create_pull_request(adapter, "a change")
    revision = hub.sha(adapter) if revision == "sha" else revision
    for name, etag in (
        ("adapter_config.json", git_hash(CONFIG.encode())),
        ("math/adapter_model.safetensors", hashlib.sha256(WEIGHTS).hexdigest()),
    ):
        url = hf_hub_url(adapter, name, revision=revision, endpoint=hub.url)
        found = get_hf_file_metadata(url, token=False)
        assert (found.commit_hash, found.etag) == (hub.sha(adapter), etag)
        assert found.size == len(hub.files(adapter)[name])


def test_missing_files_and_revisions_are_told_apart(hub: HubServer, adapter: str) -> None:
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        hf_hub_download(adapter, "nothing", endpoint=hub.url)
    assert caught.value.response.headers["X-Repo-Commit"] == hub.sha(adapter)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(adapter, "README.md", revision="v9", endpoint=hub.url)


def test_a_cached_file_of_a_pinned_commit_costs_no_request(hub: HubServer, adapter: str) -> None:
    sha = hub.sha(adapter)
    for _ in range(2):
        hf_hub_download(adapter, "adapter_config.json", revision=sha, endpoint=hub.url)
    assert hub.count("*/resolve/*", method="HEAD") == 1
    assert hub.count("*/resolve/*", method="GET") == 1
    hub.stop()
    hf_hub_download(adapter, "adapter_config.json", revision=sha, endpoint=hub.url)


def test_a_snapshot_holds_every_file(hub: HubServer, adapter: str) -> None:
    folder = Path(snapshot_download(adapter, endpoint=hub.url, max_workers=2))
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    assert found == hub.files(adapter)


def test_a_safetensors_header_takes_one_ranged_request(
    hub: HubServer, api: HfApi, adapter: str
) -> None:
    sha = hub.sha(adapter)
    hub.reset_log()
    header = api.parse_safetensors_file_metadata(
        adapter, "math/adapter_model.safetensors", revision=sha
    )
    assert [t.shape for t in header.tensors.values()] == [[2], [2]]
    (request,) = hub.requests
    assert (request.method, request.range, request.status) == ("GET", "bytes=0-100000", 206)
    assert request.path == f"/{adapter}/resolve/{sha}/math/adapter_model.safetensors"
    assert request.authenticated


def test_a_long_safetensors_header_takes_two(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("me/long", {"x.safetensors": safetensors(2000)})
    assert len(api.parse_safetensors_file_metadata("me/long", "x.safetensors").tensors) == 2000
    assert hub.count("*/x.safetensors", status=206) == 2


@pytest.mark.parametrize(
    ("header", "status", "body"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-2", 206, b"89"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, None),
        ("bytes=5-2", 416, None),
    ],
)
def test_ranges(hub: HubServer, header: str, status: int, body: bytes | None) -> None:
    hub.add_repo("me/x", {"digits.txt": "0123456789"})
    url = f"{hub.url}/me/x/resolve/main/digits.txt"
    answer = get_session().get(url, headers={"Range": header})
    assert answer.status_code == status
    assert body is None or answer.content == body


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "C:\\x", "nul\0", "a//b", "é ü"])
def test_hostile_names_are_listed_and_served(hub: HubServer, api: HfApi, name: str) -> None:
    hub.add_repo("me/bad", {name: b"payload"})
    assert name in api.list_repo_files("me/bad")
    tree = [e.path for e in api.list_repo_tree("me/bad", recursive=True) if hasattr(e, "size")]
    assert tree == [name]
    url = f"{hub.url}/me/bad/resolve/main/{quote(name, safe='')}"
    assert get_session().get(url).content == b"payload"


# Writing


def test_a_repo_is_created_once(hub: HubServer, api: HfApi) -> None:
    url = api.create_repo("me/new", private=True)
    assert (url.repo_id, hub.repo("me/new").private) == ("me/new", True)
    assert set(hub.files("me/new")) == {".gitattributes"}
    assert api.create_repo("me/new", exist_ok=True) == f"{hub.url}/me/new"
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("me/new")
    assert caught.value.response.status_code == 409
    api.update_repo_settings("me/new", private=False, gated="auto")
    assert (hub.repo("me/new").private, hub.repo("me/new").gated) == (False, "auto")
    api.move_repo("me/new", "me/newer")
    api.delete_repo("me/newer")
    assert not api.repo_exists("me/newer")


def test_one_may_only_write_ones_own(hub: HubServer, api: HfApi, anonymous: HfApi) -> None:
    hub.add_repo("you/theirs", FILES)
    reader = HfApi(endpoint=hub.url, token=hub.add_user("you", role="read"))
    for client, status in ((api, 403), (reader, 403), (anonymous, 401)):
        with pytest.raises(HfHubHTTPError) as creating:
            client.create_repo("you/new")
        with pytest.raises(HfHubHTTPError) as committing:
            client.create_commit("you/theirs", [add("x.txt", b"1")], commit_message="x")
        statuses = [caught.value.response.status_code for caught in (creating, committing)]
        assert statuses == [status, status]
    assert set(hub.files("you/theirs")) == {*FILES}


def test_a_commit_adds_copies_and_deletes_at_once(hub: HubServer, api: HfApi, adapter: str) -> None:
    parent = hub.sha(adapter)
    new = safetensors(3)
    info = api.create_commit(
        adapter,
        [
            add("chat/adapter_model.safetensors", new),
            add("chat/adapter_config.json", b"{}"),
            add("adapter_config.json", CONFIG.encode()),  # as it was: the client leaves it out
            CommitOperationCopy("adapter_model.safetensors", "copy.safetensors"),
            CommitOperationDelete("math/"),
        ],
        commit_message="one commit",
        parent_commit=parent,
    )
    assert info.oid == hub.sha(adapter)
    assert [(c.title, c.author) for c in hub.commits(adapter)[:1]] == [("one commit", "me")]
    assert len(hub.commits(adapter)) == 2
    files = hub.files(adapter)
    assert files["chat/adapter_model.safetensors"] == new
    assert files["copy.safetensors"] == WEIGHTS
    assert not [path for path in files if path.startswith("math/")]
    (put,) = hub.find(method="PUT")
    assert (put.size, put.authenticated) == (len(new), False)
    assert hub.token not in repr(hub.requests)
    assert hub.count("*/verify") == 1


def test_what_is_stored_already_is_not_uploaded_again(
    hub: HubServer, api: HfApi, adapter: str
) -> None:
    api.create_repo("me/second")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="x.safetensors", repo_id="me/second")
    assert hub.files("me/second")["x.safetensors"] == WEIGHTS
    assert hub.count(method="PUT") == 0


def test_a_file_on_disk_is_uploaded(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
    api.create_repo("me/new")
    operation = CommitOperationAdd("w.safetensors", tmp_path / "w.safetensors")
    api.create_commit("me/new", [operation], commit_message="weights")
    assert hub.files("me/new")["w.safetensors"] == WEIGHTS


def test_a_stale_parent_is_refused(hub: HubServer, api: HfApi, adapter: str) -> None:
    parent = hub.sha(adapter)
    theirs = hub.commit(adapter, {"theirs.txt": "1"})
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(
            adapter, [add("mine.txt", b"1")], commit_message="x", parent_commit=parent
        )
    assert caught.value.response.status_code == 412
    assert hub.sha(adapter) == theirs


def test_a_card_is_checked_before_it_is_committed(hub: HubServer, api: HfApi, adapter: str) -> None:
    sha = hub.sha(adapter)
    for front in ("a: [", "base_model: /root/models/llama", "tags: lora"):
        card = f"---\n{front}\n---\n".encode()
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.create_commit(adapter, [add("README.md", card)], commit_message="card")
    with pytest.warns(UserWarning, match="empty or missing"):
        api.create_commit(adapter, [add("README.md", b"# none")], commit_message="card")
    assert [c.oid for c in hub.commits(adapter)][1] == sha


def test_a_pull_request_waits_until_it_is_merged(hub: HubServer, api: HfApi) -> None:
    hub.add_repo("you/theirs", FILES)
    before = hub.sha("you/theirs")
    info = api.create_commit(
        "you/theirs", [add("new.safetensors", WEIGHTS[:-1])], commit_message="An idea",
        create_pr=True,
    )  # fmt: skip
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert info.pr_url == f"{hub.url}/you/theirs/discussions/1"
    assert hub.sha("you/theirs") == before
    assert hub.sha("you/theirs", "refs/pr/1") == info.oid
    (listed,) = api.get_repo_discussions("you/theirs")
    assert (listed.title, listed.status, listed.is_pull_request) == ("An idea", "open", True)

    owner = HfApi(endpoint=hub.url, token=hub.add_user("you"))
    owner.comment_discussion("you/theirs", 1, "thanks")
    owner.merge_pull_request("you/theirs", 1)
    details = owner.get_discussion_details("you/theirs", 1)
    assert details.status == "merged"
    assert details.merge_commit_oid == hub.sha("you/theirs")
    assert [event.type for event in details.events] == ["comment", "comment", "status-change"]
    assert hub.files("you/theirs")["new.safetensors"] == WEIGHTS[:-1]


def test_a_pull_request_that_conflicts_is_not_merged(
    hub: HubServer, api: HfApi, adapter: str
) -> None:
    for content in (b"mine", b"ours"):
        api.create_commit(adapter, [add("x.txt", content)], commit_message="x", create_pr=True)
    api.merge_pull_request(adapter, 1)
    assert api.get_discussion_details(adapter, 2).conflicting_files == ["x.txt"]
    with pytest.raises(HfHubHTTPError):
        api.merge_pull_request(adapter, 2)
    assert hub.files(adapter)["x.txt"] == b"mine"


def test_a_body_of_unknown_length_is_read_to_its_end(hub: HubServer) -> None:
    url = f"{hub.url}/api/validate-yaml"
    parts = [b'{"content": ', b'"---\\ntags: lora\\n---\\n"}']
    for _ in range(2):  # twice: the connection is still in step
        answer = get_session().post(url, content=iter(parts))
        assert answer.json()["errors"] == [{"message": '"tags" must be an array'}]
    assert [request.size for request in hub.requests] == [sum(map(len, parts))] * 2


# Faults


def test_a_refused_page_is_asked_again_when_told(
    hub: HubServer, api: HfApi, adapter: str, waits: list[float]
) -> None:
    fault = hub.fail("/api/models", status=429, retry_after=7)
    hub.fail("/api/models", status=503)
    hub.fail("/api/models", status=429, headers={"RateLimit": '"api";r=0;t=55'})
    assert [model.id for model in api.list_models()] == [adapter]
    assert waits == [8.0, 2, 56.0]  # the client adds a second to what it is told
    assert [request.status for request in hub.requests] == [429, 503, 429, 200]
    assert fault.hits == 1


def test_model_info_is_not_retried(hub: HubServer, api: HfApi, adapter: str) -> None:
    hub.fail("/api/models/me/*", status=503)
    with pytest.raises(HfHubHTTPError):
        api.model_info(adapter)
    assert hub.count() == 1
    assert api.model_info(adapter).id == adapter


def test_a_cut_body_is_resumed_where_it_ended(
    hub: HubServer, adapter: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps whole chunks only: of a file below 10 MB it would keep nothing.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 8)
    hub.fail("*/adapter_model.safetensors", cut=20)
    path = hf_hub_download(adapter, "adapter_model.safetensors", endpoint=hub.url)
    assert Path(path).read_bytes() == WEIGHTS
    ranges = [request.range for request in hub.find("*/resolve/*", method="GET")]
    assert ranges == [None, "bytes=16-"]


def test_a_file_cut_short_is_noticed_by_the_client(hub: HubServer, adapter: str) -> None:
    hub.fail("*/adapter_model.safetensors", truncate=20)
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(adapter, "adapter_model.safetensors", endpoint=hub.url)


def test_a_flipped_byte_is_not_noticed_by_the_client(hub: HubServer, adapter: str) -> None:
    hub.fail("*/adapter_model.safetensors", flip=3)
    path = Path(hf_hub_download(adapter, "adapter_model.safetensors", endpoint=hub.url))
    assert path.read_bytes() != WEIGHTS
    assert len(path.read_bytes()) == len(WEIGHTS)


def test_faults_take_turns(hub: HubServer, api: HfApi, adapter: str) -> None:
    hub.fail("*/README.md", method="GET", status=500, after=1, times=2, message="No luck")
    url = f"{hub.url}/{adapter}/resolve/main/README.md"
    statuses = [get_session().get(url).status_code for _ in range(5)]
    assert statuses == [200, 500, 500, 200, 200]
    hub.fail("*", status=500, times=None)
    assert get_session().get(url).status_code == 500
    hub.heal()
    assert get_session().get(url).status_code == 200


def test_a_lost_answer_has_done_its_work(hub: HubServer, api: HfApi, adapter: str) -> None:
    hub.fail("*/commit/main", lost=True)
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit(adapter, [add("x.txt", b"1")], commit_message="x")
    assert hub.files(adapter)["x.txt"] == b"1"
    hub.fail("*/commit/main", drop=True)
    with pytest.raises(Exception, match="disconnected"):
        api.create_commit(adapter, [add("y.txt", b"1")], commit_message="y")
    assert "y.txt" not in hub.files(adapter)


def test_a_held_answer_waits_for_the_test(hub: HubServer, adapter: str, waits: list[float]) -> None:
    fault = hub.fail("*/adapter_model.safetensors", cut=20, hold=threading.Event())
    got: list[str] = []
    download = threading.Thread(
        target=lambda: got.append(
            hf_hub_download(adapter, "adapter_model.safetensors", endpoint=hub.url)
        )
    )
    download.start()
    assert fault.reached.wait(60)
    assert not got
    assert fault.hold is not None
    fault.hold.set()
    download.join(60)
    assert Path(got[0]).read_bytes() == WEIGHTS
    assert len(waits) == 1


def test_a_stopped_hub_is_gone_and_comes_back(
    hub: HubServer, api: HfApi, adapter: str, waits: list[float]
) -> None:
    api.model_info(adapter)  # leaves a connection open
    hub.stop()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(adapter, "README.md", endpoint=hub.url)
    with pytest.raises(Exception, match="refused"):
        list(api.list_models())
    assert waits == [1, 2, 4, 8, 8] * 2
    hub.start()
    assert api.model_info(adapter).sha == hub.sha(adapter)


# As a process


@pytest.fixture
def process(tmp_path: Path) -> Iterator[str]:
    """The url of a server started by hand on a folder."""
    folder = tmp_path / "repos" / "me" / "adapter" / "math"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    command = [sys.executable, "-m", "tests.hub_server", "--folder", str(tmp_path / "repos")]
    root = Path(__file__).parents[2]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert child.stdout is not None
    yield child.stdout.readline().strip()
    child.send_signal(signal.SIGTERM)
    child.stdout.close()
    assert child.wait(60) == 0


def test_a_folder_can_be_served_by_hand(process: str) -> None:
    api = HfApi(endpoint=process, token=False)
    assert [model.id for model in api.list_models()] == ["me/adapter"]
    header = api.parse_safetensors_file_metadata("me/adapter", "math/adapter_model.safetensors")
    assert len(header.tensors) == 2


def test_children_find_the_hub_by_their_environment(hub: HubServer, adapter: str) -> None:
    code = (
        "from huggingface_hub import HfApi, constants, get_token\n"
        "assert get_token() is None and constants.HF_HUB_DISABLE_XET\n"
        f"print(HfApi().model_info({adapter!r}).sha)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert child.stdout.strip() == hub.sha(adapter)
    assert not hub.requests[0].authenticated
