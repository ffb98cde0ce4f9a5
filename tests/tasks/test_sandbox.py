"""Hostile programs in the sandbox. What only Linux refuses is tested where the sandbox says that it holds."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import sandbox

LIMITS = sandbox.Limits(seconds=20.0, memory_mb=256, file_mb=1)
SHORT = LIMITS._replace(seconds=1.0)
HELD = sandbox.protections()
syscalls = pytest.mark.skipif("syscalls" not in HELD, reason="no system-call filter on this machine")
files = pytest.mark.skipif("files" not in HELD, reason="no Landlock on this machine")


def run(program: str, *tests: str, limits: sandbox.Limits = LIMITS) -> sandbox.Result:
    return sandbox.run(program, tests, limits)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="no system-call filter here"
)
def test_linux_holds_what_it_can():
    """So that a filter which no longer installs fails here, and does not skip the tests below."""
    assert {"limits", "syscalls"} <= set(HELD)


def test_a_right_program_passes_and_a_wrong_one_does_not():
    double = "def double(x):\n    return 2 * x\n"
    assert run(double, "assert double(2) == 4", "assert double('a') == 'aa'")[:2] == (True, "passed")
    assert run(double, "assert double(2) == 4", "assert double(2) == 5")[:2] == (False, "AssertionError")
    assert run("import math, re, heapq, collections\n", "assert math.isqrt(9) == 3").passed
    assert run("x = 'ß'", "assert x == 'ß' and len(x) == 1").passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "died"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(:", "SyntaxError"),
        ("x = '''", "SyntaxError"),  # an open quote does not swallow the tests
        ("if False:", "IndentationError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", "died"),
        ("print('passed')\nimport os\nos.write(1, b'passed')\nos._exit(0)", "died"),
        ("import os\nfor fd in range(64):\n    try: os.write(fd, b'passed\\n')\n    except OSError: pass\nos._exit(0)",
         "died"),
    ],
)  # fmt: skip
def test_leaving_before_the_tests_is_no_pass(program, why):
    result = run(program, "assert True")
    assert not result.passed
    assert result.why == why


def test_an_exit_inside_a_test_is_no_pass():
    assert run("import sys\ndef f(): sys.exit(0)", "assert f() == 1").why == "SystemExit"
    assert run("import os\ndef f(): os._exit(0)", "assert f() == 1").why == "died"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "import threading\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nwhile True: pass",
    ],
)
def test_an_endless_program_is_ended(program):
    assert run(program, limits=SHORT)[:2] == (False, "timeout")


def test_memory_is_limited():
    assert run("x = bytearray(2**30)").why == "MemoryError"
    assert run("x = []\nwhile True: x.append(' ' * 10**6)").why == "MemoryError"
    assert run("x = bytearray(2**20)").passed


def test_huge_output_goes_nowhere():
    loud = "import sys\nprint('x' * 10**7)\nsys.stderr.write('y' * 10**7)\n"
    result = run(loud, "assert True")
    assert result.passed
    assert len(repr(result)) < 500


def test_files_are_limited_and_gone_afterwards(tmp_path):
    where = run("import os\nraise type('_'.join(os.getcwd().split('-')[-1:]), (Exception,), {})").why
    assert where.isidentifier()
    assert not list(Path(tempfile.gettempdir()).glob(f"program-*{where}"))
    assert run("open('a', 'w').write('x')", "assert open('a').read() == 'x'").passed
    assert run("open('a', 'wb').write(b'x' * 10**7)").why == "OSError"
    assert run("x = [open(str(i), 'w') for i in range(200)]").why == "OSError"


@files
@pytest.mark.parametrize(
    "program",
    ["open({!r}, 'w')", "import os\nos.remove({!r})", "import os\nos.rename({!r}, 'mine')",
     "import os\nos.truncate({!r}, 0)", "import os\nos.mkdir({!r} + 'd')", "import os\nos.symlink('x', {!r} + 's')",
     "import os\nos.link({!r}, 'mine')"],
)  # fmt: skip
def test_nothing_outside_changes(tmp_path, program):
    kept = tmp_path / "kept.txt"
    kept.write_text("whole")
    assert run(program.format(str(kept))).why in ("PermissionError", "OSError")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert kept.read_text() == "whole"


@syscalls
@pytest.mark.parametrize("call", ["os.chmod({!r}, 0o777)", "os.utime({!r}, (0, 0))", "os.chown({!r}, 1, 1)"])
def test_no_mode_owner_or_time_changes(tmp_path, call):
    kept = tmp_path / "kept.txt"
    kept.write_text("whole")
    before = kept.stat()
    assert run(f"import os\n{call.format(str(kept))}").why == "PermissionError"
    assert kept.stat() == before


@syscalls
@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import os, signal\nos.kill(-1, signal.SIGKILL)",
    ],
)
def test_no_process_is_started_or_hit(program):
    assert run(program).why == "PermissionError"


@syscalls
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)").why == "PermissionError"


def test_limits_cannot_be_raised():
    raise_them = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))\nx = bytearray(2**30)"
    assert not run(raise_them).passed


def test_the_environment_and_the_input_are_empty(monkeypatch):
    monkeypatch.setenv("A_SECRET", "hush")
    assert run("import os", "assert 'A_SECRET' not in os.environ and 'PATH' not in os.environ").passed
    assert run("import sys", "assert sys.stdin.read() == ''").passed
    assert run("import numpy").why == "ModuleNotFoundError"  # no site packages


def test_the_check_says_that_nothing_could_pass(monkeypatch, tmp_path):
    sandbox.check(LIMITS)
    broken = tmp_path / "child.py"
    broken.write_text("print('limits')")
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(UserError, match=r"a right program does not pass in the sandbox here \(died\)"):
        sandbox.check(SHORT)


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"memory_mb": 1}, {"file_mb": 0}])
def test_limits_that_leave_no_room_are_refused(wrong):
    with pytest.raises(UserError, match="leaves no room"):
        run("", limits=LIMITS._replace(**wrong))


def test_the_child_needs_nothing_but_the_standard_library():
    done = subprocess.run([sys.executable, "-I", "-S", str(sandbox.CHILD)], input=b"{", capture_output=True)
    assert b"JSONDecodeError" in done.stderr
