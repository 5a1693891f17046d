"""Pull, against a Hub on loopback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lorahub_registry.errors import (
    BaseModelError,
    BrokenAdapter,
    HubError,
    LoraregError,
    OutputError,
    UsageError,
)
from lorahub_registry.hub import cache
from lorahub_registry.hub.base import pull_base
from lorahub_registry.hub.client import LONGEST_WAIT, Hub
from lorahub_registry.hub.pull import PullResult, pull, resolve_commit
from lorahub_registry.refs import AdapterRef
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings
from tests.hub.conftest import Told
from tests.hub.made import BASE, adapter, card, config, weights
from tests.hub_server import HubServer

REPO = "uukuguy/speechless-multi-loras-r64"
LOCAL = "/opt/local/llm_models/huggingface.co/mistralai/Mistral-7B-v0.1"


@pytest.fixture
def many(hub: HubServer) -> str:
    """A repo with adapters two folders deep, whose configs name a path of its owner's machine."""
    files: dict[str, Any] = {
        "README.md": card(body="# Many\n\nSkills of many models."),
        "x.py": "x",
    }
    for fill, name in enumerate(("Intel/neural-chat", "bigcode/code", "meta/math"), 1):
        files |= adapter(name, fill=fill, base=LOCAL)
    files["bigcode/code/README.md"] = card(body="# Code\n\nIt writes Python.", tags=["code"])
    hub.add_repo(REPO, files, downloads=7, likes=3)
    return REPO


@pytest.fixture
def one(hub: HubServer) -> str:
    hub.add_repo("me/one", {**adapter(), "README.md": card(), "train.log": "long"})
    return "me/one"


def ref(text: str) -> AdapterRef:
    return AdapterRef.parse(text)


def cached() -> list[str]:
    """The names of all files in the cache."""
    root = Path(constants.HF_HUB_CACHE)
    return sorted(p.name for p in root.rglob("snapshots/*/**/*") if p.is_file())


# What is got


def test_every_adapter_of_a_repo_is_pulled_and_known(
    hub: HubServer, settings: Settings, registry: Registry, told: Told, many: str
) -> None:
    result = pull(ref(many), settings=settings, registry=registry, progress=told)
    sha = hub.sha(many)
    assert result.commit == sha
    assert [p.ref for p in result.adapters] == [
        f"{REPO}/{name}@{sha}" for name in ("Intel/neural-chat", "bigcode/code", "meta/math")
    ]
    for pulled in result.adapters:
        stored = registry.get(pulled.ref).record
        assert stored.local_path == str(pulled.folder)
        assert stored.weights == "local"
        assert (stored.base.name, stored.base.how) == ("mistralai/Mistral-7B-v0.1", "inferred")
        assert stored.base.declared == LOCAL
        assert stored.digest
        assert stored.ranks == {4: 2}
        assert (pulled.folder / "adapter_model.safetensors").is_file()
    repo = registry.repo("hub", REPO)
    assert repo is not None
    assert (repo.commit, repo.license, repo.downloads, repo.likes) == (sha, "apache-2.0", 7, 3)
    assert "Skills of many models" in repo.card
    assert len({p.record.digest for p in result.adapters}) == 3
    assert any("base inferred as mistralai/Mistral-7B-v0.1" in text for text in told.said)
    assert told.tasks[0] == (f"Pulling {REPO}", result.total_bytes, result.total_bytes)


def test_a_folder_s_own_card_counts_before_the_repo_s(
    settings: Settings, registry: Registry, many: str
) -> None:
    pull(ref(many), settings=settings, registry=registry)
    code = registry.get(f"{many}/bigcode/code").record
    assert code.description == "It writes Python."
    assert "code" in {skill.name for skill in code.skills}
    assert registry.get(f"{many}/meta/math").record.description == "Skills of many models."


