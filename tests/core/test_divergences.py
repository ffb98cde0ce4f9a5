"""Total variation and entropy against the float64 oracle, and their edge cases."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from oracles import rules as oracle
from speccascade_t5x.core import divergences


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(12, 0.4), (2, 5, 3)).astype(np.float32)
    return p, q


def test_total_variation_matches_the_oracle(pair):
    p, q = pair
    got = divergences.total_variation(jnp.asarray(p), jnp.asarray(q))
    wanted = [[oracle.total_variation(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(p, q, strict=True)]
    assert got.shape == (5, 3) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-6)


def test_entropy_matches_the_oracle(pair):
    wanted = [[oracle.entropy(law) for law in row] for row in pair[0]]
    np.testing.assert_allclose(divergences.entropy(jnp.asarray(pair[0])), wanted, rtol=2e-6, atol=1e-6)


def test_zeros_are_harmless():
    p, q = jnp.asarray([0.0, 0.5, 0.5]), jnp.asarray([0.25, 0.25, 0.5])
    assert divergences.entropy(p) == pytest.approx(math.log(2))
    assert divergences.total_variation(p, q) == pytest.approx(0.25)
    assert divergences.entropy(jnp.asarray([0.0, 1.0])) == 0


def test_total_variation_spans_zero_to_one():
    one, other = jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])
    assert divergences.total_variation(one, other) == 1
    assert divergences.total_variation(one, one) == 0


def test_low_precision_laws_are_reduced_in_float32():
    # 4096 equal terms of 2**-12 are exact in bfloat16, their bfloat16 running sum is not.
    flat = jnp.full(4096, 2.0**-12, jnp.bfloat16)
    got = divergences.entropy(flat)
    assert got.dtype == jnp.float32
    assert got == pytest.approx(math.log(4096), rel=1e-6)
    assert divergences.total_variation(flat, jnp.zeros_like(flat)) == pytest.approx(1, rel=1e-6)
