"""``lorareg.lock``: the commit and SHA-256 of everything that went into a mixture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorahub_registry.errors import LockError

LOCK_NAME = "lorareg.lock"
_VERSION = 1
_RECIPE = "recipe: another method, seed, coefficient, template or other setting"


@dataclass(frozen=True)
class Pin:
    """One pinned thing: an adapter, the base, a data file.

    Attributes:
        ref: a Hub ref with its commit, or the name of something local.
        files: file name → SHA-256 (hex).
        digest: of the tensors' content, where it has tensors.
    """

    ref: str
    revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None


@dataclass(frozen=True)
class Lock:
    """Pins by role: ``base``, adapters by name, data by split; and the recipe's digest."""

    recipe: str
    base: Pin
    adapters: Mapping[str, Pin]
    data: Mapping[str, Pin] = field(default_factory=dict)

    def dumps(self) -> str:
        """JSON, stable key order."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def load(cls, path: Path) -> Lock:
        """Read a lock.

        Raises:
            LockError: not there, damaged, or of a later version.
        """
        try:
            raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
            version = raw.pop("version")
            if version != _VERSION:
                raise LockError(
                    f"{path}: written by a later lorareg (lock version {version})",
                    hint="pip install --upgrade lorareg",
                )
            return cls(
                recipe=raw["recipe"],
                base=_pin(raw["base"]),
                adapters={k: _pin(v) for k, v in raw["adapters"].items()},
                data={k: _pin(v) for k, v in raw["data"].items()},
            )
        except FileNotFoundError:
            raise LockError(f"{path}: no such lock") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LockError(f"{path}: not a lorareg lock ({error})") from None

    def check(self, now: Lock) -> None:
        """Whether ``now`` pins the same things.

        Raises:
            LockError: names everything that differs.
        """
        differs = [] if self.recipe == now.recipe else [_RECIPE]
        differs += [
            *_differ("base", self.base, now.base),
            *_differ_all("adapter", self.adapters, now.adapters),
            *_differ_all("data", self.data, now.data),
        ]
        if differs:
            raise LockError(
                "not what the lock pins:\n" + "\n".join(f"  {d}" for d in differs),
                hint="get the pinned files again, or compose without --lock to make a new one",
            )


def _pin(raw: dict[str, Any]) -> Pin:
    pin = Pin(**raw)
    texts = (pin.ref, pin.revision or "", pin.digest or "", *pin.files, *pin.files.values())
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a pin holds {texts!r}")
    return pin


def _differ_all(what: str, old: Mapping[str, Pin], new: Mapping[str, Pin]) -> list[str]:
    found = [f"{what} {name}: not in the lock" for name in sorted(new.keys() - old.keys())]
    found += [f"{what} {name}: in the lock only" for name in sorted(old.keys() - new.keys())]
    for name in sorted(old.keys() & new.keys()):
        found += _differ(f"{what} {name}", old[name], new[name])
    return found


def _differ(what: str, old: Pin, new: Pin) -> list[str]:
    if old.digest and new.digest and old.digest != new.digest:
        return [f"{what}: its tensors are others ({new.digest[:12]}, pinned {old.digest[:12]})"]
    if old.revision != new.revision:
        return [f"{what}: at {new.revision or 'no revision'}, pinned {old.revision or 'none'}"]
    return [
        f"{what}: {name} has another content"
        for name in sorted(old.files.keys() | new.files.keys())
        if old.files.get(name) != new.files.get(name)
    ]
