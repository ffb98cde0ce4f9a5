"""The realised objective of a deferral rule: E[(1 - r) loss(v, q) + r loss(v, p)] + alpha E[r D_TV(p, q)]. numpy only.

Every rule here defers iff its score > alpha D_TV(p, q), so a rule is a column of scores: max p - max q is OPT, g_hat
the learned gap, E_P[...] the exact Bayes rule, the realised difference of losses the label oracle, which knows the
token to come and is unreachable. `Diff` defers iff its score > alpha, with the threshold that serves each alpha best.

Source: Narasimhan et al., "Faster Cascades via Speculative Decoding", the objective OPT is the plug-in of.
"""

from __future__ import annotations

import dataclasses

import numpy as np

ALPHA_COUNT = 10
_BELOW_TIES = 1e-3


@dataclasses.dataclass(frozen=True)
class Positions:
    """What the objective reads at each position, [N] each.

    Attributes:
      loss_q, loss_p: realised losses of drafter and verifier.
      distance: D_TV(p, q) of the distributions that are sampled.
      example: id of the example a position belongs to.
    """

    loss_q: np.ndarray
    loss_p: np.ndarray
    distance: np.ndarray
    example: np.ndarray

    def cost(self, defers: np.ndarray, alpha: float) -> np.ndarray:
        """The objective of each position, [N]."""
        return np.where(defers, self.loss_p + alpha * self.distance, self.loss_q)


def quantile_alphas(score: np.ndarray, distance: np.ndarray, count: int = ALPHA_COUNT) -> np.ndarray:
    """The alphas at which `score > alpha D_TV` defers at evenly spaced shares of positions, 5 % to 95 %, ascending.

    Positions where both distributions are equal (distance 0) are left out, because the choice does not matter there.
    Where one distribution only moves mass from its likeliest token to others, max p - max q equals D_TV and scores tie
    at alpha = 1 (or -1), up to rounding. An alpha is put just below such a tie, so that at least its share defers.
    """
    there = distance > 1e-9
    shares = np.linspace(0.95, 0.05, count)
    return np.quantile(score[there] / distance[there], 1.0 - shares) - _BELOW_TIES


def by_example(values: np.ndarray, example: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of each example, in the order of its id: what a bootstrap over examples resamples."""
    _, inverse = np.unique(example, return_inverse=True)
    return np.bincount(inverse, weights=values), np.bincount(inverse).astype(np.float64)


def best_threshold(score: np.ndarray, positions: Positions, alpha: float) -> float:
    """The threshold on `score` with the least objective at alpha, for rules whose test does not read the distance."""
    order = np.argsort(-score, kind="stable")
    gain = (positions.loss_p + alpha * positions.distance - positions.loss_q)[order]
    total = np.concatenate([[0.0], np.cumsum(gain)])
    ranked = score[order]
    # A threshold can only lie between different scores.
    splits = np.concatenate([[True], ranked[1:] < ranked[:-1], [True]])
    at = int(np.flatnonzero(splits)[np.argmin(total[splits])])
    return float("inf") if at == 0 else float(np.nextafter(ranked[at - 1], -np.inf))


def area_under_curve(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive outranks a negative, ties counted half; NaN where one kind is missing."""
    positive = np.asarray(positive, bool)
    many, few = int(positive.sum()), int((~positive).sum())
    if not many or not few:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0
    return float((ranks[inverse][positive].sum() - many * (many + 1) / 2.0) / (many * few))


def gap_error(estimate: np.ndarray, gap: np.ndarray, bins: int = 15) -> float:
    """ECE of a gap: mean over positions of |mean estimate - mean gap| in bins of equally many positions."""
    if not len(estimate):
        return float("nan")
    parts = np.array_split(np.argsort(estimate, kind="stable"), bins)
    return float(sum(abs(estimate[p].mean() - gap[p].mean()) * len(p) for p in parts if len(p)) / len(estimate))
