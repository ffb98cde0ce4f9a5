"""`--multihost`: runs a verb as one of several processes, one per host, that do a job together.

Under this flag a verb is two processes. The worker does the work. When another host dies, JAX's runtime aborts the
worker (SIGABRT and a page of log), so a parent process, which does not load JAX, watches it and reports in one sentence
what happened. The parent forwards signals, and the worker ends when the parent does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from speccascade_t5x.cli import preemption
from speccascade_t5x.interfaces import UserError

# Exit code of a verb when another host is gone: BSD's EX_UNAVAILABLE.
EXIT_CODE = 69
HEARTBEAT_S = 20  # a host that was not heard of for this long is taken to be dead, unless the flags set another time
JOIN_S = 300  # time in which all hosts must connect
_SHUTDOWN_S = 60  # largest time between the ends of the first and the last host
_LINGER_S = 2.0  # time for other hosts to report the same user error before the host that runs the service exits

_REPORT = re.compile(rb"[EF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (\S+?)[.:]")
_RUNTIME = (b"coordination", b"client", b"distributed", b"preemption")  # sources of such reports when a host is lost
# What errors say when another host is gone.
_DEAD = ("heartbeat", "coordination", "gloo", "barrier", "socket closed", "connection reset", "connection refused")

_BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's: where a host listens that is known by another address

_joined: str | None = None  # the verb, in a worker


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of verbs that run on several hosts."""
    group = parser.add_argument_group("several hosts (start the same command on each; see docs/pods.md)")
    group.add_argument("--multihost", action="store_true", help="work with other hosts; enough on TPUs and Slurm")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="elsewhere: address at which host 0 listens; whoever reaches it can join the job, so name an address of a "
        f"private network ({_BIND_VARIABLE}=ADDRESS:PORT makes host 0 listen at another one)",
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="elsewhere: number of hosts")
    group.add_argument("--process_id", type=int, metavar="I", help="elsewhere: index of this host, from 0")
    group.add_argument(
        "--host_timeout", type=int, metavar="S", help=f"seconds until a silent host is dead (default: {HEARTBEAT_S})"
    )


def join(flags: argparse.Namespace, name: str) -> None:
    """Connects to the other hosts if the flags ask for it. Call it before JAX looks for devices and threads start.

    It returns in the worker only.

    Args:
      flags: with those of `add_flags`.
      name: the verb's name in messages.

    Raises:
      UserError: the flags do not go together, or the hosts did not find each other.
    """
    named = (flags.coordinator, flags.num_processes, flags.process_id)
    silent = HEARTBEAT_S if flags.host_timeout is None else flags.host_timeout
    if not flags.multihost:
        if any(value is not None for value in (*named, flags.host_timeout)):
            raise UserError("the flags that name hosts go with --multihost: add it")
        return
    _check(*named)
    if not 1 <= silent <= 30:
        raise UserError(f"--host_timeout={silent} is outside its range: 1 to 30 seconds")
    _fork(name)
    _initialize(*named, silent)


def _check(coordinator: str | None, count: int | None, index: int | None) -> None:
    if coordinator is count is index is None:
        return
    if coordinator is None or count is None or index is None:
        raise UserError("--coordinator, --num_processes and --process_id go together: name all three or none")
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator!r} is not an address: write HOST:PORT")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} is out of range: the {count} processes are numbered from 0")


def _initialize(coordinator: str | None, count: int | None, index: int | None, silent: int) -> None:
    import jax

    set_already = jax.config.jax_cpu_collectives_implementation  # type: ignore[attr-defined]  # JAX adds its options
    if set_already is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # otherwise it would handle SIGTERM itself
    listens = None if _BIND_VARIABLE in os.environ else coordinator  # otherwise JAX listens on every interface
    if listens and index == 0:
        _check_free(listens)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            coordinator_bind_address=listens,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=silent,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (RuntimeError, ValueError) as error:
        if coordinator is None:
            advice = "give --coordinator, --num_processes and --process_id where neither a TPU nor Slurm tells them"
        else:
            advice = f"start all {count}, with the same address of host 0, which must be its own and free there"
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the hosts did not come together ({first}): {advice}") from error


