"""Metrics as sums over units, on the task metrics themselves."""

from __future__ import annotations

import numpy as np
import pytest

from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT, Scorer, halves
from speccascade_t5x.evaluation.statistics import Bootstrap
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import metrics

WORDS = ["der", "hund", "und", "die", "katze", "sehen", "am", "abend", "einen", "mond", "ueber", "dem", "haus"]
RNG = np.random.default_rng(0)
REFERENCES = [" ".join(RNG.choice(WORDS, size=RNG.integers(3, 12))) for _ in range(60)]


def noisy(seed: int, rate: float = 0.2) -> list[str]:
    rng = np.random.default_rng(seed)
    swap = lambda word: str(rng.choice(WORDS)) if rng.random() < rate else word  # noqa: E731
    return [" ".join(swap(word) for word in text.split()) for text in REFERENCES]


def score(predictions, places):
    targets = [REFERENCES[i] for i in places]
    found = {}
    for metric in (metrics.exact_match, metrics.word_accuracy, metrics.character_accuracy, metrics.bleu):
        found |= metric(targets, list(predictions))
    return found


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(score, REFERENCES)


def test_halves_part_the_items():
    found = halves(7)
    assert sorted(found[CHOOSE] + found[REPORT]) == list(range(7))
    assert [len(found[CHOOSE]), len(found[REPORT])] == [3, 4]
    assert found == halves(7)
    with pytest.raises(UserError, match="at least 2 items"):
        halves(1)


@pytest.mark.parametrize(
    ("metric", "weight"),
    [("exact_match", "example"), ("word_accuracy", "word"), ("character_accuracy", "character"), ("bleu", None)],
)
def test_what_a_metric_is_a_mean_of_is_found(scorer, metric, weight):
    runs = [noisy(1), noisy(2)]
    assert scorer.weight(metric, runs) == weight
    for half in (CHOOSE, REPORT):
        for run in runs:
            units = scorer.units(metric, [run], half, weight)
            value = scorer.all_scores(run)[half][metric]
            assert units.numerators.sum() / units.denominators.sum() == pytest.approx(value)
            assert units.kind == ("examples" if weight else "groups of examples")


@pytest.mark.parametrize(("metric", "weight"), [("word_accuracy", "word"), ("character_accuracy", "character")])
def test_an_output_that_runs_on_does_not_make_the_intervals_rough(metric, weight):
    """Alone its accuracy is cut at 0; what it takes from the whole is more."""
    run, place = noisy(4), Scorer(score, REFERENCES).halves[REPORT][7]
    run[place] = " ".join(["und und und"] * 20)
    scorer = Scorer(score, REFERENCES)
    assert scorer.weight(metric, [noisy(1), run]) == weight
    units = scorer.units(metric, [run], REPORT, weight)
    shares = units.numerators / units.denominators
    assert shares[0, 7] < -100 and units.numerators.shape == (1, 30)
    places = scorer.halves[REPORT]
    assert units.numerators.sum() / units.denominators.sum() == pytest.approx(scorer.scores(run, places)[metric])
    rng = np.random.default_rng(1)
    for _ in range(5):  # so is every resample what scoring it would give
        drawn = rng.integers(len(places), size=len(places))
        items = [places[i] for i in drawn]
        whole = score([run[i] for i in items], items)[metric]
        assert units.numerators[0, drawn].sum() / units.denominators[0, drawn].sum() == pytest.approx(whole)


def test_metrics_that_refuse_single_examples_or_are_no_numbers():
    def correlation(predictions, places):
        if len(predictions) < 2:
            raise ValueError("x and y must have length at least 2")  # as scipy says it
        return {"correlation": float(np.std([len(p) for p in predictions])), "of equals": float("nan"), "text": "-"}

    own = Scorer(correlation, REFERENCES)
    assert own.single(0, "a") == {}
    assert set(own.scores(noisy(1))) == {"correlation"}
    assert own.weight("correlation", [noisy(1)]) is None
    assert own.units("correlation", [noisy(1)], CHOOSE, None).kind == "groups of examples"


def test_the_interval_of_a_metric_that_is_no_mean_is_of_the_right_size(scorer):
    """Against resampling the examples and scoring each resample, which is what it stands for."""
    run, places = noisy(3), scorer.halves[REPORT]
    units = scorer.units("bleu", [run], REPORT, None)
    size = units.numerators.shape[1]
    found = Bootstrap(size).ratio(units.numerators, units.denominators)
    rng, direct = np.random.default_rng(1), []
    for _ in range(200):
        drawn = rng.choice(places, size=len(places))
        direct.append(score([run[i] for i in drawn], drawn)["bleu"])
    assert np.std(found.draws) == pytest.approx(np.std(direct), rel=0.5)


def test_each_prediction_of_an_item_is_scored_once(scorer):
    calls = []

    def counting(predictions, places):
        calls.append(len(places))
        return score(predictions, places)

    own = Scorer(counting, REFERENCES)
    run = noisy(1)
    own.units("exact_match", [run, run], CHOOSE, "example")
    own.units("exact_match", [run], REPORT, "example")
    assert calls == [1] * len(REFERENCES)
