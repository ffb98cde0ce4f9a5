"""The task's metrics over all items, over each half, and in the form a bootstrap over examples needs.

Most metrics are sums over examples divided by sums over examples: a mean (exact match, ROUGE), or one weighted by the
length of the reference (word and character accuracy). Which one a metric is, is found by trying: if the metric of
single examples, so weighted, gives the metric of all and of each half to rounding, then the examples are its units.
A metric that is no such ratio (BLEU, chrF) is cut into groups of examples, and each group's jackknife pseudo-value
stands for it (Quenouille 1956; Tukey 1958): its units are groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from speccascade_t5x.interfaces import UserError

CHOOSE, REPORT = "choose", "report"
GROUPS = 20
_CLOSE = 1e-6
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
      score: (predictions, places) -> metrics, see `runtime.infer.Dataset`.
      references: of all items.
      seed: of the halves.
    """

    def __init__(self, score: Callable[..., dict[str, float]], references: Sequence[str], seed: int = 0):
        self._score, self.references = score, list(references)
        self.halves = halves(len(self.references), seed)
        self._single: dict[tuple[int, str], dict[str, float]] = {}

    def scores(self, predictions: Sequence[str], places: Sequence[int] | None = None) -> dict[str, float]:
        """Metrics of some items, all where places is None; a metric that is not a number is left out."""
        chosen = predictions if places is None else [predictions[i] for i in places]
        found = self._score(chosen, range(len(predictions)) if places is None else places)
        return {name: float(value) for name, value in found.items() if isinstance(value, (int, float, np.number))}

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
        for name, weigh in _WEIGHTS.items():
            weights = np.array([weigh(text) for text in self.references])
            if weights.sum() and all(self._fits(metric, predictions, weights) for predictions in runs):
                return name
        return None

    def _fits(self, metric: str, predictions: Sequence[str], weights: np.ndarray) -> bool:
        singles = self._singles(metric, predictions)
        if singles is None:
            return False
        for places in self.halves.values():
            whole = self.scores(predictions, places)[metric]
            if not weights[places].sum():
                return False
            if abs(np.average(singles[places], weights=weights[places]) - whole) > _CLOSE * max(1.0, abs(whole)):
                return False
        return True

    def _singles(self, metric: str, predictions: Sequence[str]) -> np.ndarray | None:
        """[N] the metric of each item by itself; None where the metric refuses single items."""
        values = [self.single(place, prediction).get(metric) for place, prediction in enumerate(predictions)]
        return None if None in values else np.array(values, np.float64)

    def single(self, place: int, prediction: str) -> dict[str, float]:
        """Metrics of one prediction by itself; empty where a metric refuses a single item."""
        if (place, prediction) not in self._single:
            try:
                found = self._score([prediction], [place])
            except (UserError, ZeroDivisionError):
                found = {}
            self.learn(place, prediction, found)
        return self._single[place, prediction]

    def learn(self, place: int, prediction: str, scores: Mapping[str, float]) -> None:
        """Takes over what `single` has found before."""
        numbers = {name: float(value) for name, value in scores.items() if isinstance(value, (int, float, np.number))}
        self._single[place, prediction] = numbers

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
        weights = np.array([_WEIGHTS[weight](self.references[i]) for i in places])
        singles = np.stack([self._singles(metric, predictions)[places] for predictions in runs])
        return Units(singles * weights, np.broadcast_to(weights, singles.shape), "examples")

    def _pseudo_values(self, metric: str, predictions: Sequence[str], places: Sequence[int]) -> np.ndarray:
        """[groups] pseudo-values of the delete-a-group jackknife, moved so that their mean is the metric itself."""
        count = min(GROUPS, len(places))
        whole = self.scores(predictions, places)[metric]
        if count < 2:
            return np.array([whole])
        left = []
        for group in range(count):
            kept = [place for i, place in enumerate(places) if i % count != group]
            left.append(self.scores(predictions, kept)[metric])
        pseudo = count * whole - (count - 1) * np.array(left)
        return pseudo - pseudo.mean() + whole