def test_only_what_an_adapter_needs_is_got(settings: Settings, one: str, many: str) -> None:
    result = pull(ref(one), settings=settings)
    assert cached() == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert result.adapters[0].folder == cache.snapshot(one, result.commit)
    assert pull(ref(one), settings=settings, all_files=True).missing_bytes == len("long")
    assert "train.log" in cached()


def test_a_folder_of_the_repo_is_enough(
    hub: HubServer, settings: Settings, registry: Registry, many: str
) -> None:
    result = pull(ref(f"{many}/Intel"), settings=settings, registry=registry)
    assert [p.record.subfolder for p in result.adapters] == ["Intel/neural-chat"]
    assert not hub.find("*/resolve/*/meta/*")
    assert registry.counts()["adapters"] == 1


def test_a_second_pull_downloads_nothing(
    hub: HubServer, settings: Settings, registry: Registry, many: str
) -> None:
    first = pull(ref(many), settings=settings, registry=registry)
    assert first.missing_bytes == first.total_bytes > 0
    before = registry.get(f"{many}/meta/math")
    hub.reset_log()
    second = pull(ref(many), settings=settings, registry=registry)
    assert hub.count("*/resolve/*") == 0
    assert second.missing_bytes == 0
    assert second.adapters == first.adapters
    assert registry.get(f"{many}/meta/math") == before


def test_a_dry_run_downloads_and_writes_nothing(
    hub: HubServer, settings: Settings, registry: Registry, many: str
) -> None:
    result = pull(ref(many), settings=settings, registry=registry, dry_run=True)
    assert [found.subfolder for found in result.found] == [
        "Intel/neural-chat", "bigcode/code", "meta/math",
    ]  # fmt: skip
    assert result.missing_bytes == result.total_bytes > 0
    assert not result.adapters
    assert hub.count("*/resolve/*") == 0
    assert registry.counts()["repos"] == 0
    assert cached() == []


def test_a_revision_is_pinned_before_anything_else(
    hub: HubServer, settings: Settings, registry: Registry, one: str
) -> None:
    old = hub.sha(one)
    hub.tag(one, "v1")
    new = hub.commit(one, {"adapter_model.safetensors": weights(fill=9)})
    assert pull(ref(one), settings=settings, registry=registry).commit == new
    result = pull(ref(f"{one}@v1"), settings=settings, registry=registry)
    assert result.commit == old
    assert resolve_commit(one, "v1", settings=settings) == old
    # An older one is there to be used, but is not what the repo is now.
    assert registry.get(one).record.revision == new
    assert registry.get(f"{one}@{old}").record.digest == result.adapters[0].record.digest


def test_a_renamed_repo_is_stored_by_its_new_name(
    hub: HubServer, settings: Settings, told: Told, one: str
) -> None:
    hub.rename(one, "me/two")
    result = pull(ref(one), settings=settings, progress=told)
    assert result.repo == "me/two"
    assert told.warned == ["me/one is called me/two now"]


def test_the_user_s_word_on_the_base_counts(
    hub: HubServer, settings: Settings, registry: Registry, told: Told
) -> None:
    hub.add_repo("me/lost", adapter(base="../model"))
    pull(ref("me/lost"), settings=settings, registry=registry, progress=told)
    assert "--base" in told.warned[0]
    assert registry.get("me/lost").record.base.name is None
    pull(ref("me/lost"), settings=settings, registry=registry, base=BASE)
    base = registry.get("me/lost").record.base
    assert (base.name, base.how, base.declared) == (BASE, "given", "../model")


def test_a_pickle_is_stored_unread(
    hub: HubServer, settings: Settings, registry: Registry, told: Told
) -> None:
    canary = b"cos\nsystem\n(S'false'\ntR."
    hub.add_repo("me/old", {"adapter_config.json": config(), "adapter_model.bin": canary})
    result = pull(ref("me/old"), settings=settings, registry=registry, progress=told)
    record = registry.get("me/old").record
    assert (record.weights, record.digest, record.parameters) == ("pickle", None, None)
    assert (result.adapters[0].folder / "adapter_model.bin").read_bytes() == canary
    assert "lorareg convert" in told.warned[0]


