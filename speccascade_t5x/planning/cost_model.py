"""Predicts the gain of speculation from acceptance between levels and from the cost of a step. It needs numpy only.

gain = tokens per round x (verifier's step) / (time of a round): above 1, speculation pays off.

Levels are numbered from the verifier, 0, through the drafters from the largest; a copying drafter is the last level.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from speccascade_t5x.drafting import KMatrix
from speccascade_t5x.interfaces import UserError


def round_law(curve: Sequence[float], draft_len: int) -> np.ndarray:
    """Distribution of the number of tokens that a round with one drafter adds: [G + 2], entry n the probability of n.

    Args:
      curve: acceptance at each draft position given that all before it are accepted; the last holds for all later ones.
      draft_len: G.
    """
    stands = np.cumprod([1.0, *(_at(curve, i) for i in range(draft_len))])
    return np.array([0.0, *(stands[:-1] - stands[1:]), stands[-1]])


def tokens_per_round(law: np.ndarray, lengths: Sequence[int] = ()) -> float:
    """Expected tokens of a round, on average over a whole decode.

    Args:
      law: [G + 2] from `round_law`.
      lengths: number of tokens of each output; the last round of an output is cut at its end, so short outputs gain
        less from long drafts. Empty: outputs without end.
    """
    mean = float(law @ np.arange(len(law)))
    if not len(lengths):
        return mean
    rounds = np.zeros(max(lengths) + 1)  # rounds until n tokens are written
    for n in range(1, len(rounds)):
        added = np.arange(1, len(law))
        rounds[n] = 1.0 + law[1:] @ rounds[np.maximum(n - added, 0)]
    return float(sum(lengths) / sum(rounds[n] for n in lengths))


def _at(curve: Sequence[float], index: int) -> float:
    return curve[min(index, len(curve) - 1)]


@dataclasses.dataclass(frozen=True)
class Expected:
    """A cascade's round in the long run.

    Attributes:
      law: [G + 2], entry n the probability that a round adds n tokens.
      calls: per round, of each model, from the largest drafter.
    """

    law: np.ndarray
    calls: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How often the tokens of one level are accepted in the review by another.

    Attributes:
      curves: {(reviewer, writer): acceptance at each position given that all before it are accepted}. Positions are
        those of the draft, or of the writer's own piece if it copies; the last one holds for all later ones.
    """

    curves: Mapping[tuple[int, int], tuple[float, ...]]

    def at(self, reviewer: int, writer: int, index: int) -> float:
        """Acceptance of position `index`."""
        if (reviewer, writer) not in self.curves:
            raise UserError(f"no acceptance of level {writer} by level {reviewer} is known: measure or give it")
        return _at(self.curves[reviewer, writer], index)


