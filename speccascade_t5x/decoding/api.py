"""Entry points: each builds a Program for the one loop and runs it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x.core import rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.decoding import loop
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.decoding.state import Output, Program, harvest
from speccascade_t5x.drafting import ModelDrafter
from speccascade_t5x.interfaces import SOURCE_DRAFTER, SOURCE_VERIFIER, Array, Bound, Drafter, PyTree, UserError


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
) -> Output:
    """Speculative execution of any rule (GenSpecSample of "Faster Cascades via Speculative Decoding").

    Args:
      drafter: bound LanguageModel or Drafter.
      verifier: bound LanguageModel.
      rule: what law is emitted; alpha scalar, or one per input row.
      inputs: {"encoder_input_tokens": [rows, S]}, or what the models' `start` reads.
      config: static options.
      key: random key (jax.random.key or a raw uint32 key); required.
      example_ids: [rows] names of the examples; a row's output depends on its id, not on its batch.
      sampling: traced options, Sampling() by default.

    Returns:
      Output with B = rows x config.num_samples rows.

    Raises:
      UserError: the two vocabularies do not fit each other, or alpha has another number of rows.
    """
    program = speculative_program(drafter, verifier, rule, config, sampling)
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


def speculative_program(
    drafter: Bound, verifier: Bound, rule: rules.Rule, config: DecodeConfig, sampling: Sampling | None = None
) -> Program:
    """The Program `speculative` runs, for callers that compose init, run, harvest and refill themselves."""
    sampling = sampling or Sampling()
    width = _common_width(drafter, verifier, config)
    if config.draft_len == 0 and not rule.reads_drafter:
        bound = None
    elif isinstance(drafter.model, Drafter):
        bound = drafter
    else:
        wrapped = ModelDrafter(
            sampling, drafter.model, config.draft_len, width, config.vocab_size, rule.reads_drafter
        )
        bound = Bound(wrapped, drafter.params)
    return Program(verifier, rule, sampling, bound, config, width, SOURCE_VERIFIER)


def autoregressive_program(
    model: Bound, config: DecodeConfig, sampling: Sampling | None = None, role: str = "verifier"
) -> Program:
    """The Program `autoregressive` runs."""
    sources = {"verifier": SOURCE_VERIFIER, "drafter": SOURCE_DRAFTER}
    if role not in sources:
        raise UserError(f"role={role!r} is unknown: use 'verifier' or 'drafter'")
    config = dataclasses.replace(config, draft_len=0)
    sampling = sampling or Sampling()
    return Program(model, rules.Lossless(), sampling, None, config, model.model.vocab_size, sources[role])


def decode(program: Program, inputs: PyTree, key: Array, example_ids: Array) -> Output:
    """Runs a Program to the end: one compiled program for the inputs, one for the loop."""
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    example_ids = jnp.asarray(example_ids, jnp.int32)
    state = start(program, inputs, key, example_ids)
    program = _rows_of_alpha(program, state.done.shape[0])
    return finish(program.config, run(program, state, program.config.max_len))


# The state is donated to each segment of the loop: caches are updated in place, never copied. The Program
# is not, so parameters outlive the decode.
start = jax.jit(loop.init)
run = jax.jit(loop.run, donate_argnums=1, static_argnames="loop")
refill = jax.jit(loop.refill, donate_argnums=1)
finish = jax.jit(harvest, static_argnums=0)


def _rows_of_alpha(program: Program, batch: int) -> Program:
    """Repeats a per-input alpha for every sample of the input."""
    samples = program.config.num_samples

    def per_row(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0:
            return leaf
        if leaf.shape[0] * samples != batch:
            raise UserError(f"alpha has {leaf.shape[0]} rows, but there are {batch // samples} inputs")
        return jnp.repeat(leaf, samples, axis=0)

    return dataclasses.replace(program, rule=jax.tree.map(per_row, program.rule))


def _common_width(drafter: Bound, verifier: Bound, config: DecodeConfig) -> int:
    """The logits' width both models share; a padded tail may differ where config.vocab_size masks it."""
    sizes = [drafter.model.vocab_size, verifier.model.vocab_size]
    if sizes[0] != sizes[1] and (config.vocab_size is None or config.vocab_size > min(sizes)):
        raise UserError(
            f"the drafter has {sizes[0]} logits and the verifier {sizes[1]}: they must share a vocabulary; "
            f"if only their padding differs, set vocab_size (at most {min(sizes)})"
        )
    return min(sizes)
