"""Parameter trees of the networks: shapes, logical axes and fresh values.

A configuration names its Flax network as `module`; every network takes three arrays of token ids first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from speccascade_t5x.interfaces import Array, PyTree


def _boxed_shapes(config: Any) -> PyTree:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(lambda key, x: config.module.init(key, x, x, x)["params"], jax.random.key(0), tokens)


def param_shapes(config: Any) -> PyTree:
    """The parameter tree as jax.ShapeDtypeStruct leaves, without computing anything."""
    return meta.unbox(_boxed_shapes(config))


def logical_axes(config: Any) -> PyTree:
    """The parameter tree with each leaf replaced by its tuple of logical axis names (T5X's names)."""
    boxed = _boxed_shapes(config)
    return jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))


def init_params(config: Any, key: Array) -> PyTree:
    """Fresh parameters, T5's initialisers, float32."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return meta.unbox(jax.jit(lambda k: config.module.init(k, tokens, tokens, tokens))(key))["params"]
