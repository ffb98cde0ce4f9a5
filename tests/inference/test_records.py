"""Records on disk: whole, resumable, deterministic."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest

from speccascade_t5x.common import storage
from speccascade_t5x.inference.records import RecordWriter
from speccascade_t5x.interfaces import UserError

CONFIG = "method = 'speculative'\nalpha = 0.3\n"

# A run as a program of its own, so that it can be killed. Its arguments are the output folder and
# the pause before each record.
RUN = textwrap.dedent("""
    import sys, time
    from speccascade_t5x.inference.records import RecordWriter
    pause = float(sys.argv[2])
    writer = RecordWriter(sys.argv[1], "restore_de:v1", "alpha = 0.3", 12)
    todo = sorted(set(range(12)) - set(writer.done_chunks()))
    print("first", todo[0] if todo else None, flush=True)

    def rows(chunk):
        for row in range(40):
            time.sleep(pause)
            text = "grün\\u2028" * 50
            yield {"inputs": f"zeile {chunk}/{row}", "prediction": text, "log_prob": -chunk / 7}

    for chunk in todo:
        writer.write_chunk(chunk, rows(chunk))
        print("wrote", chunk, flush=True)
    print(writer.finish(), flush=True)
""")


def start(output_dir, pause):
    command = [sys.executable, "-c", RUN, str(output_dir), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def whole_run(output_dir, pause=0.0):
    process = start(output_dir, pause)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output


def test_killed_runs_continue_and_end_in_the_same_bytes(tmp_path):
    whole_run(tmp_path / "whole")
    name = "restore_de_v1-predict.jsonl-00000-of-00001"
    expected = (tmp_path / "whole" / name).read_bytes()
    assert expected.count(b"\n") == 12 * 40

    shuffle = random.Random(0)
    output_dir = tmp_path / "killed"
    firsts = []
    for _ in range(3):
        process = start(output_dir, 0.002)
        firsts.append(int(process.stdout.readline().split()[1]))
        for _ in range(2):  # two chunks are whole, then die inside a later one
            assert process.stdout.readline().startswith("wrote")
        time.sleep(shuffle.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not (output_dir / name).exists()
    assert firsts[0] == 0 and firsts[1] >= 2 and firsts[2] >= firsts[1] + 2

    assert "first None" not in whole_run(output_dir)
    assert (output_dir / name).read_bytes() == expected
    assert sorted(p.name for p in output_dir.iterdir()) == [
        "restore_de_v1-predict.config.txt",
        name,
    ]
    assert "first None" in whole_run(output_dir)  # a finished run has nothing left to do
    assert (output_dir / name).read_bytes() == expected


def test_records_come_back_in_chunk_order(tmp_path):
    writer = RecordWriter(tmp_path, "a/b:c", CONFIG, 3)
    rows = [{"inputs": f"eingabe {i}\u2028ß", "log_prob": -i / 3, "tokens": [i, 1]} for i in range(5)]
    writer.write_chunk(2, rows[4:])
    writer.write_chunk(0, rows[:3])
    assert writer.done_chunks() == [0, 2]
    assert list(writer.read_all()) == rows[:3] + rows[4:]
    with pytest.raises(UserError, match="chunk 1 of 3"):
        writer.finish()
    writer.write_chunk(1, rows[3:4])
    path = writer.finish()
    assert path == tmp_path / "a_b_c-predict.jsonl-00000-of-00001"
    assert list(writer.read_all()) == rows
    assert path.read_text("utf-8").split("\n")[0] == '{"inputs": "eingabe 0\u2028ß", "log_prob": 0.0, "tokens": [0, 1]}'
    assert RecordWriter(tmp_path, "a/b:c", CONFIG, 3).done_chunks() == [0, 1, 2]
    assert writer.finish() == path


def test_other_settings_are_refused_and_nothing_changes(tmp_path):
    writer = RecordWriter(tmp_path, "task", CONFIG, 2)
    writer.write_chunk(0, [{"prediction": "x"}])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as error:
        RecordWriter(tmp_path, "task", CONFIG.replace("0.3", "0.5"), 2)
    assert "- alpha" not in str(error.value) and "-alpha = 0.3" in str(error.value)
    assert "+alpha = 0.5" in str(error.value) and "method" not in str(error.value)
    with pytest.raises(UserError, match=r"\+# 3 chunks"):
        RecordWriter(tmp_path, "task", CONFIG, 3)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    RecordWriter(tmp_path, "other_task", CONFIG, 5)


def test_records_of_unknown_origin_are_not_overwritten(tmp_path):
    path = tmp_path / "task-predict.jsonl-00000-of-00001"
    path.write_text("precious\n")
    with pytest.raises(UserError, match="exists, but"):
        RecordWriter(tmp_path, "task", CONFIG, 1)
    assert path.read_text() == "precious\n"


def test_json_of_array_values_is_plain_and_repeatable():
    value = {"a": np.float32(0.1), "b": np.arange(3), "c": jnp.array([0.5]), "d": np.int64(3)}
    expected = '{"a": 0.10000000149011612, "b": [0, 1, 2], "c": [0.5], "d": 3}'
    assert storage.to_json(value) == expected
    assert storage.to_json({"e": 1 / 3, "f": None}) == '{"e": 0.3333333333333333, "f": null}'
    assert json.loads(storage.to_json({"half": "\ud83c"})) == {"half": "\ud83c"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan"), [1.0, -math.inf]])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(UserError, match="'log_prob'"):
        storage.to_json({"inputs": "a", "log_prob": bad})


def test_values_without_json_form_are_refused():
    with pytest.raises(UserError, match="set has no JSON form"):
        storage.to_json({"a": {1, 2}})


def test_side_files(tmp_path):
    writer = RecordWriter(tmp_path, "task", CONFIG, 1)
    writer.write_metrics({"bleu": 41.5})
    writer.write_timing({"seconds": np.float64(1.5)})
    writer.write_summary("# täsk\n")
    assert json.loads((tmp_path / "task-metrics.json").read_text()) == {"bleu": 41.5}
    assert json.loads((tmp_path / "task-timing.json").read_text()) == {"seconds": 1.5}
    assert (tmp_path / "task-summary.md").read_text("utf-8") == "# täsk\n"


def test_unwritable_place_names_the_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/x.json cannot be written"):
        storage.write_json(tmp_path / "file" / "x.json", {})


def test_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path):
    """A file size limit stands in for a full disk: the kernel refuses the write half-way."""
    program = textwrap.dedent("""
        import resource, signal, sys
        from speccascade_t5x.interfaces import UserError
        from speccascade_t5x.common import storage
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            storage.write_text(sys.argv[1], "x" * 100_000)
        except UserError as error:
            print(error)
    """)
    target = tmp_path / "task-summary.md"
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, check=True)
    assert f"{target} cannot be written, and nothing of it was kept: File too large" in done.stdout
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["task-summary.md"]


def test_broken_record_file_names_the_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match="line 2"):
        list(storage.read_records(path))
    with pytest.raises(UserError, match="No such file"):
        list(storage.read_records(tmp_path / "none.jsonl"))
