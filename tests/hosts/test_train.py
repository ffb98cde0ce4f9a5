"""`train` on several hosts: the bits of a run nobody disturbed, whatever happens to the processes on the way."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from corpora import ROWS, write_split
from hosts.commands import SILENT, Command, alone, running, until
from hosts.jobs import EVERY, TRAIN, TRAINING, check_parameters, losses, newest
from speccascade_t5x.cli import host_processes, preemption
from speccascade_t5x.distributed.hosts import LOST

STEPS = 60
LONG = (*TRAIN, f"--steps={STEPS}")


@pytest.fixture(scope="module")
def whole(training):
    """What two hosts train when nobody disturbs them."""
    with running(training, 2, *LONG, "--output_dir=whole") as job:
        job.wait()
    return training / "whole"


def test_two_hosts_train_as_one(training, whole):
    alone(training, *LONG, "--output_dir=one_whole")
    one, two = losses(training / "one_whole"), losses(whole)
    assert list(one) == list(two) == list(range(EVERY, STEPS + 1, EVERY))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-3)


def kill_host_1(training, out, argv=LONG):
    """Begins a run whose host 1 dies in the middle, which the other one says and ends."""
    with running(training, 2, *argv, f"--output_dir={out.name}") as job:
        job.until(lambda: newest(out) >= 2 * EVERY)
        os.kill(job.hosts[1].worker, signal.SIGKILL)
        assert job.hosts[0].wait(SILENT + 60) == host_processes.EXIT_CODE, job.said
        assert job.hosts[0].said.splitlines()[-1] == f"speccascade train: {LOST}"
        assert "Traceback" not in job.hosts[0].said
    assert 2 * EVERY <= newest(out) < STEPS


def finish(training, out, argv=LONG):
    """Starts the run again, to its end."""
    begun = newest(out)
    with running(training, 2, *argv, f"--output_dir={out.name}") as job:
        job.wait()
        assert f"continues after step {begun}" in job.hosts[0].said
        assert "continues" not in job.hosts[1].said and "loss" not in job.hosts[1].said  # one host speaks for all
    assert max(losses(out)) == STEPS


def test_a_host_dies_and_the_bits_are_those_of_an_undisturbed_run(training, whole):
    out = training / "killed"
    kill_host_1(training, out)
    finish(training, out)
    check_parameters(out, whole)


@pytest.mark.slow
def test_hosts_that_tokenise_a_task_survive_a_death_too(training, corpus):
    (training / "task.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom speccascade_t5x.tasks import l10n\n"
        f"l10n.data_dir.path = '{corpus}'\n", "utf-8"
    )  # fmt: skip
    data = ("--gin_file=task.gin", "--task=restore_de", "--inputs_len=64", "--targets_len=64")
    argv = (*TRAINING, *data, f"--steps={STEPS}")
    for split in ("train", "validation"):
        write_split(corpus, split, ROWS * 4)
    with running(training, 2, *argv, "--output_dir=task_whole") as job:
        job.wait()
    out = training / "task_killed"
    kill_host_1(training, out, argv)
    finish(training, out, argv)
    check_parameters(out, training / "task_whole")
    assert losses(out) == losses(training / "task_whole")
    assert not (out / "tokenised").exists()


@pytest.mark.slow
def test_all_hosts_stop_at_one_step_when_one_is_told(training, whole):
    out = training / "told"
    with running(training, 2, *LONG, "--output_dir=told") as job:
        job.until(lambda: newest(out) >= EVERY)
        os.kill(job.hosts[1].pid, signal.SIGTERM)
        job.wait(preemption.EXIT_CODE, preemption.EXIT_CODE)
        assert all("its checkpoint is kept: the same command continues" in host.said for host in job.hosts)
    assert EVERY < newest(out) < STEPS
    assert f"after step {newest(out)} of {STEPS}" in job.said
    finish(training, out)
    check_parameters(out, whole)


def test_sigterm_leaves_a_checkpoint_of_the_step_in_hand(training):
    out = training / "one_told"
    command = Command((*LONG, "--output_dir=one_told"), training, training / "log-told")
    until(lambda: newest(out) >= EVERY, command)
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == preemption.EXIT_CODE, command.said
    assert f"told to stop after step {newest(out)} of {STEPS}; its checkpoint is kept" in command.said
    assert "Traceback" not in command.said
    alone(training, *LONG, "--output_dir=one_told")
    alone(training, *LONG, "--output_dir=one_whole")  # continued, where another test has made it
    check_parameters(out, training / "one_whole")


@pytest.mark.slow
def test_four_hosts_with_split_weights_lose_one_and_end_with_the_same_bits(training):
    argv = (*LONG, "--topology=2x4")  # two devices each, so that a group of four spans two hosts
    with running(training, 4, *argv, "--output_dir=split", devices=2) as job:
        job.wait()
    out = training / "split_killed"
    with running(training, 4, *argv, "--output_dir=split_killed", devices=2) as job:
        job.until(lambda: newest(out) >= 2 * EVERY)
        job.hosts[3].kill()
        for host in job.hosts[:3]:
            assert host.wait(SILENT + 60) == host_processes.EXIT_CODE, job.said
            assert host.said.splitlines()[-1] == f"speccascade train: {LOST}"
    assert newest(out) < STEPS
    with running(training, 4, *argv, "--output_dir=split_killed", devices=2) as job:
        job.wait()
    check_parameters(out, training / "split")
