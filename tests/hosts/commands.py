"""Commands on several hosts: real processes that start fast, because a server that has loaded the libraries forks them.

The server has no device of its own, so each process begins like one that was just started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SILENT = 8  # seconds of heartbeats that may be missed
PATIENCE = 600  # seconds until a test gives up; machines may be slow
_LOADED = ("cli.infer", "cli.sweep", "cli.train", "evaluation.sweep", "inference.infer", "training.train")


def _run(argv: Sequence[str], folder: Path, log: Path, devices: int) -> None:
    """A process's life: a verb with its output in `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))  # one process compiles for all
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_disable_most_optimizations", True)
    from speccascade_t5x.cli.__main__ import main

    code = main(list(argv))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Command:
    """A verb that runs.

    Attributes:
      pid: of the process that a user would have started.
    """

    def __init__(self, argv: Sequence[str], folder: Path, log: Path, devices: int = 1):
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload([__name__, *(f"speccascade_t5x.{name}" for name in _LOADED)])
        self._log = log
        self._process = server.Process(target=_run, args=(tuple(argv), folder, log, devices), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    @property
    def said(self) -> str:
        """Everything it has printed."""
        return self._log.read_text("utf-8", "replace") if self._log.exists() else ""

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code."""
        self._process.join(seconds)
        assert self.ended, f"still running after {seconds} s:\n{self.said}"
        return self._process.exitcode

    @property
    def worker(self) -> int:
        """The process below it that does the work, on one of several hosts."""
        (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(child)

    def kill(self) -> None:
        """Ends it, and what it has begun, without asking."""
        with contextlib.suppress(OSError, ValueError):
            os.kill(self.worker, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)


def until(true: Callable[[], bool], *commands: Command) -> None:
    """Waits for something that must happen before a command ends."""
    give_up = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < give_up and not any(one.ended for one in commands), [one.said for one in commands]
        time.sleep(0.003)


class Job:
    """The same verb on every host; killed at the latest when the block ends."""

    def __init__(self, folder: Path, count: int, *argv: str, devices: int = 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        name = f"log-{time.monotonic_ns()}"
        join = ("--multihost", f"--coordinator={address}", f"--num_processes={count}", f"--host_timeout={SILENT}")
        self.hosts = [
            Command((*argv, *join, f"--process_id={i}"), folder, folder / f"{name}-{i}", devices) for i in range(count)
        ]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            if not host.ended:
                host.kill()

    @property
    def said(self) -> str:
        return "".join(f"--- host {i}\n{host.said}" for i, host in enumerate(self.hosts))

    def until(self, true: Callable[[], bool]) -> None:
        """Waits for something that must happen before a host ends."""
        until(true, *self.hosts)

    def wait(self, *codes: int) -> None:
        """Waits for all hosts and compares their exit codes."""
        found = [host.wait() for host in self.hosts]
        assert found == list(codes or [0] * len(found)), self.said


@contextlib.contextmanager
def running(folder: Path, count: int, *argv: str, devices: int = 1) -> Iterator[Job]:
    """A job on `count` hosts with so many devices each."""
    with Job(folder, count, *argv, devices=devices) as job:
        yield job


def alone(folder: Path, *argv: str, devices: int = 1) -> None:
    """The verb on one host, to its end."""
    command = Command(argv, folder, folder / f"log-{time.monotonic_ns()}", devices)
    assert command.wait() == 0, command.said
