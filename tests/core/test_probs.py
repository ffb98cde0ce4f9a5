"""The sampler: laws, truncation and drawing, against the float64 oracle and by hand."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import cases
from oracles import sampler as oracle
from speccascade_t5x.core import probs
from speccascade_t5x.core.probs import Sampling

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def laws(seed: int, rows: int, vocab: int, concentration: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(vocab, concentration), rows).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 0.1, 0.5, 1.0, 4.0])
def test_tempered_matches_the_oracle(temperature):
    logits, _ = cases.random_logits(1, 20, 9)
    wanted = np.stack([oracle.tempered(row, temperature, 7) for row in logits])
    got = probs.tempered(jnp.asarray(logits), temperature, 7)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


def test_raw_is_temperature_one():
    logits, _ = cases.random_logits(2, 8, 6)
    wanted = np.stack([oracle.tempered(row, 1.0, 4) for row in logits])
    np.testing.assert_allclose(probs.raw(jnp.asarray(logits), 4), wanted, rtol=0, atol=5e-7)


def test_low_precision_logits_give_float32_laws():
    logits = jnp.asarray(cases.random_logits(2, 8, 6)[0], jnp.bfloat16)
    for law in (probs.raw(logits), probs.tempered(logits, 0.5), probs.tempered(logits, 0.0)):
        assert law.dtype == jnp.float32
        np.testing.assert_allclose(law.sum(-1), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(probs.raw(logits), probs.raw(logits.astype(jnp.float32)))


def test_masked_ids_have_probability_exactly_zero():
    logits = jnp.asarray([[0.0, -50.0, 1.0, 90.0, 90.0]])  # the mass would all be in the masked tail
    for temperature in (0.0, 1e-2, 1.0, 100.0):
        law = np.asarray(probs.tempered(logits, temperature, 3))
        assert (law[:, 3:] == 0).all() and law.sum() == pytest.approx(1)
    assert (np.asarray(probs.raw(logits, 3))[:, 3:] == 0).all()


def test_temperature_zero_takes_the_lower_of_tied_ids():
    law = probs.tempered(jnp.asarray([[1.0, 5.0, 5.0], [5.0, 1.0, 5.0], [2.0, 2.0, 2.0]]), 0.0)
    np.testing.assert_array_equal(law, [[0, 1, 0], [1, 0, 0], [1, 0, 0]])


def test_temperature_zero_never_picks_a_masked_id():
    law = probs.tempered(jnp.asarray([[-3.0, -2.0, 7.0]]), 0.0, 2)
    np.testing.assert_array_equal(law, [[0, 1, 0]])


@pytest.mark.parametrize("positions", [None, 3])  # [B, V] and [B, B, V]: B must meet axis 0
def test_temperature_per_row(positions):
    logits, _ = cases.random_logits(3, 9, 3)
    logits = logits.reshape(3, 3, 3) if positions else logits[:3]
    temperatures = [0.0, 0.4, 1.3]
    got = probs.tempered(jnp.asarray(logits), jnp.asarray(temperatures))
    wanted = [probs.tempered(jnp.asarray(row), t) for row, t in zip(logits, temperatures, strict=True)]
    np.testing.assert_array_equal(got, wanted)


SETTINGS = [
    {"top_k": k, "top_p": p, "min_p": m}
    for k, p, m in itertools.product((0, 1, 3, 50), (1.0, 0.9, 0.5, 1e-3), (0.0, 0.2, 1.0))
]


@pytest.mark.parametrize("vocab", [2, 7, 150])
def test_truncation_matches_the_oracle(vocab):
    law = laws(4, 12, vocab)
    truncate = jax.jit(probs.truncate)
    for settings in SETTINGS:
        got = np.asarray(truncate(jnp.asarray(law), Sampling(**settings)))
        wanted = np.stack([oracle.truncate(row, **settings) for row in law])
        assert ((got > 0) == (wanted > 0)).all(), settings
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6, err_msg=str(settings))


def test_truncation_keeps_the_lower_of_tied_ids():
    flat = jnp.full((1, 4), 0.25)
    np.testing.assert_array_equal(probs.truncate(flat, Sampling(top_k=2)), [[0.5, 0.5, 0, 0]])
    np.testing.assert_array_equal(probs.truncate(flat, Sampling(top_p=0.5)), [[0.5, 0.5, 0, 0]])
    np.testing.assert_array_equal(probs.truncate(flat, Sampling(min_p=1.0)), flat)


def test_truncation_order_is_top_k_then_top_p_then_min_p():
    # After top-k 2 the law is [2/3, 1/3]: the mass before the second id is 2/3, no longer .4.
    law = jnp.asarray([[0.4, 0.2, 0.2, 0.2]])
    np.testing.assert_allclose(probs.truncate(law, Sampling(top_k=2, top_p=0.6)), [[1, 0, 0, 0]])
    np.testing.assert_allclose(probs.truncate(law, Sampling(top_k=2, top_p=0.7)), [[2 / 3, 1 / 3, 0, 0]], atol=1e-6)


def test_no_truncation_leaves_the_law_bit_for_bit():
    law = jnp.asarray(laws(5, 6, 300, 0.05))
    np.testing.assert_array_equal(probs.truncate(law, Sampling()), law)
    np.testing.assert_array_equal(probs.truncate(law, Sampling(temperature=0.3)), law)


def test_top_p_one_keeps_every_id_beside_other_truncation():
    """A float32 running sum reaches 1 before the tail of about half of these laws begins."""
    law = np.concatenate([laws(6, 20, 2000, 1.0), np.full((20, 50), 1e-10, np.float32)], axis=1)
    running = np.asarray(jnp.cumsum(-jnp.sort(-jnp.asarray(law)), axis=-1))
    assert (running[:, -51] >= 1).any()
    got = np.asarray(jax.jit(probs.truncate)(jnp.asarray(law), Sampling(top_k=2049, top_p=1.0)))
    assert ((got > 0).sum(-1) == 2049).all()


def test_truncation_of_a_one_hot_law_changes_nothing():
    law = probs.tempered(jnp.asarray(cases.random_logits(7, 5, 6)[0]), 0.0)
    truncate = jax.jit(probs.truncate)
    for settings in SETTINGS:
        np.testing.assert_array_equal(truncate(law, Sampling(**settings)), law)


def test_truncation_per_row():
    law = laws(8, 16, 4).reshape(4, 4, 4)  # B == G == V: only the leading axis may meet [B] settings
    rows = [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}, {}]
    stacked = Sampling(
        temperature=1.0,
        top_k=jnp.asarray([row.get("top_k", 0) for row in rows]),
        top_p=jnp.asarray([row.get("top_p", 1.0) for row in rows]),
        min_p=jnp.asarray([row.get("min_p", 0.0) for row in rows]),
    )
    got = np.asarray(probs.truncate(jnp.asarray(law), stacked))
    for b, settings in enumerate(rows):
        wanted = np.stack([oracle.truncate(row, **settings) for row in law[b]])
        np.testing.assert_allclose(got[b], wanted, rtol=0, atol=1e-6)


def test_sampling_is_a_pytree_that_never_recompiles():
    traces = []

    @jax.jit
    def shaped(logits, sampling):
        traces.append(1)
        return probs.truncate(probs.tempered(logits, sampling.temperature), sampling)

    logits = jnp.asarray(cases.random_logits(9, 4, 8)[0])
    seen = {
        np.asarray(shaped(logits, Sampling(t, k, p, m))).tobytes()
        for t, k, p, m in [
            (1.0, 0, 1.0, 0.0),
            (0.0, 0, 1.0, 0.0),
            (0.7, 3, 0.8, 0.1),
            (2.0, 5, 0.9, 0.0),
        ]
    }
    assert len(traces) == 1 and len(seen) == 4


# Drawing


def both(uniform) -> jnp.ndarray:
    """The same uniform for the chunk and for the place in it."""
    return jnp.stack([jnp.asarray(uniform, jnp.float32)] * 2, axis=-1)


def assert_inside(weights: np.ndarray, index: int, uniform: float) -> None:
    """The index's stretch of the cumulative sums holds the uniform, up to float32 rounding at its ends."""
    upper = weights[: index + 1].sum() / weights.sum()
    lower = weights[:index].sum() / weights.sum()
    assert weights[index] > 0 and lower - 1e-6 <= uniform <= upper + 1e-6


