"""Random keys and uniforms: whatever kind of key comes in, the noise of a row is threefry's.

JAX has other generators (`rbg`, `unsafe_rbg`), which are faster on TPUs, but under `jax.vmap` they take the noise of
every row from the key of row 0: rows are then neither independent of one another nor of their batch. So a key is
converted where it enters, and all that is folded into it or drawn from it afterwards is a function of the row alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import Array, UserError

_IMPL = "threefry2x32"
_BITS = 24  # what a float32 below 1 holds exactly


def from_seed(seed: int | Array) -> Array:
    """The key of a seed, whatever generator JAX is set to."""
    return jax.random.key(seed, impl=_IMPL)


def threefry(key: Array) -> Array:
    """A threefry key from a key of any kind; one that is threefry's already is returned as it is.

    Args:
      key: a scalar of `jax.random.key` with any generator, or an old-style key: [N] uint32, N >= 2. Of longer keys, all
        words count.

    Raises:
      UserError: `key` is not a random key, or more than one.
    """
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and key.shape == () and str(jax.random.key_impl(key)) == _IMPL:
        return key
    if typed and key.shape:
        raise UserError(f"key holds {key.shape} random keys, but one is wanted: a row's own is folded from it")
    words = jax.random.key_data(key) if typed else key
    if not typed and (dtype != jnp.uint32 or len(words.shape) != 1 or words.shape[0] < 2):
        raise UserError(f"key={key!r} is not a random key: give jax.random.key(seed)")
    words = jnp.ravel(words)
    found = jax.random.wrap_key_data(words[:2], impl=_IMPL)
    for place in range(2, words.shape[0]):
        found = jax.random.fold_in(found, words[place])
    return found


def uniforms(key: Array, size: int) -> Array:
    """[size] float32 uniforms in [0, 1), multiples of 2^-24: twice as fine as `jax.random.uniform` draws them."""
    bits = jax.random.bits(key, (size,), jnp.uint32) >> (32 - _BITS)
    return bits.astype(jnp.float32) * jnp.float32(2.0**-_BITS)
