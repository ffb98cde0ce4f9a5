"""Who takes which share, what is refused, and a seqio task read in parts."""

from __future__ import annotations

import argparse
import signal
import subprocess

import pytest

from speccascade_t5x.cli import host_processes as flags
from speccascade_t5x.cli import infer, sweep, train
from speccascade_t5x.cli.__main__ import run_verb
from speccascade_t5x.distributed import hosts
from speccascade_t5x.distributed.hosts import Hosts, Team
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.training import train_loop


def test_teams_share_out_every_item_once():
    items = list(range(11))
    for count, size in ((1, 1), (3, 1), (4, 2), (4, 4)):
        begins = range(0, count, size)
        teams = [tuple(range(begin, begin + size)) for begin in begins for _ in range(size)]
        shares = {
            members: Team(Hosts(i, count), members).mine(items) for i, members in zip(range(count), teams, strict=True)
        }
        assert sorted(item for share in shares.values() for item in share) == items
        leaders = [Team(Hosts(i, count), members).leads for i, members in zip(range(count), teams, strict=True)]
        assert leaders == [i % size == 0 for i in range(count)]


def test_one_host_meets_nobody():
    here = hosts.current()
    assert here == Hosts(0, 1) and here.first
    assert here.gather("nothing", {"a": 1}) == [{"a": 1}] and here.share("nothing", 3) == 3
    told = []
    stop = hosts.StopInTraining(here, lambda: bool(told), ahead=5)
    assert not stop(1)
    told.append(True)
    assert stop(2) and hosts.StopInDecoding(hosts.team(None), lambda: True)()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num_processes=2"], "the flags that name hosts go with --multihost: add it"),
        (["--multihost", "--num_processes=2"], "go together: name all three or none"),
        (["--multihost", "--coordinator=a", "--num_processes=2", "--process_id=0"], "is not an address: write HOST"),
        (
            ["--multihost", "--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "is out of range: the 2",
        ),
        (["--multihost", "--host_timeout=60"], "is outside its range: 1 to 30 seconds"),
    ],
)
@pytest.mark.parametrize("verb", [infer, sweep, train])
def test_flags_that_do_not_fit_are_refused(verb, given, message, capsys):
    assert run_verb(verb.main, given, "speccascade") == 2
    assert message in capsys.readouterr().err


def test_what_other_programs_report_is_told_from_a_lost_host():
    lost = ValueError("UNKNOWN: Gloo all-reduce failed: Read error: Connection reset by peer")
    try:
        raise UserError("the checkpoint of step 3 cannot be written") from lost
    except UserError as error:
        assert flags._names_a_dead_host(error)
    assert not flags._names_a_dead_host(UserError("the gloo on the barrier"))
    assert not flags._names_a_dead_host(ValueError("shapes differ"))
    report = b"F1121 16:45:08.963252    9184 client.h:80] Terminating process because the JAX distributed service"
    assert flags._REPORT.match(report)[1] == b"client"


def test_a_signal_after_the_end_changes_nothing():
    ended = subprocess.Popen(["true"])
    ended.wait()
    flags._hand_on(ended.pid)(signal.SIGTERM, None)
    asleep = subprocess.Popen(["sleep", "60"])
    flags._hand_on(asleep.pid)(signal.SIGTERM, None)
    assert asleep.wait(60) == -signal.SIGTERM


def test_the_parser_lists_the_flags():
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    assert "--coordinator HOST:PORT" in parser.format_help()


def test_parts_of_a_task_are_the_task(corpus):
    pytest.importorskip("seqio")
    from speccascade_t5x.data import seqio_tasks
    from speccascade_t5x.tasks import l10n  # noqa: F401  registers the task

    whole = [example.targets_text for example in seqio_tasks.examples("restore_de", "train", {})]
    parts = [[e.targets_text for e in seqio_tasks.examples("restore_de", "train", {}, shard=(i, 2))] for i in range(2)]
    assert all(parts) and sorted([*parts[0], *parts[1]]) == sorted(whole)
    with pytest.raises(UserError, match=r"no example in split 'train', part 90 of 99"):
        seqio_tasks.examples("restore_de", "train", {}, shard=(90, 99))


def test_a_mesh_over_one_host_may_be_a_part_of_it(devices):
    hosts.check_whole(3)
    assert train_loop.data_mesh(2).size == 2
