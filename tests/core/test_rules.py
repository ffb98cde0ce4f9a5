"""Every registered rule against golden vectors and the oracle, and what all rules promise alike."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import cases
from oracles import rules as oracle
from speccascade_t5x.core import probs, rules, verify
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.interfaces import UserError

VARIANTS = cases.variants(rules.names())
IN_GOLDEN = [variant for variant in VARIANTS if variant[0] not in cases.ORACLE_ONLY]
ALL = pytest.mark.parametrize("variant", VARIANTS, ids=cases.variant_id)
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@jax.jit
def laws_of(q, p, temperature) -> Pair:
    """Compiled, or the branch for temperature 0 would be compiled anew in every call."""
    return Pair(probs.tempered(q, temperature), probs.tempered(p, temperature), probs.raw(q), probs.raw(p))


def pair_of(drafter_logits, verifier_logits, temperature) -> Pair:
    q, p = jnp.asarray(drafter_logits, jnp.float32), jnp.asarray(verifier_logits, jnp.float32)
    pair = laws_of(q, p, jnp.asarray(temperature, jnp.float32))
    return dataclasses.replace(pair, greedy=temperature == 0)


def rule_of(variant, alpha):
    name, options = variant
    return rules.by_name(name, **({} if name == "lossless" else {"alpha": alpha}), **options)


def test_every_registered_rule_is_covered():
    """A new rule needs an oracle, alphas to test, and golden vectors or a place in ORACLE_ONLY."""
    for name in rules.names():
        if name in cases.NOT_A_TABLE_RULE:
            continue
        assert name in oracle.NAMES, f"{name} has no oracle in tests/oracles/rules.py"
        assert cases.ALPHAS.get(name), f"{name} has no alphas in tests/core/cases.py"
    for name, options in IN_GOLDEN:
        assert cases.golden(name, options), f"{name} is in no golden vector"


def padded(rows: list[list[float]], width: int, fill: float) -> np.ndarray:
    return np.array([list(row) + [fill] * (width - len(row)) for row in rows])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("variant", IN_GOLDEN, ids=cases.variant_id)
def test_golden_vectors(variant, jit):
    """float32 against float64. All cases are one batch: alpha, temperature and greedy are [B]."""
    name, _ = variant
    found = cases.golden(*variant)
    # Repeating rows and widening the vocabulary by impossible ids gives every rule the same shape.
    found = (found * 6)[:72]
    column = {key: [case[key] for case in found] for key in found[0]}
    pair = pair_of(
        padded(column["drafter_logits"], 8, -1e9),
        padded(column["verifier_logits"], 8, -1e9),
        jnp.asarray(column["temperature"], jnp.float32),
    )

    def derive(rule, pair):
        return rule.target(pair), rule.verdict(pair)

    rule = rule_of(variant, column["alpha"])
    target, verdict = (jax.jit(derive) if jit else derive)(rule, pair)
    mass = np.array(column["rejection_rate"])[:, None]
    for got, key, weight in (
        (target, "target", 1),
        (verdict.accept, "accept_prob", 1),
        # A residual of mass R is a difference of float32 laws over R: weigh it by R.
        (verdict.residual, "residual", mass),
    ):
        wanted = padded(column[key], 8, 0.0)
        np.testing.assert_allclose(got * weight, wanted * weight, rtol=0, atol=2e-6, err_msg=key)
        if name != "cos":  # at temperature 0 every other rule emits one token for certain
            greedy = np.array(column["temperature"]) == 0
            np.testing.assert_array_equal(got[greedy], wanted[greedy])


@ALL
def test_oracle_on_random_pairs(variant):
    name, options = variant
    for vocab, seed in ((2, 0), (5, 1), (40, 2)):
        drafter, verifier = cases.random_logits(seed, 30, vocab)
        for temperature in (0.0, 0.3, 1.0, 2.5):
            pair = pair_of(drafter, verifier, temperature)
            for alpha in cases.ALPHAS[name]:
                wanted = np.stack(
                    [
                        oracle.draft_and_target(name, a, b, alpha, temperature, **options)[1]
                        for a, b in zip(drafter, verifier, strict=True)
                    ]
                )
                got = np.asarray(rule_of(variant, alpha).target(pair))
                np.testing.assert_allclose(
                    got,
                    wanted,
                    rtol=0,
                    atol=3e-6,
                    err_msg=f"alpha {alpha} temperature {temperature}",
                )


@ALL
def test_targets_are_laws(variant):
    pair = pair_of(*cases.random_logits(3, 200, 30), 0.8)
    for alpha in cases.ALPHAS[variant[0]]:
        target = np.asarray(rule_of(variant, alpha).target(pair))
        assert target.dtype == np.float32
        assert (target >= 0).all()
        np.testing.assert_allclose(target.sum(-1), 1, rtol=0, atol=2e-6)


def test_verdict_of_a_zero_residual_is_all_zero():
    pair = pair_of(*cases.random_logits(4, 5, 6), 1.0)
    same = dataclasses.replace(pair, p=pair.q, p_raw=pair.q_raw)
    verdict = rules.by_name("lossless").verdict(same)
    np.testing.assert_array_equal(verdict.residual, jnp.zeros((5, 6)))
    np.testing.assert_array_equal(verdict.accept, jnp.ones((5, 6)))


# Ends of alpha, as the table of rules states them: (alpha, "p" or "q")
ENDS = {
    "chow": ((0.0, "p"), (1.0, "q")),
    "chow_log": ((0.0, "p"), (math.log(6) + 1e-3, "q")),
    "diff": ((-1.0, "p"), (1.0, "q")),
    "diff_log": ((-math.log(6) - 1e-3, "p"), (math.log(6) + 1e-3, "q")),
    "opt": ((-1e6, "p"), (1e6, "q")),
    "opt_log": ((-1e6, "p"), (1e6, "q")),
    "bild_fixed": ((-1.0, "p"), (1e6, "q")),
    "token_v1": ((-1.0, "p"), (1.0, "q")),
    "token_v2": ((-1.0, "p"), (1.0, "q")),
    "token_v3": ((-0.1, "p"), (1.0, "q")),
    "typical": ((0.0, "q"),),
    "cos": ((0.0, "p"), (1.0, "q")),
    "min_p": ((1.0, "p"),),
    "lossy_sd": ((0.0, "p"),),
}


@ALL
def test_ends_of_alpha(variant):
    """At its lossless end a rule gives p, at its drafter-only end q, at any temperature."""
    name, _ = variant
    for temperature in (0.0, 0.6, 1.0):
        pair = pair_of(*cases.random_logits(5, 60, 6), temperature)
        if name == "lossless":
            np.testing.assert_array_equal(rules.by_name(name).target(pair), pair.p)
        elif name == "bild":
            whole = rules.by_name(name, alpha=1e6).target(pair)
            sure = np.asarray(pair.q_raw).max(-1) >= 0.6
            assert sure.any() and not sure.all()
            np.testing.assert_allclose(whole, np.where(sure[:, None], pair.q, pair.p), atol=1e-6)
        for alpha, end in ENDS.get(name, ()):
            target = rule_of(variant, alpha).target(pair)
            np.testing.assert_allclose(target, getattr(pair, end), rtol=0, atol=1e-6, err_msg=str(alpha))


@pytest.mark.parametrize("residual", ["shifted", "optimal"])
def test_deferral_of_lossy_speculation(residual):
    """At temperature 0 the drafter's token stands or falls whole; [B] rows of both temperatures in one batch, too."""
    drafter, verifier = cases.random_logits(31, 40, 5)
    temperatures = np.arange(40, dtype=np.float32) % 2
    mixed = Pair(*(getattr(laws_of(drafter, verifier, temperatures), name) for name in ("q", "p", "q_raw", "p_raw")))
    for alpha in (0.1, 0.45, 0.8):
        rule = rules.by_name("lossy_sd", alpha, residual=residual)
        wanted = {}
        for temperature in (0.0, 1.0):
            pair = pair_of(drafter, verifier, temperature)
            laws = [np.asarray(law, np.float64) for law in (pair.q, pair.p, pair.p_raw)]
            wanted[temperature] = [
                oracle.lossy_deferral(*each, alpha, temperature == 0) for each in zip(*laws, strict=True)
            ]
            np.testing.assert_allclose(rule.deferral(pair), wanted[temperature], atol=2e-6)
        assert 0 < np.mean(wanted[0.0]) < 1
        both = np.where(temperatures == 0, wanted[0.0], wanted[1.0])
        pair = dataclasses.replace(mixed, greedy=jnp.asarray(temperatures == 0))
        np.testing.assert_allclose(jax.jit(type(rule).deferral)(rule, pair), both, atol=2e-6)


