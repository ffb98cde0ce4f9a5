"""From logits to the distributions of one scored block: pi, its raw form, and what a trace shows."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import divergences, probs
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.decoding.state import Program, Trace
from speccascade_t5x.interfaces import Array


@dataclasses.dataclass(frozen=True)
class Laws:
    """What the rule makes of one scored block.

    Attributes:
      target: [B, G + 1, V] pi, tempered and truncated: what is emitted.
      deferral: [B, G + 1] probability that the rule turns to the verifier.
      broken: [B, G + 1] bool, True where NaN went into a distribution that was read, whatever the rule made of it.
      trace: [B, G + 1] columns of the trace, or None; `log_prob` is filled when the tokens are known.
    """

    target: Array
    deferral: Array
    broken: Array
    trace: Trace | None


trees.register(Laws)


def rule_laws(program: Program, pair_raw: Pair, logits: Array, q: Array | None, plain: bool) -> Laws:
    """Builds pi for a scored block.

    Args:
      program: its rule, sampling and vocabulary size are used.
      pair_raw: both models' distributions at temperature 1, [B, G + 1, V]; q is None where the rule does not read it.
      logits: [B, G + 1, V] of the verifier.
      q: [B, G + 1, V] the drafter's distribution after temperature, untruncated; None likewise.
      plain: static; True where the caller has found `probs.is_plain`, and nothing is left to shape.
    """
    rule, sampling = program.rule, program.sampling
    pair = pair_raw
    if not plain:
        p = probs.tempered(logits, sampling.temperature, program.config.vocab_size, pair_raw.p_raw)
        greedy = jnp.asarray(sampling.temperature) == 0.0
        pair = dataclasses.replace(pair_raw, q=q, p=p, greedy=greedy)
    read = [law for law in (pair.p, pair.p_raw, pair.q, pair.q_raw) if law is not None]
    broken = functools.reduce(jnp.logical_or, map(probs.is_broken, read))
    trace = describe(pair.q, pair.p, pair.q_raw, pair.p_raw) if program.config.trace else None
    if rule.truncates_inputs and not plain:
        q = None if q is None else probs.truncate(q, sampling)
        pair = dataclasses.replace(pair, q=q, p=probs.truncate(pair.p, sampling))
    target = rule.target(pair)
    if not (rule.truncates_inputs or plain):
        target = probs.truncate(target, sampling)
    deferral = rule.deferral(pair)
    if trace is not None:
        trace = dataclasses.replace(trace, deferral=deferral)
    return Laws(target, deferral, broken, trace)


def describe(q: Array | None, p: Array | None, q_raw: Array | None, p_raw: Array | None) -> Trace:
    """Columns of the trace from the known distributions, [..., V] each; NaN for unknown ones and for those of NaN."""
    known = next(law for law in (q_raw, p_raw) if law is not None)
    unknown = jnp.full(known.shape[:-1], jnp.nan, jnp.float32)

    def of(law: Array | None, measure) -> Array:
        return unknown if law is None else jnp.where(probs.is_broken(law), jnp.nan, measure(law))

    peak = functools.partial(jnp.max, axis=-1)
    return Trace(
        log_prob=unknown,
        max_q=of(q_raw, peak),
        max_p=of(p_raw, peak),
        total_variation=of(p, lambda p: of(q, lambda q: divergences.total_variation(p, q))),
        entropy_q=of(q_raw, divergences.entropy),
        entropy_p=of(p_raw, divergences.entropy),
        deferral=unknown,
    )
