"""The realised objective, its alphas and thresholds, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from speccascade_t5x.deferral import objective
from speccascade_t5x.deferral.objective import Positions

RNG = np.random.default_rng(3)
N = 400
POSITIONS = Positions(
    RNG.integers(0, 2, N).astype(float), RNG.integers(0, 2, N).astype(float), RNG.uniform(0, 1, N), np.arange(N) // 7
)
SCORE = RNG.normal(0, 0.3, N).round(1)


def test_alphas_defer_at_their_quantiles():
    score = RNG.normal(0, 0.3, N)
    distance = np.where(np.arange(N) % 10 == 0, 0.0, POSITIONS.distance)
    alphas = objective.quantile_alphas(score, distance)
    there = distance > 0
    shares = [np.mean(score[there] > alpha * distance[there]) for alpha in alphas]
    np.testing.assert_allclose(shares, np.linspace(0.95, 0.05, 10), atol=0.01)
    assert (np.diff(alphas) > 0).all()


def test_cost_is_the_definition():
    for i in range(20):
        for defers in (0, 1):
            wanted = (1 - defers) * POSITIONS.loss_q[i] + defers * (POSITIONS.loss_p[i] + 0.3 * POSITIONS.distance[i])
            assert POSITIONS.cost(np.full(N, bool(defers)), 0.3)[i] == pytest.approx(wanted)


@pytest.mark.parametrize("alpha", [-0.4, 0.0, 0.2, 2.0])
def test_the_best_threshold_is_the_best_of_all(alpha):
    threshold = objective.best_threshold(SCORE, POSITIONS, alpha)
    candidates = [-np.inf, *np.unique(SCORE), np.inf]
    costs = [POSITIONS.cost(t < SCORE, alpha).mean() for t in candidates]
    assert POSITIONS.cost(threshold < SCORE, alpha).mean() == pytest.approx(min(costs))


def test_the_area_is_the_share_of_ordered_pairs():
    positive = RNG.uniform(size=N) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in SCORE[positive] for b in SCORE[~positive]]
    assert objective.area_under_curve(SCORE, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(objective.area_under_curve(SCORE, np.ones(N, bool)))


def test_gap_error_is_nothing_for_the_truth_and_the_shift_for_a_shift():
    gap = RNG.normal(0, 1, N)
    assert objective.gap_error(gap, gap) == pytest.approx(0)
    assert objective.gap_error(gap + 0.25, gap) == pytest.approx(0.25)


def test_sums_are_by_example():
    sums, counts = objective.by_example(POSITIONS.loss_q, POSITIONS.example)
    assert len(sums) == len(np.unique(POSITIONS.example)) and counts.sum() == N
    assert sums[3] == POSITIONS.loss_q[21:28].sum() and counts[3] == 7


def test_alphas_lie_below_ties():
    """Where every score is the distance itself, plug-in OPT must still defer at the wanted shares, not never."""
    distance = np.random.default_rng(0).uniform(0.01, 0.5, 1000)
    score = distance * (1 + 1e-6 * np.random.default_rng(1).normal(size=1000))  # a tie at 1, up to rounding
    for alpha in objective.quantile_alphas(score, distance):
        assert 0.99 < alpha < 1 and (score > alpha * distance).all()
