"""Where a mixture is written: the old folder or the new one, nothing between."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorahub_registry.adapters.config import CONFIG_NAME
from lorahub_registry.adapters.tensors import WEIGHTS_NAME
from lorahub_registry.card import RECIPE_NAME, RESULTS_NAME, TRACE_NAME
from lorahub_registry.errors import OutputError
from lorahub_registry.lock import LOCK_NAME

MIXTURE_FILES = frozenset(
    {CONFIG_NAME, WEIGHTS_NAME, "README.md", RECIPE_NAME, LOCK_NAME, RESULTS_NAME, TRACE_NAME}
)


def check_output(out: Path, *, force: bool) -> None:
    """Whether a mixture may be written to ``out``.

    Raises:
        OutputError: something is there, and ``force`` may not replace it.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file", hint="name another folder as output.path")
    inside = {p.name for p in out.iterdir()}
    if not inside:
        return
    if not force:
        raise OutputError(f"{out} exists and is not empty", hint="--force replaces it")
    if foreign := sorted(inside - MIXTURE_FILES):
        raise OutputError(
            f"{out} holds {foreign[0]}, which no mixture has; --force will not delete it",
            hint="name another folder as output.path",
        )


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
        # Temporary folders and safetensors are made for their owner alone.
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)
        check_output(out, force=force)
        _put(part, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put(part: Path, out: Path) -> None:
    """``part`` in the place of ``out``; what was there is put back if that fails."""
    if not out.exists():
        os.replace(part, out)
        return
    old = part.with_name(f"{part.name}.old")
    os.replace(out, old)
    try:
        os.replace(part, out)
    except BaseException:  # also when the user interrupts it here
        os.replace(old, out)
        raise
    shutil.rmtree(old)


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
