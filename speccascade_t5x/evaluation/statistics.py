"""Means and ratios with paired bootstrap intervals over examples. numpy only.

The unit that is resampled is the example: figures of several methods, metrics or seeds that come from one `Bootstrap`
share its resamples, so their differences and ratios are paired.

    boot = Bootstrap(len(examples))
    gain = boot.mean(hits_of_a) - boot.mean(hits_of_b)
    print(gain.value, gain.low, gain.high)

Source: percentile bootstrap (Efron 1979); paired over test items as in Koehn 2004.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from speccascade_t5x.interfaces import UserError

LEVEL = 0.95
DRAWS = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A figure and what it became in every resample.

    Attributes:
      value: on the examples as they are.
      draws: [draws] on each resample; NaN where it is not defined there (an empty denominator, a single example).
      level: coverage of [low, high].
    """

    value: float
    draws: np.ndarray
    level: float = LEVEL

    @property
    def low(self) -> float:
        """Lower end of the percentile interval; NaN where no resample gives a figure."""
        return self._ends[0]

    @property
    def high(self) -> float:
        """Upper end likewise."""
        return self._ends[1]

    @functools.cached_property
    def _ends(self) -> tuple[float, float]:
        known = self.draws[np.isfinite(self.draws)]
        if not known.size:
            return float("nan"), float("nan")
        tail = 50.0 * (1.0 - self.level)
        low, high = np.percentile(known, [tail, 100.0 - tail])
        return float(low), float(high)

    def above(self, reference: float = 0.0) -> bool:
        """Whether the whole interval lies above `reference`."""
        return self.low > reference

    def below(self, reference: float = 0.0) -> bool:
        """Whether the whole interval lies below `reference`."""
        return self.high < reference

    def as_dict(self) -> dict[str, float | None]:
        """{"value", "low", "high"}, None where a figure is not defined, as JSON wants it."""
        named = {"value": self.value, "low": self.low, "high": self.high}
        return {name: float(x) if np.isfinite(x) else None for name, x in named.items()}

    def _with(self, other: Estimate | float, how: np.ufunc) -> Estimate:
        value, draws = (other.value, other.draws) if isinstance(other, Estimate) else (other, other)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(float(how(self.value, value)), how(self.draws, draws), self.level)

    def __add__(self, other: Estimate | float) -> Estimate:
        return self._with(other, np.add)

    def __sub__(self, other: Estimate | float) -> Estimate:
        return self._with(other, np.subtract)

    def __mul__(self, other: Estimate | float) -> Estimate:
        return self._with(other, np.multiply)

    def __truediv__(self, other: Estimate | float) -> Estimate:
        return self._with(other, np.divide)

    def __neg__(self) -> Estimate:
        return self * -1.0


class Bootstrap:
    """Resamples of N examples, the same for every figure made with it.

    One example alone has no interval: its resamples are all itself, and would say that nothing is uncertain.

    Args:
      examples: N, how many there are.
      draws: resamples.
      seed: of the resamples.
      level: coverage of the intervals.

    Raises:
      UserError: there is no example, or the level is not between 0 and 1.
    """

    def __init__(self, examples: int, draws: int = DRAWS, seed: int = 0, level: float = LEVEL):
        if examples < 1 or draws < 1:
            raise UserError(f"a bootstrap needs examples and draws, got {examples} and {draws}")
        if not 0.0 < level < 1.0:
            raise UserError(f"level={level} is outside its range: it must lie between 0 and 1")
        self.examples, self.level = examples, level
        rng = np.random.default_rng(seed)
        # [draws, N] how often each example stands in each resample.
        self.counts = rng.multinomial(examples, np.full(examples, 1.0 / examples), size=draws).astype(np.float64)

    def ratio(self, numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
        """sum of numerators / sum of denominators, as corpus figures are made: time per token, error rates.

        Args:
          numerators: [N], or [seeds, N]: the seeds of one example are resampled together.
          denominators: likewise.
        """
        above, below = self._per_example(numerators), self._per_example(denominators)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.divide(above.sum(), below.sum())
            draws = (self.counts @ above) / (self.counts @ below)
        return Estimate(float(value), draws if self.examples > 1 else np.full_like(draws, np.nan), self.level)

    def mean(self, values: np.ndarray) -> Estimate:
        """Mean over examples (and seeds) of values [N] or [seeds, N]."""
        return self.ratio(values, np.ones_like(np.asarray(values, np.float64)))

    def _per_example(self, values: np.ndarray) -> np.ndarray:
        values = np.atleast_2d(np.asarray(values, np.float64)).sum(axis=0)
        if values.shape != (self.examples,):
            raise ValueError(f"{values.shape[0]} values for {self.examples} examples")
        return values


def paired_difference(
    ours: np.ndarray, theirs: np.ndarray, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """mean(ours) - mean(theirs) over the same examples, with its paired interval.

    Args:
      ours: [N] or [seeds, N].
      theirs: [N] or [other seeds, N], of the same examples in the same order.

    Raises:
      UserError: the examples are not as many.
    """
    sizes = np.asarray(ours).shape[-1], np.asarray(theirs).shape[-1]
    if sizes[0] != sizes[1]:
        raise UserError(f"a paired difference needs the same examples, got {sizes[0]} and {sizes[1]}")
    boot = Bootstrap(sizes[0], draws, seed, level)
    return boot.mean(ours) - boot.mean(theirs)
