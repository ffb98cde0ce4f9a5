"""One writer per folder: a second one is refused, a dead one blocks nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import UserError

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from speccascade_t5x.common import storage
with storage.one_writer(sys.argv[2], "a job"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "new" / "out"
    second = storage.one_writer(folder, "a job")
    with storage.one_writer(folder, "a job"):
        with pytest.raises(UserError, match="another process is at work on a job in .*: wait until it has ended"):
            second.__enter__()
        with storage.one_writer(folder, "another job"), storage.one_writer(folder, "a job", holds=False):
            pass
    with storage.one_writer(folder, "a job"):
        pass
    assert not folder.exists()  # nothing was written, so nothing is left


def test_a_killed_writer_blocks_nobody(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work"), storage.one_writer(tmp_path, "a job"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert len(list(tmp_path.iterdir())) == 1  # its file is left, and is no lock
        with storage.one_writer(tmp_path, "a job"):
            pass
    finally:
        holder.kill()
        holder.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_left_to_whoever_writes_there(tmp_path):
    (tmp_path / "file").write_text("")
    with storage.one_writer(tmp_path / "file", "a job"):
        assert (tmp_path / "file").is_file()
