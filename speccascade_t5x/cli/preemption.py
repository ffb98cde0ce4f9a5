"""SIGTERM, by which clouds announce that a machine will be taken away: the work in hand is ended, files stay whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

# What a verb that was told to stop exits with: BSD's EX_TEMPFAIL, "try the same again later".
EXIT_CODE = 75


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has come. Outside the main thread none arrives, so it never has."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
