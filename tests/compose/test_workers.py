"""Workers: the same numbers from any number of them, whoever dies, and nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorahub_registry.compose import workers
from lorahub_registry.compose.bench import Means
from lorahub_registry.compose.fit import Fitted, fit
from lorahub_registry.compose.journal import Journal
from lorahub_registry.compose.workers import Executor, Workers, process_pool
from lorahub_registry.errors import BrokenAdapter, LoraregError
from tests import tiny
from tests.compose.making import encoded, member, recipe

METHOD = {"type": "learn", "budget": 18, "optimizer": "CMA", "num_workers": 4, "l1": 0.0}


def fitted(
    model: tiny.Tiny, means: Means, method: dict[str, Any] | None = None,
    kinds: Sequence[str] = ("plain", "wide"),
) -> Fitted:  # fmt: skip
    base = model.base()
    members = [member(model.adapter(kind)) for kind in kinds]
    rows = encoded(base, 6), encoded(base, 2, 6)
    return fit(recipe(method or METHOD, device="cpu"), members, base, *rows, means=means)


def gone(patience: float = 20) -> bool:
    """Whether no child is left; those that end need a moment."""
    until = time.monotonic() + patience
    while multiprocessing.active_children():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def alone(tiny_llama: tiny.Tiny) -> Fitted:
    """What this process finds by itself, with the one thread of a worker."""
    found = fitted(tiny_llama, Means(jobs=1))
    # Some share a forward: who does must not depend on who measures.
    assert found.how["copies"] > 1
    return found


@pytest.mark.xdist_group("spawned")
def test_three_workers_find_the_same_to_the_last_bit(tiny_llama: tiny.Tiny, alone: Fitted) -> None:
    found = fitted(tiny_llama, Means(jobs=3, place=tiny_llama.folder))
    assert found.learned == alone.learned
    assert found.how == alone.how
    assert gone()


@pytest.mark.xdist_group("spawned")
def test_a_worker_that_is_killed_changes_nothing(tiny_llama: tiny.Tiny, alone: Fitted) -> None:
    started, killed = list[Executor](), list[int]()

    def start(jobs: int) -> Executor:
        started.append(process_pool(jobs))
        return started[-1]

    class Deadly(Journal):
        def put(self, *given: Any) -> None:
            super().put(*given)
            children = multiprocessing.active_children()
            if len(self._known) >= 6 and not killed and children:
                killed.append(children[0].pid or 0)
                os.kill(killed[0], signal.SIGKILL)

    found = fitted(tiny_llama, Means(Deadly(), jobs=2, place=tiny_llama.folder, start=start))
    assert found.learned == alone.learned
    assert len(killed) == 1
    assert len(started) == 2
    assert gone()


@pytest.mark.parametrize("gradient", [False, True])
def test_another_executor_does_as_well(tiny_llama: tiny.Tiny, gradient: bool) -> None:
    """Two threads of this process, each with a base of its own."""
    options = {"optimizer": "gradient", "num_workers": 1} if gradient else {}
    method = METHOD | {"folds": 2, "budget": 9} | options
    here = fitted(tiny_llama, Means(jobs=1), method)
    there = fitted(
        tiny_llama, Means(jobs=2, place=tiny_llama.folder, start=ThreadPoolExecutor), method
    )
    assert there.learned == here.learned
    assert there.spread == here.spread
    assert workers._held.base is None, "each thread holds a base of its own, and this one none"


class Counted(ThreadPoolExecutor):
    """Remembers what it was asked for."""

    calls: list[str] = []  # noqa: RUF012

    def submit(self, fn: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        self.calls.append(fn.__name__)
        return super().submit(fn, *args, **more)


def test_workers_screen_to_the_same_bits(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    method = METHOD | {"screen": {"keep": 2}, "budget": 4, "init": 0.1}
    kinds = ("plain", "wide", "same", "head")
    here = fitted(tiny_llama, Means(jobs=1), method, kinds)
    journal = Journal(tmp_path / "run.jsonl")
    means = Means(journal, jobs=2, place=tiny_llama.folder, start=Counted)
    there = fitted(tiny_llama, means, method, kinds)
    assert here.screened is not None
    assert there.screened == here.screened
    assert len(set(here.screened.alone.values())) == 4
    assert there.learned == here.learned
    assert Counted.calls.count("measure_single") == 4
    journal.close()
    # What is known is not measured again.
    means = Means(Journal(tmp_path / "run.jsonl"), jobs=2, place=tiny_llama.folder, start=Counted)
    assert fitted(tiny_llama, means, method, kinds).screened == here.screened
    assert Counted.calls.count("measure_single") == 4


class Once(ThreadPoolExecutor):
    """Loses what it was given, as a pool whose worker dies; remembers how it was ended."""

    ended: list[bool] = []  # noqa: RUF012

    def submit(self, fn: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        return super().submit(os.path.join, "no", "numbers")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.ended.append(cancel_futures)
        super().shutdown(wait, cancel_futures=cancel_futures)


def test_an_executor_is_ended_whatever_happens(tiny_llama: tiny.Tiny) -> None:
    with pytest.raises((TypeError, ValueError)):
        fitted(tiny_llama, Means(jobs=2, place=tiny_llama.folder, start=Once))
    assert Once.ended == [True]


def doomed(jobs: int) -> Executor:
    """Processes that end before they begin."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, initializer=os._exit, initargs=(1,))


def test_workers_that_always_die_are_an_error_and_no_hang(tmp_path: Path) -> None:
    with Workers(2, doomed) as pool:
        losses = pool.losses(tmp_path / "spec.json")
        with pytest.raises(LoraregError, match="killed 3 times over the same candidates") as error:
            list(losses([(1.0,), (2.0,), (3.0,)]))
    assert "fewer --jobs" in str(error.value.hint)
    assert gone()


def test_what_goes_wrong_in_a_worker_is_told_as_here(tiny_llama: tiny.Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from lorahub_registry.compose.workers import Spec

    folder = tmp_path / "plain"
    folder.mkdir()
    for file in tiny_llama.adapter("plain").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "adapter_model.safetensors"
    spoiled = {k: t * float("nan") for k, t in load_file(weights).items()}
    save_file(spoiled, weights, metadata={"format": "pt"})
    spec = Spec(
        base=str(tiny_llama.folder), name="tiny", device="cpu", dtype="auto",
        adapters=(str(folder),), form="delta", per="model", layer_groups=1, slopes=False,
        population=1,
        rows=(([1, 5], [6, 7]),),
    ).write(tmp_path, "search")  # fmt: skip
    with Workers(2, ThreadPoolExecutor) as pool:
        with pytest.raises(BrokenAdapter, match="holds NaN or infinity") as error:
            list(pool.losses(spec)([(1.0,)]))
        assert "leave this adapter out" in str(error.value.hint)


def test_threads_of_the_pool_are_no_longer_there(tiny_llama: tiny.Tiny) -> None:
    before = threading.active_count()
    fitted(tiny_llama, Means(jobs=2, place=tiny_llama.folder, start=ThreadPoolExecutor))
    until = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < until
        time.sleep(0.02)