def _check_free(address: str) -> None:
    """Rejects an address at which this host cannot listen; JAX's service would crash."""
    host, _, port = address.rpartition(":")
    try:
        for family, kind, *_, place in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as mine:
                mine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                mine.bind(place)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"host 0 cannot listen at --coordinator={address} ({error}): name an address of its own and a free port, "
            f"or set {_BIND_VARIABLE} to ADDRESS:PORT where it is known by another one"
        ) from error


def _fork(name: str) -> None:
    """Returns in a child process only; the parent stays here until the child has ended, and exits with its code."""
    global _joined
    sys.stdout.flush()
    sys.stderr.flush()
    reports, said = os.pipe()
    alive, lives = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)  # so that a Ctrl-C arrives once, through the parent
        os.dup2(said, 2)
        for end in (reports, said, lives):
            os.close(end)
        _joined = name
        threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
        return
    for end in (said, alive):
        os.close(end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _hand_on(child))
    code = _watch(child, reports, name)
    sys.stderr.flush()
    os._exit(code)


def _hand_on(child: int) -> Callable[[int, object], None]:
    """A signal handler that forwards to the worker; a signal that comes after the worker has ended has no effect."""

    def handler(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    return handler


def _end_with_parent(alive: int) -> NoReturn:
    os.read(alive, 1)  # returns when no process holds the other end
    os._exit(1)


def _watch(child: int, reports: int, name: str) -> int:
    """Forwards the worker's stderr, except for the runtime's own report of a lost host. Returns the exit code."""
    held, ours = bytearray(), f"{name}: ".encode()
    said = False
    with os.fdopen(reports, "rb") as lines:
        for line in lines:
            report = _REPORT.match(line)
            own = line.startswith(ours)
            said = said or own
            if not own and (held or (report and any(word in report[1] for word in _RUNTIME))):
                held += line
                continue
            _pass_on(line)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and b"distributed service" in held:
        if not said:
            _say(name, _lost_sentence())
        return EXIT_CODE
    if code != EXIT_CODE:
        _pass_on(held)
    if code >= 0:
        return code
    _say(name, f"the process of this host was ended by {signal.Signals(-code).name}; the same command continues")
    return 128 - code


def _pass_on(said: bytes | bytearray) -> None:
    sys.stderr.write(bytes(said).decode("utf-8", "replace"))  # not its buffer: the terminal guard does not cover that
    sys.stderr.flush()


def _lost_sentence() -> str:
    from speccascade_t5x.distributed import hosts

    return hosts.LOST


def _say(name: str, sentence: str) -> None:
    print(f"{name}: {sentence}", file=sys.stderr, flush=True)


def first() -> bool:
    """Whether this process prints results and writes the files that are written once per job."""
    if not _joined:
        return True
    from speccascade_t5x.distributed import hosts

    return hosts.current().first


def failed(error: Exception, name: str) -> int | None:
    """Reports what went wrong in a worker. Returns its exit code; None if the caller reports the error instead."""
    if not _joined:
        return None
    from speccascade_t5x.distributed import hosts

    if isinstance(error, hosts.HostLost):
        _say(name, str(error).splitlines()[0])  # gin appends where it came from
        return EXIT_CODE
    if _names_a_dead_host(error):
        _say(name, hosts.LOST)
        return EXIT_CODE
    if isinstance(error, UserError):
        return None
    traceback.print_exception(error)
    return 1


def _names_a_dead_host(error: BaseException | None) -> bool:
    """Whether an error, or its cause, is one that JAX, gloo or Orbax raise when another process is gone."""
    while error is not None:
        theirs = isinstance(error, (ValueError, RuntimeError)) and not isinstance(error, UserError)
        if theirs and any(sign in str(error).lower() for sign in _DEAD):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(code: int) -> int:
    """Ends a worker with this exit code; returns the code in a process that is not a worker.

    Only a worker that has finished disconnects from the others: after a failure it would wait for hosts that are gone.
    """
    if not _joined:
        return code
    import jax

    from speccascade_t5x.distributed import hosts

    _flush()
    if code in (0, preemption.EXIT_CODE):  # all hosts have reached this point
        try:
            jax.distributed.shutdown()
        except RuntimeError:
            _say(_joined, hosts.LOST)
            code = EXIT_CODE
    elif hosts.current().first:
        time.sleep(_LINGER_S)
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the reader of our output has left
            continue
