"""Ctrl-C and SIGTERM, also where a library loses them.

Both raise KeyboardInterrupt wherever the program is just then. Compiled code of others may make
another error of it, or drop it; so it is remembered, and raised again at the next step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_heard = threading.Event()


@contextmanager
def listening() -> Iterator[None]:
    """Hear both while a command runs; a Ctrl-C that is ignored (``nohup``) stays so."""
    _heard.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heard() -> bool:
    """Whether one has come."""
    return _heard.is_set()


def check() -> None:
    """Raise again what came and was lost.

    Raises:
        KeyboardInterrupt: one has come.
    """
    if heard() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def _raise(*_: object) -> None:
    _heard.set()
    raise KeyboardInterrupt
