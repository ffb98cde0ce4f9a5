"""Cascades of real T5 models: no cache ever holds a wrong token, rows are alone, and calls are counted per level."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from decoding import tiny_pair
from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.interfaces import Bound

ROWS, VOCAB, ROOM = 6, tiny_pair.VOCAB, 64
K = [[1, 4, 3], [0, 1, 1], [0, 0, 2]]
SAMPLING = Sampling(np.float32(1.2), np.int32(0), np.float32(1), np.float32(0))


def cascade(k=K, **options) -> Bound:
    """The larger T5 model, the smaller one, and Max-Gram, as drafters."""
    small, large = tiny_pair.pair()
    rng = np.random.default_rng(4)
    table = drafting.build_table([rng.integers(2, VOCAB, 9) for _ in range(5)], VOCAB)
    copier = drafting.max_gram(1, VOCAB, table)
    return drafting.cascade([large, small], k, copier=copier, **{"sampling": SAMPLING, **options})


def full_laws(model: int, params, source, tokens) -> jax.Array:
    """The law of one model after every token of every row, [B, T, V], by one teacher-forced forward."""
    module = tiny_pair.pair()[1 - model].model.module
    encoder = source["encoder_input_tokens"]
    logits = module.apply({"params": params[model]}, encoder, tokens, jnp.ones_like(tokens))
    return jax.nn.softmax(logits / SAMPLING.temperature)


def test_every_law_is_a_full_forwards_whatever_was_accepted():
    """Rounds that accept anything from nothing to all, so that caches lag, are rolled back and catch up."""
    source = tiny_pair.sources(ROWS)
    bound = cascade(lenience=None, reads=1)
    drafter, size = bound.model, bound.model.draft_len
    state = jax.jit(lambda params: drafter.start(params, source, ROWS, ROOM))(bound.params)
    propose = jax.jit(drafter.propose)
    forward = jax.jit(lambda params, tokens: [full_laws(i, params, source, tokens) for i in range(2)])
    rng = np.random.default_rng(1)
    committed, length = np.zeros((ROWS, ROOM), np.int32), np.zeros(ROWS, np.int32)
    every = np.arange(ROWS)
    caught_up, counted = 0, np.zeros((ROWS, 2), int)
    for turn in range(7):
        last_two = np.stack([committed[every, np.maximum(length - 1, 0)], committed[every, length]], 1)
        noise = rng.random((ROWS, drafter.noise_size), np.float32)
        proposal, state = propose(bound.params, state, last_two, length, noise)
        proposal = jax.device_get(proposal)
        np.testing.assert_array_equal(proposal.lengths, size)  # the table fills what nothing else writes
        np.testing.assert_array_equal(proposal.calls, proposal.level_calls.sum(axis=1))
        ahead = committed.copy()
        for row in range(ROWS):
            ahead[row, length[row] + 1 : length[row] + 1 + size] = proposal.tokens[row]
        large, small = (np.asarray(x) for x in forward(bound.params["models"], ahead))
        for row in range(ROWS):
            here = slice(length[row], length[row] + size + 1)
            np.testing.assert_allclose(proposal.q[row], small[row, here], atol=2e-5)
            one_hot = np.eye(VOCAB)[proposal.tokens[row]]
            ways = np.stack([large[row, here][:-1], small[row, here][:-1], one_hot])
            off = np.abs(ways - proposal.law[row]).max(axis=-1)
            assert (off.min(axis=0) < 2e-5).all(), (turn, row, off)
            assert off[0, 0] < 2e-5  # the larger model writes first
        caught_up += (proposal.level_calls[:, 0] > 1).sum()
        accepted = [size] * ROWS if turn == 2 else rng.integers(0, size + 1, ROWS)
        for row, kept in enumerate(accepted):
            committed[row, : length[row] + 1 + kept] = ahead[row, : length[row] + 1 + kept]
            length[row] += kept + 1
            committed[row, length[row]] = rng.integers(2, VOCAB)
        stuck = 3  # a row that is done: it is proposed to as the others are, and its calls do not count
        counted += np.where((every == stuck)[:, None] & (turn > 0), 0, proposal.level_calls)
        told = np.where((every == stuck) & (turn > 0), np.asarray(state["committed"]), length)
        state = drafter.commit(state, jnp.asarray(told, jnp.int32))
    assert caught_up  # the larger model reviews once a round: any other call of it only catches up
    np.testing.assert_array_equal(state["level_calls"], counted)


@functools.cache
def program() -> decoding.Program:
    """The larger model as verifier; the smaller one, above prompt lookup, drafts for it with lenience."""
    small, large = tiny_pair.pair()
    copier = drafting.max_gram(1, VOCAB, None)
    drafter = drafting.cascade([small], [[2, 2], [0, 2]], copier=copier, lenience=2.0, sampling=SAMPLING)
    config = decoding.DecodeConfig(max_len=14, draft_len=4)
    return decoding.speculative_program(drafter, large, rules.Lossless(), config, SAMPLING)


def decode(sampling: Sampling, source, ids: np.ndarray) -> tuple[decoding.Output, decoding.State]:
    """(output, last state)."""
    ready = program()
    drafter = dataclasses.replace(ready.drafter, model=dataclasses.replace(ready.drafter.model, sampling=sampling))
    ready = dataclasses.replace(ready, drafter=drafter, sampling=sampling)
    state = decoding.run(ready, decoding.start(ready, source, jax.random.key(3), ids), ready.max_rounds)
    return decoding.finish(ready.config, state), state


def test_a_row_does_not_depend_on_its_batch_and_greedy_is_the_verifiers_own():
    every, source = np.arange(ROWS), tiny_pair.sources(ROWS)["encoder_input_tokens"]
    whole, state = decode(SAMPLING, {"encoder_input_tokens": source}, every)
    mates = tiny_pair.sources(ROWS, seed=1)["encoder_input_tokens"]
    mates[[3, 0]] = source[[1, 4]]
    other, _ = decode(SAMPLING, {"encoder_input_tokens": mates}, np.array([4, 10, 11, 1, 12, 13]))
    np.testing.assert_array_equal(whole.tokens[np.array([1, 4])], other.tokens[np.array([3, 0])])
    calls = np.asarray(state.drafter_state["level_calls"])
    np.testing.assert_array_equal(calls.sum(axis=1), whole.counts.drafter_calls)
    assert calls.min() > 0
    cold = dataclasses.replace(SAMPLING, temperature=np.float32(0))
    greedy, _ = decode(cold, {"encoder_input_tokens": source}, every)
    alone = decoding.autoregressive(
        model=tiny_pair.pair()[1],
        inputs={"encoder_input_tokens": source},
        config=decoding.DecodeConfig(max_len=14),
        sampling=cold,
        key=jax.random.key(0),
        example_ids=every,
    )
    np.testing.assert_array_equal(greedy.tokens, alone.tokens)
    assert 0 < int(np.sum(greedy.counts.accepted)) < int(np.sum(greedy.counts.examined))
