"""Cascades of drafters are exact with the law d as reported, by enumeration in float64 and no sampling.

What `oracles.cascade` enumerates is proven here to give the verifier's law, three levels deep, with lenience on
and off, under token and block verification, and with rules between drafters. `test_cascade` proves that the
package's drafters write the drafts of that enumeration, with its laws.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest

from drafting import cascades
from oracles import cascade as oracle
from oracles import rules as rule_oracle
from oracles import sampler
from oracles import verify as verify_oracle

HOW = pytest.mark.parametrize("how", ["token", "block"])


@functools.cache
def leaves(name: str, lenience: float | None, temperature: float = 1.0, **truncation) -> list[oracle.Leaf]:
    return cascades.oracle(name, lenience, temperature, truncation).leaves()


def target(temperature: float = 1.0, truncation: dict | None = None):
    """The verifier's law at each prefix."""

    @functools.cache
    def law(prefix):
        p = sampler.tempered(cascades.logits(cascades.VERIFIER)(prefix), temperature)
        return sampler.truncate(p, **(truncation or {}))

    return law


def error(drafts: list[oracle.Leaf], law, how: str, length: int) -> float:
    """How far the law of a round and what follows it is from `law`."""
    round_ = oracle.round_law(drafts, law, how)
    found = verify_oracle.round_then_target(round_, law, length)
    return verify_oracle.distance(found, verify_oracle.autoregressive(law, length))


@HOW
@pytest.mark.parametrize("lenience", [None, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", ["three_levels", "three_models"])
def test_the_last_review_is_exact(name, lenience, how):
    drafts = leaves(name, lenience)
    assert math.fsum(leaf.chance for leaf in drafts) == pytest.approx(1.0, abs=1e-12)
    length = cascades.length(name) + 1
    assert error(drafts, target(), how, length) < 1e-14


@HOW
@pytest.mark.parametrize(("temperature", "truncation"), [(0.5, {"top_p": 0.8}), (1.0, {"top_k": 2}), (0.0, {})])
def test_so_it_is_with_temperature_and_truncation(temperature, truncation, how):
    drafts = leaves("three_levels", 2.0, temperature, **truncation)
    length = cascades.length("three_levels") + 1
    assert error(drafts, target(temperature, truncation), how, length) < 1e-14


@HOW
def test_reporting_the_models_law_everywhere_is_not_exact(how):
    """The published code reports m for every reviewed token; with lenience that biases the output."""
    cascade = cascades.oracle("three_levels", 3.0)
    wrong = []
    for leaf in leaves("three_levels", 3.0):
        laws = []
        for i, law in enumerate(leaf.laws):
            copied = max(law) == 1.0
            laws.append(law if copied else cascade.law(0 if i < 2 else 1, leaf.tokens[:i])[2])
        wrong.append(dataclasses.replace(leaf, laws=tuple(laws)))
    assert error(wrong, target(), how, cascades.length("three_levels") + 1) > 1e-3


@HOW
@pytest.mark.parametrize("name", ["rule_between", "rules_between"])
@pytest.mark.parametrize("rule", ["lossless", "token_v3", "opt", "lossy_sd", "cos"])
def test_rules_over_three_models_are_exact(name, rule, how):
    """pi = rule2(q', p) with q' = rule1(q1, q2): drafts from Tr(q'), pi reading q'."""
    cascade, alpha = cascades.oracle(name, None), cascades.ALPHAS[rule]
    verifier = cascades.logits(cascades.VERIFIER)

    @functools.cache
    def pi(prefix):
        q, q_raw, _ = cascade.law(0, prefix)
        p = sampler.tempered(verifier(prefix))
        return rule_oracle.target(rule, q, p, q_raw, p, alpha)

    drafts = leaves(name, None)
    size = cascades.length(name)
    for leaf in drafts:
        for i, law in enumerate(leaf.laws):
            np.testing.assert_allclose(law, cascade.law(0, leaf.tokens[:i])[2], atol=1e-14)
    assert error(drafts, pi, how, size + 1) < 1e-14


def test_lenience_changes_the_drafts():
    """Guards the tests above: with lenience off and on the drafts' laws differ."""
    strict, lax = (
        {(leaf.tokens[0], round(float(leaf.laws[0][0]), 9)) for leaf in leaves("three_levels", lenience)}
        for lenience in (None, 5.0)
    )
    assert strict != lax
