"""Where results are written: the old folder or the new one, nothing between."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub_registry import __version__
from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.dynamic import FOLDER
from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.card import (
    FACTORY_NAME,
    GATES_NAME,
    LOG_NAME,
    LOSS_NAME,
    RECIPE_NAME,
    RESULTS_NAME,
    TRACE_NAME,
)
from lorahub_registry.errors import LoraregError, OutputError
from lorahub_registry.lock import LOCK_NAME
from lorahub_registry.progress import Progress

if TYPE_CHECKING:
    from lorahub_registry.weights.stream.part import Part

REPORT_NAME = "lorareg.json"
"""What made a folder, of what, and which files it holds: of models and adapters that streaming
commands write."""

ADAPTER_FILES = frozenset(
    {CONFIG_NAME, WEIGHTS_NAME, "README.md", LOCK_NAME, RESULTS_NAME}
    | {RECIPE_NAME, TRACE_NAME}
    | {FACTORY_NAME, LOG_NAME, LOSS_NAME, GATES_NAME}
    | {f"{FOLDER}/{CONFIG_NAME}", f"{FOLDER}/{WEIGHTS_NAME}"}
)
"""What stands in a mixture's or a trained adapter's folder, which has no report."""


def check_output(out: Path, *, force: bool, made_of: Sequence[Path] = ()) -> None:
    """Whether a result may be written to ``out``.

    Args:
        made_of: folders that it is made of, which no ``force`` replaces.

    Raises:
        OutputError: something is there, and ``force`` may not replace it.
    """
    real = Path(os.path.realpath(out))
    for folder in made_of:
        source = Path(os.path.realpath(folder))
        if source.is_relative_to(real) or real.is_relative_to(source):
            where = "holds" if source.is_relative_to(real) else "is inside of"
            raise OutputError(f"{out} {where} what this is made of", hint="name another folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file", hint="name another folder")
    if not any(out.iterdir()):
        return
    if not force:
        raise OutputError(f"{out} exists and is not empty", hint="--force replaces it")
    if foreign := sorted(_inside(out) - (_reported(out) or ADAPTER_FILES)):
        raise OutputError(
            f"{out} holds {foreign[0]}, which lorareg has not written; --force will not delete it",
            hint="name another folder",
        )


def _inside(folder: Path) -> set[str]:
    """The files in ``folder`` and below it, by their paths from there; and what folders are empty.

    Links are not followed.
    """
    found = set()
    for path in folder.rglob("*"):
        inner = path.is_dir() and not path.is_symlink() and any(path.iterdir())
        if not inner:
            found.add(path.relative_to(folder).as_posix())
    return found


def _reported(out: Path) -> set[str]:
    """The files that the report in ``out`` lists, itself among them; empty where there is none."""
    try:
        files = json.loads((out / REPORT_NAME).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    # A kill between the last two steps leaves the journal.
    return {REPORT_NAME, ".journal.jsonl", *map(str, files)}


@contextmanager
def resumable(
    out: Path,
    key: Mapping[str, Any],
    *,
    force: bool,
    progress: Progress,
    unit: str = "tensors",
    keep: bool = False,
) -> Iterator[Part]:
    """A folder to fill that becomes ``out`` at once at the end, and stays where the run is stopped.

    Args:
        key: all that decides what is written; the same command goes on where it was.
        unit: what :meth:`Part.mark` counts.
        keep: what is marked is kept after any error; else an error of the data, which would come
            again, leaves nothing.

    Raises:
        OutputError: the place cannot be written, or holds what may not be replaced.
    """
    from lorahub_registry.weights.stream.part import JOURNAL, Part

    out = Path(os.path.realpath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from None
    with Part(out, key) as part:
        try:
            _put_back(part.folder, out)
            check_output(out, force=force)
            if part.resumed:
                progress.say(
                    f"an earlier run was stopped: {_counted(part.resumed, unit)} there already"
                )
            yield part
            for left in part.folder.glob(".*"):  # what only a run that goes on has use for
                if left.name != JOURNAL:
                    shutil.rmtree(left)
            _for_all(part.folder)
            check_output(out, force=force)
        except BaseException as error:
            # An error of the data comes again, whatever is kept; a full disk or memory may not.
            again = isinstance(error, LoraregError) and not isinstance(error, OutputError)
            if (again and not keep) or not part.done:
                part.forget()
            else:
                progress.say(
                    f"{_counted(len(part.done), unit)} kept in {part.folder.name}: the same "
                    "command goes on from there"
                )
            if isinstance(error, OSError):
                why = error.strerror or error
                raise OutputError(f"{out} cannot be written: {why}") from error
            raise
        try:
            part.settle(lambda folder: _put(folder, out))
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit} are" if number != 1 else f"1 {unit.removesuffix('s')} is"


def _put_back(part: Path, out: Path) -> None:
    """What a killed run had moved aside takes its place again, or goes if that is taken."""
    old = _aside(part)
    if old.exists():
        if out.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, out)


def _for_all(folder: Path) -> None:
    """Temporary folders and safetensors are made for their owner alone; results are for all."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def report_head(command: str, *libraries: str) -> dict[str, Any]:
    """How every report begins: what made it, and by which versions of what."""
    versions = {name: version(name) for name in ("torch", "safetensors", *libraries)}
    return {"command": command, "versions": {"lorareg": __version__, **versions}}


def write_report(folder: Path, facts: Mapping[str, Any], files: Collection[str] = ()) -> None:
    """The report of what is in ``folder`` and below it; ``files`` are there, or will be."""
    names = {name for name in _inside(folder) if not name.startswith(".")} | set(files)
    text = json.dumps({**facts, "files": sorted(names - {REPORT_NAME})}, indent=2)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")


@contextmanager
def new_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill, that becomes ``out`` at once at the end, or leaves no trace.

    Raises:
        OutputError: the place cannot be written.
    """
    out = Path(os.path.realpath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.{os.getpid()}."))
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from None
    try:
        yield part
        _for_all(part)
        check_output(out, force=force)
        _put(part, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put(part: Path, out: Path) -> Path:
    """``part`` in the place of ``out``; what was there is put back if that fails."""
    if not out.exists():
        os.replace(part, out)
        return out
    old = _aside(part)
    os.replace(out, old)
    try:
        os.replace(part, out)
    except BaseException:  # also when the user interrupts it here
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return out


def _aside(part: Path) -> Path:
    return part.with_name(f"{part.name}.old")


def _sweep(out: Path) -> None:
    """Delete what killed processes left beside ``out``; what they had replaced is put back."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.*"):
        pid = left.name[len(out.name) + 2 :].split(".")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if left.name.endswith(".old") and not out.exists():
            os.replace(left, out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # there is no harmless way to ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
