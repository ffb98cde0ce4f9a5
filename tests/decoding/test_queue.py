"""A queue gives what its batches give alone, whatever the places and the order its rows move in."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.decoding.queue import NOBODY

from . import tiny_pair

PLACES, KEY = 6, jax.random.key(11)
EXAMPLES = [0, 1, 2, 3, 4, NOBODY], [10, 11, 12, 13, 14, 15], [20, 21, 22, 23, NOBODY, NOBODY]
BATCHES = [np.array(ids) for ids in EXAMPLES]


@functools.cache
def program(samples: int = 1) -> decoding.Program:
    """Outputs of 1 to 24 tokens, of which drafts give up to three in a round."""
    drafter, verifier = tiny_pair.pair()
    config = decoding.DecodeConfig(max_len=24, draft_len=2, num_samples=samples)
    return decoding.speculative_program(drafter, verifier, rules.Lossless(), config, decoding.Sampling(np.float32(1.0)))


@functools.cache
def begun(batch: int, samples: int) -> decoding.State:
    ids = BATCHES[batch]
    return decoding.start(program(samples), tiny_pair.sources(PLACES, seed=batch), KEY, np.maximum(ids, 0))


def rows_of(output: decoding.Output, ids: np.ndarray) -> dict[int, list]:
    """{example: its samples} of the places that hold one."""
    output = jax.device_get(output)
    fields = (output.tokens, output.lengths, output.source, output.counts.rounds, output.counts.accepted)
    split = [field.reshape(len(ids), -1, *field.shape[1:]) for field in fields]
    return {int(ids[i]): [field[i].tolist() for field in split] for i in np.flatnonzero(ids != NOBODY)}


@functools.cache
def alone(samples: int) -> dict[int, list]:
    """Every example, decoded in its batch."""
    found = {}
    for batch, ids in enumerate(BATCHES):
        state = decoding.run(program(samples), jax.tree.map(lambda x: x.copy(), begun(batch, samples)), 24)
        found |= rows_of(decoding.finish(program(samples).config, state), ids)
    return found


def queue(samples: int, patience: int, width: int):
    """Runs all batches through one state. Returns (rows, outputs that ended in each call, places after each call)."""
    chosen, found, ended_ids, ids_after = program(samples), {}, [], []
    state, ids = jax.tree.map(lambda x: x.copy(), begun(0, samples)), BATCHES[0]
    for batch, coming in enumerate(BATCHES[1:], start=1):
        waiting = begun(batch, samples)
        state, ids, ended = decoding.run_queue(chosen, state, ids, waiting, coming, patience, width=width)
        ended_ids.append(np.asarray(ended.example_ids))
        ids_after.append(np.asarray(ids))
        assert not set(ended_ids[-1]) - {NOBODY} & set(found)
        found |= rows_of(ended.output, ended_ids[-1])
    nobody = np.full(PLACES, NOBODY)
    state, ids, ended = decoding.run_queue(chosen, state, ids, waiting, nobody, patience, width=width)
    assert np.all(np.asarray(ended.example_ids) == NOBODY)
    found |= rows_of(decoding.finish(chosen.config, state), np.asarray(ids))
    return found, ended_ids, ids_after


@pytest.mark.parametrize(("samples", "width", "patience"), [(1, 1, 1), (1, 2, 3), (1, 6, 6), (2, 2, 2)])
def test_every_example_comes_once_and_as_in_its_batch(samples, width, patience):
    found, ended, after = queue(samples, patience, width)
    assert found == alone(samples)
    assert sorted(found) == [i for i in itertools.chain(*BATCHES) if i != NOBODY]
    assert len({len(str(row[0])) for row in found.values()}) > 5  # lengths differ, or nothing was shown
    for coming, out, held in zip(BATCHES[1:], ended, after, strict=True):  # what waited has moved in, and nothing else
        assert set(coming) - {NOBODY} <= set(held) | set(out)
        assert np.all(out[coming == NOBODY] == NOBODY)


def test_patience_decides_when_rows_move():
    """Waiting for all of them is lockstep: the first batch leaves whole. Waiting for none, its slowest row stays on."""
    _, lockstep, _ = queue(1, PLACES, PLACES)
    assert lockstep[0].tolist() == BATCHES[0].tolist()
    _, eager, held = queue(1, 1, 1)
    assert eager[0][0] == NOBODY  # the empty place goes first
    slow = set(BATCHES[0]) & set(held[0].tolist())
    assert slow and {10, 11, 12, 13, 14, 15} & set(eager[0].tolist())  # overtaken
    rounds = {i: alone(1)[i][3][0] for i in alone(1)}
    assert max(rounds, key=rounds.get) in slow | set(held[-1].tolist())
