"""The rules of learned deferral, registered on import. Their heads and calibrations are pytree leaves, as alpha is."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import jax.numpy as jnp

from speccascade_t5x.core import divergences, probs
from speccascade_t5x.core.rules import Pair, PrefixRule, TokenRule, register
from speccascade_t5x.deferral.calibration import PairCalibration
from speccascade_t5x.deferral.head import LOSSES, Head
from speccascade_t5x.interfaces import Array, UserError

_SC = "Faster Cascades via Speculative Decoding"
RULES = ("learned_gap", "learned_token", "calibrated_opt")
TESTS = ("v1", "v2", "v3")


_Part = TypeVar("_Part", Head, PairCalibration)


def _present(part: _Part | None, rule: str) -> _Part:
    if part is None:
        what = "a fitted calibration" if rule == "calibrated_opt" else "a fitted head"
        raise UserError(f"the rule {rule!r} needs {what}: fit one with `speccascade train_deferral`")
    return part


@dataclasses.dataclass(frozen=True)
class LearnedGap(PrefixRule):
    """Defer iff g_hat > alpha D_TV(p, q): the optimal rule of [SC] with a fitted loss gap in the plug-in's place.

    As in OPT, the head reads the raw pair, and the distance is of the temperature-scaled, untruncated pair.

    Attributes:
      head: a prefix head.
    """

    head: Head | None = None

    alpha_range = (-math.inf, math.inf)
    ends = "minus infinity is lossless, plus infinity the drafter alone"
    source = f"{_SC}, optimal deferral rule, with a fitted loss gap"

    @property
    def reads_hidden(self) -> bool:  # type: ignore[override]  # a class attribute of other rules
        """Whether the head reads the models' hidden states."""
        return self.head is not None and self.head.config.features.hidden > 0

    def defers(self, pair: Pair) -> Array:
        gap = _present(self.head, "learned_gap").gap(pair)
        return gap > self._alpha(gap.ndim) * divergences.total_variation(pair.p, pair.q)


@dataclasses.dataclass(frozen=True)
class LearnedToken(TokenRule):
    """The token-specific tests of [SC] on P_hat, a token head's estimate of the data's distribution.

    v1 rules out v iff P_hat(v) < P_hat(argmax p_raw) - alpha, v2 iff P_hat(v) < max P_hat - alpha, v3 iff
    P_hat(v) < (1 - alpha) max P_hat.

    Attributes:
      head: a token head.
      test: "v1", "v2" or "v3"; static.
    """

    head: Head | None = None
    test: str = dataclasses.field(default="v3", metadata={"static": True})

    alpha_range = (-math.inf, 1.0)
    ends = "v3: 0 keeps only the likeliest token of the fitted distribution from the drafter; 1 is the drafter alone"
    source = f"{_SC}, Token-specific V1 to V3, on a fitted distribution"

    def __post_init__(self) -> None:
        if self.test not in TESTS:
            raise UserError(f"test={self.test!r} is unknown: use one of {', '.join(TESTS)}")

    @property
    def reads_hidden(self) -> bool:  # type: ignore[override]  # a class attribute of other rules
        """Whether the head reads the models' hidden states."""
        return self.head is not None and self.head.config.features.hidden > 0

    def rejects(self, pair: Pair) -> Array:
        law = _present(self.head, "learned_token").law(pair)
        alpha, best = self._alpha(law.ndim), jnp.max(law, axis=-1, keepdims=True)
        if self.test == "v1":
            return law < probs.gather(law, probs.argmax(pair.p_raw))[..., None] - alpha
        return law < (best - alpha if self.test == "v2" else (1.0 - alpha) * best)


@dataclasses.dataclass(frozen=True)
class CalibratedOpt(PrefixRule):
    """OPT (loss "zero_one") or OPTLog ("log") whose raw maxima or entropies are calibrated; the distance is not.

    Attributes:
      calibration: of both models.
      loss: "zero_one" or "log"; static. "log" needs calibrated distributions, which isotonic regression does not give.
    """

    calibration: PairCalibration | None = None
    loss: str = dataclasses.field(default="zero_one", metadata={"static": True})

    alpha_range = (-math.inf, math.inf)
    ends = "minus infinity is lossless, plus infinity the drafter alone"
    source = f"{_SC}, OPT and OPTLog, on calibrated inputs"

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss={self.loss!r} is unknown: use {' or '.join(LOSSES)}")

    def gap(self, pair: Pair) -> Array:
        """[...] the plug-in of the loss gap after calibration."""
        return _present(self.calibration, "calibrated_opt").gap(pair, self.loss)

    def defers(self, pair: Pair) -> Array:
        gap = self.gap(pair)
        return gap > self._alpha(gap.ndim) * divergences.total_variation(pair.p, pair.q)


for _name, _cls in zip(RULES, (LearnedGap, LearnedToken, CalibratedOpt), strict=True):
    register(_name, _cls)
