"""Loading needs the arrays and little more: measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 1.3  # times the largest tensor, beyond the resident arrays


def measure(folder: Path, sizes: list[int], formats: list[str]) -> dict[str, float]:
    """Format -> peak minus what was there before minus the arrays, in largest tensors."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which can tell and forget the peak of a process")
    command = [sys.executable, str(Path(__file__).with_name("memory_probe.py")), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([*command, *map(str, sizes), *formats], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["format"]: row["over"] / row["largest"] for row in rows}


def test_one_tensor_at_a_time(tmp_path):
    """34 MB of embedding; a reader that held all of it twice would need a largest tensor more."""
    found = measure(tmp_path, [16384, 512, 1, 512], ["huggingface:bfloat16"])
    assert max(found.values()) < LIMIT, found


@pytest.mark.slow
def test_two_gigabytes(tmp_path):
    formats = ["t5x", "orbax", "t5x_orbax", "huggingface", "huggingface:bfloat16", "bundle"]
    found = measure(tmp_path, [32128, 1024, 24, 2816], formats)
    print(found)
    assert set(found) == set(formats) and max(found.values()) < LIMIT, found
