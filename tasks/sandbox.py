"""Runs an untrusted program and its tests inside bubblewrap (`bwrap`).

The program is confined by user, process, IPC, network, host name and (if available) cgroup namespaces of its own; a
file system of its own that holds the interpreter and the system's libraries, all read-only, and one small temporary
folder in memory; no environment, no input, no capability; limits on memory, processor time, files and their size; no
further process or thread; a filter (through bwrap) for the few system calls that no namespace covers. It ends with
its time, or with this process. A superuser's programs run as `nobody`.

The confinement has limits: the program shares its interpreter with the tests, so a hostile one can forge the report of
success or change what `==` means, and a pass is evidence, not proof. Faults of the kernel and of bubblewrap are not
covered. The kernel's memory for many small files is bounded by the time limit alone. docs/security.md has the same for
users. This module loads no TensorFlow.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from speccascade_t5x.interfaces import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
INSTALL = "install it with `apt-get install bubblewrap` or `dnf install bubblewrap`"
_NOBODY = 65534
_TEMPORARY_MB = 16
_LONGEST_REPORT = 4096
# What namespaces and limits leave open: processes and threads (clone, clone3, fork, vfork, unshare: a superuser's are
# not counted), sockets (AF_VSOCK reaches the host of a virtual machine), memory outside the limit (shmget, msgget), the
# caller's keys (add_key, request_key, keyctl), rings that make such calls unseen (io_uring_setup). For each machine:
# its audit number, then the numbers of these calls.
_FILTERED = {
    "x86_64": (0xC000003E, (56, 435, 57, 58, 272, 41, 29, 68, 248, 249, 250, 425)),
    "aarch64": (0xC00000B7, (220, 435, 97, 198, 194, 186, 217, 218, 219, 425)),
}


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
      seconds: of the clock, the start of its interpreter included, and of processor time.
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
      said: the first line of what bubblewrap or the interpreter had to say, if they did not come as far as the program.
    """

    passed: bool
    why: str
    said: str = ""


def run(program: str, tests: Sequence[str], limits: Limits, protected: bool = True) -> Result:
    """Runs a program and then its tests in the same namespace.

    Args:
      program: Python source.
      tests: sources that raise if they fail, each compiled by itself, so no text of the program can swallow one.
      limits: what it may use.
      protected: False runs it without bubblewrap, with all that this user may do.

    Raises:
      UserError: limits out of range, no bubblewrap, or a machine that allows no new processes or temporary files.
    """
    if limits.seconds <= 0 or limits.memory_mb < 64 or limits.file_mb < 1:
        raise UserError(f"{limits} leaves no room: give more than 0 seconds, 64 MB of memory and 1 MB of file size")
    seconds, memory, size = int(limits.seconds) + 1, limits.memory_mb * 2**20, limits.file_mb * 2**20
    rlimits = {"RLIMIT_CPU": seconds, "RLIMIT_AS": memory, "RLIMIT_FSIZE": size, "RLIMIT_NOFILE": 64}
    rlimits |= dict.fromkeys(("RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"), 0) | {"RLIMIT_NPROC": 1}
    job = {"program": program, "tests": list(tests), "limits": rlimits, "protected": protected}
    secret = secrets.token_hex(16).encode()
    try:
        with contextlib.ExitStack() as stack:
            given, report, said = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(json.dumps(job).encode())
            given.seek(0)
            command, files, folder = _interpreter(sys.executable, str(CHILD)), [_pipe(stack, secret)], None
            if protected:
                command, filtered = _enclosed(stack)
                files.append(filtered)
            else:
                folder = tempfile.mkdtemp(prefix="program-")
                stack.callback(subprocess.run, ["rm", "-rf", folder])  # not shutil, which recurses into nested folders
            child = subprocess.Popen(
                [*command, str(files[0])], stdin=given, stdout=report, stderr=said, env={}, cwd=folder, pass_fds=files,
                start_new_session=True,
            )  # fmt: skip
            code = _wait(child, limits.seconds)
            report.seek(0)
            told = report.read(_LONGEST_REPORT)
            said.seek(0)
            line = said.readline(_LONGEST_REPORT).decode("utf-8", "replace").strip()
    except OSError as error:
        raise UserError(
            f"no process could be started to run a program in ({error}): free some memory or disk"
        ) from error
    if code == 0 and told == secret:
        return Result(True, "passed")
    word = told.decode("utf-8", "replace")
    why = word if word.isidentifier() and word != "passed" else "died"
    return Result(False, "timeout" if code is None else why, line)


