"""Rules with no deferral test: lossless, mixtures and truncations of p, lossy speculative decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from speccascade_t5x.core import probs
from speccascade_t5x.core.rules.base import AlphaRule, Pair, Rule, peak, register
from speccascade_t5x.interfaces import Array, UserError

_LV = "lossy-verification audit (2607.26627)"


class Lossless(Rule):
    """pi = p: plain speculative decoding [LEV]."""

    reads_drafter = False
    source = "Leviathan et al. 2023"

    def target(self, pair: Pair) -> Array:
        return pair.p


class CoS(AlphaRule):
    """pi = (1 - alpha) p + alpha q ([LV])."""

    alpha_range = (0.0, 1.0)
    ends = "0 is lossless, 1 is the drafter alone"
    source = f"{_LV}, CoS"

    def target(self, pair: Pair) -> Array:
        # Written so that p == q gives exactly q, and a draft is then never rejected by an ulp.
        return pair.q + (1.0 - self._alpha(pair.p.ndim)) * (pair.p - pair.q)

    def deferral(self, pair: Pair) -> Array:
        return jnp.broadcast_to(1.0 - self._alpha(pair.p.ndim - 1), pair.p.shape[:-1])


class MinP(AlphaRule):
    """pi = norm(p where p_raw(v) >= (1 - alpha) max p_raw), which does not depend on the drafter ([LV]).

    It is the fair baseline of TokenV3 at the same alpha: it keeps the same tokens, without the drafter's mass.
    """

    reads_drafter = False
    alpha_range = (0.0, 1.0)
    ends = "0 is the verifier's argmax, 1 is plain p"
    source = f"{_LV}, baseline of Token V3"

    def target(self, pair: Pair) -> Array:
        return probs.normalise(self._kept(pair))

    def target_at(self, pair: Pair, tokens: Array) -> Array:
        kept = self._kept(pair)
        total = jnp.sum(kept, axis=-1)
        return probs.gather(kept, tokens) / jnp.where(total > 0, total, 1.0)

    def _kept(self, pair: Pair) -> Array:
        floor = 1.0 - self._alpha(pair.p_raw.ndim)
        return jnp.where(pair.p_raw >= floor * peak(pair.p_raw)[..., None], pair.p, 0.0)


@dataclasses.dataclass(frozen=True)
class LossySD(AlphaRule):
    """Lossy speculative decoding with lenience l = 1 - alpha: drafts are kept with probability min(1, p / (l q)).

    The distribution depends on what replaces a rejected draft:
      shifted: pi = min(q, p/l) + (1 - sum min(q, p/l)) norm(max(0, p - q))    [the [SC] notebook]
      optimal: pi = max(min(q, p/l), p/b), b >= 1 chosen so that it sums to 1  [Tran-Thien, mentored decoding]
    At temperature 0, where both p and q are one-hot: the drafter's argmax iff p_raw of it is at least
    l max p_raw, else the verifier's (the greedy lenience of [LEV]). Its INPUTS are truncated, not pi.

    Attributes:
      residual: "shifted" or "optimal"; static.
    """

    residual: str = dataclasses.field(default="shifted", metadata={"static": True})

    truncates_inputs = True
    alpha_range = (0.0, 1.0)
    ends = "0 is lossless, 1 is the drafter alone"
    source = "Leviathan et al. 2023, lenience; Tran-Thien, mentored decoding"

    def __post_init__(self) -> None:
        if self.residual not in ("shifted", "optimal"):
            raise UserError(f"residual={self.residual!r} is unknown: use 'shifted' or 'optimal'")

    def target(self, pair: Pair) -> Array:
        def at_zero() -> Array:
            return jnp.where(self._stands(pair)[..., None], pair.q, pair.p)

        return _where_greedy(pair, at_zero, self._blend(pair.q, pair.p, self._share(pair)))

    def target_at(self, pair: Pair, tokens: Array) -> Array:
        if pair.greedy is not False:
            return super().target_at(pair, tokens)
        q, p = (probs.gather(law, tokens)[..., None] for law in (pair.q, pair.p))
        return self._blend(q, p, self._share(pair))[..., 0]

    def deferral(self, pair: Pair) -> Array:
        def at_zero() -> Array:
            return 1.0 - self._stands(pair).astype(jnp.float32)

        return _where_greedy(pair, at_zero, 1.0 - jnp.sum(self._kept(pair.q, pair.p), axis=-1))

    def _stands(self, pair: Pair) -> Array:
        """[...] bool: at temperature 0, whether the drafter's token is kept."""
        chosen = probs.gather(pair.p_raw, probs.argmax(pair.q))
        return chosen >= self._lenience(chosen.ndim) * peak(pair.p_raw)

    def _lenience(self, rank: int) -> Array:
        return 1.0 - self._alpha(rank)

    def _kept(self, q: Array, p: Array) -> Array:
        """min(q, p / l): the drafter's mass that is kept."""
        smallest = jnp.finfo(jnp.float32).tiny  # alpha = 1: p / l is then large wherever p is positive
        return jnp.minimum(q, p / jnp.maximum(self._lenience(p.ndim), smallest))

    def _share(self, pair: Pair) -> Array:
        """[..., 1] how much of the residual makes pi sum to 1: a factor of max(0, p - q), or 1/b."""
        missing = jnp.maximum(1.0 - jnp.sum(self._kept(pair.q, pair.p), axis=-1, keepdims=True), 0.0)
        if self.residual == "optimal":
            return _share_of_p(pair, missing)
        total = jnp.sum(jnp.maximum(pair.p - pair.q, 0.0), axis=-1, keepdims=True)
        return missing / jnp.where(total > 0, total, 1.0)

    def _blend(self, q: Array, p: Array, share: Array) -> Array:
        """pi of the tokens whose q and p these are."""
        if self.residual == "optimal":
            return jnp.maximum(self._kept(q, p), share * p)
        return self._kept(q, p) + share * jnp.maximum(p - q, 0.0)


