"""Push, against a Hub on loopback."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorahub_registry.errors import HubError, LoraregError, OutputError, UsageError
from lorahub_registry.hub.pull import pull
from lorahub_registry.hub.push import PushResult, push
from lorahub_registry.refs import AdapterRef
from lorahub_registry.settings import Settings
from tests.hub.conftest import Told
from tests.hub.made import adapter, card, config, weights
from tests.hub_server import HubServer

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "recipe.yaml",
    "lorareg.lock",
    "results.json",
    "loss.png",
}


@pytest.fixture
def mixture(tmp_path: Path, logged_in: str) -> Path:
    """A composed mixture's folder, by a user who is logged in."""
    folder = tmp_path / "out" / "my-mix"
    folder.mkdir(parents=True)
    for name, data in adapter().items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    (folder / "README.md").write_text(card(body="# Mix\n\nGood at https://example.org/home/x."))
    (folder / "recipe.yaml").write_text("name: my-mix\noutput: {path: out/my-mix}\n")
    (folder / "lorareg.lock").write_text("{}")
    (folder / "results.json").write_text('{"nll": 1.5}')
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    (folder / "journal.db").write_bytes(b"mine")
    return folder


def put(folder: Path, settings: Settings, repo: str = "me/mix", **options: Any) -> PushResult:
    return push(folder, repo, settings=settings, **options)


def writes(hub: HubServer) -> list[str]:
    """What was asked of the Hub that could change it."""
    asked = [r.path for r in hub.requests if r.method not in {"GET", "HEAD"}]
    return [path for path in asked if "validate-yaml" not in path and "preupload" not in path]


def test_one_commit_holds_all_of_it(
    hub: HubServer, settings: Settings, mixture: Path, told: Told
) -> None:
    result = put(mixture, settings, progress=told)
    assert {path for path in hub.files("me/mix") if path != ".gitattributes"} == FILES
    assert result.commit == hub.sha("me/mix")
    assert result.url == f"{hub.url}/me/mix"
    assert (result.changed, result.pr_url) == (True, None)
    assert dict(result.files) == {n: (mixture / n).stat().st_size for n in FILES}
    assert len(hub.commits("me/mix")) == 2  # the first one made the repo
    assert hub.count("*/commit/main") == 1
    assert told.said[0] == "not published: journal.db"
    pulled = pull(AdapterRef("me/mix"), settings=settings).adapters[0]
    assert pulled.record.base.name == "mistralai/Mistral-7B-v0.1"
    assert {file.name for file in pulled.record.files} == FILES - {"loss.png"}


def test_the_same_again_makes_no_commit(hub: HubServer, settings: Settings, mixture: Path) -> None:
    first = put(mixture, settings)
    again = put(mixture, settings)
    assert (again.commit, again.changed) == (first.commit, False)
    assert hub.count("*/commit/main") == 1
    (mixture / "results.json").write_text("{}")
    third = put(mixture, settings, message="Measured again")
    assert third.changed
    assert hub.commits("me/mix")[0].title == "Measured again"


def test_a_dry_run_asks_nothing(hub: HubServer, settings: Settings, mixture: Path) -> None:
    result = put(mixture, settings, dry_run=True)
    assert {name for name, _size in result.files} == FILES
    assert result.commit is None
    assert hub.requests == []


def test_a_private_repo(hub: HubServer, settings: Settings, mixture: Path) -> None:
    put(mixture, settings, private=True)
    assert hub.repo("me/mix").private
    hub.add_repo("me/open", {"x": "y"})
    before = hub.sha("me/open")
    with pytest.raises(HubError, match="exists and is public"):
        put(mixture, settings, "me/open", private=True)
    assert hub.sha("me/open") == before


def test_a_pull_request(hub: HubServer, settings: Settings, mixture: Path) -> None:
    hub.add_repo("you/theirs", {"x": "y"})
    before = hub.sha("you/theirs")
    result = put(mixture, settings, "you/theirs", create_pr=True)
    assert result.pr_url == f"{hub.url}/you/theirs/discussions/1"
    assert hub.sha("you/theirs") == before
    assert hub.sha("you/theirs", "refs/pr/1") == result.commit
    with pytest.raises(HubError, match="not allowed"):
        put(mixture, settings, "you/theirs")
    with pytest.raises(HubError, match="no such repo"):
        put(mixture, settings, "me/nothing", create_pr=True)
    assert hub.sha("you/theirs") == before