def _wait(child: subprocess.Popen, seconds: float) -> int | None:
    """Waits for the end of a child, or of its time, and ends all it has started. Returns its code; None: timed out."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.wait()


def _interpreter(executable: str, child: str) -> list[str]:
    return [executable, "-I", "-S", "-B", "-X", "utf8", child]


def _enclosed(stack: contextlib.ExitStack) -> tuple[list[str], int]:
    """The command that runs the child in bubblewrap, and the open file it needs."""
    bwrap = shutil.which("bwrap")
    if bwrap is None or platform.machine() not in _FILTERED:
        raise UserError(f"there is no bubblewrap to run programs in: {INSTALL} (Linux on x86-64 or ARM64)")
    command = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    command += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "sandbox", "--cap-drop", "ALL"]
    command += ["--clearenv", "--setenv", "LD_LIBRARY_PATH", ":".join(f"/python/{name}" for name in ("lib", "lib64"))]
    prefix = Path(sys.base_prefix)
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    shown = {f"/{name}": Path(f"/{name}") for name in ("usr/lib", "usr/lib64", "lib", "lib64")}
    shown |= {"/python/lib": prefix / "lib", "/python/lib64": prefix / "lib64", "/python/bin/python3": executable}
    for inside, path in (shown | {"/python/child.py": CHILD}).items():
        if path.is_symlink() and str(path) == inside:
            command += ["--symlink", os.readlink(path), inside]
        elif path.exists():
            command += ["--ro-bind", str(path), inside]
            for packages in path.glob("python3*/*-packages"):
                hidden = f"{inside}/{packages.relative_to(path)}"
                command += ["--tmpfs", hidden, "--remount-ro", hidden]
    filtered = _pipe(stack, _filter(*_FILTERED[platform.machine()]))
    command += ["--dev-bind", os.devnull, os.devnull, "--size", str(_TEMPORARY_MB * 2**20), "--tmpfs", "/tmp"]
    command += ["--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(filtered)]
    return [*command, "--", *_interpreter("/python/bin/python3", "/python/child.py")], filtered


def _pipe(stack: contextlib.ExitStack, content: bytes) -> int:
    """The end of a pipe to read `content` from."""
    end, start = os.pipe()
    stack.callback(os.close, end)
    with open(start, "wb") as file:
        file.write(content)
    return end


def _filter(audit: int, refused: Sequence[int]) -> bytes:
    """A seccomp program that answers EPERM to the numbers refused, and to every call of another machine's numbers."""
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    refuse = (end, 0, 0, 0x00050001)
    lines = [(load, 0, 0, 4), (equal, 1, 0, audit), refuse, (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), refuse]
    lines += [line for number in refused for line in ((equal, 0, 1, number), refuse)]
    return b"".join(struct.pack("=HBBI", *line) for line in [*lines, (end, 0, 0, 0x7FFF0000)])


@functools.lru_cache
def check(limits: Limits, protected: bool = True) -> None:
    """Makes sure that a program that is right passes here, and that the limits the kernel may not grant do hold.

    Raises:
      UserError: they do not.
    """
    program = "import collections, functools, heapq, itertools, math, os, re, sys\ndef twice(x):\n    return 2 * x\n"
    tests = ["assert twice(2) == 4"]
    if protected:
        tests += [f"assert os.getpid() < 10 and not os.path.exists({str(CHILD)!r})"]
        tests += ["try: os.fork() or os._exit(0)\nexcept PermissionError: pass\nelse: raise ProcessLookupError"]
    result = run(program, tests, limits, protected)
    if not result.passed:
        fix = f"check that bubblewrap (0.7 or later) may make user namespaces here; {INSTALL}" if protected else ""
        raise UserError(
            f"a right program does not pass in the sandbox here ({result.said or result.why}): "
            f"{fix or 'give it more time or memory with `mbpp.execution`'}"
        )
