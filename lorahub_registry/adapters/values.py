"""Values of a config that somebody else wrote; what is wrong with them is collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Values:
    """Reads one key after the other; a wrong value adds to ``problems`` and reads as 1 or nothing.

    Args:
        raw: the config, without nulls.
        of: what stands before a key in messages (``expert_lora's ``).
    """

    def __init__(self, raw: Mapping[str, Any], of: str = "") -> None:
        self.raw = raw
        self.of = of
        self.problems: list[str] = []

    def whole(self, key: str, default: int | None, *, most: int = 2**31) -> int:
        """A whole number from 1 to ``most``."""
        value = self.raw.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            self.problems.append(f"{self.of}{key} is missing")
        elif type(value) is not int or not 1 <= value <= most:
            self.problems.append(
                f"{self.of}{key} is {short(value)}, not a whole number from 1 to {most}"
            )
        else:
            return value
        return 1

    def number(
        self, key: str, default: float | None, *, most: float = 1e9, above: bool = False
    ) -> float:
        """A number from 0 to ``most``; with ``above`` not 0 itself."""
        value = self.raw.get(key, default)
        if value is None:
            self.problems.append(f"{self.of}{key} is missing")
        elif (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 <= value <= most
            or (above and value == 0)
        ):
            least = "above 0" if above else "from 0"
            self.problems.append(
                f"{self.of}{key} is {short(value)}, not a number {least} to {most:g}"
            )
        else:
            return float(value)
        return 1.0

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{self.of}{key} is {short(value)}, neither true nor false")
        return value is True

    def text(self, key: str) -> str | None:
        """A name; None where there is none, or an empty one."""
        value = self.raw.get(key)
        if value is not None and (not isinstance(value, str) or len(value) > 4096):
            self.problems.append(f"{self.of}{key} is {short(value)}, not a name")
            return None
        return (value or "").strip() or None


def short(value: Any) -> str:
    """``value`` as it is quoted in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
