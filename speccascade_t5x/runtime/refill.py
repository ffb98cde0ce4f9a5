"""Decoding a queue of batches without waiting for the slowest row: finished rows are refilled between segments.

A batch in lockstep lasts as long as its longest output, and rows that end early only wait. Here the loop pauses as soon
as a few rows are done, hands their records out, and goes on with new examples in their place:

    running   [ a  b  c  d ]   the state the loop works on
    waiting   [ e  f  g  h ]   the next batch, its inputs read already

The waiting batch is read by the program that would begin it in lockstep, so nothing is compiled but the copy of rows
from one state to the other, and an example's encoder output has the same bits. Noise depends on the example alone. So
every record is what lockstep gives, where a row of a matrix product does not depend on its place in the batch:
so on CPU, bit for bit (tests/runtime/test_refill.py). The price is a second state in memory.

Examples of one encoder length (bucket) make one queue; the queues run one after another.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from speccascade_t5x.decoding import State
from speccascade_t5x.decoding.compiled import CompiledDecoder
from speccascade_t5x.runtime.batching import Batch
from speccascade_t5x.runtime.generate import Runner

# The loop pauses once one in so many rows can be refilled. A pause costs the host's turn and a copy of rows, waiting
# costs rounds in which those rows stand idle.
PAUSE_AT = 8

Records = dict[int, dict[str, Any]]


def decode(runner: Runner, batches: Sequence[Batch]) -> Iterator[Records]:
    """Decodes batches of like lengths as one queue each.

    Args:
      runner: what decodes, and how.
      batches: as `runner.batches` made them, or some of these in their order.

    Yields:
      {example index: record} after every segment that finished some; every valid example once.

    Raises:
      UserError: a model produced NaN.
    """
    for _, queue in itertools.groupby(batches, key=lambda batch: batch.bucket):
        yield from _Queue(runner, list(queue)).run()


class _Queue:
    """The batches of one encoder length on their way through one state."""

    def __init__(self, runner: Runner, batches: list[Batch]):
        self.runner, self.batches = runner, batches
        self.samples = runner.settings.num_samples
        self.size = len(batches[0].valid)
        self.width = max(1, self.size // PAUSE_AT)  # inputs copied at a time
        self.waiting: State | None = None
        self.ready: list[tuple[int, int]] = []  # (input of `waiting`, example)

    def run(self) -> Iterator[Records]:
        """See `decode`."""
        runner = self.runner
        decoder = runner.compiled(self.batches[0])
        begin = time.perf_counter()
        self._read()
        state, self.waiting = self.waiting, None
        inside, self.ready = dict(self.ready), []  # input of `state` -> the example in it
        done = np.zeros((self.size, self.samples), bool)
        while inside or self.ready or self.batches:
            state = self._refill(decoder, state, inside, done)
            # With nothing left to read a pause would bring nothing: the rest runs to its end.
            more = self.width * self.samples if self.ready or self.batches else done.size
            state = decoder.run(runner.program, state, until=min(int(done.sum()) + more, done.size))
            done = np.array(state.done).reshape(done.shape)
            finished = [place for place in inside if done[place].all()]
            if not finished:  # of several samples, some
                continue
            output = jax.device_get(decoder.finish(state))
            runner.timing.decode_s += time.perf_counter() - begin
            yield {inside[place]: runner.record(output, place, inside.pop(place)) for place in finished}
            begin = time.perf_counter()

    def _read(self) -> None:
        """Begins the next batch in the waiting state."""
        batch = self.batches.pop(0)
        self.waiting = self.runner.start(batch)
        self.ready = [(place, int(batch.example_ids[place])) for place in np.flatnonzero(batch.valid).tolist()]

    def _refill(self, decoder: CompiledDecoder, state: State, inside: dict[int, int], done: np.ndarray) -> State:
        """Moves waiting examples into the free places of the state, as far as there are any; updates the rest."""
        free = [place for place in range(self.size) if place not in inside]
        while free and (self.ready or self.batches):
            if not self.ready:
                self._read()
            count = min(self.width, len(free), len(self.ready))
            places, free = free[:count], free[count:]
            coming, self.ready = self.ready[:count], self.ready[count:]
            source = self._rows([place for place, _ in coming], nowhere=0)
            state = self._move(decoder, state, source, self._rows(places, nowhere=self.size))
            inside.update(zip(places, (index for _, index in coming), strict=True))
            done[places] = False
        return state

    def _rows(self, places: list[int], nowhere: int) -> np.ndarray:
        """Rows of all samples of these inputs, filled up to the width of a move with those of `nowhere`."""
        inputs = np.array(places + [nowhere] * (self.width - len(places)), np.int32)
        return (inputs[:, None] * self.samples + np.arange(self.samples, dtype=np.int32)).reshape(-1)

    def _move(self, decoder: CompiledDecoder, state: State, source: np.ndarray, target: np.ndarray) -> State:
        """One move; what compiling it took counts as compiling."""
        before, begin = decoder.seconds, time.perf_counter()
        state = decoder.move(state, self.waiting, source, target)
        spent = decoder.seconds - before
        if spent:
            self.runner.timing.compile_s += spent
            self.runner.timing.decode_s -= min(spent, time.perf_counter() - begin)
        return state
