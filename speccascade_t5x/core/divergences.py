"""Total variation and entropy of distributions. Both reduce the last axis in float32; logarithms are natural."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import xlogy

from speccascade_t5x.interfaces import Array


def total_variation(p: Array, q: Array) -> Array:
    """D_TV(p, q) = sum_v max(0, p(v) - q(v)), [..., V] x [..., V] -> [...].

    >>> print(total_variation(jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.25, 0.5])))
    0.5
    """
    return jnp.sum(jnp.maximum(p.astype(jnp.float32) - q.astype(jnp.float32), 0.0), axis=-1)


def entropy(p: Array) -> Array:
    """H(p) = -sum_v p(v) log p(v) in nats, with 0 log 0 = 0. [..., V] -> [...].

    >>> print(f"{entropy(jnp.array([0.5, 0.5, 0.0])):.3f}")
    0.693
    """
    p = p.astype(jnp.float32)
    return -jnp.sum(xlogy(p, p), axis=-1)
