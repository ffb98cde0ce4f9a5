"""The law of learned rules, proven as every rule's is: the head is just another function of the prefix.

Un-jitted round: d and pi are the oracle's, the round has the branches the oracle states on every possible draft, and a
round with these branches, continued by pi, has the law of pi. Compiled decoder: whole outputs by sampling.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import cases, round_probe
from decoding.tables import EOS, inputs, random_tables, tally
from deferral import fitted_rules
from deferral.fitted_rules import ALPHAS, VOCAB
from optimized import optimized_jit
from oracles import tables as oracle_tables
from oracles import verify as oracle
from speccascade_t5x import decoding
from speccascade_t5x.core import probs, verify
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.models import bigram

LONGEST = 3
PREFIXES = [p for n in range(LONGEST + 1) for p in itertools.product(range(VOCAB), repeat=n)]
SETTINGS = list(itertools.product((0.0, 0.5, 1.0), ({}, {"top_p": 0.7, "top_k": 3})))
NAME = pytest.mark.parametrize("name", ALPHAS)
HOW = pytest.mark.parametrize("how", ["token", "block"])
ROWS, MAX_LEN = 50_000, 4


@functools.cache
def logits():
    return tuple(0.6 * x for x in cases.random_logits(2025, len(PREFIXES), VOCAB))


@functools.cache
def _laws(temperature: float):
    drafter, verifier = (jnp.asarray(x) for x in logits())
    tempered = jax.jit(probs.tempered)
    return Pair(
        tempered(drafter, jnp.float32(temperature)), tempered(verifier, jnp.float32(temperature)), probs.raw(drafter),
        probs.raw(verifier), position=jnp.asarray([len(prefix) for prefix in PREFIXES]),
    )  # fmt: skip


_target = jax.jit(lambda rule, pair, sampling: [probs.truncate(x, sampling) for x in (pair.q, rule.target(pair))])


@functools.cache
def tables(name: str, temperature: float, truncation: tuple):
    """(d, pi) of the package at every prefix."""
    options = {"top_k": 0, "top_p": 1.0, **dict(truncation)}
    sampling = Sampling(1.0, jnp.int32(options["top_k"]), jnp.float32(options["top_p"]), 0.0)
    return tuple(np.asarray(x) for x in _target(fitted_rules.rule(name), _laws(temperature), sampling))


def law_at(table):
    return {prefix: table[i].astype(np.float64) for i, prefix in enumerate(PREFIXES)}.__getitem__


def test_every_learned_rule_is_here():
    from speccascade_t5x import deferral

    assert {type(fitted_rules.rule(name)).__name__ for name in ALPHAS} == {
        deferral.LearnedGap.__name__, deferral.LearnedToken.__name__, deferral.CalibratedOpt.__name__
    }  # fmt: skip
    assert set(cases.NOT_A_TABLE_RULE) == set(deferral.RULES)


@NAME
def test_draft_and_target_laws_are_the_oracles(name):
    mixed = False
    for temperature, truncation in SETTINGS:
        d, pi = tables(name, temperature, tuple(truncation.items()))
        for i, prefix in enumerate(PREFIXES):
            pair = (table[i] for table in logits())
            wanted = fitted_rules.draft_and_target(name, *pair, len(prefix), temperature, truncation)
            np.testing.assert_allclose((d[i], pi[i]), wanted, rtol=0, atol=3e-6, err_msg=f"{prefix} {temperature}")
        if not truncation:
            p = np.asarray(_laws(temperature).p)
            mixed |= np.abs(pi - p).max() > 0.05 and np.abs(pi - d).max() > 0.05
    assert mixed  # neither drafter nor verifier alone


@NAME
@HOW
def test_branches_and_law_of_a_round(name, how):
    parts = []
    for temperature, truncation in SETTINGS[1::2] + SETTINGS[4:5]:
        d, pi = (law_at(table) for table in tables(name, temperature, tuple(truncation.items())))
        wanted = oracle.autoregressive(pi, LONGEST + 1)
        law = oracle.round_then_target(oracle.round_law(d, pi, LONGEST, how), pi, LONGEST + 1)
        assert oracle.distance(law, wanted) < 2e-6, (temperature, truncation)
        found = []
        for draft, chance in oracle.drafts(d, oracle.fixed_length(2)):
            prefixes = [draft[:i] for i in range(3)]
            laws, targets = np.array([d(x) for x in prefixes[:-1]]), np.array([pi(x) for x in prefixes])
            found.append(round_probe.Case(draft, laws, targets, targets, chance))
        parts.append(round_probe.rows_of(found, how, 2))
    for rows in parts:
        assert not round_probe.errors(verify.BY_NAME[how], rows)
        assert rows.blur < 2e-4


@functools.cache
def decoder(draft_len: int, how: str):
    config = decoding.DecodeConfig(MAX_LEN, draft_len, eos_id=EOS, verification=how)

    @optimized_jit
    def run(rule, drafter, verifier, sampling, key):
        return decoding.speculative(
            drafter=bigram(drafter), verifier=bigram(verifier), rule=rule, inputs=inputs(ROWS), config=config,
            sampling=sampling, key=key, example_ids=np.arange(ROWS),
        )  # fmt: skip

    return run


def compiled_agreement(name: str, draft_len: int, how: str, temperature: float, truncation: dict, rule=None):
    drafter, verifier = random_tables(3, VOCAB, MAX_LEN)
    options = {"top_k": 0, "top_p": 1.0, **truncation}
    sampling = Sampling(
        np.float32(temperature), np.int32(options["top_k"]), np.float32(options["top_p"]), np.float32(0)
    )
    rule = rule or fitted_rules.rule(name)
    output = decoder(draft_len, how)(rule, drafter, verifier, sampling, jax.random.key(5))

    def target(prefix):
        pair = (oracle_tables.lookup(table, prefix) for table in (drafter, verifier))
        return fitted_rules.draft_and_target(name, *pair, len(prefix), temperature, truncation)[1]

    return oracle_tables.agreement(tally(output, VOCAB), oracle_tables.output_law(target, MAX_LEN, EOS))


def test_compiled_decoder_follows_the_learned_gap():
    for setting in ((1.0, {}), (0.5, {"top_p": 0.7})):
        found = compiled_agreement("gap", 2, "block", *setting)
        assert found.holds, (setting, found)
    # The same program with another head must disagree, or the check would be worth nothing.
    wrong = dataclasses.replace(fitted_rules.rule("gap"), head=fitted_rules.head("prefix", seed=0))
    assert not compiled_agreement("gap", 2, "block", 1.0, {}, wrong).holds


def test_alphas_and_heads_are_swept_without_recompiling():
    assert decoder(2, "block")._cache_size() == 1  # after the test above


@pytest.mark.slow
@pytest.mark.parametrize("how", ["token", "block"])
@NAME
def test_compiled_decoder_follows_every_learned_rule(name, how):
    for setting in ((1.0, {}), (0.5, {"top_p": 0.7}), (0.0, {}), (1.0, {"top_k": 2})):
        found = compiled_agreement(name, 3, how, *setting)
        assert found.holds, (setting, found)
