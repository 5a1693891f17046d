"""Some files and adapters of a repo, against a Hub on loopback."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorahub_registry.errors import BrokenAdapter, HubError
from lorahub_registry.hub.parts import pull_parts
from lorahub_registry.refs import AdapterRef
from lorahub_registry.settings import Settings
from tests.hub.conftest import Told
from tests.hub.made import adapter, card, config
from tests.hub_server import HubServer

REPO = AdapterRef.parse("me/parts")


@pytest.fixture
def parts(hub: HubServer) -> HubServer:
    """Two adapters, one below the other, a third without weights, and a file beside them."""
    files = adapter("in/a") | adapter("in/a/b", fill=2) | {"in/none/adapter_config.json": config()}
    hub.add_repo(REPO.repo, {**files, "in/x.pt": b"x" * 99, "in/y.pt": b"y", "README.md": card()})
    return hub


def test_paths_count_from_the_subfolder(parts: HubServer, settings: Settings) -> None:
    got = pull_parts(AdapterRef.parse("me/parts/in"), ["x.pt"], ["a"], settings=settings)
    assert (got.repo, got.commit) == (REPO.repo, parts.sha(REPO.repo))
    assert (got.folder / "x.pt").read_bytes() == b"x" * 99
    names = sorted(p.relative_to(got.folder).as_posix() for p in got.folder.rglob("*.*"))
    assert names == ["a/adapter_config.json", "a/adapter_model.safetensors", "x.pt"]


def test_a_repo_that_was_renamed_is_said(parts: HubServer, settings: Settings, told: Told) -> None:
    parts.rename(REPO.repo, "me/other")
    got = pull_parts(REPO, ["in/x.pt"], [], settings=settings, progress=told)
    assert got.repo == "me/other"
    assert told.warned == ["me/parts is called me/other now"]


def test_an_adapter_without_weights_is_refused(parts: HubServer, settings: Settings) -> None:
    with pytest.raises(BrokenAdapter, match=r"me/parts/in/none: no adapter_model\.safetensors"):
        pull_parts(REPO, ["in/x.pt"], ["in/none"], settings=settings)
    assert parts.count("*/resolve/*") == 0


def test_offline_a_damaged_or_missing_file_is_not_taken(
    parts: HubServer, settings: Settings, told: Told
) -> None:
    got = pull_parts(REPO, ["in/x.pt"], ["in/a"], settings=settings)
    offline = replace(settings, offline=True)
    assert pull_parts(REPO, ["in/x.pt"], ["in/a"], settings=offline, progress=told) == got
    assert told.warned == [f"offline: me/parts as the cache has it, at {got.commit[:12]}"]
    with pytest.raises(HubError, match="offline mode is on"):
        pull_parts(REPO, ["in/y.pt"], ["in/a"], settings=offline)
    with pytest.raises(HubError, match="offline mode is on"):
        pull_parts(REPO, ["in/x.pt"], ["in/a/b"], settings=offline)
    weights = (got.folder / "in/a/adapter_model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BrokenAdapter, match="damaged, its checksum is another"):
        pull_parts(REPO, ["in/x.pt"], ["in/a"], settings=offline)
