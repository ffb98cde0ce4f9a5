"""Decodes batches as a queue: finished rows are refilled instead of waiting for the slowest row of their batch.

The next batch is read as it would be in lockstep, and its rows wait in a second state. `decoding.queue` runs the loop
and moves them in, with one host round trip per batch. An example's encoder output has the same bits as in lockstep, and
its noise depends on the example alone. So every record equals that of lockstep, provided that a row of a matrix product
does not depend on its place in the batch; on CPU this holds bit for bit (tests/inference/test_refill.py). The second
state takes additional memory.

The examples of one encoder length (bucket) make one queue; the queues run one after another.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from speccascade_t5x.data.batching import Batch
from speccascade_t5x.decoding import Output, State
from speccascade_t5x.decoding.compiled import CompiledQueue
from speccascade_t5x.decoding.queue import NOBODY
from speccascade_t5x.inference.generate import Runner
from speccascade_t5x.interfaces import Array

# Time of a pause of the loop (a copy of rows) in rounds, for the packaged pair on two CPU cores.
# Until the first outputs have come, the loop pauses once one in FIRST_PAUSE inputs has ended.
PAUSE_ROUNDS, FIRST_PAUSE = 0.15, 8

Records = dict[int, dict[str, Any]]


def decode(runner: Runner, batches: Sequence[Batch]) -> Iterator[Records]:
    """Decodes the batches of each encoder length as one queue.

    Args:
      runner: the runner that decodes.
      batches: the batches of `runner.batches`, or some of them in their order.

    Yields:
      {example index: record} after every segment that finished some examples; every valid example once.

    Raises:
      UserError: a model produced NaN.
    """
    for _, queue in itertools.groupby(batches, key=lambda batch: batch.bucket):
        batches = list(queue)
        if len(batches) == 1:  # nothing waits
            yield runner.decode(batches[0])
        else:
            yield from _Queue(runner, batches).run()


class _Queue:
    """The batches of one encoder length, decoded in one state."""

    def __init__(self, runner: Runner, batches: list[Batch]):
        self.runner, self.batches = runner, batches
        self.compiled = runner.compiled(batches[0], CompiledQueue)
        self.ended = self.rounds = 0  # number of finished rows, and of the rounds they took

    def run(self) -> Iterator[Records]:
        """See `decode`."""
        runner, program = self.runner, self.runner.program
        begin = time.perf_counter()
        ids: Array | np.ndarray
        state, ids = self._read(self.batches[0])
        waiting: Any = None  # read only once it is there: a queue has two batches at least
        for batch in self.batches[1:]:
            del waiting  # before the next takes memory
            waiting, coming = self._read(batch)
            state, ids, ended = self.compiled.run(program, state, ids, waiting, coming, self._patience(len(coming)))
            ended = jax.device_get(ended)
            runner.timing.decode_s += time.perf_counter() - begin
            yield self._records(ended.output, ended.example_ids)
            begin = time.perf_counter()
        nobody = np.full_like(coming, NOBODY)
        state, ids, _ = self.compiled.run(program, state, ids, waiting, nobody, len(nobody))
        output, places = jax.device_get((self.compiled.finish(state), ids))
        runner.timing.decode_s += time.perf_counter() - begin
        yield self._records(output, places)

    def _read(self, batch: Batch) -> tuple[State, np.ndarray]:
        """The state of a batch, and the example in each of its rows."""
        return self.runner.start(self.compiled, batch), np.where(batch.valid, batch.example_ids, NOBODY)

    def _patience(self, inputs: int) -> int:
        """How many inputs must have ended before the loop pauses.

        Of B rows that take R rounds each, B / R end per round. Waiting until k have ended leaves (k - 1) / 2 idle on
        average, and shares a pause between k rows; the total cost is least at k = B sqrt(2 c / R), where c is the time
        of a pause in rounds.
        """
        share = math.sqrt(2 * PAUSE_ROUNDS * self.ended / self.rounds) if self.ended else 1 / FIRST_PAUSE
        return max(1, min(round(share * inputs), inputs))

    def _records(self, output: Output, ids: np.ndarray) -> Records:
        """Records of the rows of an output that hold an example."""
        places = np.flatnonzero(ids != NOBODY).tolist()
        rounds = output.counts.rounds.reshape(len(ids), -1)[places]
        self.ended, self.rounds = self.ended + rounds.size, self.rounds + int(rounds.sum())
        return {int(ids[place]): self.runner.record(output, place, int(ids[place])) for place in places}
