"""Short texts that differ where arrays differ, without moving sharded parameters to the host.

The digest of an array is a sum over its elements of a hash of (bits, place), modulo 2**32, twice with two seeds. A sum
does not depend on the order or the device of its terms: each device adds up what it holds, and only two numbers per
array are moved. The hash is the finaliser of MurmurHash3 (Appleby, public domain).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.interfaces import Array, PyTree

_SEEDS = (0x3C6EF372, 0xA54FF53A)
_BLOCK = 2**20  # elements hashed at a time on the host


def of_tree(tree: PyTree) -> str:
    """16 hexadecimal digits that depend on names, shapes, types and values of all leaves, on whichever devices."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), of_array(leaf))).encode())
    return digest.hexdigest()[:16]


def of_array(array: Any) -> tuple[int, int]:
    """The two sums of one array."""
    near = not isinstance(array, jax.Array) or (
        len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"  # hashed on its own devices
    )
    if near:
        return _on_host(np.asarray(array))
    first, second = jax.device_get(_on_devices(array))
    return int(first), int(second)


def _mixed(bits: Any, place: Any, seed: int) -> Any:
    """A hash of 32 bits at a place, for arrays of uint32 of numpy and jax alike."""
    number = np.uint32  # wraps around in both libraries
    found = bits ^ (place * number(0x9E3779B1) + number(seed))
    found = (found ^ (found >> number(16))) * number(0x85EBCA6B)
    found = (found ^ (found >> number(13))) * number(0xC2B2AE35)
    return found ^ (found >> number(16))


def _on_host(array: np.ndarray) -> tuple[int, int]:
    size = array.dtype.itemsize
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(f"u{min(size, 4)}")  # wider elements count as several
    sums = [0, 0]
    for begin in range(0, len(bits), _BLOCK):
        block = bits[begin : begin + _BLOCK].astype(np.uint32)
        place = (np.arange(begin, begin + len(block), dtype=np.uint64) & 0xFFFFFFFF).astype(np.uint32)
        for i, seed in enumerate(_SEEDS):
            sums[i] = (sums[i] + int(_mixed(block, place, seed).sum(dtype=np.uint64))) % 2**32
    return sums[0], sums[1]


@jax.jit
def _on_devices(array: Array) -> tuple[Array, Array]:
    """The same, computed on the devices of the array. Elements have at most 32 bits, as in JAX."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = jnp.uint32(math.prod(array.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * stride
    first, second = (jnp.sum(_mixed(bits, place, seed), dtype=jnp.uint32) for seed in _SEEDS)
    return first, second
