"""Bootstrap intervals: against a plain loop, paired, and pooled over seeds."""

from __future__ import annotations

import numpy as np
import pytest

from speccascade_t5x.evaluation.statistics import Bootstrap, paired_difference
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


def test_an_interval_covers_what_it_should():
    hits = 0
    for seed in range(300):
        sample = np.random.default_rng(seed).normal(size=60)
        found = Bootstrap(60, draws=400, seed=seed).mean(sample)
        hits += found.low <= 0.0 <= found.high
    assert 0.90 <= hits / 300 <= 0.98  # 95 %, a percentile interval of 60 examples being a little short


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
    assert paired_difference(runs, VALUES).as_dict() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_ratios_of_figures():
    boot = Bootstrap(40)
    fast, slow = boot.mean(VALUES**2 + 1), boot.mean(2 * (VALUES**2 + 1))
    gain = slow / fast
    assert (gain.value, gain.low, gain.high) == pytest.approx((2, 2, 2))
    assert (-gain + 3).value == pytest.approx(1) and (gain * 2).value == pytest.approx(4)


def test_a_figure_that_is_not_defined():
    found = Bootstrap(3).ratio([1, 1, 1], [0, 0, 0])
    assert found.as_dict() == {"value": None, "low": None, "high": None}
    assert not found.above() and not found.below()


def test_one_example_alone_has_no_interval():
    found = Bootstrap(1).ratio([3.0], [2.0])  # not [1.5, 1.5]: nothing would look uncertain
    assert found.as_dict() == {"value": 1.5, "low": None, "high": None}
    assert not found.above(1.0) and not found.below(2.0) and not (found - 1.0).above()


def test_refusals():
    with pytest.raises(UserError, match="needs examples"):
        Bootstrap(0)
    with pytest.raises(UserError, match="level=95 is outside its range"):
        Bootstrap(3, level=95)
    with pytest.raises(UserError, match="the same examples, got 3 and 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="2 values for 3 examples"):
        Bootstrap(3).mean([1.0, 2.0])