def test_a_pickle_beside_safetensors_stays_there(hub: HubServer, settings: Settings) -> None:
    hub.add_repo("me/both", {**adapter(), "adapter_model.bin": b"pickle"})
    pull(ref("me/both"), settings=settings)
    assert "adapter_model.bin" not in cached()


def test_a_score_that_is_no_number_is_left_out(
    hub: HubServer, settings: Settings, registry: Registry
) -> None:
    front = (
        "model-index: [{name: x, results: [{task: {type: t}, dataset: {name: d}, "
        "metrics: [{type: acc, value: .nan}, {type: f1, value: 0.5}]}]}]"
    )
    hub.add_repo("me/nan", {**adapter(), "README.md": f"---\n{front}\n---\n"})
    pull(ref("me/nan"), settings=settings, registry=registry)
    assert [score.metric for score in registry.get("me/nan").record.scores] == ["f1"]


# What is wrong with a repo


def test_one_bad_adapter_does_not_stop_the_others(
    hub: HubServer, settings: Settings, registry: Registry, told: Told
) -> None:
    files = {
        **adapter("good"),
        **adapter("rank", r=64),
        "cut/adapter_config.json": config(),
        "cut/adapter_model.safetensors": weights()[:-5],
        "json/adapter_config.json": "{",
        "json/adapter_model.safetensors": weights(),
        "none/adapter_config.json": config(),
    }
    hub.add_repo("me/mixed", files)
    result = pull(ref("me/mixed"), settings=settings, registry=registry, progress=told)
    assert [p.record.subfolder for p in result.adapters] == ["good"]
    assert {r.ref.removeprefix("me/mixed/") for r in result.refused} == {
        "rank", "cut", "json", "none",
    }  # fmt: skip
    assert registry.counts()["adapters"] == 1
    assert len(told.warned) == 4
    with pytest.raises(BrokenAdapter, match=r"rank 4, but adapter_config\.json says 64"):
        pull(ref("me/mixed/rank"), settings=settings)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": "{}", "model.safetensors": weights()}, "a whole model"),
        ({"q4.gguf": "x"}, "GGUF"),
        ({"pytorch_lora_weights.safetensors": weights()}, "diffusers"),
        ({"adapters.safetensors": weights()}, "MLX"),
        ({"adapter_model.safetensors": weights()}, "without their config"),
        ({"notes.txt": "x"}, r"it has notes\.txt"),
    ],
)
def test_a_repo_without_adapters_says_what_it_is(
    hub: HubServer, settings: Settings, files: dict[str, Any], words: str
) -> None:
    hub.add_repo("me/other", files)
    with pytest.raises(HubError, match=words) as caught:
        pull(ref("me/other"), settings=settings)
    assert caught.value.hint