@pytest.mark.parametrize("vocab", [1, 2, 5, 127, 128, 129, 1000])
def test_sample_inverts_cumulative_sums(vocab):
    """The first uniform picks a chunk by its mass, the second an id by its share of the chunk."""
    law, width = laws(10, 8, vocab, 0.3), probs.chunk_width(vocab)
    uniforms = np.random.default_rng(0).random((8, 256, 2), np.float32)
    uniforms[:, :2] = 0.0, BELOW_ONE
    got = np.asarray(probs.sample(jnp.asarray(np.repeat(law[:, None], 256, 1)), jnp.asarray(uniforms)))
    for row, ids, pairs in zip(law.astype(np.float64), got, uniforms, strict=True):
        chunks = np.pad(row, (0, -vocab % width)).reshape(-1, width)
        for place, (outer, inner) in zip(ids, pairs, strict=True):
            assert_inside(chunks.sum(axis=1), place // width, outer)
            assert_inside(chunks[place // width], place % width, inner)


def test_sample_by_hand():
    law = jnp.asarray([[0.25, 0.0, 0.5, 0.25]] * 6)
    uniforms = [0.0, 0.249, 0.25, 0.749, 0.75, BELOW_ONE]
    assert probs.sample(law, both(uniforms)).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocab", [3, 128, 500])
def test_sample_never_returns_an_id_of_probability_zero(vocab):
    rng = np.random.default_rng(11)
    law = rng.dirichlet(np.ones(vocab), 400) * (rng.random((400, vocab)) < 0.3)
    law[:, 0] = law[:, -1] = 0  # the ids that rounding at either end would return
    law[np.arange(400), rng.integers(1, vocab - 1, 400)] += 1e-3
    law = (law / law.sum(-1, keepdims=True)).astype(np.float32)
    for u in (0.0, 1e-38, 0.5, 1 - 1e-6, BELOW_ONE):
        ids = np.asarray(probs.sample(jnp.asarray(law), both(np.full(400, u))))
        assert (law[np.arange(400), ids] > 0).all(), u


def test_sample_reaches_each_id_of_a_one_hot_law():
    law = jnp.eye(300)
    for u in (0.0, 0.5, BELOW_ONE):
        ids = probs.sample(law, both(np.full(300, u)))
        assert ids.tolist() == list(range(300))


def test_sample_keeps_leading_axes_and_takes_unnormalised_weights():
    law = laws(12, 12, 5).reshape(3, 4, 5)
    uniforms = jnp.asarray(np.random.default_rng(0).random((3, 4, 2), np.float32))
    ids = probs.sample(jnp.asarray(law), uniforms)
    assert ids.shape == (3, 4)
    # Powers of two scale without rounding.
    np.testing.assert_array_equal(probs.sample(jnp.asarray(law / 64), uniforms), ids)
    np.testing.assert_array_equal(jax.jit(probs.sample)(jnp.asarray(law), uniforms), ids)


def test_frequencies_follow_the_law():
    law = laws(13, 1, 6, 1.0)
    count = 40_000
    uniforms = (np.arange(count, dtype=np.float32) + 0.5) / count  # every 1/count of the unit line once
    ids = np.asarray(probs.sample(jnp.asarray(np.repeat(law, count, 0)), both(uniforms)))
    np.testing.assert_allclose(np.bincount(ids, minlength=6) / count, law[0], rtol=0, atol=2 / count)
