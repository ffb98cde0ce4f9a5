"""Verification: which drafted tokens are accepted, and what follows them, so that outputs follow exactly pi.

Both functions take the distribution d from which each drafted token was really drawn, and the target distribution pi,
whatever rule or models they come from. Uniforms are arguments, so a test can script them.
Sources: GenSpecSample of "Faster Cascades via Speculative Decoding"; Sun et al. 2024, block verification,
here for any target distribution.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import probs
from speccascade_t5x.interfaces import Array


@dataclasses.dataclass(frozen=True)
class Verification:
    """Outcome of one round.

    Attributes:
      accepted: [B] how many drafted tokens are accepted.
      token: [B] the token after them: from the residual after a rejection, else the bonus token.
      bonus: [B] bool, True where the whole draft is accepted.
    """

    accepted: Array
    token: Array
    bonus: Array


trees.register(Verification)


def _at(values: Array, index: Array) -> Array:
    """values[b, index[b]]: [B, N, ...] x [B] -> [B, ...]."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, keepdims=False))(values, index)


def _of_draft(target: Array, draft: Array) -> Array:
    """pi of each drafted token, [B, G + 1, V] x [B, G] -> [B, G]; without a copy of pi's first G positions."""
    return probs.gather(target, jnp.pad(draft, ((0, 0), (0, 1))))[:, :-1]


def _leading(flags: Array) -> Array:
    """How many flags hold before the first that does not: [B, G] -> [B]."""
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32), axis=-1), axis=-1)


def _next_token(accepted: Array, lengths: Array, law: Array, target: Array, scale: Array, noise: Array) -> Verification:
    """Draws the token at the stopping position from norm(max(0, scale pi - d)), or from pi as the bonus."""
    bonus = accepted == lengths
    pi = _at(target, accepted)
    drafted = _at(law, jnp.minimum(accepted, law.shape[1] - 1)) if law.shape[1] else jnp.zeros_like(pi)
    residual = jnp.maximum(scale[:, None] * pi - jnp.where(bonus[:, None], 0.0, drafted), 0.0)
    # Nothing left to draw can only come from rounding (a rejection where pi == d up to an ulp).
    empty = jnp.sum(residual, axis=-1, keepdims=True) <= 0.0
    residual = jnp.where(empty | bonus[:, None], pi, residual)
    return Verification(accepted, probs.sample(residual, noise), bonus)


def token(
    draft: Array, lengths: Array, law: Array, target: Array, accept_noise: Array, residual_noise: Array
) -> Verification:
    """Token verification: accept x_i with probability min(1, pi_i(x_i) / d_i(x_i)), one after another.

    Args:
      draft: [B, G] drafted ids; G may be 0.
      lengths: [B] how many of them count.
      law: [B, G, V] d.
      target: [B, G + 1, V] pi; position i is the distribution given the first i drafted tokens.
      accept_noise: [B, G] uniforms in [0, 1).
      residual_noise: [B, probs.DRAW] uniforms in [0, 1).
    """
    size = draft.shape[1]
    # Strict, because a uniform can be exactly 0 and must not accept a token of target probability 0.
    stands = accept_noise * probs.gather(law, draft) < _of_draft(target, draft)
    accepted = _leading(stands & (jnp.arange(size) < lengths[:, None]))
    return _next_token(accepted, lengths, law, target, jnp.ones(accepted.shape, jnp.float32), residual_noise)


def block(
    draft: Array, lengths: Array, law: Array, target: Array, accept_noise: Array, residual_noise: Array
) -> Verification:
    """Block verification: the longest prefix that passes a joint test is accepted.

    Same distribution as `token`, and at least as many tokens per round in expectation. Arguments as for `token`.
    With p_0 = 1, p_i = min(1, p_{i-1} pi_i(x_i) / d_i(x_i)) and S_i = sum_v max(0, p_i pi_{i+1}(v) - d_{i+1}(v)),
    position i passes with probability h_i = S_i / (S_i + 1 - p_i), or p_i at the end of the row's draft.
    """
    size = draft.shape[1]
    if size == 0:
        return token(draft, lengths, law, target, accept_noise, residual_noise)
    ratio = _of_draft(target, draft) / probs.gather(law, draft)
    reached = [jnp.ones(draft.shape[:1], jnp.float32)]
    for i in range(size):
        reached.append(jnp.minimum(1.0, reached[-1] * ratio[:, i]))
    reach = jnp.stack(reached, axis=1)  # [B, G + 1]
    spare = jnp.sum(jnp.maximum(reach[:, 1:size, None] * target[:, 1:size] - law[:, 1:], 0.0), axis=-1)
    denominator = spare + 1.0 - reach[:, 1:size]
    inner = jnp.where(reach[:, 1:size] >= 1.0, 1.0, spare / jnp.where(denominator > 0, denominator, 1.0))
    passes = jnp.concatenate([inner, reach[:, size:]], axis=1)  # h_1 .. h_G of a full-length draft
    position = jnp.arange(1, size + 1)
    passes = jnp.where(position == lengths[:, None], reach[:, 1:], passes)
    stands = (accept_noise < passes) & (position <= lengths[:, None])
    accepted = jnp.max(jnp.where(stands, position, 0), axis=-1)
    return _next_token(accepted, lengths, law, target, _at(reach, accepted), residual_noise)


BY_NAME = {"token": token, "block": block}
