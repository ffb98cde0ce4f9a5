"""Token rules: single tokens of the drafter are ruled out, pi(v) = q(v) (1 - r(v)) + eta p(v)."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from speccascade_t5x.core import divergences, probs
from speccascade_t5x.core.rules.base import Pair, TokenRule, peak, register
from speccascade_t5x.interfaces import Array

_SC = "Faster Cascades via Speculative Decoding"


class TokenV1(TokenRule):
    """Rule out v iff q_raw(v) < max p_raw - alpha ([SC], Token-specific V1)."""

    alpha_range = (-1.0, 1.0)
    ends = "-1 is lossless, 1 is the drafter alone"
    source = f"{_SC}, Token-specific V1"

    def rejects(self, pair: Pair) -> Array:
        return pair.q_raw < peak(pair.p_raw)[..., None] - self._alpha(pair.q_raw.ndim)


class TokenV2(TokenRule):
    """Rule out v iff p_raw(v) < max p_raw - alpha ([SC], Token-specific V2)."""

    alpha_range = (-1.0, 1.0)
    ends = "-1 is lossless, 1 is the drafter alone"
    source = f"{_SC}, Token-specific V2"

    def rejects(self, pair: Pair) -> Array:
        return pair.p_raw < peak(pair.p_raw)[..., None] - self._alpha(pair.p_raw.ndim)


class TokenV3(TokenRule):
    """Rule out v iff p_raw(v) < (1 - alpha) max p_raw ([SC], Token-specific V3, its main result).

    alpha = 0 is NOT lossless at temperature > 0: only the verifier's argmax may then come from the drafter.

    >>> p, q = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.2, 0.5, 0.3])
    >>> pair = Pair(q=q, p=p, q_raw=q, p_raw=p)
    >>> print(*(f"{x:.2f}" for x in TokenV3(alpha=0.4).target(pair)))  # tokens 1 and 2 are ruled out: 0.8 goes to p
    0.68 0.24 0.08
    """

    alpha_range = (-math.inf, 1.0)
    ends = "0 keeps only the verifier's argmax from the drafter, 1 is the drafter alone, below 0 is lossless"
    source = f"{_SC}, Token-specific V3"

    def rejects(self, pair: Pair) -> Array:
        floor = 1.0 - self._alpha(pair.p_raw.ndim)
        return pair.p_raw < floor * peak(pair.p_raw)[..., None]


class Typical(TokenRule):
    """Rule out v iff p_raw(v) < min(alpha, sqrt(alpha) exp(-H(p_raw))): Medusa's typical acceptance."""

    alpha_range = (0.0, 1.0)
    ends = "1 rules out all but a certain token, 0 is the drafter alone"
    source = "Cai et al. 2024, typical acceptance, as a token rule"

    def rejects(self, pair: Pair) -> Array:
        alpha = self._alpha(pair.p_raw.ndim)
        spread = jnp.exp(-divergences.entropy(pair.p_raw))[..., None]
        return pair.p_raw < jnp.minimum(alpha, jnp.sqrt(alpha) * spread)


@dataclasses.dataclass(frozen=True)
class BiLD(TokenRule):
    """BiLD's original policy: p where max q_raw < fallback, else rule out v iff -log p_raw(v) > alpha.

    alpha is the rollback threshold in nats. Greedy in the paper; here generalised to sampling, which at
    temperature 0 gives the published behaviour back.

    Attributes:
      fallback: confidence below which the verifier speaks; traced.
    """

    fallback: Array | float = 0.6

    alpha_range = (0.0, math.inf)
    ends = "0 is the verifier's certain tokens only, plus infinity is Chow's rule at 1 - fallback"
    source = "Kim et al. 2023, with sampling"

    def rejects(self, pair: Pair) -> Array:
        fallback = probs.expand_right(jnp.asarray(self.fallback, jnp.float32), pair.q_raw.ndim)
        falls_back = peak(pair.q_raw)[..., None] < fallback
        return falls_back | (-jnp.log(pair.p_raw) > self._alpha(pair.p_raw.ndim))


for _name, _cls in {
    "token_v1": TokenV1,
    "token_v2": TokenV2,
    "token_v3": TokenV3,
    "typical": Typical,
    "bild": BiLD,
}.items():
    register(_name, _cls)