class CascadeModel:
    """Expected tokens and calls of a cascade's round: an exact recursion over how a draft can be written.

    It assumes that a token is accepted in a review with the probability that `Acceptance` gives its position, whatever
    else happened, that every inner review is exact, and that rows do not wait for each other. It models exactly the
    lengths of the K matrix, pieces that overshoot into the next drafter's share, and the largest drafter's cache, in
    which the tokens of other drafters are missing, so that its first review of a round is shorter.
    """

    def __init__(self, plan: KMatrix, acceptance: Acceptance):
        self.plan, self.acceptance = plan, acceptance
        self._rest = functools.cache(self._uncached_rest)

    def expected(self) -> Expected:
        """Averages over the stationary behaviour of rounds."""
        length = self.plan.length(0)
        rounds = [self._round(lag) for lag in range(length + 2)]
        share = np.eye(length + 2)[0]
        moves = np.stack([lags for _, _, lags in rounds])
        for _ in range(200):
            share = share @ moves
        law = sum(s * np.insert(pmf, 0, 0.0) for s, (pmf, _, _) in zip(share, rounds, strict=True))
        calls = sum(s * calls for s, (_, calls, _) in zip(share, rounds, strict=True))
        return Expected(law, tuple(calls.tolist()))

    def _round(self, lag: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(distribution of accepted tokens [G + 1], calls [models], distribution of the next round's lag [G + 2])."""
        length = self.plan.length(0)
        if not self.plan.rows[0][0] or self.plan.models == 0:
            pmf, calls, lags = self._rest(0, 0, 0, length)
            return pmf, calls, lags
        block = self.plan.block(0)
        inner = min(length, block - lag % block) - 1
        pmf, calls, lags = self._review(0, 0, 0, length, inner)
        calls = calls.copy()
        calls[0] += lag // block
        return pmf, calls, lags

    def _uncached_rest(self, row: int, drafter: int, count: int, limit: int) -> tuple[np.ndarray, ...]:
        """The rest of a round once `count` tokens are accepted and `drafter` is writing; as `_round`."""
        entries, length = self.plan.rows[row], self.plan.length(0)
        lags, none = np.eye(length + 2)[0], np.zeros(self.plan.models)
        if drafter == len(entries) or count >= limit:
            pmf = np.eye(length + 1)[count]
            return pmf, none, self._lags(row, drafter, count, pmf)
        goal = min(sum(entries[: drafter + 1]), limit)
        if count >= goal:
            pmf, calls, later = self._rest(row, drafter + 1, count, limit)
            return pmf, calls, self._lags(row, drafter, count, pmf) if drafter == 0 else later
        if drafter == self.plan.models:
            pmf, stands = np.zeros(length + 1), 1.0
            for i in range(goal - count):
                chance = self.acceptance.at(row, drafter + 1, i)
                pmf[count + i] += stands * (1.0 - chance)
                stands *= chance
            pmf[goal] += stands
            return pmf, none, lags
        inner = min(limit - count - 1, self.plan.length(drafter + 1))
        return self._review(row, drafter, count, limit, inner)

    def _review(self, row: int, drafter: int, count: int, limit: int, inner: int) -> tuple[np.ndarray, ...]:
        """One review by `drafter` of an inner draft of at most `inner` tokens, and the rest of the round."""
        length = self.plan.length(0)
        pmf, lags = np.zeros(length + 1), np.zeros(length + 2)
        if drafter + 1 < len(self.plan.rows) and inner > 0:
            within, calls, _ = self._rest(drafter + 1, 0, 0, inner)
            calls = calls.copy()
        else:
            within, calls = np.eye(length + 1)[0], np.zeros(self.plan.models)
        calls[drafter] += 1.0
        for accepted, chance in enumerate(within):
            if not chance:
                continue
            stands = chance
            for i in range(accepted + 1):
                keeps = self.acceptance.at(row, drafter + 1, count + i)
                pmf[count + i] += stands * (1.0 - keeps)
                lags[0] += stands * (1.0 - keeps)
                stands *= keeps
            rest, more, later = self._rest(row, drafter, count + accepted + 1, limit)
            pmf, lags, calls = pmf + stands * rest, lags + stands * later, calls + chance * more
        return pmf, calls, lags

    def _lags(self, row: int, drafter: int, count: int, pmf: np.ndarray) -> np.ndarray:
        """The next round's lag of the largest drafter, which has written up to `count`; 0 below row 0."""
        lags = np.zeros(self.plan.length(0) + 2)
        if row or drafter:
            lags[0] = 1.0
            return lags
        for accepted, chance in enumerate(pmf):
            lags[max(accepted + 1 - count, 0)] += chance
        return lags


@dataclasses.dataclass(frozen=True)
class Costs:
    """Times of a pair, in one unit: seconds, or steps of the verifier.

    Attributes:
      step: a token of the verifier alone, everything included.
      verifier: {number of tokens: time of scoring a block of them}.
      drafters: the same for each drafter model, from the largest.
      drafter_step: a token of the largest drafter drafting by itself, its sampling included.
      round: time of a round besides models and copying: distributions, verification, the loop.
      copies: {number of tokens: time of copying and filling them}; empty if that is free.
      review: time of a review inside a cascade besides its block and its draft.
      review_token: the same per token of its block.
    """

    step: float
    verifier: Mapping[int, float]
    drafters: tuple[Mapping[int, float], ...]
    drafter_step: float
    round: float = 0.0
    copies: Mapping[int, float] = dataclasses.field(default_factory=dict)
    review: float = 0.0
    review_token: float = 0.0

    @classmethod
    def relative(cls, coefficients: Sequence[float]) -> Costs:
        """In steps of the verifier, blocks of any width costing as much as one token: Leviathan et al.'s accounting."""
        drafters = tuple({1: c} for c in coefficients)
        return cls(1.0, {1: 1.0}, drafters, coefficients[0] if coefficients else 0.0)

    def copy(self, size: int) -> float:
        """Time of copying `size` tokens."""
        return block_time(self.copies, size) if self.copies and size else 0.0

    def cascade(self, plan: KMatrix, calls: Sequence[float]) -> dict[str, float]:
        """Times of the parts of a cascade's round, without what rules add that read the drafter.

        Args:
          plan: the K matrix.
          calls: per round, of each model, from the largest.

        Returns:
          {"verifier", "round", "models", "copies", "reviews": time}.
        """
        blocks = [plan.block(drafter) for drafter in range(plan.models)]
        models = sum(n * block_time(times, size) for n, times, size in zip(calls, self.drafters, blocks, strict=True))
        # Every review of a model has a draft below it, possibly empty: the copier in its row runs each time.
        drafts = [1.0, *calls][: len(plan.rows)]
        copied = [row[-1] if plan.copies else 0 for row in plan.rows]
        return {
            "verifier": block_time(self.verifier, plan.length(0) + 1),
            "round": self.round,
            "models": models,
            "copies": sum(n * self.copy(size) for n, size in zip(drafts, copied, strict=True)),
            "reviews": sum(n * (self.review + self.review_token * size) for n, size in zip(calls, blocks, strict=True)),
        }


def fit_reviews(rows: Sequence[tuple[float, float]], left: Sequence[float]) -> tuple[float, float]:
    """(time per review, time per reviewed token), not negative, that best explain the remaining time of some rounds.

    Args:
      rows: (reviews, reviewed tokens) per round of each probe.
      left: the remaining time of its round.
    """
    terms, rest = np.asarray(rows, float), np.asarray(left, float)
    best, found = float(rest @ rest), np.zeros(2)
    for columns in ([0, 1], [0], [1]):
        solution = np.zeros(2)
        solution[columns] = np.linalg.lstsq(terms[:, columns], rest, rcond=None)[0]
        error = terms @ solution - rest
        if (solution >= 0.0).all() and error @ error < best:
            best, found = float(error @ error), solution
    return float(found[0]), float(found[1])


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for a cascade.

    Attributes:
      tokens: tokens per round.
      calls: calls per round of each model, from the largest, including those for what the rule reads.
      seconds: time of a round, in the unit of the costs.
      gain: tokens per unit of time over the verifier alone.
    """

    tokens: float
    calls: tuple[float, ...]
    seconds: float
    gain: float


def predict_cascade(
    plan: KMatrix, acceptance: Acceptance, costs: Costs, lengths: Sequence[int] = (), reads: bool = False
) -> Prediction:
    """Tokens, calls and time of a cascade's round.

    Args:
      plan: the K matrix.
      acceptance: between levels.
      costs: of blocks, copies and reviews.
      lengths: tokens of typical outputs; see `tokens_per_round`.
      reads: whether the rule reads the largest drafter's distribution, which costs one more block of it.
    """
    expected = CascadeModel(plan, acceptance).expected()
    tokens = tokens_per_round(expected.law, lengths)
    seconds = sum(costs.cascade(plan, expected.calls).values())
    calls = expected.calls
    if reads:
        seconds += block_time(costs.drafters[0], plan.length(0) + 1)
        calls = (calls[0] + 1.0, *calls[1:])
    return Prediction(tokens, calls, seconds, tokens * costs.step / seconds)


def block_time(times: Mapping[int, float], block: int) -> float:
    """Time of a block, interpolated between the measured ones and extrapolated beyond them with the last slope."""
    known = sorted(times)
    if block <= known[-1] or len(known) == 1:
        return float(np.interp(block, known, [times[size] for size in known]))
    before, last = known[-2:]
    slope = max((times[last] - times[before]) / (last - before), 0.0)
    return times[last] + slope * (block - last)