def test_token_v3_at_zero_is_not_lossless():
    pair = pair_of(*cases.random_logits(6, 60, 6), 1.0)
    target = rules.by_name("token_v3", alpha=0.0).target(pair)
    assert np.abs(np.asarray(target - pair.p)).max() > 0.05


def test_chow_at_zero_defers_even_where_the_drafter_is_certain():
    logits = jnp.asarray([[200.0, 0.0, 0.0]]), jnp.asarray([[0.0, 1.0, 2.0]])
    pair = pair_of(*logits, 1.0)  # max q_raw is exactly 1 in float32
    np.testing.assert_array_equal(rules.by_name("chow", alpha=0.0).target(pair), pair.p)


@ALL
def test_alpha_per_row(variant):
    """B == G == V, so that an alpha expanded on the wrong side would broadcast, and be wrong."""
    name, _ = variant
    if name == "lossless":
        alphas = [None] * 4
    else:
        grid = cases.ALPHAS[name]
        alphas = [grid[i % len(grid)] for i in range(4)]
    drafter, verifier = (x.reshape(4, 4, 4) for x in cases.random_logits(7, 16, 4))
    for temperature in (0.0, 1.0):
        got = rule_of(variant, alphas).target(pair_of(drafter, verifier, temperature))
        for b, alpha in enumerate(alphas):
            alone = rule_of(variant, alpha).target(pair_of(drafter[b], verifier[b], temperature))
            np.testing.assert_allclose(got[b], alone, rtol=0, atol=1e-7)
        flat = pair_of(drafter[:, 0], verifier[:, 0], temperature)  # [B, V] with B == V
        np.testing.assert_allclose(rule_of(variant, alphas).target(flat), got[:, 0], rtol=0, atol=1e-7)


