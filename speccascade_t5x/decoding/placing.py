"""Puts arrays onto devices, including those of other hosts."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from speccascade_t5x.interfaces import Array, PyTree


def put(tree: PyTree, where: jax.sharding.Sharding | PyTree, may_alias: bool | None = None) -> PyTree:
    """`jax.device_put`, also where a sharding reaches devices of other hosts.

    In that case every host calls it with the same values and fills in its own part. Nothing is sent between hosts, and
    nothing checks that the values are equal.

    Args:
      tree: arrays, of numpy or of JAX, whole on this host or already in place.
      where: a sharding for all, or a tree of them.
      may_alias: False copies in any case, see `jax.device_put`.
    """
    if all(at.is_fully_addressable for at in jax.tree.leaves(where)):
        return jax.device_put(tree, where, may_alias=may_alias)
    spread = jax.tree.map(lambda _: where, tree) if isinstance(where, jax.sharding.Sharding) else where
    return jax.tree.map(lambda leaf, at: _put(leaf, at, may_alias), tree, spread)


def _put(leaf: Any, at: jax.sharding.Sharding, may_alias: bool | None) -> Array:
    if at.is_fully_addressable or getattr(leaf, "sharding", None) == at:
        return jax.device_put(leaf, at, may_alias=may_alias)
    if jax.dtypes.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), at, may_alias), impl=jax.random.key_impl(leaf))
    value = np.array(leaf)  # a copy: on CPU the array may live in it
    return jax.make_array_from_callback(value.shape, at, lambda index: value[index])
