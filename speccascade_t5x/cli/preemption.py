"""Handles SIGTERM, by which clouds announce a preemption: the current unit of work is finished, files stay complete."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

# Exit code of a verb that was stopped by SIGTERM: BSD's EX_TEMPFAIL, "try the same again later".
EXIT_CODE = 75


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM has arrived. Outside the main thread it is always False."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
