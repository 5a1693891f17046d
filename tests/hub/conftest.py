"""A Hub for each test, and clients that find nothing but it."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.utils import _http

from lorahub_registry.hub.client import Hub
from lorahub_registry.registry.store import Registry
from lorahub_registry.settings import Settings
from tests.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running Hub. Child processes find it by their environment; in this process pass its url.

    Caches and tokens are the test's own, here and in children. Nobody is logged in.
    """
    home = tmp_path / "hf"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        yield server
    _http.close_session()


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client of user `me`."""
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def anonymous(hub: HubServer) -> HfApi:
    """The client of nobody."""
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits between attempts: noted here instead of waited for."""
    noted: list[float] = []

    class Clock:
        def __getattr__(self, name: str) -> Any:
            return noted.append if name == "sleep" else getattr(time, name)

    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", Clock())
    monkeypatch.setattr(Hub, "_pause", lambda _hub, seconds: noted.append(seconds))
    return noted


@pytest.fixture
def settings(hub: HubServer, tmp_path: Path) -> Settings:
    """What the environment of this test says."""
    return Settings(home=tmp_path / "home", endpoint=hub.url)


@pytest.fixture
def registry(settings: Settings) -> Iterator[Registry]:
    """An empty registry."""
    with Registry(settings.database) as found:
        yield found


@pytest.fixture
def logged_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The user `me` is logged in."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub.token


class Told:
    """Notes what a reader of the command line would see."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.tasks: list[tuple[str, float | None, float]] = []

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Any]:
        done = [0.0]

        class Task:
            def advance(self, n: float = 1) -> None:
                done[0] += n

            def describe(self, text: str) -> None:
                pass

        yield Task()
        self.tasks.append((title, total, done[0]))

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


@pytest.fixture
def told() -> Told:
    """Somebody who watches."""
    return Told()
