"""Planted bugs of the sharing: each must make the check fail that guards against it.

| planted bug                                                         | check that must fail                        |
|---------------------------------------------------------------------|---------------------------------------------|
| a_chunk_is_claimed_twice: every team takes every chunk              | together: no token is decoded twice         |
| a_chunk_is_left_out: a share ends before its last chunk             | together: the file of one host              |
| joined_by_host: the first host's chunks, then the second's          | together: the file of one host              |
| gaps_are_not_seen: a restart continues behind the last chunk        | restarted: the file of one host             |
| kept_chunks_are_decoded_again: a restart begins at the beginning    | restarted: what was kept stays untouched    |
| each_host_looks_by_itself: what is missing is not agreed upon       | restarted: no token is decoded twice        |
| files_grow_in_place: a chunk appears under its name before its end  | killed_in_a_write: the file of one host     |
| no_step_ahead: hosts that are told to stop do so at once            | stopped: all at one step                    |
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hosts.threads import Threads, serving
from inference import small_pair
from speccascade_t5x.common import storage
from speccascade_t5x.distributed import hosts
from speccascade_t5x.inference import generate, infer, records

LINES = [f"zeile {i}" for i in range(22)]
CHUNKS, PER_CHUNK, HOSTS = 6, 4, 2  # the last chunk is not full
AHEAD = 3
PATIENCE_S, SHORT_S = 60.0, 5.0  # until a host is given up: where all is well, and where a bug makes one leave


@pytest.fixture(scope="module")
def clients():
    with serving(HOSTS) as found:
        yield found


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return generate.load(small_pair.write(tmp_path_factory.mktemp("bundle") / "pair", table=False, drafter=False))


class Place:
    """A shared folder, and hosts that decode the lines into it."""

    def __init__(self, folder: Path, pair: generate.LoadedPair, threads: Threads):
        self.folder, self.threads, self._pair, self.patience_s = folder, threads, pair, PATIENCE_S
        self._input = folder / "lines.txt"
        self._input.write_text("\n".join(LINES) + "\n", "utf-8")

    def decode(self, out: str, **options) -> infer.InferResult:
        """The job on the host whose thread this is."""
        settings = generate.Settings(method="verifier", batch_size=2, max_len=6, buckets=(16,), max_input_len=16)
        return infer.infer(
            self._pair, settings, self.folder / out, input=str(self._input), batches_per_chunk=PER_CHUNK // 2, **options
        )

    def together(self, out: str) -> list:
        """The same on all hosts: results or exceptions."""
        return self.threads.run(lambda _: self.decode(out, host_patience_s=self.patience_s))

    def begun(self, out: str) -> dict[str, int]:
        """What a killed job has left: all chunks but the second and the last two. Returns when they were written."""
        asked = iter([False] * 2 * (CHUNKS - 2))  # after each batch but the last of a chunk
        with pytest.raises(hosts.Preempted):
            self.decode(out, stop=lambda: next(asked, True))
        chunk_dir = self.folder / out / "lines-predict.chunks" / "00000-of-00001"
        names = sorted(path.name for path in chunk_dir.iterdir())
        assert len(names) == CHUNKS - 2
        (chunk_dir / names[1]).unlink()
        return {path.name: path.stat().st_mtime_ns for path in chunk_dir.iterdir()}

    def bytes(self, out: str) -> bytes:
        return (self.folder / out / "lines-predict.jsonl-00000-of-00001").read_bytes()

    def tokens(self, out: str) -> int:
        """How many were decoded by the last job, on all hosts."""
        return json.loads((self.folder / out / "lines-timing.json").read_text("utf-8"))["tokens_decoded"]


@pytest.fixture
def place(tmp_path, pair, clients, monkeypatch):
    monkeypatch.setattr(hosts, "_SHARED_S", 0.5)  # one disk
    found = Place(tmp_path, pair, Threads(clients, monkeypatch))
    found.decode("one")
    return found


# Checks: each returns whether what it looks at is in order.


def same_file(place: Place, found: list) -> bool:
    return not any(isinstance(each, Exception) for each in found) and place.bytes("out") == place.bytes("one")


def together(place: Place) -> bool:
    """Hosts that begin together leave the file of one host, and decode no more than it does."""
    return same_file(place, place.together("out")) and place.tokens("out") == place.tokens("one")


def restarted(place: Place) -> bool:
    """A job that continues what a killed one left decodes what is missing, once, and touches nothing else."""
    kept, touched = place.begun("out"), []
    write = records.RecordWriter.write_chunk

    def watched(writer, chunk, rows):
        touched.append(writer._chunk_path(chunk).name)
        write(writer, chunk, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.RecordWriter, "write_chunk", watched)
        found = place.together("out")
    return same_file(place, found) and len(touched) == CHUNKS - len(kept) and not kept.keys() & set(touched)


class Killed(BaseException):
    """No Exception: nothing tidies up after it."""


def killed_in_a_write(place: Place) -> bool:
    """A job that dies while it writes a chunk is continued to the file of one host."""
    flush, calls = os.fsync, []

    def dying(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 5:  # of settings and chunks, and of the folders they are in: before a chunk is whole
            raise Killed
        flush(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.os, "fsync", dying)
        with pytest.raises(Killed):
            place.decode("out")
    return same_file(place, place.together("out"))


def stopped(place: Place) -> bool:
    """One host is told to stop in step 5, while the other is AHEAD steps further: both stop after the same step."""
    ended = [0, 0]  # the step each host is in; host 1 begins one when host 0 is no more than AHEAD behind

    def wait(index: int, step: int) -> None:
        ended[index], give_up = step, time.monotonic() + place.patience_s
        while (ended[1] < step + AHEAD if index == 0 else ended[0] < step - AHEAD) and time.monotonic() < give_up:
            time.sleep(0.001)

    def train(index: int) -> int:
        told = []
        stop = hosts.StopInTraining(hosts.current(), lambda: bool(told), AHEAD)
        for step in range(1, 100):
            wait(index, step)
            told += [True] * (index == 0 and step == 5)
            if stop(step):
                break
        ended[index] = 1000  # nobody waits for it any more
        return step

    found = place.threads.run(train)
    return found[0] == found[1] < 99


# Planted bugs: each takes pytest's monkeypatch.

REAL_MINE, REAL_FINISH, REAL_OPEN = hosts.Team.mine, records.RecordWriter.finish, infer._open


def a_chunk_is_claimed_twice(patch):
    patch.setattr(hosts.Team, "mine", lambda self, items: list(items))


def a_chunk_is_left_out(patch):
    patch.setattr(hosts.Team, "mine", lambda self, items: REAL_MINE(self, items[:-1]))


def joined_by_host(patch):
    def finish(self, order=None):
        by_host = [i for host in range(HOSTS) for i in order if i // PER_CHUNK % HOSTS == host]
        return REAL_FINISH(self, by_host)

    patch.setattr(records.RecordWriter, "finish", finish)


def gaps_are_not_seen(patch):
    def done_chunks(self):
        written = [i for i in range(self.num_chunks) if self._chunk_path(i).exists()]
        return list(range(self.num_chunks if self.path.exists() else max(written, default=-1) + 1))

    patch.setattr(records.RecordWriter, "done_chunks", done_chunks)


def kept_chunks_are_decoded_again(patch):
    patch.setattr(infer, "_open", lambda *args: (REAL_OPEN(*args)[0], set()))


def each_host_looks_by_itself(patch):
    """The first host looks when the second has written a chunk already."""

    def opened(here, *args):
        writer, done = REAL_OPEN(here, *args)
        give_up = time.monotonic() + 5.0
        while here.count > 1 and here.first and len(writer.done_chunks()) == len(done):
            if time.monotonic() > give_up:
                break
            time.sleep(0.002)
        return writer, set(writer.done_chunks()) if here.first else done

    patch.setattr(infer, "_open", opened)


def files_grow_in_place(patch):
    def write_bytes(path, chunks):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk[: len(chunk) // 2])
                file.flush()
                os.fsync(file.fileno())
                file.write(chunk[len(chunk) // 2 :])
        return path

    patch.setattr(storage, "write_bytes", write_bytes)


def no_step_ahead(patch):
    real = hosts.StopInTraining.__init__
    patch.setattr(hosts.StopInTraining, "__init__", lambda self, of, told, ahead: real(self, of, told, -1))


BUGS = [
    (a_chunk_is_claimed_twice, together),
    (a_chunk_is_left_out, together),
    (joined_by_host, together),
    (gaps_are_not_seen, restarted),
    (kept_chunks_are_decoded_again, restarted),
    (each_host_looks_by_itself, restarted),
    (files_grow_in_place, killed_in_a_write),
    (no_step_ahead, stopped),
]


@pytest.mark.parametrize(("bug", "check"), [pytest.param(*p, id=p[0].__name__) for p in BUGS])
def test_a_planted_bug_is_found(bug: Callable, check: Callable, place, monkeypatch):
    bug(monkeypatch)
    place.patience_s = SHORT_S
    assert not check(place)


@pytest.mark.parametrize("check", [together, restarted, killed_in_a_write, stopped])
def test_without_a_bug_every_check_passes(check, place):
    assert check(place)
