"""What the process has to keep still around a model: spare threads, and other people's bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

_TINY = 5_000_000


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread.

    Steps this small gain little from a second one, and on a busy machine they take ten times as
    long, because the threads wait for each other. The sums no longer depend on the cores, either.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """One thread for a model under five million parameters, torch's own number for others."""
    if sum(p.numel() for p in model.parameters()) < _TINY:
        with one_thread():
            yield
    else:
        yield


@contextmanager
def tf32(wanted: bool) -> Iterator[None]:
    """Allow TF32 in products of float32 on NVIDIA devices, or leave it as it is."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing bars of its own beside ``progress``."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
