"""Where host 0 listens, asked from inside a process that has joined."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOIN = """
import socket, sys
from speccascade_t5x.cli import host_processes
host, port = sys.argv[1].split(":")
host_processes._initialize(sys.argv[1], 1, 0, 20)
answers = []
for address in ("127.0.0.1", "127.0.0.2"):
    with socket.socket() as mine:
        answers.append(mine.connect_ex((address, int(port))) == 0)
print(*answers)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def join(host: str, bind: str | None = None) -> subprocess.CompletedProcess:
    port = free_port()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COORDINATOR_BIND_ADDRESS": f"{bind}:{port}"} if bind else {}
    command = [sys.executable, "-c", JOIN, f"{host}:{port}"]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 on its loopback interface")
def test_host_0_listens_where_it_is_told_and_nowhere_else():
    assert join("127.0.0.1").stdout.split() == ["True", "False"]
    assert join("127.0.0.1", bind="0.0.0.0").stdout.split() == ["True", "True"]


def test_an_address_of_another_machine_is_said():
    refused = join("192.0.2.1")
    assert refused.returncode == 1
    assert "UserError: host 0 cannot listen at --coordinator=192.0.2.1:" in refused.stderr
