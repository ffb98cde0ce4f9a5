"""Runs a program somebody else wrote, against asserts, in a process of its own with little it may do.

What holds the program:
  everywhere   an isolated interpreter without site packages; an empty environment; a temporary folder as working
               directory, removed afterwards; no input, and output that goes nowhere; a process group that is killed
               when the time is over; limits on processor time, memory, file size, open files and core dumps
  Linux        (x86-64 and ARM64, by seccomp) no new process, no other program, no socket, no signal, no change of
               limits, owners, modes or times; (Landlock, kernel 5.13 and later) no file made, changed or removed
               outside the working directory; capabilities dropped where user namespaces are allowed
`protections` names what the machine at hand grants.

What does not: the program may read whatever this user may read. It shares its interpreter with the asserts, so one
that goes looking can find the word that reports success, or change what `==` means: a pass is evidence, not proof.
It can fill the temporary folder with small files until its time is over. Bugs of the kernel and of Python are its
bugs too. Without the Linux part it can also start processes, use the network and write wherever this user may. Who
expects malice runs all of this in a throw-away virtual machine. Loads no TensorFlow.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from speccascade_t5x.interfaces import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
_LONGEST_REPORT = 4096
# Starting an interpreter on a busy machine is not the program's time: that begins with the child's first line.
_START_SECONDS = 60.0
_POLL_SECONDS = 0.005


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      seconds: of processor time, and of the clock (the interpreter's start apart).
      memory_mb: address space, the interpreter's own included.
      file_mb: of each file.
    """

    seconds: float = 10.0
    memory_mb: int = 512
    file_mb: int = 1


class Result(NamedTuple):
    """What came of a program.

    Attributes:
      passed: it ran to its end, and so did every test.
      why: "passed", "timeout", the name of an exception ("AssertionError", "MemoryError", "SyntaxError", ...), or
        "died" where the process ended by itself or by a signal.
      protections: what held it, see `protections`.
    """

    passed: bool
    why: str
    protections: tuple[str, ...]


def run(program: str, tests: Sequence[str], limits: Limits) -> Result:
    """Runs a program and then its tests in the same namespace.

    Args:
      program: Python source.
      tests: sources that raise if they fail, each compiled by itself, so no text of the program can swallow one.
      limits: what it may use.

    Raises:
      UserError: limits out of range, or a machine that refuses new processes or temporary files.
    """
    if limits.seconds <= 0 or limits.memory_mb < 64 or limits.file_mb < 1:
        raise UserError(f"{limits} leaves no room: give more than 0 seconds, 64 MB of memory and 1 MB of file size")
    word = secrets.token_hex(16)
    job = {"program": program, "tests": list(tests), "word": word, **limits._asdict()}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as report,
        ):
            given.write(json.dumps(job).encode())
            given.seek(0)
            timed_out = _wait(folder, given, report, limits.seconds)
            report.seek(0)
            lines = report.read(_LONGEST_REPORT).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise UserError(
            f"no process could be started to run a program in ({error}): free some memory or disk"
        ) from error
    protections = tuple(lines[0].split()) if lines else ()
    if word in lines[1:]:
        return Result(True, "passed", protections)
    told = next((line for line in lines[1:] if line.isidentifier() and line != "passed"), "died")
    return Result(False, "timeout" if timed_out else told, protections)


def _wait(folder: str, given: BinaryIO, report: BinaryIO, seconds: float) -> bool:
    """Runs the child to its end, or to the end of its time. Returns whether time ended it."""
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD)]
    child = subprocess.Popen(
        command, stdin=given, stdout=report, stderr=subprocess.DEVNULL, env={}, cwd=folder, start_new_session=True
    )
    try:
        started = time.monotonic() + _START_SECONDS
        while child.poll() is None and not os.fstat(report.fileno()).st_size and time.monotonic() < started:
            time.sleep(_POLL_SECONDS)
        return child.wait(seconds) == -signal.SIGXCPU
    except subprocess.TimeoutExpired:
        return True
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.wait()


def protections() -> tuple[str, ...]:
    """What holds programs here: of "limits", "namespace", "syscalls" and "files"."""
    return run("", [], Limits()).protections


@functools.lru_cache
def check(limits: Limits) -> None:
    """Makes sure that a program that is right passes here, and says what does not hold a wrong one.

    Raises:
      UserError: it does not, so every score would be 0.
    """
    program = "import collections, functools, heapq, itertools, math, re, sys\ndef twice(x):\n    return 2 * x\n"
    result = run(program, ["assert twice(2) == 4"], limits)
    if not result.passed:
        raise UserError(
            f"a right program does not pass in the sandbox here ({result.why}): give it more time or memory with "
            "`mbpp.execution`"
        )
    missing = {"limits", "syscalls", "files"} - set(result.protections)
    if missing:
        logging.getLogger(__name__).warning(
            "programs run without %s here: use a throw-away machine for what you do not trust",
            ", ".join(sorted(missing)),
        )