def _where_greedy(pair: Pair, at_zero: Callable[[], Array], sampled: Array) -> Array:
    """`sampled` [B, ...], but what `at_zero` makes in the rows of temperature 0; it runs where there are any."""

    def replaced(sampled: Array) -> Array:
        return jnp.where(probs.expand_right(jnp.asarray(pair.greedy), sampled.ndim), at_zero(), sampled)

    if isinstance(pair.greedy, bool):  # known without a trace
        return replaced(sampled) if pair.greedy else sampled
    return jax.lax.cond(jnp.any(pair.greedy), replaced, lambda sampled: sampled, sampled)


def _share_of_p(pair: Pair, missing: Array) -> Array:
    """t = 1/b in [0, 1] with sum_v max(0, t p - q) = missing, [..., 1].

    The left side is convex, piecewise linear and increasing in t, and at least `missing` at t = 1, so
    Newton's steps from there fall towards the root, each landing on a new piece, and need no sort.
    """

    def improve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        t, _ = carry
        active = t * pair.p > pair.q
        slope = jnp.sum(jnp.where(active, pair.p, 0.0), axis=-1, keepdims=True)
        offset = jnp.sum(jnp.where(active, pair.q, 0.0), axis=-1, keepdims=True)
        better = jnp.where(slope > 0, jnp.minimum(t, (missing + offset) / jnp.where(slope > 0, slope, 1.0)), t)
        return better, jnp.any(better < t)

    start = jnp.ones_like(missing)
    return jax.lax.while_loop(lambda carry: carry[1], improve, (start, jnp.array(True)))[0]


for _name, _cls in {"lossless": Lossless, "cos": CoS, "min_p": MinP, "lossy_sd": LossySD}.items():
    register(_name, _cls)
