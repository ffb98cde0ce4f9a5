"""Counters, rates, and acceptance per draft position against what the rounds really did."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.tables import inputs, outputs, random_tables
from oracles import rules as oracle_rules
from oracles.tables import lookup
from speccascade_t5x import decoding
from speccascade_t5x.core import accounting, rules
from speccascade_t5x.core.accounting import Counts, acceptance_by_position
from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_BONUS,
    SOURCE_DRAFTER,
    SOURCE_RESIDUAL,
    SOURCE_VERIFIER,
)
from speccascade_t5x.models import bigram

A, R, B = SOURCE_ACCEPTED, SOURCE_RESIDUAL, SOURCE_BONUS
VOCAB, ORDER, MAX_LEN = 4, 2, 10
TABLES = random_tables(6, VOCAB, ORDER)


def test_only_rows_that_are_alive_are_counted():
    counts = Counts.zeros(3).add(jnp.array([True, False, True]), rounds=1, accepted=jnp.array([2, 2, 0]))
    counts = counts.add(jnp.array([True, True, False]), rounds=1, deferred=jnp.array([0.25, 0.5, 1.0]))
    np.testing.assert_array_equal(counts.rounds, [2, 1, 1])
    np.testing.assert_array_equal(counts.accepted, [2, 0, 0])
    np.testing.assert_array_equal(counts.deferred, [0.25, 0.5, 0.0])
    total = accounting.totals(counts)
    assert (total["rounds"], total["accepted"], total["deferred"]) == (4, 2, 0.75)
    assert isinstance(total["rounds"], int) and isinstance(total["deferred"], float)


def test_rates_by_hand():
    total = dict(rounds=10, drafter_calls=60, verifier_calls=12, drafted=50, accepted=27)  # noqa: C408
    total |= {"examined": 36, "committed": 40, "scored": 72, "deferred": 30.0}
    assert accounting.rates(total) == {
        "acceptance": 0.75,
        "block_efficiency": 4.0,
        "verifier_calls_per_token": 0.3,
        "drafter_calls_per_token": 1.5,
        "scored_per_token": 1.8,
        "deferral_rate": 0.75,
    }


def test_calls_of_each_level_by_hand():
    counts = Counts.zeros(2).add(jnp.array([True, True]), committed=jnp.array([6, 4]), verifier_calls=2)
    assert "level_calls" not in accounting.totals(counts) and "level_calls" not in counts.row(0)
    counts = dataclasses.replace(counts, level_calls=jnp.array([[3, 10], [2, 5]]))
    assert counts.row(1)["level_calls"] == [2, 5] and counts.row(1)["committed"] == 4
    total = accounting.totals(counts)
    assert total["level_calls"] == [5, 15] and total == accounting.total([counts.row(0), counts.row(1)])
    assert accounting.rates(total)["level_calls_per_token"] == [0.5, 1.5]
    assert "level_calls_per_token" not in accounting.rates(accounting.totals(Counts.zeros(2)))
    # 10 tokens for 4 calls of the verifier, 5 at 0.4 and 15 at 0.1.
    assert accounting.standardised_improvement(total, [0.4, 0.1]) == pytest.approx(10 / (4 + 2 + 1.5))
    plain = {"committed": 10, "verifier_calls": 4, "drafter_calls": 15}
    assert accounting.standardised_improvement(plain, [0.2]) == pytest.approx(10 / 7)
    with pytest.raises(ValueError, match="1 costs for 2 models"):
        accounting.standardised_improvement(total, [0.4])


@pytest.mark.parametrize(
    ("sources", "wanted"),
    [
        ([], []),
        ([[]], []),
        ([[B, B]], []),  # nothing was drafted
        ([[SOURCE_VERIFIER] * 3, [SOURCE_DRAFTER] * 2], []),
        ([[R, R, R]], [0.0]),
        ([[A, A, B]], [1.0, 1.0]),
        ([[A, A]], [1.0, 1.0]),  # cut by EOS or the length limit
        ([[A, R], [R], [A, B]], [2 / 3, 0.0]),
        ([[A, A, R, A, R, A, A, A]], [1.0, 2 / 3, 1 / 2]),
        (np.array([[R, A, B, A, R]]), [2 / 3, 0.0]),
    ],
)
def test_acceptance_by_position_by_hand(sources, wanted):
    assert acceptance_by_position(sources) == pytest.approx(wanted)


def program(verification: str = "token", rule: str = "token_v3", draft_len: int = 3, top_k: int = 0):
    alpha = None if rule == "lossless" else np.float32(0.5)
    config = decoding.DecodeConfig(MAX_LEN, draft_len, verification=verification)
    sampling = decoding.Sampling(top_k=np.int32(top_k))
    return decoding.speculative_program(*map(bigram, TABLES), rules.by_name(rule, alpha), config, sampling)


@pytest.mark.parametrize("verification", ["token", "block"])
def test_acceptance_by_position_is_what_the_rounds_did(verification):
    """Round by round, the counters say how many drafts each row examined and accepted."""
    rows, chosen = 300, program(verification)
    state = decoding.start(chosen, inputs(rows), jax.random.key(0), np.arange(rows))
    examined, accepted, before = np.zeros(4), np.zeros(4), np.zeros((2, rows), int)
    while not np.asarray(state.done).all():
        state = decoding.run(chosen, state, 1)
        now = np.array([state.counts.examined, state.counts.accepted])
        for total, count in zip((examined, accepted), now - before, strict=True):
            total += (np.arange(4) < count[:, None]).sum(0)
        before = now
    output = decoding.finish(chosen.config, state)
    lengths = np.asarray(output.lengths)
    sources = [line[:size].tolist() for line, size in zip(np.asarray(output.source), lengths, strict=True)]
    found = acceptance_by_position(sources)
    assert len(found) == 3 and examined[3] == 0
    assert found == pytest.approx(accepted[:3] / examined[:3])
    assert 0 < min(found) < max(found) < 1
    total = accounting.totals(output.counts)
    assert accounting.rates(total)["acceptance"] == accepted.sum() / examined.sum()


@functools.cache
def overlap(rule: str, top_k: int, prefix: tuple[int, ...]) -> float:
    """sum_v min(pi, d) at a prefix: the probability that a draft there stands."""
    q, p = (lookup(table, prefix) for table in TABLES)
    d, pi = oracle_rules.draft_and_target(rule, q, p, 0.5, 1.0, {"top_k": top_k})
    return float(np.minimum(pi, d).sum())


@pytest.mark.parametrize("setting", [("lossless", 3, 0), ("token_v3", 3, 0), ("token_v3", 1, 2)], ids=str)
def test_examined_drafts_are_accepted_at_the_rate_of_the_overlap(setting):
    """With token verification: accepted drafts less the sum of overlaps, over all examined positions, is a sum of
    uncorrelated terms of mean 0 and variance b (1 - b). Five standard deviations: 6e-7 false alarms."""
    rule, draft_len, top_k = setting
    rows = 4000
    chosen = program("token", rule, draft_len, top_k)
    output = decoding.decode(chosen, inputs(rows), jax.random.key(1), np.arange(rows))
    excess = variance = accepted = 0.0
    examined = 0
    for tokens, sources in zip(outputs(output), np.asarray(output.source), strict=True):
        for place in np.flatnonzero((sources == A) | (sources == R)):
            chance = overlap(rule, top_k, tokens[max(0, place - ORDER) : place] if place >= ORDER else tokens[:place])
            examined += 1
            accepted += sources[place] == A
            excess += (sources[place] == A) - chance
            variance += chance * (1 - chance)
    assert abs(excess) < 5 * np.sqrt(variance)
    assert np.sqrt(variance) / examined < 0.005  # a rate off by 0.05 would be ten deviations away
    total = accounting.totals(output.counts)
    assert (total["examined"], total["accepted"]) == (examined, accepted)
