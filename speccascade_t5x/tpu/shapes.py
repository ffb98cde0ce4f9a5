"""A pair, a decode and a training batch as shapes with shardings: nothing is computed or stored."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from speccascade_t5x import decoding
from speccascade_t5x.core import noise, rules
from speccascade_t5x.decoding.compiled import shapes
from speccascade_t5x.distributed.partitioning import Partitioning
from speccascade_t5x.interfaces import Bound, PyTree
from speccascade_t5x.models import T5, T5Config, param_shapes

_CACHES = ("verifier_cache", "drafter_state")


@functools.cache  # a second of tracing for large models, and a table asks for every slice
def parameter_bytes(config: T5Config) -> int:
    """Bytes of a model's parameters, all of them."""
    return sum(_nbytes(leaf) for leaf in jax.tree.leaves(param_shapes(config)))


def bound(config: T5Config, partitioning: Partitioning, drafter: bool = False) -> Bound:
    """A model whose parameters are shapes."""
    model = T5(config)
    return Bound(model, shapes(param_shapes(config), partitioning.params(model, drafter)))


def program(drafter: T5Config, verifier: T5Config, wanted: Any, partitioning: Partitioning) -> decoding.Program:
    """The speculative program that the runtime would compile, with shapes for leaves.

    Args:
      drafter: architecture.
      verifier: architecture.
      wanted: `slice_cells.Options`.
      partitioning: the placement of all arrays.
    """
    config = decoding.DecodeConfig(wanted.max_len, wanted.draft_len, num_samples=wanted.num_samples)
    # Strongly typed, as `inference.settings` makes them.
    sampling = decoding.Sampling(jnp.float32(1.0), jnp.int32(0), jnp.float32(1.0), jnp.float32(0.0))
    pair = bound(drafter, partitioning, drafter=True), bound(verifier, partitioning)
    made = decoding.speculative_program(*pair, rules.by_name(wanted.rule, wanted.alpha), config, sampling)
    return jax.tree.map(lambda leaf: _placed(leaf, partitioning), made)


def _placed(leaf: Any, partitioning: Partitioning) -> jax.ShapeDtypeStruct:
    """The shape of a leaf, on every device unless it has a sharding."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=partitioning.whole)


def decode_inputs(rows: int, input_len: int, partitioning: Partitioning) -> tuple[PyTree, Any, Any]:
    """(inputs, key, example ids) of a decode, as shapes."""
    inputs = {T5.input_name: jax.ShapeDtypeStruct((rows, input_len), jnp.int32, sharding=partitioning.rows)}
    key = jax.ShapeDtypeStruct((), noise.from_seed(0).dtype, sharding=partitioning.whole)
    return inputs, key, jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=partitioning.rows)


def training_batch(rows: int, input_len: int, targets_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The features of a packed batch, as shapes."""
    sizes = {"encoder": input_len, "decoder": targets_len}
    names = ("encoder_input_tokens", "encoder_segment_ids", "decoder_input_tokens", "decoder_target_tokens")
    batch = {
        name: jax.ShapeDtypeStruct((rows, sizes[name.partition("_")[0]]), jnp.int32)
        for name in (*names, "decoder_segment_ids")
    }
    return batch | {"decoder_loss_weights": jax.ShapeDtypeStruct((rows, targets_len), jnp.float32)}


def bytes_per_chip(tree: PyTree) -> int:
    """Bytes of placed shapes on one chip, each leaf unpadded."""
    return sum(_nbytes(leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def cache_bytes_per_chip(state: decoding.State) -> int:
    """The same of the key/value caches of both models."""
    caches = [getattr(state, name) for name in _CACHES]
    flat = [pair for cache in caches for pair in jax.tree_util.tree_leaves_with_path(cache)]
    return bytes_per_chip([leaf for _, leaf in flat if leaf.ndim == 4 and leaf.shape[-2] > 1])


def _nbytes(leaf: Any, shape: tuple[int, ...] | None = None) -> int:
    width = 4 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(leaf.shape if shape is None else shape) * width
