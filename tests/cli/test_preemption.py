"""SIGTERM to a real `speccascade infer`: an exit code of its own, whole files, a restart that leaves no trace of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from inference import small_pair
from speccascade_t5x.cli import preemption

ROOT = Path(__file__).resolve().parents[2]
LINES = [f"zeile {i}" for i in range(400)]
NAME = "lines-predict.jsonl-00000-of-00001"


@pytest.fixture
def start(tmp_path):
    """Starts the verb on LINES into a folder."""
    small_pair.write(tmp_path / "pair", table=False, drafter=False)
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n", "utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),  # one process compiles for all
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(folder: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "speccascade_t5x.cli", "infer", "--input=lines.txt", f"--output_dir={folder}"]
        fixed = ["--pair=pair", "--method=verifier", "--batch_size=2", "--gin.infer.infer.batches_per_chunk=2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, *fixed, *flags], cwd=tmp_path, env=environment, **pipes)

    return run


def test_a_preempted_run_ends_with_its_own_code_and_continues(start, tmp_path):
    out = tmp_path / "out"
    process = start("out", "--refill")
    give_up = time.monotonic() + 900
    while not list(out.rglob("*-of-00100.jsonl")):  # the first chunk is there
        assert process.poll() is None and time.monotonic() < give_up, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=900)
    assert process.returncode == preemption.EXIT_CODE, err
    assert "chunks are kept: the same command continues" in err and "Traceback" not in err
    kept = list(out.rglob("*-of-00100.jsonl"))
    assert 0 < len(kept) < 100
    assert all(path.read_bytes().count(b"\n") == 4 for path in kept)
    assert not list(out.rglob("*.partial")) and not (out / NAME).exists() and not (out / "config.gin").exists()

    rest, lockstep = start("out", "--refill"), start("lockstep")
    for process in (rest, lockstep):
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
    assert (out / NAME).read_bytes() == (tmp_path / "lockstep" / NAME).read_bytes()
    assert not list(out.rglob("*chunks*"))


def test_the_handler_that_was_there_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.stop_on_sigterm() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before
    found = []

    def elsewhere():
        with preemption.stop_on_sigterm() as stop:
            found.append(stop())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False]
