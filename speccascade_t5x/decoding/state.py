"""What a decode carries from round to round, and what it returns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x.core.accounting import Counts
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.core.rules import Rule
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.interfaces import SOURCE_PAD, Array, Bound, PyTree

# Output token 0 of a row sits in this column of the token buffer; the columns before it hold the first
# token twice, so that "the last two tokens" exist from the beginning.
OFFSET = 2


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs: models, rule and options. Never donated, so parameters outlive a decode.

    Attributes:
      verifier: bound LanguageModel.
      rule: its alpha is scalar or [B].
      sampling: traced sampling options.
      drafter: bound Drafter, or None where nothing is drafted.
      config: static options.
      width: V that laws are computed on.
      solo_source: `source` of tokens where nothing is drafted.
    """

    verifier: Bound
    rule: Rule
    sampling: Sampling
    drafter: Bound | None
    config: DecodeConfig
    width: int
    solo_source: int


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
    """

    tokens: Array
    lengths: Array
    log_probs: Array
    counts: Counts
    source: Array


for _cls, _static in ((Program, ["config", "width", "solo_source"]), (State, []), (Output, [])):
    _names = [f.name for f in dataclasses.fields(_cls) if f.name not in _static]
    jax.tree_util.register_dataclass(_cls, data_fields=_names, meta_fields=_static)


def harvest(config: DecodeConfig, state: State) -> Output:
    """Cuts each row at its end. Unfinished rows give what they have so far."""
    inside = jnp.arange(config.max_len) < state.committed[:, None]
    tokens = state.tokens[:, OFFSET : OFFSET + config.max_len]
    return Output(
        tokens=jnp.where(inside, tokens, config.pad_id),
        lengths=state.committed,
        log_probs=state.log_probs,
        counts=state.counts,
        source=jnp.where(inside, state.source[:, : config.max_len], SOURCE_PAD),
    )
