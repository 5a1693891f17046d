"""What the environment says: where the registry is, which Hub, whether to stay offline."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PUBLIC_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Settings:
    """The environment, read once a command.

    Attributes:
        home: folder of the registry (``LORAREG_HOME``; default ``$XDG_DATA_HOME/lorareg``).
        endpoint: the Hub (``HF_ENDPOINT``).
        offline: no request leaves this machine (``HF_HUB_OFFLINE``).
        debug: errors keep their traceback (``LORAREG_DEBUG``).
    """

    home: Path
    endpoint: str = PUBLIC_HUB
    offline: bool = False
    debug: bool = False

    @property
    def database(self) -> Path:
        """The registry's SQLite file."""
        return self.home / "registry.sqlite"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read ``env`` (``os.environ`` when None)."""
        env = os.environ if env is None else env
        return cls(
            home=_home(env),
            endpoint=env.get("HF_ENDPOINT", "").rstrip("/") or PUBLIC_HUB,
            offline=_true(env.get("HF_HUB_OFFLINE")) or _true(env.get("TRANSFORMERS_OFFLINE")),
            debug=_true(env.get("LORAREG_DEBUG")),
        )


def _home(env: Mapping[str, str]) -> Path:
    if given := env.get("LORAREG_HOME"):
        return Path(os.path.expanduser(given)).absolute()
    data = Path(env.get("XDG_DATA_HOME", ""))  # where it is relative, it does not count
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "lorareg"


def _true(value: str | None) -> bool:
    return (value or "").strip().upper() in {"1", "ON", "YES", "TRUE"}
