"""The state a decode carries from round to round, and its output."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core.accounting import Counts
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.core.rules import Rule
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.interfaces import SOURCE_PAD, Array, Bound, PyTree

# Output token 0 of a row sits in this column of the token buffer; the columns before it hold the first
# token twice, so that "the last two tokens" exist from the beginning.
OFFSET = 2


class Execution(Protocol):
    """When each model is run: what one round of the loop does. A pytree."""

    writings: ClassVar[int]  # how often a row's output may be written from its beginning

    def begin(self, program: Program, first: Array) -> PyTree:
        """What the execution itself carries from round to round, for rows that begin at positions first [B]."""

    def round(self, program: Program, state: State) -> State:
        """One round for every row. What a row that is done has committed must not change; its slots beyond may."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs: models, rule, execution and options. Never donated, so parameters outlive a decode.

    Attributes:
      verifier: bound LanguageModel.
      rule: its alpha is scalar or [B].
      sampling: traced sampling options.
      drafter: bound Drafter; bound LanguageModel in a sequence cascade; None where nothing is drafted.
      execution: what a round does.
      config: static options.
      width: V that distributions are computed on.
    """

    verifier: Bound
    rule: Rule
    sampling: Sampling
    drafter: Bound | None
    execution: Execution
    config: DecodeConfig
    width: int

    @property
    def max_rounds(self) -> int:
        """Rounds after which every row is done: each adds at least one token."""
        return self.config.max_len * self.execution.writings


@dataclasses.dataclass(frozen=True)
class Trace:
    """Diagnostics of each output token, [B, N] float32; NaN where a distribution was not computed.

    Attributes:
      log_prob: log pi of the token, temperature 1, untruncated.
      max_q, max_p: largest probability of either model at temperature 1.
      total_variation: D_TV(p, q) of the temperature-scaled, untruncated pair.
      entropy_q, entropy_p: in nats, at temperature 1.
      deferral: probability that the rule turned to the verifier.
    """

    log_prob: Array
    max_q: Array
    max_p: Array
    total_variation: Array
    entropy_q: Array
    entropy_p: Array
    deferral: Array


@dataclasses.dataclass(frozen=True)
class State:
    """Loop state; batch on axis 0 of every leaf, so rows can be replaced.

    Attributes:
      tokens: [B, OFFSET + max_len + G + 1] buffer; beyond a row's committed tokens it holds leftovers.
      source: [B, max_len + G + 1] who wrote each output token.
      committed: [B] output tokens so far (cached and scored tokens are counted elsewhere).
      done: [B] bool.
      first: [B] position of the token before the output.
      keys: [B] random key of each row, from (key, example id, sample index).
      log_probs: [B] sum of log pi of the committed tokens, temperature 1, untruncated.
      counts: per-row counters.
      verifier_cache: the verifier's.
      drafter_state: the drafter's, or None.
      progress: what the execution carries, or None.
      trace: [B, max_len + G + 1] diagnostics, or None.
    """

    tokens: Array
    source: Array
    committed: Array
    done: Array
    first: Array
    keys: Array
    log_probs: Array
    counts: Counts
    verifier_cache: PyTree
    drafter_state: PyTree
    progress: PyTree
    trace: Trace | None


@dataclasses.dataclass(frozen=True)
class Output:
    """A finished decode.

    Attributes:
      tokens: [B, max_len], EOS kept, pad after it.
      lengths: [B] committed tokens.
      log_probs: [B] sum of log pi at temperature 1, untruncated (single-model runs: that model's log-probability).
        NaN where a model produced NaN.
      counts: per-row counters.
      source: [B, max_len], see interfaces.SOURCE_*.
      trace: [B, max_len] diagnostics, NaN after the end; None unless config.trace.
    """

    tokens: Array
    lengths: Array
    log_probs: Array
    counts: Counts
    source: Array
    trace: Trace | None


for _cls, _static in ((Program, ["config", "width"]), (State, []), (Output, []), (Trace, [])):
    trees.register(_cls, static=_static)


def harvest(config: DecodeConfig, state: State) -> Output:
    """Cuts each row at its end. Unfinished rows give what they have so far."""
    inside = jnp.arange(config.max_len) < state.committed[:, None]
    tokens = state.tokens[:, OFFSET : OFFSET + config.max_len]
    return Output(
        tokens=jnp.where(inside, tokens, config.pad_id),
        lengths=state.committed,
        log_probs=state.log_probs,
        counts=_counts(state),
        source=jnp.where(inside, state.source[:, : config.max_len], SOURCE_PAD),
        trace=jax.tree.map(lambda x: jnp.where(inside, x[:, : config.max_len], jnp.nan), state.trace),
    )


def _counts(state: State) -> Counts:
    """The counters; those of each model of a cascade of drafters are kept in its own state."""
    if isinstance(state.drafter_state, dict) and "level_calls" in state.drafter_state:
        return dataclasses.replace(state.counts, level_calls=state.drafter_state["level_calls"])
    return state.counts
