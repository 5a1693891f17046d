"""Where a search goes on that was stopped: its journal, keyed by all that decides its numbers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub_registry import __version__
from lorahub_registry.adapters.tensors import file_sha256
from lorahub_registry.api.prepare import Prepared
from lorahub_registry.errors import DataError, LoraregError, NotApplied, RecipeError
from lorahub_registry.progress import Progress
from lorahub_registry.registry.store import Registry

if TYPE_CHECKING:
    from lorahub_registry.compose.bench import Means
    from lorahub_registry.evaluate.base import LoadedBase


_KEPT = 30 * 24 * 3600  # seconds


@contextmanager
def means_of(
    ready: Prepared,
    loaded: LoadedBase,
    registry: Registry,
    jobs: int | None,
    progress: Progress,
) -> Iterator[Means]:
    """How the search of ``ready`` is carried out, with what an earlier run of it left.

    The journal stays where the run is stopped from outside, or by what may be otherwise the next
    time (a full disk); of a run that ended with an error of its own it goes. The caller lets it go
    once the mixture is written.
    """
    from lorahub_registry.compose.bench import Means
    from lorahub_registry.compose.journal import Journal

    searches = ready.recipe.method.reads_train and ready.base.folder is not None
    journals = registry.path.parent / "journals"
    path = journals / f"{_run_key(ready, loaded, jobs)}.jsonl"
    _sweep(journals)
    journal = Journal(path if searches else None)
    if journal.found:
        progress.say(
            f"an earlier run of this recipe was stopped: {journal.found} evaluations are known"
        )
    try:
        yield Means(journal, jobs, ready.base.folder)
    except (NotApplied, DataError, RecipeError):
        journal.forget()  # it came to its end, which was none to write
        raise
    except (KeyboardInterrupt, LoraregError, OSError):
        if path.exists():
            progress.say(
                f"{journal.known} evaluations are kept: the same command goes on from there"
            )
        raise
    finally:
        journal.close()


def _sweep(journals: Path) -> None:
    """Delete what nobody came back for."""
    for left in journals.glob("*.jsonl"):
        with suppress(OSError):  # gone meanwhile, or not ours to delete
            if time.time() - left.stat().st_mtime > _KEPT:
                left.unlink()


def _run_key(ready: Prepared, loaded: LoadedBase, jobs: int | None) -> str:
    """Over all that decides a number: pins and settings, libraries, device, threads."""
    import torch

    libraries = ("torch", "transformers", "nevergrad", "scipy", "numpy")
    facts = [
        ready.lock.dumps(),
        file_sha256(ready.base.folder / "config.json") if ready.base.folder else None,
        [__version__, *(version(name) for name in libraries)],
        str(loaded.device),
        1 if jobs else torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