def test_a_repo_that_moved_on_is_not_overwritten(
    hub: HubServer, settings: Settings, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = hub.add_repo("me/mix", {"x": "y"}).head.oid
    theirs = hub.commit("me/mix", {"x": "z"})
    with pytest.raises(HubError, match="has changed on the Hub") as caught:
        put(mixture, settings, expected_parent=parent)
    assert "--create-pr" in (caught.value.hint or "")
    assert writes(hub) == []

    # And one that moves on between the look and the commit.
    moved = []

    def collect(*args: Any, **options: Any) -> Any:
        moved.append(hub.commit("me/mix", {"x": "w"}))
        return real(*args, **options)

    from huggingface_hub import HfApi

    real = HfApi.create_commit
    monkeypatch.setattr(HfApi, "create_commit", collect)
    with pytest.raises(HubError, match="has changed on the Hub"):
        put(mixture, settings, expected_parent=theirs)
    assert hub.sha("me/mix") == moved[0]
    assert set(hub.files("me/mix")) == {"x"}


def test_a_lost_answer_is_looked_for(
    hub: HubServer, settings: Settings, mixture: Path, told: Told, waits: list[float]
) -> None:
    hub.add_repo("me/mix", {"x": "y"})
    hub.fail("*/commit/main", lost=True)
    result = put(mixture, settings, progress=told)
    assert result.commit == hub.sha("me/mix")
    assert any("answer was lost" in text for text in told.said)

    (mixture / "results.json").write_text("{}")
    hub.fail("*/commit/main", drop=True)
    with pytest.raises(HubError, match="broke off"):
        put(mixture, settings)
    assert hub.sha("me/mix") == result.commit

    hub.fail("*/commit/main", lost=True)
    hub.fail("/api/models/me/mix", after=1, drop=True, times=None)
    with pytest.raises(HubError, match="cannot be told"):
        put(mixture, settings)


def test_a_lost_answer_to_a_pull_request(hub: HubServer, settings: Settings, mixture: Path) -> None:
    hub.add_repo("you/theirs", {"x": "y"})
    hub.fail("*/commit/main", lost=True)
    result = put(mixture, settings, "you/theirs", create_pr=True)
    assert result.pr_url == f"{hub.url}/you/theirs/discussions/1"
    assert result.commit == hub.sha("you/theirs", "refs/pr/1")


def test_a_failed_upload_leaves_the_repo_as_it_was(
    hub: HubServer, settings: Settings, mixture: Path, waits: list[float]
) -> None:
    before = hub.add_repo("me/mix", {"x": "y"}).head.oid
    for pattern in ("*/preupload/main", "*/objects/batch", "*/commit/main"):
        hub.fail(pattern, status=500, times=None)
        with pytest.raises(HubError):
            put(mixture, settings)
        hub.heal()
        assert hub.sha("me/mix") == before
    assert put(mixture, settings).changed


# What must not be published


@pytest.mark.parametrize(
    "name", sorted(FILES - {"adapter_model.safetensors", "adapter_config.json"})
)
@pytest.mark.parametrize(
    ("secret", "words"),
    [
        ("hf_" + "aB3" * 10, "an access token"),
        ("{token}", "an access token"),
        ("{home}/models/x", "the path of your home folder"),
        ("{folder}/x", "the path of the folder"),
        ("/home/somebody/models", "somebody's machine"),
        (r"C:\\Users\\Some Body\\x", "somebody's machine"),
    ],
)
def test_secrets_and_local_paths_are_refused_before_any_request(
    hub: HubServer, settings: Settings, mixture: Path, tmp_path: Path, name: str, secret: str,
    words: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    home = tmp_path / "people" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    text = secret.format(token=hub.token, home=home, folder=mixture) if "{" in secret else secret
    path = mixture / name
    path.write_bytes(path.read_bytes() + f"\n# see {text} there\n".encode())
    for dry_run in (True, False):
        with pytest.raises(OutputError, match=words) as caught:
            put(mixture, settings, dry_run=dry_run)
        assert str(path) in str(caught.value)
        assert hub.token not in str(caught.value)
        assert "aB3aB3" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", config(base="/opt/models/mistral"), "no Hub id"),
        ("adapter_config.json", config(base="./out/merged"), "no Hub id"),
        ("adapter_config.json", config(note="/root/x"), "machine|home folder"),
        ("adapter_config.json", "{", "not valid JSON"),
        ("adapter_model.safetensors", weights(trained_in="/home/me/run"), "somebody's machine"),
        ("README.md", card(base="models/mistral"), "no Hub id"),
        ("README.md", card(tags=["base_model:adapter:/opt/m"]), "no Hub id"),
        ("README.md", "---\na: [\n---\n", "not valid YAML"),
    ],
)
def test_what_means_nothing_elsewhere_is_refused(
    hub: HubServer, settings: Settings, mixture: Path, name: str, content: Any, words: str
) -> None:
    (mixture / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LoraregError, match=words):
        put(mixture, settings)
    assert hub.requests == []


def test_the_machine_s_name_is_refused(
    hub: HubServer, settings: Settings, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-box-17")
    (mixture / "results.json").write_text(json.dumps({"where": "gpu-box-17"}))
    with pytest.raises(OutputError, match="name of this machine"):
        put(mixture, settings)
    assert hub.requests == []


def test_a_link_that_leads_out_is_refused(
    hub: HubServer, settings: Settings, mixture: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    (mixture / "plot.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(OutputError, match="leads out"):
        put(mixture, settings)


def test_a_folder_that_is_no_adapter(settings: Settings, mixture: Path, tmp_path: Path) -> None:
    (mixture / "adapter_model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"no adapter_model\.safetensors"):
        put(mixture, settings)
    with pytest.raises(OutputError, match="no such folder"):
        put(tmp_path / "nothing", settings)


# Who


def test_nobody_is_logged_in(
    hub: HubServer, settings: Settings, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="nobody is logged in") as caught:
        put(mixture, settings)
    assert caught.value.hint == "hf auth login"
    assert hub.requests == []


def test_a_token_that_may_not_write(
    hub: HubServer, settings: Settings, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.add_user("me", role="read"))
    with pytest.raises(HubError, match="not allowed"):
        put(mixture, settings)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    with pytest.raises(HubError, match="does not know the token"):
        put(mixture, settings)


def test_where_it_cannot_go(settings: Settings, mixture: Path, hub: HubServer) -> None:
    for name in ("mix", "me/mix/sub", "me/mix@main", "../x"):
        with pytest.raises(UsageError):
            put(mixture, settings, name)
    with pytest.raises(HubError, match="offline"):
        put(mixture, replace(settings, offline=True))
    assert hub.requests == []


def test_a_mixture_without_a_card_is_told(
    hub: HubServer, settings: Settings, mixture: Path, told: Told, recwarn: pytest.WarningsRecorder
) -> None:
    (mixture / "README.md").write_text("# Mix\n")
    put(mixture, settings, progress=told)
    assert "no README.md with metadata" in told.warned[0]
    assert [w for w in recwarn if issubclass(w.category, UserWarning)] == []
