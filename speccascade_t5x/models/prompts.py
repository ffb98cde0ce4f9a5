"""Ragged prompts of models that continue their inputs.

The names are those of T5X's `DecoderOnlyModel`, so that its batches can be decoded as they are:

    prompts                    9 4 6 1        7 1
    decoder_input_tokens       0 9 4 6 1      0 7 1 0 0      the start token, the prompt, padding
    decoder_causal_attention   1 1 1 1 1      1 1 1 0 0      optional: 1 where the first column or a prompt token is

The mask gives the length of each prompt, and what follows the prompt is not read (T5X's batches hold the targets
there). Without a mask, trailing 0s are padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from speccascade_t5x.interfaces import Array, PyTree, UserError

TOKENS = "decoder_input_tokens"
MASK = "decoder_causal_attention"


def from_rows(prompts: Array, start_id: int) -> dict[str, Array]:
    """Inputs of prompts [B, S] that are padded with 0 on the right: shifted by the start token, [B, S + 1]."""
    tokens = jnp.asarray(prompts, jnp.int32)
    return {TOKENS: jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=start_id)}


def given(inputs: PyTree) -> bool:
    """Whether the inputs hold prompts."""
    return isinstance(inputs, Mapping) and TOKENS in inputs


def read(inputs: PyTree) -> tuple[Array, Array]:
    """(tokens [B, S], lengths [B]), the start token counted as part of the prompt.

    Raises:
      UserError: there are no such inputs.
    """
    if not given(inputs):
        raise UserError(
            f"a decoder-only model reads {TOKENS!r}, but the inputs are {', '.join(sorted(inputs)) or 'none'}: "
            "give the prompts there, each after the start token"
        )
    tokens = jnp.asarray(inputs[TOKENS], jnp.int32)
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise UserError(f"{TOKENS} has shape {tokens.shape}: give [rows, 1 or more]")
    if MASK in inputs:
        if jnp.shape(inputs[MASK]) != tokens.shape:
            raise UserError(f"{MASK} has shape {jnp.shape(inputs[MASK])}, but {TOKENS} {tokens.shape}: make them equal")
        lengths = jnp.sum(jnp.asarray(inputs[MASK]) > 0, axis=1, dtype=jnp.int32)
    else:
        lengths = jnp.max(jnp.where(tokens != 0, jnp.arange(1, tokens.shape[1] + 1), 1), axis=1)
    return tokens, jnp.maximum(lengths, 1)


def last(inputs: PyTree) -> tuple[Array, Array]:
    """(tokens [B], positions [B]) of the last token of each prompt: the first token of a row's first block."""
    tokens, lengths = read(inputs)
    positions = lengths - 1
    return jnp.take_along_axis(tokens, positions[:, None], axis=1)[:, 0], positions


def repeats(batch_size: int, rows: int) -> int:
    """How many samples each input row gets.

    Raises:
      ValueError: the rows do not divide the batch.
    """
    samples, rest = divmod(batch_size, rows)
    if rest:
        raise ValueError(f"batch_size {batch_size} is not a multiple of the {rows} input rows")
    return samples