def test_bild_fallback_per_row():
    """B == G == V as above: rows whose alpha and fallback are their own; neither falls back always or never."""
    alphas, fallbacks = [0.3, 3.0, 1.2, 0.7], [0.3, 0.45, 0.6, 0.75]
    drafter, verifier = (x.reshape(4, 4, 4) for x in cases.random_logits(7, 16, 4))
    for temperature in (0.0, 1.0):
        pair = pair_of(drafter, verifier, temperature)
        got = rules.by_name("bild", alphas, fallback=np.asarray(fallbacks, np.float32)).target(pair)
        for b, (alpha, fallback) in enumerate(zip(alphas, fallbacks, strict=True)):
            alone = rules.by_name("bild", alpha, fallback=fallback)
            np.testing.assert_allclose(got[b], alone.target(pair_of(drafter[b], verifier[b], temperature)), atol=1e-7)
        flat = pair_of(drafter[:, 0], verifier[:, 0], temperature)  # [B, V] with B == V
        found = rules.by_name("bild", alphas, fallback=jnp.asarray(fallbacks)).target(flat)
        np.testing.assert_allclose(found, got[:, 0], rtol=0, atol=1e-7)
        falls_back = np.asarray(pair.q_raw).max(-1) < np.asarray(fallbacks)[:, None]
        assert 0 < falls_back.sum() < falls_back.size
    # With the fallback of one row for all of them the laws differ.
    assert np.abs(np.asarray(rules.by_name("bild", alphas, fallback=0.3).target(pair) - got)).max() > 0.05


@pytest.mark.parametrize("variant", VARIANTS, ids=cases.variant_id)
def test_target_at_gathers_the_target(variant):
    """The view of single tokens is the law itself, with alpha per row, at rows of temperature 0 as well."""
    name, _ = variant
    alphas = None if name == "lossless" else [cases.ALPHAS[name][i % len(cases.ALPHAS[name])] for i in range(4)]
    drafter, verifier = (x.reshape(4, 6, 5) for x in cases.random_logits(13, 24, 5))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 5, (4, 6)))
    rule, mixed = rule_of(variant, alphas), jnp.asarray([0.0, 1.0, 0.0, 0.5])
    pairs = [pair_of(drafter, verifier, temperature) for temperature in (0.0, 0.7, 1.0, mixed)]
    pairs[-1] = dataclasses.replace(pairs[-1], greedy=mixed == 0)
    for pair in pairs:
        wanted = np.take_along_axis(np.asarray(rule.target(pair)), np.asarray(tokens)[..., None], -1)[..., 0]
        np.testing.assert_allclose(rule.target_at(pair, tokens), wanted, rtol=1e-6, atol=1e-7)


@ALL
def test_greedy_may_be_traced_and_per_row(variant):
    """One program serves rows at temperature 0 and rows that sample."""
    drafter, verifier = (jnp.asarray(x.reshape(4, 4, 4)) for x in cases.random_logits(8, 16, 4))
    temperatures = jnp.asarray([0.0, 1.0, 0.0, 0.5])
    rule = rule_of(variant, cases.ALPHAS[variant[0]][-2:][0])

    @jax.jit
    def mixed(rule, temperatures):
        q, p = probs.tempered(drafter, temperatures), probs.tempered(verifier, temperatures)
        pair = Pair(q, p, probs.raw(drafter), probs.raw(verifier), greedy=temperatures == 0)
        return rule.target(pair)

    got = mixed(rule, temperatures)
    for b, temperature in enumerate(temperatures.tolist()):
        alone = rule.target(pair_of(drafter[b], verifier[b], temperature))
        np.testing.assert_allclose(got[b], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v[0] != "lossless"], ids=cases.variant_id)
