"""`infer` on several hosts: the files of one host, whatever happens to the processes on the way."""

from __future__ import annotations

import os
import signal

import pytest

from hosts.commands import SILENT, alone, running
from hosts.jobs import CHUNKS, INFER, check_records, chunks
from speccascade_t5x.cli import host_processes, preemption
from speccascade_t5x.distributed.hosts import LOST

BOUND = SILENT + 60  # far below what a hang would take, far above what a loaded machine adds


def test_a_host_dies_another_is_preempted_and_the_files_are_those_of_one_host(decoding):
    out, argv = decoding / "out", (*INFER, "--output_dir=out")
    with running(decoding, 2, *argv) as job:
        job.until(lambda: len(chunks(out)) >= 4)
        os.kill(job.hosts[0].worker, signal.SIGKILL)  # with it goes the coordination service
        assert job.hosts[1].wait(BOUND) == host_processes.EXIT_CODE, job.said
        assert job.hosts[1].said.splitlines() == [f"speccascade infer: {LOST}"]
        assert job.hosts[0].wait() == 128 + signal.SIGKILL and "was ended by SIGKILL" in job.hosts[0].said
    kept = chunks(out)
    assert 4 <= len(kept) < CHUNKS

    with running(decoding, 2, *argv) as job:
        job.until(lambda: len(chunks(out)) >= len(kept) + 4)
        os.kill(job.hosts[1].pid, signal.SIGTERM)
        job.wait(preemption.EXIT_CODE, preemption.EXIT_CODE)
        assert all(host.said.endswith("chunks are kept: the same command continues\n") for host in job.hosts)
    still = chunks(out)
    assert len(kept) + 4 <= len(still) < CHUNKS and kept.items() <= still.items()  # none was decoded again

    with running(decoding, 2, *argv) as job:
        job.wait()
        assert "wrote out/" in job.hosts[0].said and not job.hosts[1].said
    check_records(out, decoding / "one")


@pytest.mark.slow
def test_four_hosts_lose_one_and_a_job_of_three_finishes_it(decoding):
    argv = (*INFER, "--output_dir=four", "--refill")
    with running(decoding, 4, *argv) as job:
        job.until(lambda: len(chunks(decoding / "four")) >= 4)
        job.hosts[2].kill()
        for host in (job.hosts[0], job.hosts[1], job.hosts[3]):
            assert host.wait(BOUND) == host_processes.EXIT_CODE, job.said
            assert host.said.splitlines() == [f"speccascade infer: {LOST}"]
    assert len(chunks(decoding / "four")) < CHUNKS
    with running(decoding, 3, *argv) as job:
        job.wait()
    check_records(decoding / "four", decoding / "one")


@pytest.mark.slow
def test_weights_over_two_hosts_give_the_files_of_one_with_as_many_devices(decoding):
    """model=2 where each host has one device: a team of two hosts in lockstep; of four hosts, two teams."""
    argv = (*INFER, "--refill", "--gin_file=runs/infer.gin", "--gin_file=topologies/any.gin")
    argv = (*argv, "--gin.partitioning.Topology.model=2")
    alone(decoding, *argv, "--output_dir=mesh", devices=2)
    out = decoding / "teams"
    with running(decoding, 4, *argv, "--output_dir=teams") as job:
        job.until(lambda: len(chunks(out)) >= 4)
        os.kill(job.hosts[1].pid, signal.SIGTERM)  # which does not lead its team
        job.wait(*[preemption.EXIT_CODE] * 4)
    assert 4 <= len(chunks(out)) < CHUNKS
    with running(decoding, 2, *argv, "--output_dir=teams") as job:
        job.wait()
    check_records(out, decoding / "mesh")
