"""`sweep` on several hosts: they share the cells, and what one that died had begun is measured by a restart."""

from __future__ import annotations

import json
import os
import signal

import pytest

from hosts.commands import SILENT, alone, running
from inference import small_pair
from speccascade_t5x.cli import host_processes
from speccascade_t5x.distributed.hosts import LOST

TEXTS = ["abcabcabcabc", "aaaabbbb", "xyzxyz", "hello", "good day", "abba"]
SWEEP = (
    *("sweep", "--pair=pair", "--input=in.jsonl", "--methods=lossless", "--seeds=0,1,2,3", "--batch_size=1"),
    "--gin.sweep.sweep.baselines=('verifier', 'drafter', 'lossless')",
    *("--gin.generate.Settings.buckets=(32,)", "--gin.sweep.sweep.traces=0", "--gin.sweep.sweep.timing_items=2"),
    *("--gin.sweep.sweep.timing_repeats=1", "--gin.sweep.sweep.timed_points=1"),
)
CELLS = 4 * 3  # seeds x baselines


@pytest.fixture
def place(tmp_path):
    """A folder all hosts share, with what one host measures."""
    small_pair.write(tmp_path / "pair", table=False)
    lines = [json.dumps({"inputs": text, "targets": text[::-1]}) for text in TEXTS]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), "utf-8")
    alone(tmp_path, *SWEEP, "--output_dir=one")
    return tmp_path


def cells(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("cells/*.json.gz")}


def rows(folder):
    """Rows in the order of cells.jsonl, without times and what compiling happened to fall to them."""
    found = [json.loads(line) for line in (folder / "cells.jsonl").read_text("utf-8").splitlines()]
    return [{name: row[name] for name in ("cell", "order", "metrics", "rates", "settings", "tokens")} for row in found]


def test_a_host_dies_and_the_restarted_sweep_has_the_cells_of_one_host(place):
    out, argv = place / "out", (*SWEEP, "--output_dir=out")
    with running(place, 2, *argv) as job:
        job.until(lambda: len(cells(out)) >= 4)
        os.kill(job.hosts[1].pid, signal.SIGKILL)  # the parent, which its worker does not outlive
        assert job.hosts[0].wait(SILENT + 60) == host_processes.EXIT_CODE, job.said
        assert job.hosts[0].said.splitlines()[-1] == f"speccascade sweep: {LOST}"
    kept = cells(out)
    assert 4 <= len(kept) < CELLS

    with running(place, 2, *argv) as job:
        job.wait()
        assert "cells.jsonl" in job.hosts[0].said and "cells.jsonl" not in job.hosts[1].said
    assert kept.items() <= cells(out).items()  # none was measured again
    assert rows(out) == rows(place / "one") and len(rows(out)) == CELLS
    timed = [len(list((folder / "timing").iterdir())) for folder in (out, place / "one")]
    assert timed[0] == timed[1] > 0
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
def test_four_hosts_lose_one_and_a_sweep_of_three_finishes_it(place):
    out, argv = place / "four", (*SWEEP, "--output_dir=four")
    with running(place, 4, *argv) as job:
        job.until(lambda: len(cells(out)) >= 3)
        job.hosts[2].kill()
        for host in (job.hosts[0], job.hosts[1], job.hosts[3]):
            assert host.wait(SILENT + 60) == host_processes.EXIT_CODE, job.said
            assert host.said.splitlines()[-1] == f"speccascade sweep: {LOST}"
    kept = cells(out)
    assert 3 <= len(kept) < CELLS

    with running(place, 3, *argv) as job:
        job.wait()
    assert kept.items() <= cells(out).items()
    assert rows(out) == rows(place / "one") and len(rows(out)) == CELLS
    assert not list(out.rglob("*.partial"))
