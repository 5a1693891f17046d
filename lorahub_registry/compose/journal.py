"""Evaluations of a run that has not ended, one JSON line each, so that a killed run goes on.

A search is deterministic, so nothing of its state is kept: a resumed run asks the same candidates
again and finds their values here. Lines are keyed by scope (which rows, which adapters) and
coefficients, and hold floats as Python writes them, which read back to the same bit. A line that a
kill cut off is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorahub_registry.compose.objective import Coefficients, Loss, Losses
from lorahub_registry.errors import OutputError
from lorahub_registry.evaluate.tokens import Encoded

_VERSION = 1


def rows_digest(rows: Sequence[Encoded]) -> str:
    """Names rows as the model sees them: tokenizer, template and selection are all in it."""
    ids = json.dumps([(row.prompt, row.output) for row in rows])
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


class Journal:
    """What is known of an unfinished run.

    Args:
        path: its file, made with the first entry; None: nothing is kept.

    Attributes:
        found: how many evaluations an earlier run had left.
        used: how many of them this run has asked for.

    Raises:
        OutputError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[tuple[str, Coefficients], Loss] = {}
        self._answered: set[tuple[str, Coefficients]] = set()
        self._file: Any = None
        if path is not None and path.is_file():
            self._read(path)
        self.found, self.used = len(self._known), 0

    @property
    def known(self) -> int:
        """How many evaluations it holds by now."""
        return len(self._known)

    def put(self, scope: str, coefficients: Coefficients, loss: Loss) -> None:
        """Keep ``loss``; it survives a kill of this process from here on."""
        key = scope, coefficients
        if key in self._known:
            return
        self._known[key] = loss
        if self._path is None:
            return
        line = {
            "v": _VERSION, "scope": scope, "c": coefficients, "nll": loss.nll, "slope": loss.slope
        }  # fmt: skip
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _end_line(self._path)
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"{self._path}: the journal cannot be written: {error.strerror or error}"
            ) from None

    def through(self, scope: str, losses: Losses, copies: int = 1) -> Losses:
        """``losses``, asked only for what is not known yet.

        Args:
            copies: so many candidates share one forward. Who shares it may change the last bits,
                so what a killed run left unfinished is asked again as a whole, in the company that
                it has in an unbroken run.
        """

        def measured(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
            asked = [c for c in dict.fromkeys(candidates) if (scope, c) not in self._answered]
            parts = [asked[i : i + copies] for i in range(0, len(asked), copies)]
            lacking = [
                c
                for part in parts
                if any((scope, c) not in self._known for c in part)
                for c in part
            ]
            missing, new = set(lacking), losses(lacking)
            for c in candidates:
                key = scope, c
                if key not in self._answered:
                    self._answered.add(key)
                    if c in missing:
                        self.put(scope, c, next(new))
                    else:
                        self.used += 1
                yield self._known[key]
            for _ in new:  # nothing more comes, but it may have something to take off
                pass

        return measured

    def close(self) -> None:
        """Leave the file for a later run."""
        file, self._file = self._file, None
        if file is not None:
            # On a full disk what put could not write is tried again, and was told already.
            with suppress(OSError):
                file.close()

    def forget(self) -> None:
        """The run is at its end: delete the file."""
        self.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise OutputError(f"{path}: the journal cannot be read: {error.strerror}") from None
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if entry["v"] == _VERSION:
                    slope = entry["slope"] and tuple(map(float, entry["slope"]))
                    loss = Loss(float(entry["nll"]), slope)
                    self._known[entry["scope"], tuple(map(float, entry["c"]))] = loss
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # cut off by a kill: it will be measured again


def _end_line(path: Path) -> None:
    """End a line that was cut off, so that the next one is whole."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
