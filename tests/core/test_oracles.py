"""The oracles against golden vectors, hand-made scenes and enumeration; no package code runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core import cases
from oracles import rules, sampler, verify

VARIANTS = cases.variants(rules.NAMES)
# What the golden vectors do not hold, test_bild_by_hand covers.
IN_GOLDEN = [(name, options) for name, options in VARIANTS if name not in cases.ORACLE_ONLY]


@pytest.mark.parametrize("variant", IN_GOLDEN, ids=cases.variant_id)
def test_rules_match_the_golden_vectors(variant):
    name, options = variant
    found = cases.golden(name, options)
    assert found
    for case in found:
        d, pi = rules.draft_and_target(
            name, case["drafter_logits"], case["verifier_logits"], case["alpha"],
            case["temperature"], **options,
        )  # fmt: skip
        np.testing.assert_allclose(pi, case["target"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(rules.acceptance(pi, d), case["accept_prob"], rtol=0, atol=1e-12)
        rejected = rules.total_variation(d, pi)
        assert rejected == pytest.approx(case["rejection_rate"], abs=1e-12)
        # Unnormalised, so that a residual of mass 1e-9 is not asked for twelve digits of its shape.
        gain, wanted = rejected * rules.residual(pi, d), rejected * np.array(case["residual"])
        np.testing.assert_allclose(gain, wanted, rtol=0, atol=1e-12)


def test_every_golden_rule_has_an_oracle():
    used = {cases.GOLDEN_NAMES.get(name, name) for name, _ in IN_GOLDEN}
    assert used == {case["rule"] for case in cases.golden_cases()}


def test_bild_by_hand():
    q, p = [0.7, 0.2, 0.1], [0.05, 0.15, 0.8]
    # -log p = 3.0, 1.9, 0.22: rollback 2 rules out token 0 and hands its 0.7 to p.
    pi = rules.target("bild", q, p, q, p, 2.0)
    np.testing.assert_allclose(pi, [0.035, 0.2 + 0.105, 0.1 + 0.56], atol=1e-15)
    np.testing.assert_allclose(rules.target("bild", q, p, q, p, 2.0, fallback=0.71), p)
    np.testing.assert_allclose(rules.target("bild", q, p, q, p, 9.0), q)


def test_greedy_limits_by_hand():
    q_raw, p_raw = [0.6, 0.3, 0.1], [0.3, 0.5, 0.2]
    q, p = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    keeps = {  # largest alpha that defers, smallest that keeps: the drafter's argmax has q .6, p .3
        "token_v1": (-0.2, -0.05),
        "token_v2": (0.1, 0.3),
        "token_v3": (0.3, 0.5),
        "lossy_sd": (0.3, 0.5),
    }
    for name, (defers, keeps_at) in keeps.items():
        assert list(rules.target(name, q, p, q_raw, p_raw, defers, greedy=True)) == p
        assert list(rules.target(name, q, p, q_raw, p_raw, keeps_at, greedy=True)) == q


def test_lossy_optimal_solves_its_equation():
    rng = np.random.default_rng(0)
    for _ in range(50):
        q, p = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
        keep = rng.uniform(0.2, 0.9)
        pi = rules.target("lossy_sd", q, p, q, p, 1 - keep, residual="optimal")
        assert math.fsum(pi) == pytest.approx(1, abs=1e-13)
        raised = pi > np.minimum(q, p / keep) + 1e-12
        if raised.any():  # one b >= 1 for all raised tokens
            b = (p / pi)[raised]
            assert np.ptp(b) < 1e-10 and b.min() >= 1 - 1e-12


def test_sampler_by_hand():
    law = [0.1, 0.4, 0.2, 0.2, 0.1]
    third = [0, 0.5, 0.25, 0.25, 0]
    np.testing.assert_allclose(sampler.truncate(law, top_k=3), third)
    np.testing.assert_allclose(sampler.truncate(law, top_k=2), [0, 2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(sampler.truncate(law, top_p=0.59), [0, 2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(sampler.truncate(law, top_p=0.61), third)
    np.testing.assert_allclose(sampler.truncate(law, min_p=0.5), third)
    # Top-k first: the halves left by top-k 2 of a flat law fill top-p .5 with one token, not two.
    np.testing.assert_allclose(sampler.truncate([0.25] * 4, top_k=2, top_p=0.5), [1, 0, 0, 0])
    assert sampler.tempered([1.0, 3.0, 3.0], 0.0).tolist() == [0, 1, 0]
    assert sampler.tempered([1.0, 2.0, 9.0], 1.0, vocab_size=2)[2] == 0
    assert [sampler.inverse_cdf([0, 0.5, 0, 0.5, 0], u) for u in (0, 0.499, 0.5, 1)] == [1, 1, 3, 3]


def table(seed: int, name: str, temperature: float, truncation: dict, options: dict, vocab: int = 3):
    """(draft law, target law) of a random pair, both depending on the whole prefix."""
    memory = {}

    def laws(prefix):
        if prefix not in memory:
            drafter, verifier = cases.random_logits(hash((seed, *prefix)) % 2**32, 1, vocab)
            alpha = cases.ALPHAS[name][len(prefix) % len(cases.ALPHAS[name])]
            memory[prefix] = rules.draft_and_target(
                name, drafter[0], verifier[0], alpha, temperature, truncation, **options
            )
        return memory[prefix]

    return (lambda prefix: laws(prefix)[0]), (lambda prefix: laws(prefix)[1])


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("variant", VARIANTS, ids=cases.variant_id)
def test_one_round_then_pi_is_the_law_of_pi(variant, verification):
    name, options = variant
    for temperature in (0.0, 0.5, 1.0):
        for truncation in ({}, {"top_p": 0.7, "top_k": 2}):
            d, pi = table(11, name, temperature, truncation, options)
            wanted = verify.autoregressive(pi, 4)
            for draft_len in (1, 2, 3):
                round_ = verify.round_law(d, pi, draft_len, verification)
                assert math.fsum(round_.values()) == pytest.approx(1, abs=1e-13)
                assert verify.distance(verify.round_then_target(round_, pi, 4), wanted) < 1e-14


def test_block_commits_at_least_as_many_tokens():
    gains = []
    for name, options in VARIANTS:
        d, pi = table(23, name, 1.0, {}, options)
        token, block = (verify.tokens_per_round(verify.round_law(d, pi, 3, how)) for how in ("token", "block"))
        gains.append(block - token)
    assert min(gains) > -1e-13 and max(gains) > 1e-3


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_draft_may_stop_on_what_it_has_drafted(verification):
    d, pi = table(5, "token_v3", 1.0, {}, {})

    def stop(prefix):
        return len(prefix) == 3 or (prefix != () and d(prefix)[prefix[-1]] < 0.3)

    assert {len(draft) for draft, _ in verify.drafts(d, stop)} == {1, 2, 3}
    round_ = verify.round_law(d, pi, stop, verification)
    assert verify.distance(
        verify.round_then_target(round_, pi, 4), verify.autoregressive(pi, 4)
    ) < 1e-14  # fmt: skip


def test_enumeration_sees_a_wrong_draft_law():
    """If the verifier is told another law than the one drafted from, the result is visibly off."""
    d, pi = table(7, "lossless", 1.0, {}, {})
    told, _ = table(8, "lossless", 1.0, {}, {})
    law: dict = {}
    for draft, chance in verify.drafts(d, verify.fixed_length(2)):
        branches = verify.token_branches(draft, [told(draft[:i]) for i in range(2)], [pi(draft[:i]) for i in range(3)])
        for kept, weight in enumerate(branches.weights):
            for x, probability in enumerate(branches.next_laws[kept]):
                key = (*draft[:kept], x)
                law[key] = law.get(key, 0.0) + chance * weight * probability
    assert verify.distance(verify.round_then_target(law, pi, 3), verify.autoregressive(pi, 3)) > 0.01


def test_first_rejection_has_the_documented_rate():
    d, pi = table(9, "token_v2", 1.0, {}, {})
    round_ = verify.round_law(d, pi, 1, "token")
    rejected = math.fsum(chance for committed, chance in round_.items() if len(committed) == 1)
    assert rejected == pytest.approx(rules.total_variation(d(()), pi(())), abs=1e-14)
