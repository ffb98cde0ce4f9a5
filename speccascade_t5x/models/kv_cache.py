"""Per-row key/value cache: block writes at [B] positions, rollback by writing lower.

One layer's cache is a pair (keys, values), each [B, H, S, K] with S slots. Writing OVERWRITES, so a slot
may be written again after a rejected draft; nothing is ever erased, because a query never sees a slot
after its own position:

    slots      0 1 2 3 4 5 6          slots      0 1 2 3 4 5 6
    round 1    a b x y z . .    ->    round 2    a b x c d e .      (y, z rejected; c written over y)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import Array

# The longest block and the largest cache row that are written by selecting. A prompt is longer, but written only once;
# beyond so many bytes a TPU v4 takes longer to pass over a row than to write it in a loop (docs/precompile.md).
MOST_SELECTED, MOST_BYTES = 16, 2**21


def empty(batch: int, heads: int, slots: int, width: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """A zero-filled (keys, values) pair, each [batch, heads, slots, width]."""
    shape = (batch, heads, slots, width)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)  # two buffers, so that both can be donated


def write(stored: Array, block: Array, positions: Array) -> Array:
    """Writes row b of a block into slots positions[b] .. positions[b] + T - 1.

    A start beyond S - T would be clamped by XLA and overwrite earlier slots: the caller makes room for
    every draft length + 1 beyond the output length, so that it never happens.

    On a TPU short blocks are written by selecting, slot by slot, between old and new: slices at one position per
    row become a loop over the rows there, which costs more than passing over a whole cache that is not large. A CPU
    writes the slices in place.

    Args:
      stored: [B, H, S, K].
      block: [B, H, T, K].
      positions: [B].
    """
    block = block.astype(stored.dtype)
    if stored.shape[0] == 1:
        return jax.lax.dynamic_update_slice(stored, block, (0, 0, positions[0], 0))
    row_bytes = stored.dtype.itemsize * math.prod(stored.shape[1:])
    if block.shape[2] > MOST_SELECTED or row_bytes > MOST_BYTES:
        return slices(stored, block, positions)
    return jax.lax.platform_dependent(stored, block, positions, tpu=selected, default=slices)


def slices(stored: Array, block: Array, positions: Array) -> Array:
    """`write` with one slice per row."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))(stored, block, positions)


def selected(stored: Array, block: Array, positions: Array) -> Array:
    """`write` by a choice per slot. It does no arithmetic, so the result is bit-identical to that of `slices`."""
    column = jnp.arange(stored.shape[2]) - positions[:, None]  # of the block that belongs into each slot, [B, S]
    for i in range(block.shape[2]):
        stored = jnp.where((column == i)[:, None, :, None], block[:, :, i : i + 1], stored)
    return stored


def visible(positions: Array, length: int, slots: int) -> Array:
    """[B, length, slots] bool: which slots the queries at positions[b] + t may see (their own and earlier)."""
    query = positions[:, None] + jnp.arange(length)
    return jnp.arange(slots) <= query[:, :, None]
