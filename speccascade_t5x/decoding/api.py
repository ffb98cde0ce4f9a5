"""Entry points: each builds a Program for the one loop and runs it."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.core import noise, rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.decoding import loop, queue
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.decoding.programs import (
    autoregressive_program,
    sequence_cascade_program,
    speculative_program,
    token_cascade_program,
)
from speccascade_t5x.decoding.state import Output, Program, harvest
from speccascade_t5x.drafting import DraftStop
from speccascade_t5x.interfaces import Array, Bound, PyTree, UserError


def speculative(
    *,
    drafter: Bound,
    verifier: Bound,
    rule: rules.Rule,
    inputs: PyTree,
    config: DecodeConfig,
    key: Array,
    example_ids: Array,
    sampling: Sampling | None = None,
    draft_stop: DraftStop | None = None,
) -> Output:
    """Speculative execution of any rule (GenSpecSample of "Faster Cascades via Speculative Decoding").

    Args:
      drafter: bound LanguageModel or Drafter.
      verifier: bound LanguageModel.
      rule: what distribution is emitted; alpha scalar, or one per input row.
      inputs: {"encoder_input_tokens": [rows, S]}, or what the models' `start` reads: decoder-only models read
        {"decoder_input_tokens": [rows, S]}, ragged prompts after the start token (`models.prompts`).
      config: static options.
      key: random key, jax.random.key or a raw uint32 key, of any generator: it is converted to threefry; required.
      example_ids: [rows] names of the examples; a row's output depends on its id, not on its batch.
      sampling: traced options, Sampling() by default.
      draft_stop: ends a row's draft before config.draft_len, see `drafting.stop`; None always drafts it whole.

    Returns:
      Output with B = rows x config.num_samples rows.

    Raises:
      UserError: the two vocabularies do not fit each other, or alpha has another number of rows.

    A table over four tokens that counts upwards to EOS, 3, as drafter and as verifier:

    >>> import jax, jax.numpy as jnp
    >>> from speccascade_t5x import models
    >>> upwards = models.bigram(20.0 * jnp.eye(4, k=1))
    >>> output = speculative(
    ...     drafter=upwards, verifier=upwards, rule=rules.Lossless(), inputs={"rows": jnp.zeros((1, 1), jnp.int32)},
    ...     config=DecodeConfig(max_len=6, draft_len=2, eos_id=3), key=jax.random.key(0), example_ids=jnp.array([0]),
    ... )
    >>> print(output.tokens, output.lengths, output.source)  # two accepted drafts and a bonus token
    [[1 2 3 0 0 0]] [3] [[1 1 3 0 0 0]]
    """
    program = speculative_program(drafter, verifier, rule, config, sampling, draft_stop)
    return decode(program, inputs, key, example_ids)


def autoregressive(
    *,
    model: Bound,
    inputs: PyTree,
    config: DecodeConfig,
    key: Array,
    example_ids: Array,
    sampling: Sampling | None = None,
    role: str = "verifier",
) -> Output:
    """One model alone: the same loop with nothing drafted, whatever config.draft_len says.

    Args:
      model: bound LanguageModel.
      inputs: as for `speculative`.
      config: as for `speculative`.
      key: as for `speculative`.
      example_ids: as for `speculative`.
      sampling: as for `speculative`.
      role: "verifier" or "drafter": what `source` says of every token.
    """
    return decode(autoregressive_program(model, config, sampling, role), inputs, key, example_ids)


def token_cascade(
    *,
    drafter: Bound,
    verifier: Bound,
    rule: rules.PrefixRule,
    inputs: PyTree,
    config: DecodeConfig,
    key: Array,
    example_ids: Array,
    sampling: Sampling | None = None,
    oracle: bool = False,
) -> Output:
    """TokenCascade, the sequential baseline: the drafter writes a token, or the verifier where the rule defers.

    Args:
      rule: a rule whose test reads the drafter alone (Chow, ChowLog); with `oracle` any prefix rule.
      oracle: charge the verifier only at the tokens the rule defers, as if its test were free (Oracle[Diff]).
      config: draft_len + 1 is the chunk in which the verifier's cache catches up.

    Other arguments and the output are as for `speculative`. The emitted distribution is the rule's pi.

    Raises:
      UserError: a rule this execution cannot run; the message says what to use instead.
    """
    program = token_cascade_program(drafter, verifier, rule, config, sampling, oracle)
    return decode(program, inputs, key, example_ids)


def sequence_cascade(
    *,
    drafter: Bound,
    verifier: Bound,
    threshold: Array | float,
    inputs: PyTree,
    config: DecodeConfig,
    key: Array,
    example_ids: Array,
    sampling: Sampling | None = None,
    confidence: Literal["sum", "mean", "quantile"] = "mean",
    quantile: Array | float = 0.0,
) -> Output:
    """SeqCascade: the drafter writes the whole output; below `threshold` the verifier writes it again.

    Args:
      threshold: a log-probability, scalar or one per input; -inf is the drafter alone, inf the verifier.
      confidence: of the drafter's output: "sum", "mean" or "quantile" of its log-probabilities.
      quantile: which one, 0 to 1, for "quantile".

    Other arguments and the output are as for `speculative`; log_probs are those of the model that wrote the row.
    """
    program = sequence_cascade_program(drafter, verifier, config, sampling, threshold, confidence, quantile)
    return decode(program, inputs, key, example_ids)


def decode(program: Program, inputs: PyTree, key: Array, example_ids: Array) -> Output:
    """Runs a Program to the end: one compiled program for the inputs, one for the loop."""
    state = start(program, inputs, noise.threefry(key), _as_ids(example_ids, inputs))
    program = loop.per_row(program, state.done.shape[0])  # here, so that a mistake is named without a trace
    return finish(program.config, run(program, state, program.max_rounds))


# The state is donated to each segment of the loop: caches are updated in place, never copied. The Program
# is not, so parameters outlive the decode.
start = jax.jit(loop.init)
run = jax.jit(functools.partial(loop.run, loop="lax"), donate_argnums=1)
refill = jax.jit(loop.refill, donate_argnums=1)
run_queue = jax.jit(queue.run_queue, donate_argnums=1, static_argnames="width")
finish = jax.jit(harvest, static_argnums=0)


def _as_ids(example_ids: Array, inputs: PyTree) -> Array:
    """[rows] int32 ids; one that does not fit would silently repeat another example's noise."""
    rows = jax.tree.leaves(inputs)[0].shape[0]
    if jnp.shape(example_ids) != (rows,):
        raise UserError(f"example_ids has shape {jnp.shape(example_ids)}, but there are {rows} inputs: one id each")
    if not isinstance(example_ids, jax.core.Tracer):
        wide = np.asarray(example_ids)
        if wide.size and (wide.min() < 0 or wide.max() > np.iinfo(np.int32).max):
            raise UserError("example_ids must lie from 0 to 2**31 - 1")
    return jnp.asarray(example_ids, jnp.int32)