def test_alpha_sweep_traces_once(variant):
    traces = []

    @jax.jit
    def target(rule, pair):
        traces.append(1)
        return rule.target(pair)

    pair = pair_of(*cases.random_logits(9, 40, 5), 1.0)
    results = {np.asarray(target(rule_of(variant, alpha), pair)).tobytes() for alpha in cases.ALPHAS[variant[0]]}
    assert len(traces) == 1
    assert len(results) > 1, "alpha has no effect"


@ALL
def test_reads_drafter_says_the_truth(variant):
    name, _ = variant
    rule = rule_of(variant, cases.ALPHAS[name][-2:][0])
    assert rule.reads_drafter is (name not in oracle.IGNORES_DRAFTER)
    assert rule.truncates_inputs is (name in oracle.TRUNCATES_INPUTS)
    pair = pair_of(*cases.random_logits(10, 60, 5), 1.0)
    blind = dataclasses.replace(pair, q=None, q_raw=None)
    if not rule.reads_drafter:
        np.testing.assert_array_equal(rule.target(blind), rule.target(pair))
    else:
        other = pair_of(*cases.random_logits(11, 60, 5), 1.0)
        swapped = dataclasses.replace(pair, q=other.q, q_raw=other.q_raw)
        assert np.abs(np.asarray(rule.target(swapped) - rule.target(pair))).max() > 0.01


# Rules whose target law is p when the pair agrees. The others rule out tokens by a test on p.
AGREEABLE = [v for v in VARIANTS if v[0] not in ("token_v1", "token_v2", "token_v3", "typical", "min_p", "bild")]


@pytest.mark.parametrize("how", ["token", "block"])
@pytest.mark.parametrize("variant", AGREEABLE, ids=cases.variant_id)
def test_equal_models_never_reject(variant, how):
    """Through rule and round, at uniforms of exactly 0 and of the last float below 1."""
    rows, vocab = 600, 7
    logits, _ = cases.random_logits(12, rows, vocab)
    draft = np.random.default_rng(0).integers(0, vocab, rows)
    round_ = jax.jit(verify.BY_NAME[how])
    for temperature in (0.0, 0.7, 1.0):
        pair = pair_of(logits, logits, temperature)
        for alpha in cases.ALPHAS[variant[0]]:
            pi = rule_of(variant, alpha).target(pair)
            ids = np.where(np.asarray(pair.q)[np.arange(rows), draft] > 0, draft, np.argmax(logits, -1))
            for u in (0.0, BELOW_ONE):
                out = round_(
                    jnp.asarray(ids)[:, None],
                    jnp.ones(rows, jnp.int32),
                    pair.q[:, None],
                    jnp.stack([pi, pair.p], axis=1),
                    jnp.full((rows, 1), u, jnp.float32),
                    jnp.full(rows, 0.5, jnp.float32),
                )
                assert np.asarray(out.bonus).all(), (temperature, alpha, u)


# Names and ranges


def test_unknown_rule_names_the_nearest():
    with pytest.raises(UserError, match="token_v3"):
        rules.by_name("token_v33", alpha=0.1)


@pytest.mark.parametrize(
    ("name", "alpha"),
    [("token_v3", 1.5), ("chow", -0.1), ("min_p", 2.0), ("diff", -1.5)],
)
def test_alpha_out_of_range_names_the_range(name, alpha):
    with pytest.raises(UserError, match=rf"{name}.*(to 1|1 or less)"):
        rules.by_name(name, alpha=alpha)


def test_an_alpha_that_is_no_number_is_rejected():
    with pytest.raises(UserError, match="alpha=.*nan.* must be a number"):
        rules.by_name("chow", alpha=math.nan)


def test_one_bad_alpha_of_many_is_found():
    with pytest.raises(UserError, match="7"):
        rules.by_name("chow", alpha=[0.1, 7.0])


@pytest.mark.parametrize("alpha", [0.3, np.float32(0.3), np.array(0.3), np.array([0.3, 0.4]), (0.3, 0.4)], ids=repr)
def test_alpha_comes_in_many_forms(alpha):
    rule = rules.by_name("token_v3", alpha=alpha)
    np.testing.assert_allclose(rule.alpha, alpha, rtol=1e-6)


def test_missing_and_superfluous_arguments():
    with pytest.raises(UserError, match="alpha"):
        rules.by_name("token_v3")
    with pytest.raises(UserError, match="no alpha"):
        rules.by_name("lossless", alpha=0.5)
    with pytest.raises(UserError, match="lenience"):
        rules.by_name("token_v3", alpha=0.5, lenience=2)


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ValueError, match="token_v3"):
        rules.register("token_v3", rules.Lossless)
    assert rules.get("token_v3") is rules.TokenV3
