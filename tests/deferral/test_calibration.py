"""Calibrations against numpy, and that each undoes what it is made for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from oracles import deferral as oracle
from oracles import sampler
from speccascade_t5x.deferral import calibration
from speccascade_t5x.interfaces import UserError

RNG = np.random.default_rng(7)
V = 6


def drawn(rows: int = 6000):
    """(logits of the truth, tokens drawn from it)."""
    logits = RNG.normal(0, 1.5, (rows, V))
    uniform = RNG.uniform(size=(rows, 1))
    law = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits.astype(np.float32), (law.cumsum(-1) < uniform).sum(-1).clip(0, V - 1).astype(np.int32)


LOGITS, TOKENS = drawn()


def batches_of(logits, tokens=TOKENS):
    def again():
        for begin in range(0, len(tokens), 2000):
            part = tokens[begin : begin + 2000].copy()
            part[::10] = -1  # positions that do not count
            yield logits[begin : begin + 2000], part

    return again


@pytest.mark.parametrize("wrong", [0.4, 1.0, 2.5])
def test_a_temperature_is_undone(wrong):
    found = calibration.fit_temperature(batches_of(LOGITS / wrong))
    assert float(found.values["temperature"]) == pytest.approx(1 / wrong, rel=0.08)
    # The least negative log-likelihood, by brute force over the positions that count.
    counted = np.arange(len(TOKENS)) % 2000 % 10 != 0
    temperatures = np.linspace(0.5, 2.0, 31) / wrong

    def nll(t):
        x = LOGITS[counted] / wrong / t
        return np.mean(np.log(np.exp(x).sum(-1)) - x[np.arange(counted.sum()), TOKENS[counted]])

    best = temperatures[np.argmin([nll(t) for t in temperatures])]
    assert abs(float(found.values["temperature"]) - best) <= (temperatures[1] - temperatures[0]) * 1.01


def test_few_batches_are_computed_once_and_many_each_time():
    calls = []

    def counted():
        calls.append(1)
        yield from batches_of(LOGITS)()

    for most, wanted in ((2**29, 1), (1000, 3)):
        calls.clear()
        again = calibration.remembered(counted, most)
        passes = [list(again()) for _ in range(3)]
        assert len(calls) == wanted and all(len(each) == 3 for each in passes)
        np.testing.assert_array_equal(passes[2][1][0], LOGITS[2000:4000])


def test_vector_scaling_undoes_what_one_temperature_cannot():
    bias = np.array([2.0, 0, 0, -1.5, 0, 0], np.float32)
    wrong = batches_of(LOGITS + bias)
    one = calibration.fit_temperature(wrong)
    found = calibration.fit_vector(wrong, one)
    shift = np.asarray(found.values["bias"])
    assert shift[0] - shift[1] < -1.2 and shift[3] - shift[1] > 0.8
    law = np.exp(LOGITS + bias)
    law /= law.sum(-1, keepdims=True)
    hits = np.argmax(np.asarray(found.law(jnp.asarray(law, jnp.float32))), -1) == TOKENS
    errors = [
        calibration.expected_error(np.asarray(c.confidence(jnp.asarray(law, jnp.float32))), hits) for c in (one, found)
    ]
    assert errors[1] < errors[0] / 2


def test_laws_are_the_oracles():
    law = np.array([[0.5, 0.3, 0.2, 0.0], [0.97, 0.01, 0.01, 0.01]], np.float32)
    scaled = calibration.Calibration("temperature", {"temperature": jnp.float32(1.7)})
    for row, found in zip(law, np.asarray(scaled.law(jnp.asarray(law))), strict=True):
        np.testing.assert_allclose(found, oracle.tempered_by(row.tolist(), 1.7), atol=1e-6)
    scale, bias = [1.5, 0.5, 1.0, 2.0], [0.3, -0.2, 0.0, 9.0]
    vector = calibration.Calibration("vector", {"scale": jnp.array(scale), "bias": jnp.array(bias)})
    found = np.asarray(vector.law(jnp.asarray(law)))
    np.testing.assert_allclose(found[1], oracle.vector_scaled(law[1].tolist(), scale, bias), atol=1e-5)
    assert found[0, 3] == 0.0  # impossible stays impossible
    # A padded tail has no parameters of its own.
    padded = np.pad(law, ((0, 0), (0, 2)))
    np.testing.assert_allclose(np.asarray(vector.law(jnp.asarray(padded)))[:, :4], found, atol=1e-6)


def test_isotonic_is_the_best_monotone_fit():
    values = RNG.permutation(40) / 40 + 0.01
    hits = (RNG.uniform(size=40) < values**2).astype(float)
    found = calibration.fit_isotonic(values, hits)
    got = np.interp(values, found.values["knots"], found.values["levels"])
    np.testing.assert_allclose(got, oracle.isotonic(values.tolist(), hits.tolist()), atol=1e-6)
    # Equal confidences are one point.
    found = calibration.fit_isotonic(np.array([0.2, 0.2, 0.6]), np.array([0.0, 1.0, 1.0]))
    assert np.interp(0.2, found.values["knots"], found.values["levels"]) == pytest.approx(0.5)


def test_reliability_and_error():
    confidence, hits = np.array([0.95, 0.95, 0.15, 0.5]), np.array([1, 0, 0, 1])
    rows = calibration.reliability(confidence, hits, bins=10)
    assert [row["count"] for row in rows] == [1, 1, 2]
    assert calibration.expected_error(confidence, hits, 10) == pytest.approx((0.15 + 0.5 + 2 * 0.45) / 4)
    assert sampler.normalise([1, 1])[0] == 0.5


def test_what_cannot_be_calibrated_is_said():
    with pytest.raises(UserError, match="the fitting split is empty"):
        calibration.fit_temperature(lambda: iter(()))
    with pytest.raises(UserError, match="not finite"):
        calibration.fit_temperature(batches_of(np.full_like(LOGITS, np.nan)))
    with pytest.raises(UserError, match="right at every label"):
        calibration.fit_isotonic(np.array([0.3, 0.7]), np.ones(2))
    with pytest.raises(UserError, match="gives no distribution"):
        calibration.fit_isotonic(np.array([0.3, 0.7]), np.array([0, 1])).law(jnp.ones((1, 2)) / 2)
    with pytest.raises(UserError, match="'none' is unknown"):
        calibration.Calibration("none", {})
