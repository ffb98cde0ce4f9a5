"""Prefix rules: a whole position is the drafter's or the verifier's, pi = (1 - r) q + r p."""

from __future__ import annotations

import math

import jax.numpy as jnp

from speccascade_t5x.core import divergences, probs
from speccascade_t5x.core.rules.base import Pair, PrefixRule, peak, register
from speccascade_t5x.interfaces import Array

_SC = "Faster Cascades via Speculative Decoding"


class Chow(PrefixRule):
    """Defer iff max q_raw < 1 - alpha ([SC], Chow's rule)."""

    tests_drafter_alone = True
    alpha_range = (0.0, 1.0)
    ends = "0 is lossless, 1 is the drafter alone"
    source = f"{_SC}, Chow"

    def defers(self, pair: Pair) -> Array:
        confidence = peak(pair.q_raw)
        alpha = self._alpha(confidence.ndim)
        # At alpha = 0 the distribution must be p even where q is certain: a float32 maximum can reach exactly 1.
        return (confidence < 1.0 - alpha) | (alpha <= 0.0)


class ChowLog(PrefixRule):
    """Defer iff H(q_raw) > alpha, in nats ([SC], ChowLog)."""

    tests_drafter_alone = True
    alpha_range = (0.0, math.inf)
    ends = "0 is lossless wherever q is not certain, log V is the drafter alone"
    source = f"{_SC}, ChowLog"

    def defers(self, pair: Pair) -> Array:
        uncertainty = divergences.entropy(pair.q_raw)
        return uncertainty > self._alpha(uncertainty.ndim)


class Diff(PrefixRule):
    """Defer iff max q_raw < max p_raw - alpha ([SC], Diff)."""

    alpha_range = (-1.0, 1.0)
    ends = "-1 is lossless, 1 is the drafter alone"
    source = f"{_SC}, Diff"

    def defers(self, pair: Pair) -> Array:
        confidence = peak(pair.q_raw)
        return confidence < peak(pair.p_raw) - self._alpha(confidence.ndim)


class DiffLog(PrefixRule):
    """Defer iff H(q_raw) > H(p_raw) + alpha, in nats ([SC], DiffLog)."""

    alpha_range = (-math.inf, math.inf)
    ends = "-log V is lossless, log V is the drafter alone"
    source = f"{_SC}, DiffLog"

    def defers(self, pair: Pair) -> Array:
        uncertainty = divergences.entropy(pair.q_raw)
        return uncertainty > divergences.entropy(pair.p_raw) + self._alpha(uncertainty.ndim)


class Opt(PrefixRule):
    """Defer iff max q_raw < max p_raw - alpha D_TV(p, q) ([SC], OPT: the plug-in of the optimal rule).

    Hybrid, as in the authors' notebook: the maxima are raw, the distance is of the temperature-scaled,
    untruncated pair.
    """

    alpha_range = (-math.inf, math.inf)
    ends = "minus infinity is lossless, plus infinity the drafter alone"
    source = f"{_SC}, OPT"

    def defers(self, pair: Pair) -> Array:
        confidence = peak(pair.q_raw)
        distance = divergences.total_variation(pair.p, pair.q)
        return confidence < peak(pair.p_raw) - self._alpha(confidence.ndim) * distance


class OptLog(PrefixRule):
    """Defer iff H(q_raw) > H(p_raw) + alpha D_TV(p, q) ([SC], OPT for the log loss)."""

    alpha_range = (-math.inf, math.inf)
    ends = "minus infinity is lossless, plus infinity the drafter alone"
    source = f"{_SC}, OPTLog"

    def defers(self, pair: Pair) -> Array:
        uncertainty = divergences.entropy(pair.q_raw)
        distance = divergences.total_variation(pair.p, pair.q)
        return uncertainty > divergences.entropy(pair.p_raw) + self._alpha(uncertainty.ndim) * distance


class BiLDFixed(PrefixRule):
    """Defer iff -log p_raw(argmax q_raw) > alpha: BiLD's rollback test at a fixed draft length ([SC], BiLD*)."""

    alpha_range = (-math.inf, math.inf)
    ends = "below 0 is lossless, plus infinity is the drafter alone"
    source = f"{_SC}, BiLD*; Kim et al. 2023"

    def defers(self, pair: Pair) -> Array:
        choice = probs.argmax(pair.q_raw)[..., None]
        agreed = jnp.take_along_axis(pair.p_raw, choice, axis=-1)[..., 0]
        return -jnp.log(agreed) > self._alpha(agreed.ndim)


for _name, _cls in {
    "chow": Chow,
    "chow_log": ChowLog,
    "diff": Diff,
    "diff_log": DiffLog,
    "opt": Opt,
    "opt_log": OptLog,
    "bild_fixed": BiLDFixed,
}.items():
    register(_name, _cls)
