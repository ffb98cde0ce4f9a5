"""The task's metrics over all items, over each half, and in the form a bootstrap over examples needs.

Most metrics are sums over examples divided by sums over examples: a mean (exact match, ROUGE), or one weighted by the
length of the reference (word and character accuracy). Which of these a metric is, is found by trying: if the metric of
single examples, so weighted, gives the metric of each half up to rounding, then the examples are its units. Word and
character accuracy are cut off at 0, and an output that never ends would lie below: such an example is scored together
with references that are predicted right, from which its own part follows.
For a metric that is not such a ratio (BLEU, chrF) the examples are split into groups, and each group is represented by
its jackknife pseudo-value (Quenouille 1956; Tukey 1958): the units are groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from speccascade_t5x.interfaces import UserError

CHOOSE, REPORT = "choose", "report"
GROUPS = 20
_CLOSE = 1e-6
_COMPANY = 10  # enough that no output is worse than they are good
# What the weight of an example may be, from its reference.
_WEIGHTS: dict[str, Callable[[str], float]] = {
    "example": lambda text: 1.0,
    "character": lambda text: float(len(text)),
    "word": lambda text: float(len(text.split())),
}


def halves(examples: int, seed: int = 0) -> dict[str, list[int]]:
    """Places of the items alphas are chosen on, and of those they are reported on: two random halves.

    Raises:
      UserError: fewer than two items.
    """
    if examples < 2:
        raise UserError(f"a sweep needs at least 2 items, one to choose on and one to report on, got {examples}")
    order = np.random.default_rng(seed).permutation(examples)
    half = examples // 2
    return {CHOOSE: sorted(order[:half].tolist()), REPORT: sorted(order[half:].tolist())}


@dataclasses.dataclass(frozen=True)
class Units:
    """A metric as sums over units, which a bootstrap resamples.

    Attributes:
      numerators: [seeds, units].
      denominators: likewise; metric = sum of numerators / sum of denominators.
      kind: "examples" or "groups of examples".
    """

    numerators: np.ndarray
    denominators: np.ndarray
    kind: str


class Scorer:
    """Metrics of a dataset; what one item's prediction is worth is computed once.

    Args:
      score: (predictions, places) -> metrics, see `inference.datasets.Dataset`.
      references: of all items.
      seed: of the halves.
    """

    def __init__(self, score: Callable[..., dict[str, float]], references: Sequence[str], seed: int = 0):
        self._score, self.references = score, list(references)
        self.halves = halves(len(self.references), seed)
        self._single: dict[tuple[int, str], dict[str, float]] = {}
        self._together: dict[tuple[int, str], dict[str, float]] = {}
        self._cut: set[str] = set()  # metrics of which single examples do not show how bad they are

    def scores(self, predictions: Sequence[str], places: Sequence[int] | None = None) -> dict[str, float]:
        """Metrics of some items, all where places is None; a metric that is not a finite number is left out."""
        chosen = predictions if places is None else [predictions[i] for i in places]
        return _numbers(self._score(chosen, range(len(predictions)) if places is None else places))

    def all_scores(self, predictions: Sequence[str]) -> dict[str, dict[str, float]]:
        """{"all", "choose", "report"}: metrics of each."""
        return {"all": self.scores(predictions)} | {
            name: self.scores(predictions, places) for name, places in self.halves.items()
        }

    def weight(self, metric: str, runs: Sequence[Sequence[str]]) -> str | None:
        """What weights single examples so that they give this metric on every run, or None where nothing does.

        Args:
          metric: its name.
          runs: predictions of all items, per run.
        """
        for cut in (False, True):
            (self._cut.add if cut else self._cut.discard)(metric)
            for name in _WEIGHTS:
                weights = self._weights(name)
                if weights.sum() and all(self._fits(metric, predictions, weights) for predictions in runs):
                    return name
        return None

    def _weights(self, name: str) -> np.ndarray:
        return np.array([_WEIGHTS[name](text) for text in self.references])

    def _fits(self, metric: str, predictions: Sequence[str], weights: np.ndarray) -> bool:
        numerators = self._numerators(metric, predictions, weights)
        if numerators is None:
            return False
        for places in self.halves.values():
            whole = self.scores(predictions, places)[metric]
            if not weights[places].sum():
                return False
            if abs(numerators[places].sum() / weights[places].sum() - whole) > _CLOSE * max(1.0, abs(whole)):
                return False
        return True

    def _numerators(self, metric: str, predictions: Sequence[str], weights: np.ndarray) -> np.ndarray | None:
        """[N] what each item adds to the metric's numerator; None where single items do not tell."""
        found = []
        for place, prediction in enumerate(predictions):
            value = self.single(place, prediction).get(metric)
            if metric in self._cut and not value:
                added = self._in_company(metric, place, prediction, weights)
            else:
                added = None if value is None else value * weights[place]
            if added is None:
                return None
            found.append(added)
        return np.array(found, np.float64)

    def _in_company(self, metric: str, place: int, prediction: str, weights: np.ndarray) -> float | None:
        """What an item adds, from its metric together with the longest references, these predicted right."""
        longest = sorted(range(len(self.references)), key=lambda i: (-len(self.references[i]), i))
        others = [i for i in longest[: _COMPANY + 1] if i != place][:_COMPANY]
        company, alone = [self.references[i] for i in others], (-1, ",".join(map(str, others)))
        for key, texts, places in (
            (alone, company, others),
            ((place, prediction), [prediction, *company], [place, *others]),
        ):
            if key not in self._together:
                self._together[key] = self._attempt(texts, places)
        both, theirs = self._together[place, prediction].get(metric), self._together[alone].get(metric)
        if both is None or theirs is None:
            return None
        return both * weights[[place, *others]].sum() - theirs * weights[others].sum()

    def _attempt(self, predictions: Sequence[str], places: Sequence[int]) -> dict[str, float]:
        try:
            return _numbers(self._score(predictions, places))
        except (UserError, ArithmeticError, ValueError):  # a correlation of one item, words of a text without any
            return {}

    def single(self, place: int, prediction: str) -> dict[str, float]:
        """Metrics of one prediction by itself; empty where a metric cannot be computed of a single item."""
        if (place, prediction) not in self._single:
            self.learn(place, prediction, self._attempt([prediction], [place]))
        return self._single[place, prediction]

    def learn(self, place: int, prediction: str, scores: Mapping[str, float]) -> None:
        """Takes over what `single` has found before."""
        self._single[place, prediction] = _numbers(scores)

    def units(self, metric: str, runs: Sequence[Sequence[str]], half: str, weight: str | None) -> Units:
        """A metric on one half, over the seeds of a point.

        Args:
          metric: its name.
          runs: predictions of all items, per seed.
          half: `CHOOSE` or `REPORT`.
          weight: what `weight` found.
        """
        places = self.halves[half]
        if weight is None:
            pseudo = np.stack([self._pseudo_values(metric, predictions, places) for predictions in runs])
            return Units(pseudo, np.ones_like(pseudo), "groups of examples")
        weights = self._weights(weight)
        found: list[Any] = [self._numerators(metric, predictions, weights) for predictions in runs]
        numerators = np.stack([each[places] for each in found])
        return Units(numerators, np.broadcast_to(weights[places], numerators.shape), "examples")

    def _pseudo_values(self, metric: str, predictions: Sequence[str], places: Sequence[int]) -> np.ndarray:
        """[groups] pseudo-values of the delete-a-group jackknife, moved so that their mean is the metric itself."""
        count = min(GROUPS, len(places))
        whole = self.scores(predictions, places).get(metric, math.nan)
        if count < 2:
            return np.array([whole])
        left = []
        for group in range(count):
            kept = [place for i, place in enumerate(places) if i % count != group]
            left.append(self.scores(predictions, kept).get(metric, math.nan))
        pseudo = count * whole - (count - 1) * np.array(left)
        return pseudo - pseudo.mean() + whole


def _numbers(scores: Mapping[str, object]) -> dict[str, float]:
    """Those that are finite numbers: a correlation of equal outputs, or a text, is none. A number in a mapping in
    another is called `outer/inner`."""
    found: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in _numbers(value).items()}
        elif isinstance(value, (int, float, np.number)) and math.isfinite(value):
            found[name] = float(value)
    return found
