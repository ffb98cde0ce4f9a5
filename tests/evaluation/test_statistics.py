"""Intervals: against a plain loop, paired, pooled over seeds, and how often they hold the truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from speccascade_t5x.evaluation.statistics import (
    MIN_UNITS,
    Bootstrap,
    Estimate,
    TimeRatio,
    TimeRatios,
    holm,
    paired_difference,
)
from speccascade_t5x.interfaces import UserError

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=40)


def test_a_ratio_is_that_of_each_resample():
    weights = RNG.uniform(1, 3, size=40)
    boot = Bootstrap(40, draws=50, seed=3)
    found = boot.ratio(VALUES * weights, weights)
    assert found.value == pytest.approx(np.average(VALUES, weights=weights))
    for counts, draw in zip(boot.counts, found.draws, strict=True):
        places = np.repeat(np.arange(40), counts.astype(int))
        assert len(places) == 40
        assert draw == pytest.approx(np.average(VALUES[places], weights=weights[places]))


def coverage(interval: Callable[[np.ndarray, np.ndarray, int], tuple[float, float]], units: int, runs: int) -> float:
    """How often an interval of a speed-up of 1.3 holds it, where items differ as timed ones do."""
    rng, held = np.random.default_rng(units), 0
    for run in range(runs):
        length = rng.lognormal(0.0, 0.5, size=units)  # both methods take longer over a long item
        ours = length * rng.lognormal(-np.log(1.3), 0.2, size=units)
        low, high = interval(length, ours, run)
        held += low <= 1.3 <= high
    return held / runs


def by_times(base: np.ndarray, ours: np.ndarray, run: int) -> tuple[float, float]:
    found = TimeRatios(len(base), draws=1).ratio(base, ours)
    return found.low, found.high


def by_percentiles(base: np.ndarray, ours: np.ndarray, run: int) -> tuple[float, float]:
    logs = np.log(base / ours)
    places = np.random.default_rng(run).integers(0, len(logs), size=(400, len(logs)))
    return tuple(np.exp(np.percentile(logs[places].mean(axis=1), [2.5, 97.5])))


@pytest.mark.parametrize("units", [8, 12, 16])
def test_an_interval_of_wall_times_covers_what_it_claims(units):
    assert 0.935 <= coverage(by_times, units, 3000) <= 0.965  # four standard errors of the simulation
    if units == 8:
        assert coverage(by_percentiles, units, 600) < 0.92  # what would be claimed to be 95 % otherwise


@pytest.mark.parametrize("units", [8, 20, 60])
def test_an_interval_of_means_covers_what_it_claims(units):
    held = 0
    for seed in range(1000):
        sample = np.random.default_rng([units, seed]).normal(size=units)
        found = Bootstrap(units, draws=400, seed=seed).mean(sample)
        held += found.low <= 0.0 <= found.high
    assert 0.925 <= held / 1000 <= 0.975


def test_a_difference_is_paired():
    theirs = VALUES + 0.01 * RNG.normal(size=40) - 0.1
    paired = paired_difference(VALUES, theirs)
    assert paired.above(0.09) and paired.below(0.11)
    apart = Bootstrap(40, seed=1).mean(VALUES) - Bootstrap(40, seed=2).mean(theirs)
    assert apart.high - apart.low > 20 * (paired.high - paired.low)


def test_seeds_of_an_example_are_resampled_together():
    runs = np.stack([VALUES, VALUES])
    one, two = Bootstrap(40).mean(VALUES), Bootstrap(40).mean(runs)
    assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high))
    assert paired_difference(runs, VALUES).as_dict() == {"value": 0.0, "low": 0.0, "high": 0.0, "units": 40}


def test_ratios_of_figures():
    boot = Bootstrap(40)
    fast, slow = boot.mean(VALUES**2 + 1), boot.mean(2 * (VALUES**2 + 1))
    gain = slow / fast
    assert (gain.value, gain.low, gain.high, gain.units) == pytest.approx((2, 2, 2, 40))
    assert (-gain + 3).value == pytest.approx(1) and (gain * 2).value == pytest.approx(4)
    assert (gain - Bootstrap(12).mean(VALUES[:12])).units == 12


def test_the_quotient_of_two_speed_ups_is_paired_per_item():
    base, one = RNG.lognormal(size=12), RNG.lognormal(size=12)
    two = one / 1.5 * RNG.lognormal(0.0, 0.01, size=12)
    times = TimeRatios(12, draws=4000)
    first, second = times.ratio(base, one), times.ratio(base, two)
    found, straight = second / first, times.ratio(one, two)
    assert isinstance(found, TimeRatio) and found.units == 12
    assert (found.value, found.low, found.high) == pytest.approx((straight.value, straight.low, straight.high))
    assert found.above(1.45) and found.below(1.55) and first.high / first.low > 2
    # What is made of times and other figures sees the same spread.
    assert np.percentile(np.log(first.draws), [2.5, 97.5]) == pytest.approx(np.log([first.low, first.high]), abs=0.1)


def test_a_figure_that_is_not_defined():
    found = Bootstrap(30).ratio([1] * 30, [0] * 30)
    assert found.as_dict() == {"value": None, "low": None, "high": None, "units": 30}
    assert not found.above() and not found.below()


def test_few_units_have_no_interval():
    n = MIN_UNITS - 1
    for found in (Bootstrap(n).ratio([3.0] * n, [2.0] * n), TimeRatios(n).ratio([3.0] * n, [2.0] * n)):
        assert found.as_dict() == {"value": pytest.approx(1.5), "low": None, "high": None, "units": n}
        assert not found.above(1.0) and not found.below(2.0) and not (found - 1.0).above()
        assert not (found + Bootstrap(40).mean(VALUES)).above(-99.0)


def test_one_of_many_comparisons_is_not_called_different_by_chance():
    """Of 70 figures that are all 0 in truth some interval leaves 0 out in nearly every report; Holm's correction."""
    alone = corrected = 0
    for run in range(60):
        values = np.random.default_rng(run).normal(size=(70, 100))
        boot = Bootstrap(100, draws=500, seed=run)
        family = [boot.mean(each) for each in values]
        alone += any(each.above() or each.below() for each in family)
        corrected += any(holm(family))
    assert alone > 50 and corrected <= 8
    family[13] = boot.mean(values[13] + 1.0)
    assert [i for i, differs in enumerate(holm(family)) if differs] == [13]
    constant, few = Estimate(0.0, np.zeros(9)), Bootstrap(3).mean([1.0, 1.1, 0.9])
    assert holm([constant, few]) == [False, False]


def test_refusals():
    with pytest.raises(UserError, match="needs examples"):
        Bootstrap(0)
    with pytest.raises(UserError, match="level=95 is outside its range"):
        Bootstrap(3, level=95)
    with pytest.raises(UserError, match="the same examples, got 3 and 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="2 values for 3 examples"):
        Bootstrap(3).mean([1.0, 2.0])
    with pytest.raises(ValueError, match="2 values for 3 units"):
        TimeRatios(3).ratio([1.0, 2.0], [1.0, 2.0])
