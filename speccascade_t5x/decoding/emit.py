"""Writing what a round emitted: the one place where a row's output grows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x.core import stopping
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.decoding.state import OFFSET, Program, State, Trace
from speccascade_t5x.interfaces import Array


@dataclasses.dataclass(frozen=True)
class Emission:
    """What a round would add to each row, before it is cut at the row's end.

    Attributes:
      tokens: [B, W] ids.
      source: [B, W] who wrote them.
      grown: [B] how many of them count.
      prob_raw: [B, W] probability of each token under pi at temperature 1, untruncated.
      deferral: [B, W] probability that the rule turned to the verifier.
      trace: [B, W] diagnostics, or None.
    """

    tokens: Array
    source: Array
    grown: Array
    prob_raw: Array
    deferral: Array
    trace: Trace | None


def write_rows(buffer: Array, block: Array, columns: Array) -> Array:
    """Writes block [B, W] into buffer [B, N] from column columns[b] on."""
    put = jax.vmap(jax.lax.dynamic_update_slice)
    return put(buffer, block.astype(buffer.dtype), (columns,))


def trim(config: DecodeConfig, tokens: Array, committed: Array, grown: Array, width: int) -> tuple[Array, Array]:
    """`stopping.trim` of a State's token buffer, into which `grown` [B] tokens have been written."""
    return stopping.trim(
        tokens,
        committed,
        grown,
        offset=OFFSET,
        width=width,
        max_len=config.max_len,
        eos_id=config.eos_id,
        stop_sequences=config.stop_sequences,
    )


def emit(program: Program, state: State, emission: Emission) -> tuple[State, Array]:
    """Adds an emission to the rows that are alive, cut at EOS, stop sequence or length limit.

    Counts `committed` and `deferred`; the other counters are the execution's.

    Returns:
      (state, [B] how many tokens each row really grew by).
    """
    alive = ~state.done
    width = emission.tokens.shape[1]
    tokens = write_rows(state.tokens, emission.tokens, OFFSET + state.committed)
    grown, ended = trim(program.config, tokens, state.committed, emission.grown, width)
    grown = jnp.where(alive, grown, 0)
    kept = jnp.arange(width) < grown[:, None]
    tiny = jnp.finfo(jnp.float32).tiny  # a distribution at temperature 1 may underflow where the sampled one did not
    log_prob = jnp.log(jnp.where(emission.prob_raw < tiny, tiny, emission.prob_raw))  # and NaN stays NaN
    trace = state.trace
    if trace is not None and emission.trace is not None:
        columns = dataclasses.replace(emission.trace, log_prob=log_prob)
        trace = jax.tree.map(lambda old, new: write_rows(old, new, state.committed), trace, columns)
    deferred = jnp.sum(jnp.where(kept, emission.deferral, 0.0), axis=1)
    state = dataclasses.replace(
        state,
        tokens=tokens,
        source=write_rows(state.source, emission.source, state.committed),
        committed=state.committed + grown,
        done=state.done | (alive & ended),
        log_probs=state.log_probs + jnp.sum(jnp.where(kept, log_prob, 0.0), axis=1),
        counts=state.counts.add(alive, committed=grown, deferred=deferred),
        trace=trace,
    )
    return state, grown
