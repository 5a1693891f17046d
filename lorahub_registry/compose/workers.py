"""Candidates measured in other processes, through whatever has ``submit``.

What travels is the path of a spec (JSON: where base and adapters lie, the rows as token ids) and
coefficients; what comes back are numbers. A worker loads the spec once, and keeps it. Each runs
its products on one thread, so that a candidate's loss does not depend on how many workers there
are.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from lorahub_registry.compose.objective import Loss, Measure
from lorahub_registry.errors import LoraregError

Coefficients = Sequence[float]
Measured = tuple[float, tuple[float, ...] | None]
_Call = Callable[[str, Sequence[Coefficients]], list[Measured]]
_DEATHS = 3


class Executor(Protocol):
    """What runs work elsewhere: a process pool, or anything with the same two methods."""

    def submit(self, call: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Have ``call(*args)`` done; both pickle."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing more will come."""


@dataclass(frozen=True)
class Spec:
    """All that a worker needs to measure candidates, as JSON.

    Attributes:
        base: the folder of the model; ``name``, ``device``, ``dtype`` as ``load_base`` takes them.
        adapters: their folders, in the order of the coefficients.
        rows: (prompt, output) as token ids.
    """

    base: str
    name: str
    device: str
    dtype: str
    adapters: tuple[str, ...]
    form: str
    per: str
    layer_groups: int
    slopes: bool
    population: int
    rows: tuple[tuple[list[int], list[int]], ...]

    def write(self, folder: Path, name: str) -> Path:
        """Write it as ``name``.json into ``folder``."""
        path = folder / f"{name}.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


