"""What the environment says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorahub_registry.settings import PUBLIC_HUB, Settings


def test_nothing_said_means_the_public_hub_and_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = Settings.from_environment({})
    assert found == Settings(home=tmp_path / ".local" / "share" / "lorareg")
    assert (found.endpoint, found.offline, found.debug) == (PUBLIC_HUB, False, False)
    assert found.database == found.home / "registry.sqlite"


def test_a_home_is_taken_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def home(**env: str) -> Path:
        return Settings.from_environment(env).home

    assert home(LORAREG_HOME="/a/b") == Path("/a/b")
    assert home(LORAREG_HOME="~/b") == tmp_path / "b"
    assert home(LORAREG_HOME="b") == tmp_path / "b"
    assert home(LORAREG_HOME="", XDG_DATA_HOME="/x") == Path("/x/lorareg")
    assert home(LORAREG_HOME="/a", XDG_DATA_HOME="/x") == Path("/a")
    assert home(XDG_DATA_HOME="relative") == tmp_path / ".local" / "share" / "lorareg"


def test_the_hub_is_the_endpoint_without_its_last_slash() -> None:
    assert Settings.from_environment({"HF_ENDPOINT": "http://x:1/"}).endpoint == "http://x:1"
    assert Settings.from_environment({"HF_ENDPOINT": ""}).endpoint == PUBLIC_HUB


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", " 1 "])
@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_said_by_either_variable(name: str, value: str) -> None:
    assert Settings.from_environment({name: value}).offline


@pytest.mark.parametrize("value", ["", "0", "false", "no", "off"])
def test_other_words_do_not_switch_anything_on(value: str) -> None:
    found = Settings.from_environment({"HF_HUB_OFFLINE": value, "LORAREG_DEBUG": value})
    assert not found.offline
    assert not found.debug


def test_the_real_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAREG_HOME", "/somewhere")
    assert Settings.from_environment().home == Path("/somewhere")
