"""Every error a user can meet, as one tree.

    LoraregError                  known: the CLI prints it and exits 1
    ├── UsageError                the call itself is wrong: exits 2
    ├── AdapterError              an adapter's files cannot be used
    │   ├── ForeignFormat         not PEFT's: MLX, adapter-transformers, diffusers…
    │   └── BrokenAdapter         config or tensors are damaged or disagree
    ├── IncompatibleAdapters      adapters that cannot be mixed as asked
    ├── UnknownRef                no such adapter, base, file or mixture
    ├── AmbiguousRef              more than one thing has that name
    ├── RecipeError               a recipe that does not validate
    ├── DataError                 rows that cannot be read or used
    ├── BaseModelError            the base cannot be found, loaded or is another one
    ├── RegistryError             the SQLite file: not writable, newer, damaged
    ├── HubError                  what the Hub answered, or that it did not
    ├── LockError                 a file is not the one that was pinned
    ├── OutputError               where to write: exists, full, not allowed
    └── NotApplied                a written mixture that does nothing, or not what it should

Library code raises these; only ``cli/`` prints them. ``str(error)`` says what happened and to
which file or repo; ``error.hint`` says what to do next.
"""

from __future__ import annotations


class LoraregError(Exception):
    """Base of all known errors.

    Args:
        message: what happened, and to which file or repo.
        hint: what to do next, as a sentence or a command.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(LoraregError):
    """The call itself is wrong: an unknown sort key, a malformed range."""

    exit_code = 2


class AdapterError(LoraregError):
    """An adapter's files cannot be used."""


class ForeignFormat(AdapterError):
    """The files are somebody's adapter, but not PEFT's; the message names the format."""


class BrokenAdapter(AdapterError):
    """Config or tensors are damaged, hostile, or disagree with each other."""


class IncompatibleAdapters(LoraregError):
    """Adapters that cannot be mixed with each other, or by the method asked for."""


class UnknownRef(LoraregError):
    """Nothing has that name, id or path."""


class AmbiguousRef(LoraregError):
    """More than one thing answers to that name."""


class RecipeError(LoraregError):
    """A recipe that does not validate.

    Attributes:
        problems: one sentence each, with its line in the file.
    """

    def __init__(
        self, message: str, *, problems: tuple[str, ...] = (), hint: str | None = None
    ) -> None:
        super().__init__("\n".join([message, *(f"  {p}" for p in problems)]), hint=hint)
        self.problems = problems


class DataError(LoraregError):
    """Rows that cannot be read, or hold nothing to learn from or to score."""


class BaseModelError(LoraregError):
    """The base model cannot be found or loaded, or is another one than the adapters'."""


class RegistryError(LoraregError):
    """The registry's file is not writable, damaged, or newer than this program."""


class HubError(LoraregError):
    """The Hub refused, had nothing of that name, or could not be reached."""


class LockError(LoraregError):
    """A file is not the one that was pinned."""


class OutputError(LoraregError):
    """The place to write to exists already, is full, or may not be written."""


class NotApplied(LoraregError):
    """A written mixture that changes nothing, or not what was computed."""
