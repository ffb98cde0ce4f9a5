"""What the machine is and what it can do: named and measured beside every figure."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np


def name() -> str:
    """CPU model, cores and versions, in one line."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    device = jax.devices()[0]
    where = "" if device.platform == "cpu" else f", {device.device_kind}"
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores{where}, Python {platform.python_version()}, jax {jax.__version__}"


def load_average() -> float:
    """Runnable processes over the last minute: above 0.5 the figures are disturbed by others."""
    return os.getloadavg()[0]


def memory_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes/s of reading memory in sequence: the best over one thread and one per core."""
    arrays = [np.ones(megabytes * 250_000, np.float32) for _ in os.sched_getaffinity(0)]
    best = 0.0
    for workers in {1, len(arrays)}:
        for _ in range(repeats):
            threads = [threading.Thread(target=array.sum) for array in arrays[:workers]]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            best = max(best, workers * arrays[0].nbytes / (time.perf_counter() - begin))
    return best


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def interleave(tasks: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Calls every task once per round, in turn, so that drift of the machine hits all alike.

    Args:
      tasks: name -> function that returns its own figure (seconds, usually); called once before, unmeasured.
      repeats: rounds.

    Returns:
      name -> one figure per round.
    """
    for task in tasks.values():
        task()
    found: dict[str, list[float]] = {key: [] for key in tasks}
    for _ in range(repeats):
        for key, task in tasks.items():
            found[key].append(task())
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)
