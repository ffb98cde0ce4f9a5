"""Where a row ends: EOS, a stop sequence or the length limit, found inside the block a round has just added."""

from __future__ import annotations

import jax.numpy as jnp

from speccascade_t5x.interfaces import Array


def trim(
    buffer: Array,
    committed: Array,
    grown: Array,
    *,
    offset: int,
    width: int,
    max_len: int,
    eos_id: int,
    stop_sequences: tuple[tuple[int, ...], ...] = (),
) -> tuple[Array, Array]:
    """Cuts what a round added at the first EOS, stop sequence or length limit.

    EOS and stop sequences are looked for before the length limit, and stay in the output.

    Args:
      buffer: [B, N] tokens, the output of a row beginning at column `offset`, the new block already written.
      committed: [B] output tokens before this round.
      grown: [B] tokens the round would add, at most `width`.
      offset: column of output token 0.
      width: static bound on `grown`.
      max_len: length limit of the output.
      eos_id: ends a row.
      stop_sequences: token sequences that end a row once its output holds one of them.

    Returns:
      (grown [B] after trimming, done [B] bool).

    The buffer holds a start token and two output tokens; the round has added 7, EOS and 9:

    >>> buffer = jnp.array([[0, 5, 6, 7, 1, 9]])
    >>> grown, done = trim(buffer, jnp.array([2]), jnp.array([3]), offset=1, width=3, max_len=5, eos_id=1)
    >>> print(grown, done)
    [2] [ True]
    """
    within = jnp.arange(width)
    column = offset + committed[:, None] + within
    block = jnp.take_along_axis(buffer, column, axis=1, mode="clip")
    ends = block == eos_id
    for sequence in stop_sequences:
        size = len(sequence)
        whole = committed[:, None] + within + 1 >= size
        for back, wanted in enumerate(reversed(sequence)):
            past = jnp.maximum(column - back, 0)
            whole &= jnp.take_along_axis(buffer, past, axis=1, mode="clip") == wanted
        ends |= whole
    ends &= within < grown[:, None]
    first = jnp.min(jnp.where(ends, within, width), axis=1)
    room = max_len - committed
    kept = jnp.minimum(jnp.minimum(grown, first + 1), room)
    return kept, (first < kept) | (kept >= room)
