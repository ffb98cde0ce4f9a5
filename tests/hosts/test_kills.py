"""Kill -9 at random moments: no record and no checkpoint is lost, repeated or damaged."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hosts.commands import Command, alone
from hosts.jobs import EVERY, INFER, TRAIN, check_parameters, check_records, losses

STEPS = 6 * EVERY


def endure(folder: Path, argv: tuple[str, ...], kills: int, check: Callable[[Path], None]) -> None:
    """Starts a verb and kills it, again and again. What it leaves when it ends is checked, and a new folder begun.

    A moment is drawn from the time a whole run takes here and now, so kills fall into every part of one. The first
    run of all is not measured: it compiles.

    Args:
      folder: where it runs.
      argv: the verb.
      kills: how many must hit.
      check: of the output folder of a run that ended.
    """
    alone(folder, *argv, "--output_dir=measured")
    begin = time.monotonic()
    alone(folder, *argv, "--output_dir=measured_again")
    span, moments = time.monotonic() - begin, random.Random(kills)
    hits = runs = 0
    while hits < kills:
        out, ended = f"killed_{runs}", False
        while not ended:
            command = Command((*argv, f"--output_dir={out}"), folder, folder / f"log-{time.monotonic_ns()}")
            last = time.monotonic() + span * moments.random()
            while not command.ended and (time.monotonic() < last or hits == kills):
                time.sleep(0.002)
            ended = command.ended
            if ended:
                assert command.wait() == 0, command.said
            else:
                os.kill(command.pid, signal.SIGKILL)
                command.wait()
                hits += 1
        check(folder / out)
        runs += 1


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_no_record_is_lost(decoding, kills):
    endure(decoding, INFER, kills, lambda out: check_records(out, decoding / "measured"))


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_no_checkpoint_is_damaged(training, kills):
    def check(out: Path) -> None:
        check_parameters(out, training / "measured")
        assert list(losses(out)) == list(range(EVERY, STEPS + 1, EVERY))

    endure(training, (*TRAIN, f"--steps={STEPS}"), kills, check)