def test_a_wrong_folder_names_the_right_ones(settings: Settings, many: str) -> None:
    with pytest.raises(HubError, match="no adapter in nowhere") as caught:
        pull(ref(f"{many}/nowhere"), settings=settings)
    assert "bigcode/code" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a\\..\\x", "a\x00b", "..", "evil/../../adapter_config.json"],
)
def test_names_that_lead_out_are_refused_before_anything_is_written(
    hub: HubServer, settings: Settings, registry: Registry, tmp_path: Path, name: str
) -> None:
    hub.add_repo("me/hostile", {**adapter(), name: "x"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HubError, match="leads out of its folder"):
        pull(ref("me/hostile"), settings=settings, registry=registry, all_files=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert registry.counts()["repos"] == 0


def test_folders_that_differ_in_case_alone_are_not_mixed_up(
    hub: HubServer, settings: Settings
) -> None:
    hub.add_repo("me/case", {**adapter("Math"), **adapter("math", fill=2), **adapter("code")})
    result = pull(ref("me/case"), settings=settings)
    assert [p.record.subfolder for p in result.adapters] == ["code"]
    assert len(result.refused) == 2
    assert len(pull(ref("me/case/Math"), settings=settings).adapters) == 1


# What goes wrong on the way


def test_a_flipped_byte_is_noticed_and_deleted(
    hub: HubServer, settings: Settings, registry: Registry, one: str
) -> None:
    hub.fail("*/adapter_model.safetensors", flip=700)
    with pytest.raises(BrokenAdapter, match="arrived damaged") as caught:
        pull(ref(one), settings=settings, registry=registry)
    assert "again" in (caught.value.hint or "")
    assert "adapter_model.safetensors" not in cached()
    blobs = list((cache.storage(one) / "blobs").iterdir())
    assert all(blob.read_bytes() != weights() for blob in blobs)
    assert registry.counts()["repos"] == 0
    assert pull(ref(one), settings=settings, registry=registry).adapters


def test_a_flipped_byte_in_a_small_file_is_noticed(
    hub: HubServer, settings: Settings, one: str
) -> None:
    hub.fail("*/adapter_config.json", flip=3)
    with pytest.raises(BrokenAdapter, match="arrived damaged"):
        pull(ref(one), settings=settings)


def test_a_file_that_rots_in_the_cache_is_got_again(
    hub: HubServer, settings: Settings, one: str
) -> None:
    path = pull(ref(one), settings=settings).adapters[0].folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(whole[:-1] + b"?")
    hub.reset_log()
    pull(ref(one), settings=settings)
    assert path.read_bytes() == whole
    assert hub.count("*/resolve/*", method="GET") == 1


def test_a_damaged_file_of_one_adapter_leaves_the_others(
    hub: HubServer, settings: Settings, registry: Registry, many: str
) -> None:
    hub.fail("*/bigcode/code/adapter_model.safetensors", flip=700)
    result = pull(ref(many), settings=settings, registry=registry)
    assert [p.record.subfolder for p in result.adapters] == ["Intel/neural-chat", "meta/math"]
    assert [r.ref for r in result.refused] == [f"{many}/bigcode/code"]


CHILD = """
import sys
from lorahub_registry.hub.pull import pull
from lorahub_registry.refs import AdapterRef
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings
settings = Settings.from_environment()
pull(AdapterRef.parse(sys.argv[1]), settings=settings, registry=Registry(settings.database), jobs=1)
"""


def test_a_pull_that_is_killed_leaves_no_half_adapter(
    hub: HubServer,
    settings: Settings,
    registry: Registry,
    many: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORAREG_HOME", str(settings.home))
    held = hub.fail("*/code/adapter_model.safetensors", cut=400, hold=threading.Event())
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, many], cwd=Path(__file__).parents[2], env={**os.environ}
    )
    try:
        assert held.reached.wait(120)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    assert registry.counts()["adapters"] == registry.counts()["repos"] == 0
    sha = hub.sha(many)
    assert not (cache.snapshot(many, sha) / "bigcode/code/adapter_model.safetensors").exists()
    assert held.hold is not None
    held.hold.set()
    hub.heal()
    result = pull(ref(many), settings=settings, registry=registry)
    assert len(result.adapters) == registry.counts()["adapters"] == 3
    files = {p.record.digest for p in result.adapters}
    assert len(files) == 3


def test_a_full_disk_is_named(
    settings: Settings, registry: Registry, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "hf_hub_download", full)
    with pytest.raises(OutputError, match="disk is full"):
        pull(ref(one), settings=settings, registry=registry)
    assert registry.counts()["repos"] == 0


# Who may, and what is there


def test_a_missing_and_a_private_repo(
    hub: HubServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("you/secret", adapter(), private=True)
    for name in ("you/nothing", "you/secret"):
        with pytest.raises(HubError, match=f"{name}: no such repo") as caught:
            pull(ref(name), settings=settings)
        assert "hf auth login" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with pytest.raises(HubError) as caught:
        pull(ref("you/secret"), settings=settings)
    assert "hf auth whoami" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", hub.add_user("you"))
    assert pull(ref("you/secret"), settings=settings).adapters


def test_a_gated_repo_links_to_its_conditions(
    hub: HubServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("you/gated", adapter(), gated=True)
    with pytest.raises(HubError, match="accepted its conditions") as caught:
        pull(ref("you/gated"), settings=settings)
    assert f"{hub.url}/you/gated" in (caught.value.hint or "")
    assert "hf auth login" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.grant("you/gated", "me")
    assert pull(ref("you/gated"), settings=settings).adapters


def test_other_refusals_are_told_apart(
    hub: HubServer, settings: Settings, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="has no revision 'v9'"):
        pull(ref(f"{one}@v9"), settings=settings)
    hub.add_repo("me/off", adapter(), disabled=True)
    with pytest.raises(HubError, match="disabled"):
        pull(ref("me/off"), settings=settings)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not know the token"):
        pull(ref(one), settings=settings)


def test_an_unreachable_hub_fails_at_once(
    hub: HubServer, settings: Settings, one: str, waits: list[float]
) -> None:
    hub.stop()
    with pytest.raises(HubError, match="cannot be reached") as caught:
        pull(ref(one), settings=settings)
    assert "HF_ENDPOINT" in (caught.value.hint or "")
    assert waits == []


def test_a_hub_that_dies_during_the_downloads_is_named(
    hub: HubServer, settings: Settings, registry: Registry, one: str, waits: list[float]
) -> None:
    hub.fail("*/resolve/*", drop=True, times=None)
    with pytest.raises(HubError, match="broke off"):
        pull(ref(one), settings=settings, registry=registry)
    hub.heal()
    hub.fail("*/resolve/*", status=503, times=None)
    with pytest.raises(HubError, match="status 503"):
        pull(ref(one), settings=settings, registry=registry)
    assert registry.counts()["repos"] == 0


def test_a_busy_hub_is_waited_for_as_long_as_it_says(
    hub: HubServer, settings: Settings, told: Told, one: str, waits: list[float]
) -> None:
    hub.fail("/api/models/me/one", status=429, retry_after=7)
    hub.fail("/api/models/me/one", status=503)
    assert pull(ref(one), settings=settings, progress=told).adapters
    assert waits == [8, 2]
    assert any("asking again in 8 s" in text for text in told.said)
    hub.fail("/api/models/me/one", status=429, retry_after=LONGEST_WAIT + 1)
    with pytest.raises(HubError, match="asks to wait"):
        pull(ref(one), settings=settings)
    assert waits == [8, 2]


def test_what_the_client_says_goes_to_the_reader(
    hub: HubServer, settings: Settings, told: Told, one: str, waits: list[float],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub.fail("*/adapter_model.safetensors", method="GET", status=429, retry_after=4)
    pull(ref(one), settings=settings, progress=told)
    assert any("Waiting 5" in text for text in told.said)
    assert capfd.readouterr() == ("", "")


def test_an_answer_that_no_hub_gives(hub: HubServer, settings: Settings, one: str) -> None:
    hub.fail("/api/models/me/one", method="GET", truncate=9)
    with pytest.raises(HubError, match="no Hub gives"):
        pull(ref(one), settings=settings)


# Offline


def off(settings: Settings) -> Settings:
    return replace(settings, offline=True)


def test_offline_takes_what_is_cached(
    hub: HubServer, settings: Settings, registry: Registry, told: Told, many: str
) -> None:
    first = pull(ref(many), settings=settings, registry=registry)
    hub.reset_log()
    hub.stop()
    for text in (many, f"{many}@{first.commit}", f"{many}/meta"):
        again = pull(ref(text), settings=off(settings), registry=registry, progress=told)
        wanted = [p for p in first.adapters if p.ref.startswith(text.partition("@")[0])]
        assert [p.ref for p in again.adapters] == [p.ref for p in wanted]
        assert [p.record.digest for p in again.adapters] == [p.record.digest for p in wanted]
    assert resolve_commit(many, settings=off(settings)) == first.commit
    assert "may hold others" in told.warned[0]
    assert hub.requests == []


def test_offline_without_a_cache_is_an_error(
    hub: HubServer, settings: Settings, registry: Registry, many: str
) -> None:
    for call in (
        lambda: pull(ref(many), settings=off(settings), registry=registry),
        lambda: resolve_commit(many, settings=off(settings)),
        lambda: pull_base(many, settings=off(settings)),
        lambda: Hub(off(settings)).info(many),
    ):
        with pytest.raises(HubError, match="offline mode is on") as caught:
            call()
        assert "HF_HUB_OFFLINE" in (caught.value.hint or "")
    assert hub.requests == []


def test_offline_refuses_what_is_damaged_or_in_part(
    settings: Settings, registry: Registry, one: str
) -> None:
    result: PullResult = pull(ref(one), settings=settings, registry=registry)
    path = result.adapters[0].folder / "adapter_model.safetensors"
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(weights(fill=7))
    with pytest.raises(BrokenAdapter, match="damaged"):
        pull(ref(one), settings=off(settings))
    path.unlink()
    with pytest.raises(BrokenAdapter, match="only a part"):
        pull(ref(one), settings=off(settings))


# Bases

MODEL = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer.model": b"\0x",
    "merges.txt": "a b",
    "chat_template.jinja": "x",
    "model-00001-of-00002.safetensors": weights(),
    "model-00002-of-00002.safetensors": weights(fill=2),
    "model.safetensors.index.json": '{"weight_map": {"a": "model-00001-of-00002.safetensors", '
    '"b": "model-00002-of-00002.safetensors"}}',
}
UNWANTED = {
    "modeling_x.py": "raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": weights(),
    "model.fp16.safetensors": weights(),
    "onnx/model.onnx": b"x",
    "trainer_state.json": "{}",
    "README.md": card(),
}


def test_a_base_is_pinned_and_holds_neither_pickles_nor_code(
    hub: HubServer, settings: Settings, told: Told
) -> None:
    hub.add_repo("lab/base", {**MODEL, **UNWANTED})
    folder, commit = pull_base("lab/base", settings=settings, progress=told)
    assert commit == hub.sha("lab/base")
    assert {p.name for p in folder.iterdir()} == set(MODEL)
    assert told.tasks[0][1] == told.tasks[0][2]
    hub.stop()
    assert pull_base("lab/base", settings=off(settings)) == (folder, commit)
    assert pull_base("lab/base", commit, settings=off(settings)) == (folder, commit)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HubError, match="offline"):
        pull_base("lab/base", settings=off(settings))


def test_a_base_that_is_none(hub: HubServer, settings: Settings, one: str) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        pull_base(one, settings=settings)
    hub.add_repo("lab/old", {"config.json": "{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(BaseModelError, match="pickles only"):
        pull_base("lab/old", settings=settings)
    assert cached() == []


def test_a_damaged_base_is_noticed(hub: HubServer, settings: Settings) -> None:
    hub.add_repo("lab/base", MODEL)
    hub.fail("*/model-00002-of-00002.safetensors", flip=700)
    with pytest.raises(BrokenAdapter, match="arrived damaged"):
        pull_base("lab/base", settings=settings)
    assert "model-00002-of-00002.safetensors" not in cached()
    assert pull_base("lab/base", settings=settings)


def test_what_can_be_no_repo(settings: Settings) -> None:
    with pytest.raises((UsageError, LoraregError)):
        pull_base("not a repo", settings=settings)
