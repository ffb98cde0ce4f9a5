"""The law of one un-jitted round, for every rule, proven by enumeration instead of sampling.

The chain, for a random pair of prefix-dependent tables over four tokens:
  1. the package's d and pi at every prefix are the float64 oracle's;
  2. the package's round, on every possible draft, has exactly the branches the oracle states
     (acceptance thresholds, residual and bonus laws), by probes on both sides of each boundary;
  3. a round with those branches on these tables, continued by pi, has the law of pi.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import cases, round_probe
from oracles import rules as rule_oracle
from oracles import verify as oracle
from speccascade_t5x.core import probs, rules, verify
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.core.rules import Pair

VOCAB, LONGEST = 4, 3
PREFIXES = [p for n in range(LONGEST + 1) for p in itertools.product(range(VOCAB), repeat=n)]
TEMPERATURES = (0.0, 0.5, 1.0)
TRUNCATIONS = ({}, {"top_p": 0.7, "top_k": 3})
VARIANTS = cases.variants(rules.names())
VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=cases.variant_id)
HOW = pytest.mark.parametrize("how", ["token", "block"])
# One alpha per rule that defers on some prefixes or tokens of the tables and not on others.
ALPHA = {
    "lossless": None, "chow": 0.4, "chow_log": 1.0, "diff": 0.03, "diff_log": 0.1, "opt": 0.2,
    "opt_log": 0.2, "bild_fixed": 0.9, "bild": 1.5, "token_v1": 0.25, "token_v2": 0.25,
    "token_v3": 0.55, "lossy_sd": 0.35, "cos": 0.35, "typical": 0.4, "min_p": 0.8,
}  # fmt: skip
_truncate = jax.jit(probs.truncate)


@functools.cache
def logits() -> tuple[np.ndarray, np.ndarray]:
    # Flat enough that drafts branch into every token and truncation still leaves two or three.
    return tuple(0.6 * x for x in cases.random_logits(2024, len(PREFIXES), VOCAB))


@functools.cache
def tables(name: str, options: tuple, temperature: float, truncation: tuple):
    """(d, pi, p) of the package at every prefix, [prefixes, V] float32."""
    drafter, verifier = (jnp.asarray(x) for x in logits())
    q, p = probs.tempered(drafter, temperature), probs.tempered(verifier, temperature)
    rule = rules.by_name(name, **({} if ALPHA[name] is None else {"alpha": ALPHA[name]}), **dict(options))
    sampling = Sampling(temperature=temperature, **dict(truncation))
    if rule.truncates_inputs:
        q, p = _truncate(q, sampling), _truncate(p, sampling)
    pair = Pair(q, p, probs.raw(drafter), probs.raw(verifier), greedy=temperature == 0)
    pi = rule.target(pair)
    if rule.truncates_inputs:
        return np.asarray(q), np.asarray(pi), np.asarray(p)
    d, pi, p = (_truncate(law, sampling) for law in (q, pi, p))
    return np.asarray(d), np.asarray(pi), np.asarray(p)


def settings(variant):
    """Every (temperature, truncation) as arguments of `tables`."""
    name, options = variant
    for temperature, truncation in itertools.product(TEMPERATURES, TRUNCATIONS):
        yield name, tuple(options.items()), temperature, tuple(truncation.items())


def law_at(table: np.ndarray):
    at = {prefix: table[i].astype(np.float64) for i, prefix in enumerate(PREFIXES)}
    return at.__getitem__


def drafts_of(key, draft_len: int) -> list[round_probe.Case]:
    """Every draft of positive probability and length `draft_len`."""
    d, pi, p = (law_at(table) for table in tables(*key))
    found = []
    for draft, chance in oracle.drafts(d, oracle.fixed_length(draft_len)):
        prefixes = [draft[:i] for i in range(draft_len + 1)]
        found.append(
            round_probe.Case(
                draft,
                np.array([d(x) for x in prefixes[:-1]]).reshape(draft_len, VOCAB),
                np.array([pi(x) for x in prefixes]),
                np.array([p(x) for x in prefixes]),
                chance,
            )
        )
    return found


@functools.cache
def probes(variant_key: tuple, how: str, size: int, lengths: tuple[int, ...]) -> list[round_probe.Rows]:
    """Probes of one rule: for each setting, drafts of all `lengths` in one ragged batch."""
    variant = (variant_key[0], dict(variant_key[1:]))
    return [
        round_probe.rows_of([case for n in lengths for case in drafts_of(key, n)], how, size)
        for key in settings(variant)
    ]


def joined(parts: list[round_probe.Rows]) -> round_probe.Rows:
    inputs = tuple(np.concatenate(column) for column in zip(*(r.inputs for r in parts), strict=True))
    rest = [np.concatenate([getattr(r, name) for r in parts]) for name in ("other", "accepted", "allowed")]
    return round_probe.Rows(inputs, *rest, max(r.blur for r in parts))


@VARIANT
def test_draft_and_target_laws_are_the_oracles(variant):
    name, options = variant
    mixed = False
    for key in settings(variant):
        _, _, temperature, truncation = key
        d, pi, p = tables(*key)
        wanted = [
            rule_oracle.draft_and_target(name, a, b, ALPHA[name], temperature, dict(truncation), **options)
            for a, b in zip(*logits(), strict=True)
        ]
        np.testing.assert_allclose(d, [x for x, _ in wanted], rtol=0, atol=2e-6, err_msg=str(key))
        np.testing.assert_allclose(pi, [x for _, x in wanted], rtol=0, atol=2e-6, err_msg=str(key))
        mixed |= np.abs(pi - p).max() > 0.05 and np.abs(pi - d).max() > 0.05
    # A rule that is p or q throughout would make the rest of this file prove little.
    assert mixed or name == "lossless"


@VARIANT
@HOW
@pytest.mark.parametrize(("size", "lengths"), [(1, (1,)), (2, (2,)), (LONGEST, tuple(range(LONGEST + 1)))])
def test_branches_of_the_round_are_the_oracles(variant, how, size, lengths):
    """Draft width 1, 2 and 3; at 3 the rows of one batch also draft 0, 1 and 2 tokens."""
    name, options = variant
    rows = joined(probes((name, *options.items()), how, size, lengths))
    found = round_probe.errors(verify.BY_NAME[how], rows)
    assert not found, f"{len(found)} of {len(rows.accepted)} probes:\n" + "\n".join(found[:5])
    # Summed over the lengths in the batch, each of which is a whole law.
    assert rows.blur < 2e-4 * len(lengths)


@VARIANT
@HOW
def test_a_round_with_these_branches_has_the_law_of_pi(variant, how):
    for key in settings(variant):
        d, pi, _ = (law_at(table) for table in tables(*key))
        wanted = oracle.autoregressive(pi, LONGEST + 1)
        for draft_len in range(1, LONGEST + 1):
            round_ = oracle.round_law(d, pi, draft_len, how)
            law = oracle.round_then_target(round_, pi, LONGEST + 1)
            assert oracle.distance(law, wanted) < 2e-6, (key, draft_len)


# Mutants: wrong rounds that the probes must see. Each gets p as `other`.


def _round(how, draft, lengths, law, target, accept_noise, residual_noise):
    return verify.BY_NAME[how](draft, lengths, law, target, accept_noise, residual_noise)


def bonus_from_the_verifier(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    last = (jnp.arange(target.shape[1]) == lengths[:, None])[..., None]
    return _round(how, draft, lengths, law, jnp.where(last, other, target), accept_noise, residual_noise)


def accept_by_the_verifier(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    """Acceptance with p / d in place of pi / d; the next token is rightly drawn where it stops."""
    stopped = _round(how, draft, lengths, law, other, accept_noise, residual_noise)
    at = jnp.arange(len(draft)), stopped.accepted
    gain = jnp.maximum(target[at] - jnp.pad(law, ((0, 0), (0, 1), (0, 0)))[at], 0)
    drawn = jnp.where(stopped.bonus[:, None] | (gain.sum(-1, keepdims=True) == 0), target[at], gain)
    return verify.Verification(stopped.accepted, probs.sample(drawn, residual_noise), stopped.bonus)


def residual_from_the_whole_target(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    right = _round(how, draft, lengths, law, target, accept_noise, residual_noise)
    drawn = probs.sample(target[jnp.arange(len(draft)), right.accepted], residual_noise)
    return verify.Verification(right.accepted, drawn, right.bonus)


def residual_of_the_verifier(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    """norm(max(0, p - d)): right for Lossless, wrong for every rule."""
    right = _round(how, draft, lengths, law, target, accept_noise, residual_noise)
    at = jnp.arange(len(draft)), right.accepted
    gain = jnp.maximum(other[at] - jnp.pad(law, ((0, 0), (0, 1), (0, 0)))[at], 0)
    drawn = jnp.where(right.bonus[:, None], target[at], gain)
    return verify.Verification(right.accepted, probs.sample(drawn, residual_noise), right.bonus)


def ignores_lengths(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    return _round(
        how,
        draft,
        jnp.full_like(lengths, draft.shape[1]),
        law,
        target,
        accept_noise,
        residual_noise,
    )


def slightly_lenient(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    """Thresholds off by one part in ten thousand."""
    return _round(how, draft, lengths, law, target, accept_noise * (1 - 1e-4), residual_noise)


def accepts_at_equality(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    """u d <= pi where it must be <: a uniform of exactly 0 then accepts an impossible token."""
    drafted = jnp.where(accept_noise[..., None] == 0, jnp.maximum(target[:, :-1], 1e-20), target[:, :-1])
    nudged = jnp.concatenate([drafted, target[:, -1:]], axis=1)
    return _round(how, draft, lengths, law, nudged, accept_noise, residual_noise)


def draws_the_neighbour(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    right = _round(how, draft, lengths, law, target, accept_noise, residual_noise)
    return verify.Verification(right.accepted, (right.token + 1) % target.shape[-1], right.bonus)


def the_other_verification(how, draft, lengths, law, target, accept_noise, residual_noise, other):
    swapped = {"token": "block", "block": "token"}[how]
    return _round(swapped, draft, lengths, law, target, accept_noise, residual_noise)


MUTANTS = [
    bonus_from_the_verifier,
    accept_by_the_verifier,
    residual_from_the_whole_target,
    residual_of_the_verifier,
    ignores_lengths,
    slightly_lenient,
    accepts_at_equality,
    draws_the_neighbour,
    the_other_verification,
]


@HOW
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_probes_see_a_wrong_round(mutant, how):
    rows = joined(probes(("token_v3",), how, LONGEST, tuple(range(LONGEST + 1))))
    assert round_probe.errors(jax.jit(functools.partial(mutant, how)), rows, with_other=True)


@HOW
def test_probes_accept_the_compiled_round(how):
    rows = joined(probes(("token_v3",), how, LONGEST, tuple(range(LONGEST + 1))))
    assert not round_probe.errors(jax.jit(verify.BY_NAME[how]), rows)


@HOW
def test_enumeration_sees_a_wrong_target(how):
    """Step 3 is not vacuous: judged against p, or with its bonus from p, the round is off."""
    d, pi, p = (law_at(table) for table in tables("token_v3", (), 1.0, ()))
    law = oracle.round_then_target(oracle.round_law(d, pi, 2, how), pi, 3)
    assert oracle.distance(law, oracle.autoregressive(p, 3)) > 0.01
    bonus_from_p = oracle.round_law(d, lambda prefix: (p if len(prefix) == 2 else pi)(prefix), 2, how)
    assert oracle.distance(oracle.round_then_target(bonus_from_p, pi, 3), oracle.autoregressive(pi, 3)) > 1e-3
