"""A language model as drafter: it reports the law it samples from, and its cache never lags behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import tiny_pair
from decoding.tables import decoder, inputs, random_tables
from oracles import sampler as oracle
from oracles.tables import lookup
from speccascade_t5x import decoding
from speccascade_t5x.core import probs, rules
from speccascade_t5x.drafting import ModelDrafter
from speccascade_t5x.interfaces import Bound, Drafter
from speccascade_t5x.models import bigram

VOCAB, DRAFT_LEN = 5, 3
SETTINGS = {
    "plain": {},
    "cool": {"temperature": 0.5},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 2},
    "top_p": {"temperature": 0.8, "top_p": 0.6},
    "min_p": {"min_p": 0.3},
}


def drafter_of(
    settings: dict, model, width: int, score_bonus: bool, vocab_size=None, draft_len=DRAFT_LEN
) -> ModelDrafter:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
    return ModelDrafter(decoding.Sampling(**values), model, draft_len, width, vocab_size, score_bonus)


def first_round(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(last two tokens, positions) of rows that hold only their start token."""
    return np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32)


@pytest.mark.parametrize("score_bonus", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_law_reported_is_the_law_sampled_from(name, score_bonus):
    """Against the oracle at every drafted prefix, and against the frequencies of the drafts themselves."""
    rows, settings = 20_000, SETTINGS[name]
    table = random_tables(6, VOCAB, 3)[0]
    bound = bigram(table)
    drafter = drafter_of(settings, bound.model, VOCAB, score_bonus)
    assert isinstance(drafter, Drafter)
    assert drafter.noise_size == DRAFT_LEN * probs.DRAW

    @jax.jit
    def propose(drafter, noise):
        state = drafter.start(bound.params, inputs(rows), rows, 8)
        return drafter.propose(bound.params, state, *first_round(rows), noise)[0]

    noise = np.random.default_rng(0).random((rows, drafter.noise_size), np.float32)
    proposal = jax.device_get(propose(drafter, noise))
    assert proposal.law.shape == (rows, DRAFT_LEN, VOCAB)
    np.testing.assert_array_equal(proposal.lengths, DRAFT_LEN)
    np.testing.assert_array_equal(proposal.calls, DRAFT_LEN + score_bonus)
    assert (proposal.q is None) == (proposal.q_raw is None) == (not score_bonus)

    temperature = settings.get("temperature", 1.0)
    shape = {k: v for k, v in settings.items() if k != "temperature"}
    for size in range(DRAFT_LEN + 1):
        for prefix in np.unique(proposal.tokens[:, :size], axis=0):
            here = (proposal.tokens[:, :size] == prefix).all(axis=1)
            logits = lookup(table, prefix.tolist())
            q = oracle.tempered(logits, temperature)
            if score_bonus:
                wanted = np.broadcast_to(q, (here.sum(), VOCAB))
                np.testing.assert_allclose(proposal.q[here, size], wanted, atol=1e-6)
                raw = np.broadcast_to(oracle.tempered(logits), (here.sum(), VOCAB))
                np.testing.assert_allclose(proposal.q_raw[here, size], raw, atol=1e-6)
            if size == DRAFT_LEN:
                continue
            law = oracle.truncate(q, **shape)
            wanted = np.broadcast_to(law, (here.sum(), VOCAB))
            np.testing.assert_allclose(proposal.law[here, size], wanted, atol=1e-6)
            seen = np.bincount(proposal.tokens[here, size], minlength=VOCAB) / here.sum()
            assert not seen[law == 0].any()
            # Hoeffding: 156 prefixes at most and 5 tokens each stay within this but for 1e-7 in all.
            assert np.abs(seen - law).max() < np.sqrt(np.log(2 * 780 / 1e-7) / (2 * here.sum()))


def test_ids_beyond_the_vocabulary_are_never_drafted():
    table = np.zeros((8, 8), np.float32)
    table[:, 5:] = 9.0
    bound = bigram(table)
    drafter = drafter_of({}, bound.model, width=7, score_bonus=True, vocab_size=5)
    state = drafter.start(bound.params, inputs(100), 100, 8)
    noise = np.random.default_rng(0).random((100, drafter.noise_size), np.float32)
    proposal, _ = drafter.propose(bound.params, state, *first_round(100), noise)
    assert proposal.law.shape[-1] == proposal.q.shape[-1] == 7
    assert set(np.unique(proposal.tokens)) == set(range(5))
    assert not np.asarray(proposal.q)[..., 5:].any()


@pytest.mark.parametrize(
    ("score_bonus", "rows", "draft_len"),
    [(True, 4, 3), (False, 4, 3), (False, 1, 3), (False, 4, 1)],
)
def test_the_cache_catches_up_whatever_was_accepted(score_bonus, rows, draft_len):
    """After any number of accepted tokens, all of them included, the next laws equal a full forward's."""
    bound = tiny_pair.pair()[0]
    source = tiny_pair.sources(rows)
    drafter = drafter_of({"temperature": 1.3}, bound.model, tiny_pair.VOCAB, score_bonus, draft_len=draft_len)
    room = 20
    state = jax.jit(lambda p: drafter.start(p, source, rows, room))(bound.params)
    propose = jax.jit(drafter.propose)
    apply = jax.jit(
        lambda params, x: bound.model.module.apply(
            {"params": params}, source["encoder_input_tokens"], x, jnp.ones_like(x)
        )
    )
    rng = np.random.default_rng(3)
    committed = np.zeros((rows, room), np.int32)  # column 0 is the start token
    length = np.zeros(rows, np.int32)
    every = np.arange(rows)
    for accepted in ([3, 0, 1, 2], [3, 3, 0, 1], [0, 3, 3, 2], [3, 1, 3, 3]):
        last_two = np.stack([committed[every, np.maximum(length - 1, 0)], committed[every, length]], 1)
        noise = rng.random((rows, drafter.noise_size), np.float32)
        proposal, state = propose(bound.params, state, last_two, length, noise)
        draft = np.asarray(proposal.tokens)
        ahead = committed.copy()
        for row in range(rows):
            ahead[row, length[row] + 1 : length[row] + 1 + draft_len] = draft[row]
        logits = np.asarray(apply(bound.params, ahead))
        for slot in range(draft_len + score_bonus):
            q = jax.nn.softmax(logits[every, length + slot] / 1.3)
            found = proposal.q[:, slot] if score_bonus else proposal.law[:, slot]
            np.testing.assert_allclose(found, q, atol=1e-5)
        for row, kept in enumerate(np.minimum(accepted[:rows], draft_len)):
            committed[row, : length[row] + 1 + kept] = ahead[row, : length[row] + 1 + kept]
            length[row] += kept + 1
            committed[row, length[row]] = rng.integers(1, tiny_pair.VOCAB)  # residual or bonus token
        state = drafter.commit(state, length)


@pytest.mark.slow  # guards the test above, which does not change
def test_a_lagging_cache_would_be_seen():
    """Without the catch-up the laws after a wholly accepted draft differ, so the test above can fail."""
    bound = tiny_pair.pair()[0]
    source = tiny_pair.sources(4)
    drafter = drafter_of({"temperature": 1.3}, bound.model, tiny_pair.VOCAB, score_bonus=False)
    state = drafter.start(bound.params, source, 4, 20)
    propose = jax.jit(drafter.propose)
    noise = np.full((4, drafter.noise_size), 0.4, np.float32)
    proposal, state = propose(bound.params, state, *first_round(4), noise)
    at = np.full(4, DRAFT_LEN + 1, np.int32)
    last_two = np.stack([np.asarray(proposal.tokens)[:, -1], np.full(4, 7)], 1).astype(np.int32)
    right, _ = propose(bound.params, state, last_two, at, noise)
    logits, _ = bound.model.extend(bound.params, state["cache"], last_two[:, 1:], at)
    lagging = jax.nn.softmax(logits[:, 0] / 1.3)
    assert np.abs(right.law[:, 0] - lagging).max() > 1e-3


def test_a_drafter_may_be_passed_ready_made():
    """A Bound Drafter and a Bound LanguageModel decode alike."""
    tables = random_tables(6, VOCAB, 1)
    drafter, verifier = (bigram(t) for t in tables)
    sampling = decoding.Sampling(*(np.float32(1), np.int32(0), np.float32(1), np.float32(0)))
    config = decoding.DecodeConfig(max_len=6, draft_len=DRAFT_LEN)
    wanted = decoder(config, "token_v3", 50)(np.float32(0.5), *tables, sampling, jax.random.key(0))
    ready = Bound(ModelDrafter(sampling, drafter.model, DRAFT_LEN, VOCAB, None, True), drafter.params)
    program = decoding.speculative_program(ready, verifier, rules.by_name("token_v3", 0.5), config, sampling)
    output = decoding.decode(program, inputs(50), jax.random.key(0), np.arange(50))
    np.testing.assert_array_equal(output.tokens, wanted.tokens)
