"""A training run that has not come to its end: whose it is, and its log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry.api.papers import finite
from lorahub_registry.card import LOG_NAME
from lorahub_registry.errors import OutputError, UsageError

if TYPE_CHECKING:
    from lorahub_registry.train.learner import Learner

_KEY = ".key"


def agree(out: Path, key: Mapping[str, Any], *, force: bool) -> None:
    """Whether what an earlier run left unfinished is this run's to go on with.

    Hours of training are not thrown away because a file was changed meanwhile.

    Args:
        force: forget what is another's.

    Raises:
        OutputError: it is of another base, of other options, or of other data; it says of which.
    """
    from lorahub_registry.weights.stream.part import unfinished

    folder = unfinished(Path(os.path.realpath(out)))
    kept = folder / _KEY / "key.json"
    if kept.is_file():
        before = json.loads(kept.read_text("utf-8"))
        differs = _differences(before, json.loads(json.dumps(key)))
        if differs and not force:
            raise OutputError(
                f"{out}: an unfinished run is there, of another factory: {'; '.join(differs)}",
                hint="put that back as it was to go on, or give --force to begin anew",
            )


def sign(folder: Path, key: Mapping[str, Any]) -> None:
    """Say in an unfinished run's folder what it is of."""
    place = folder / _KEY
    place.mkdir(exist_ok=True)
    (place / "new").write_text(json.dumps(key), encoding="utf-8")
    os.replace(place / "new", place / "key.json")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    if before["base"] != now["base"]:
        found.append(f"its base is {before['base'].get('name')}, with other files or type")
    old, new = before["adapters"], now["adapters"]
    if gone := sorted(old.keys() ^ new.keys()):
        found.append(f"adapters that only one of them has: {', '.join(gone)}")
    for name in sorted(old.keys() & new.keys()):
        if old[name]["files"] != new[name]["files"]:
            kept = old[name]["files"]
            changed = [split for split, sha in new[name]["files"].items() if kept.get(split) != sha]
            found.append(f"{name}: its {' and '.join(changed) or 'data'} rows have changed")
        elif old[name] != new[name]:
            found += [f"{name}: {change}" for change in _changes(old[name], new[name])]
    return found


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
    """``training.max_steps was 200, is 150``, of everything that is another."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        return [
            change
            for key in keys
            for change in _changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path} was {json.dumps(old)}, is {json.dumps(new)}"]


class Logs:
    """Every step of every learner as a line of JSON; on request as TensorBoard's events, too."""

    def __init__(self, folder: Path, learners: Sequence[Learner], tensorboard: Path | None) -> None:
        self._files = {}
        for learner in learners:
            place = folder / learner.plan.name
            place.mkdir(exist_ok=True)
            path = place / LOG_NAME
            kept = []
            if path.is_file():  # steps after the checkpoint are taken again
                lines = path.read_text("utf-8").splitlines()
                kept = [text for text in lines if _is_kept(text, learner)]
            path.write_text("".join(f"{text}\n" for text in kept), encoding="utf-8")
            self._files[learner.number] = path.open("a", encoding="utf-8")
        self._boards = {}
        if tensorboard is not None:
            for learner in learners:
                writer = board_writer()
                events = str(tensorboard / learner.plan.name)
                self._boards[learner.number] = writer(events, purge_step=learner.at.step + 1)

    def entry(self, learner: Learner, facts: Mapping[str, Any]) -> None:
        """One line."""
        self._files[learner.number].write(json.dumps(finite(facts)) + "\n")
        board = self._boards.get(learner.number)
        for name, value in facts.items():
            if board is not None and name != "step" and isinstance(value, int | float):
                board.add_scalar(name, value, facts["step"])

    def flush(self) -> None:
        """What was logged survives a kill."""
        for file in [*self._files.values(), *self._boards.values()]:
            file.flush()

    def close(self) -> None:
        """No more lines."""
        for file in [*self._files.values(), *self._boards.values()]:
            file.close()


@contextmanager
def logs(folder: Path, learners: Sequence[Learner], tensorboard: Path | None) -> Iterator[Logs]:
    """Logs in each adapter's folder, going on after what its learner has done already."""
    opened = Logs(folder, learners, tensorboard)
    try:
        yield opened
    finally:
        opened.close()


def _is_kept(line: str, learner: Learner) -> bool:
    """Whether what a line tells of was done before the checkpoint."""
    at = learner.at
    try:
        facts = json.loads(line)
        step = facts["step"]
    except (ValueError, KeyError, TypeError):
        return False  # cut off by a kill
    if "eval_nll" in facts:
        return any(step == scored for scored, _ in at.validation)
    return bool(step <= at.step or ("diverged" in facts and at.state == "diverged"))


def board_writer() -> Any:
    """TensorBoard's writer of event files.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "TensorBoard is not installed", hint="pip install 'lorareg[tensorboard]'"
        ) from None
    return SummaryWriter
