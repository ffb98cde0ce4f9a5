"""Whether what was written is what is read back, in every tensor and in the logits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.checkpoints import architecture, flat_params
from speccascade_t5x.drafting import NGramTable
from speccascade_t5x.interfaces import Bound, PyTree, UserError


def compare(original: Bound, written: Bound, found: Bound, target: str) -> float:
    """Largest difference of logits between source and export; what was read back must be what was written.

    Raises:
      UserError: it is not.
    """
    if found.model != written.model:
        raise UserError(f"{target} reads back as another architecture: {found.model}; it was not kept")
    flat = flat_params.flatten(found.params)
    for name, leaf in flat_params.flatten(written.params).items():
        if not np.array_equal(np.asarray(leaf), np.asarray(flat[name])):
            raise UserError(f"{target}: tensor {name!r} reads back with other values; it was not kept")
    draw = np.random.default_rng(0)
    inputs = [draw.integers(1, original.model.vocab_size, (2, n)) for n in (12, 8)]
    before, ours, again = (
        np.asarray(_logits(bound.model, bound.params, *inputs)) for bound in (original, written, found)
    )
    if not np.array_equal(ours, again):
        raise UserError(f"{target} reads back with logits off by {np.abs(ours - again).max():.3g}; it was not kept")
    return float(np.abs(before - again).max())


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: architecture.Model, params: PyTree, encoder: jax.Array, decoder: jax.Array) -> jax.Array:
    ones = jnp.ones_like(decoder)
    tokens = (decoder, ones, ones) if model.input_name == "decoder_input_tokens" else (encoder, decoder, ones)
    return model.module.apply({"params": params}, *tokens)


def compare_tables(written: NGramTable | None, found: NGramTable | None, target: str) -> None:
    """Rejects a table that was read back otherwise than it was written.

    Raises:
      UserError: it was.
    """
    (ours, shape), (theirs, read) = jax.tree.flatten(written), jax.tree.flatten(found)
    alike = shape == read  # type: ignore[operator]  # JAX declares no comparison of tree structures
    same = alike and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if not same:
        raise UserError(f"{target}: the n-gram table reads back with other values; it was not kept")