class Workers:
    """A pool of workers over one spec after the other; a context manager.

    Args:
        jobs: how many at once.
        start: makes an executor; again where a worker's death has broken it.
    """

    def __init__(self, jobs: int, start: Callable[[int], Executor] | None = None) -> None:
        self._jobs, self._start = jobs, start or process_pool
        self._executor: Executor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def losses(self, spec: Path, copies: int = 1) -> Callable[[Sequence[Any]], Iterator[Loss]]:
        """What measures candidates under ``spec``, ``copies`` of them in one forward."""
        return self._measuring(measure, spec, copies)

    def singles(self, spec: Path) -> Callable[[Sequence[Any]], Iterator[Loss]]:
        """What measures single adapters of ``spec``, given by their numbers."""
        return self._measuring(measure_single, spec, 1)

    def _measuring(
        self, call: _Call, spec: Path, copies: int
    ) -> Callable[[Sequence[Any]], Iterator[Loss]]:
        def measured(candidates: Sequence[Coefficients]) -> Iterator[Loss]:
            parts = [candidates[i : i + copies] for i in range(0, len(candidates), copies)]
            for found in self._in_order(call, str(spec), parts):
                for nll, slope in found:
                    yield Loss(nll, None if slope is None else tuple(slope))

        return measured

    def _in_order(
        self, call: _Call, spec: str, parts: Sequence[Sequence[Coefficients]]
    ) -> Iterator[list[Measured]]:
        futures: dict[int, Future[list[Measured]]] = {}
        for wanted in range(len(parts)):
            deaths = 0
            while True:
                try:
                    for i in range(wanted, len(parts)):
                        if i not in futures:
                            whole = [tuple(map(float, c)) for c in parts[i]]
                            futures[i] = self._running().submit(call, spec, whole)
                    yield futures[wanted].result()
                    break
                except BrokenExecutor:
                    # Whoever was at work is lost with its candidate; it is measured again.
                    self._stop()
                    futures = {i: f for i, f in futures.items() if _finished(f)}
                    deaths += 1
                    if deaths == _DEATHS:
                        raise LoraregError(
                            f"a worker process was killed {_DEATHS} times over the same candidates",
                            hint="most often memory runs out, since each worker holds a base of "
                            "its own: use fewer --jobs; a script of your own has to start its run "
                            'under `if __name__ == "__main__":`',
                        ) from None

    def _running(self) -> Executor:
        if self._executor is None:
            self._executor = self._start(self._jobs)
        return self._executor

    def _stop(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None


def _finished(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


class _Processes(ProcessPoolExecutor):
    """Fresh processes of this machine, which end with the pool or with their parent.

    Each holds one end of a pipe, whose other end nobody else has.
    """

    def __init__(self, jobs: int) -> None:
        context = get_context("spawn")
        theirs, self._ours = context.Pipe(duplex=False)
        super().__init__(jobs, context, initializer=_begin, initargs=(theirs,))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        with _deaf():
            return super().submit(fn, *args, **more)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        self._ours.close()


def process_pool(jobs: int) -> Executor:
    """Workers on this machine; those in the middle of a candidate leave it when all is over."""
    return _Processes(jobs)


@contextmanager
def _deaf() -> Iterator[None]:
    """Whatever process is started meanwhile hears no Ctrl-C, from its first moment on."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(pipe: Connection) -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(pipe,), daemon=True).start()


def _follow(pipe: Connection) -> None:
    pipe.poll(None)  # nothing is ever sent: the other end was closed
    os._exit(1)


class _Held(threading.local):
    """What a worker has loaded; an executor of threads has one base in each."""

    def __init__(self) -> None:
        self.place: tuple[str, str, str] | None = None
        self.spec = ""
        self.rows: tuple[str, Any, Any] = ("", None, None)
        self.base: Any = None
        self.measure: Measure | None = None


_held = _Held()


def measure(spec: str, candidates: Sequence[Coefficients]) -> list[Measured]:
    """The losses of ``candidates`` under the spec at this path; runs in a worker."""
    if _held.spec != spec:
        _load(spec)
    assert _held.measure is not None
    return [(loss.nll, loss.slope) for loss in _held.measure([tuple(c) for c in candidates])]


def measure_single(spec: str, candidates: Sequence[Coefficients]) -> list[Measured]:
    """The losses of adapters alone, given by their numbers in the spec; runs in a worker."""
    from lorahub_registry.adapters.facts import read_facts
    from lorahub_registry.compose.screen import alone

    if _held.rows[0] != spec:
        _held.rows = spec, *_begun(spec)
    _, facts, rows = _held.rows
    folders = [Path(facts["adapters"][int(number)]) for [number] in candidates]
    return [(alone(_held.base.model, f, read_facts(f), rows), None) for f in folders]


def _load(path: str) -> None:
    from lorahub_registry.adapters.facts import read_facts
    from lorahub_registry.compose.forms import make_form

    spec, rows = _begun(path)
    base = _held.base
    adapters = [(Path(folder), read_facts(Path(folder))) for folder in spec["adapters"]]
    form = make_form(
        adapters, form=spec["form"], per=spec["per"], layer_groups=spec["layer_groups"],
        device=base.device,
    )  # fmt: skip
    _held.measure = Measure(
        base.model, form, rows, slopes=spec["slopes"], population=spec["population"]
    ).__enter__()
    _held.spec = path


def _begun(path: str) -> tuple[dict[str, Any], Any]:
    """The spec, read, and its rows on the device; its base is held from here on, and bare."""
    import torch

    from lorahub_registry.evaluate.base import load_base
    from lorahub_registry.evaluate.tokens import Encoded

    torch.set_num_threads(1)
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    if _held.measure is not None:
        _held.measure.__exit__()
        _held.measure, _held.spec = None, ""
    place = (spec["base"], spec["device"], spec["dtype"])
    if _held.place != place:
        _held.base = load_base(
            spec["base"], name=spec["name"], device=spec["device"], dtype=spec["dtype"]
        )
        _held.place = place
    rows = [Encoded(prompt, output) for prompt, output in spec["rows"]]
    return spec, _held.base.batches(rows, gradients=spec["slopes"])
