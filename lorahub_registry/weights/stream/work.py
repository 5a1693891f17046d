"""Work spread over the cores, a bounded part of it in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


_MOST = 12  # workers: each holds some blocks of rows, and more would wait for the disk


def cores() -> int:
    """How many this process may use, and has use for."""
    try:
        return min(_MOST, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every system
        return min(_MOST, os.cpu_count() or 1)


def spread(items: Iterable[_T], work: Callable[[_T], Any], *, workers: int | None = None) -> None:
    """``work`` on every item, in threads with one core each; twice as many wait as work.

    The first error ends it: no item is begun after it, and it is raised when those that were have
    ended. An interrupt does the same.
    """
    workers = workers or cores()
    threads = torch.get_num_threads()
    if workers == 1:
        torch.set_num_threads(1)
        try:
            for item in items:
                work(item)
        finally:
            torch.set_num_threads(threads)
        return
    stop = threading.Event()

    def one(item: _T) -> None:
        if stop.is_set():
            return
        try:
            work(item)
        except BaseException:
            stop.set()
            raise

    def alone() -> None:
        torch.set_num_threads(1)  # of this thread: the cores are shared out already

    waiting: set[Future[None]] = set()
    with ThreadPoolExecutor(workers, initializer=alone) as pool:
        try:
            for item in items:
                waiting.add(pool.submit(one, item))
                if len(waiting) >= 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            for future in waiting:
                future.result()
        finally:
            stop.set()
            torch.set_num_threads(threads)
