"""Hosts of one job as threads of this process, over JAX's real coordination service: cheap enough to break on purpose.

What goes through the service and through the shared folder is real; there is no mesh over these hosts, and none can be
killed: for both see the tests that start processes.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from jax._src.lib import _jax  # what jax.distributed.initialize is made of, which allows one host per process

from speccascade_t5x.distributed import hosts

PATIENCE_S = 60.0  # until a host that does not come is given up, where a test says nothing else
_jobs = itertools.count()  # a service keeps the keys of all jobs it has seen


class Threads:
    """As many hosts as there are clients; each job of them has keys of its own in the service."""

    def __init__(self, clients: list[Any], patch: pytest.MonkeyPatch):
        self.count, self._clients, self._patch = len(clients), clients, patch
        self._here = threading.local()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work` returned on each host, or the exception it raised there.

        Args:
          work: called with the index of the host, in a thread in which `hosts.current` is that host.
        """
        self._patch.setattr(hosts, "_PREFIX", f"job-{next(_jobs)}")
        self._patch.setattr(hosts, "_client", lambda: self._clients[self._here.index])
        self._patch.setattr(hosts, "current", self._current)

        def host(index: int) -> Any:
            self._here.index = index
            try:
                return work(index)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(host, range(self.count)))

    def _current(self) -> hosts.Hosts:
        index = getattr(self._here, "index", None)
        return hosts.Hosts() if index is None else hosts.Hosts(index, self.count, PATIENCE_S)


@contextlib.contextmanager
def serving(count: int) -> Iterator[list[Any]]:
    """Clients of so many hosts at a coordination service that runs here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    service = _jax.get_distributed_runtime_service(address, count)
    clients = [_jax.get_distributed_runtime_client(address, i, init_timeout=60) for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda client: client.connect(), clients))
        try:
            yield clients
        finally:
            list(pool.map(lambda client: client.shutdown(), clients))
            service.shutdown()
