"""n-gram tables one lookup at a time, the exact law of whole outputs, and tests of samples against it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

Prefix = tuple[int, ...]
LawAt = Callable[[Prefix], Sequence[float]]


def lookup(table: np.ndarray, prefix: Sequence[int], start_id: int = 0) -> np.ndarray:
    """The entry of an n-gram table for what follows `prefix` (the output so far, without start token).

    The axes of the table before the last are the last tokens, oldest first; places before the output
    hold `start_id`.
    """
    order = table.ndim - 1
    context = [start_id] * order + list(prefix)
    return table[tuple(context[len(context) - order :])]


def output_law(law_at: LawAt, max_len: int, eos_id: int, prefix: Prefix = ()) -> dict[Prefix, float]:
    """{whole output: probability} of one token after another until EOS (kept) or `max_len` tokens."""
    if len(prefix) == max_len or (prefix and prefix[-1] == eos_id):
        return {prefix: 1.0}
    outputs = {}
    for token, chance in enumerate(law_at(prefix)):
        if chance > 0:
            rest = output_law(law_at, max_len, eos_id, (*prefix, token))
            outputs.update({output: chance * share for output, share in rest.items()})
    return outputs


def prefix_law(outputs: dict[Prefix, float]) -> dict[Prefix, float]:
    """{prefix of an output, itself included: probability}."""
    found: dict[Prefix, float] = {}
    for output, chance in outputs.items():
        for size in range(1, len(output) + 1):
            found[output[:size]] = found.get(output[:size], 0.0) + chance
    return found


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well a sample of whole outputs agrees with their exact law.

    Attributes:
      impossible: outputs seen although their probability is 0.
      smallest_p_value: of the two-sided exact binomial tests of every prefix, times their number.
      total_variation: between the sample's frequencies and the law.
      most_allowed: what `total_variation` exceeds with at most the false-alarm rate.
      surely_detected: a law this far away in total variation exceeds `most_allowed` with probability
        1 - (false-alarm rate) or more.
    """

    impossible: list[Prefix]
    smallest_p_value: float
    total_variation: float
    most_allowed: float
    surely_detected: float
    false_alarms: float

    @property
    def holds(self) -> bool:
        return (
            not self.impossible
            and self.smallest_p_value > self.false_alarms
            and self.total_variation <= self.most_allowed
        )


def agreement(sample: Counter[Prefix], law: dict[Prefix, float], false_alarms: float = 1e-7) -> Agreement:
    """Compares independent whole outputs with their exact law, by two tests of proven error rate.

    Total variation of n draws from the law itself: the mean is at most half of sum sqrt(p (1 - p) / n)
    (Jensen), and one draw changes it by at most 1 / n, so it exceeds its mean by s with probability at
    most exp(-2 n s^2) (McDiarmid). Of n draws from another law, the mean is at least the total variation
    between the laws, so the same bound gives the power. The binomial tests of single prefixes find
    deviations that are small but concentrated.
    """
    count = sum(sample.values())
    impossible = [output for output in sample if law.get(output, 0.0) <= 0.0]
    prefixes = prefix_law(law)
    seen = prefix_law({output: float(number) for output, number in sample.items()})
    smallest = 1.0
    for prefix, chance in prefixes.items():
        number, chance = round(seen.get(prefix, 0.0)), min(chance, 1.0)
        below = stats.binom.cdf(number, count, chance)
        above = stats.binom.sf(number - 1, count, chance)
        # A chance of 1 has rounding in its sum; the outputs of chance 0 are `impossible` anyway.
        if chance < 1.0 - 1e-12:
            smallest = min(smallest, 2.0 * min(below, above))
    distance = 0.5 * math.fsum(abs(sample.get(output, 0) / count - law.get(output, 0.0)) for output in {*sample, *law})
    mean = 0.5 * math.fsum(math.sqrt(p * max(0.0, 1.0 - p) / count) for p in law.values())
    slack = math.sqrt(-math.log(false_alarms) / (2 * count))
    return Agreement(
        impossible=impossible,
        smallest_p_value=smallest * len(prefixes),
        total_variation=distance,
        most_allowed=mean + slack,
        surely_detected=mean + 2 * slack,
        false_alarms=false_alarms,
    )
