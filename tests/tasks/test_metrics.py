from __future__ import annotations

import random
import subprocess
import sys

import pytest
import sacrebleu

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import metrics

ALL = [
    metrics.bleu,
    metrics.chrf,
    metrics.exact_match,
    metrics.word_accuracy,
    metrics.character_accuracy,
]


@pytest.mark.parametrize("metric", ALL)
def test_perfect_predictions_score_100(metric):
    texts = ["Öffnen Sie die Datei jetzt", "Größe der Schaltfläche ändern"]
    (value,) = metric(texts, list(texts)).values()
    assert value == pytest.approx(100.0)


@pytest.mark.parametrize("metric", ALL)
def test_wrong_counts_are_refused(metric):
    with pytest.raises(UserError, match="2 targets and 1 predictions"):
        metric(["a", "b"], ["a"])
    with pytest.raises(UserError, match="at least one example"):
        metric([], [])


def test_exact_match_counts_whole_strings():
    assert metrics.exact_match(["a b", "c", "d", "e"], ["a b", "C", "d ", "e"]) == {"exact_match": 50.0}


def test_word_accuracy_by_hand():
    # one replaced + one missing word of 3 + 2 words
    found = metrics.word_accuracy(["die alte Datei", "neue Farbe"], ["die Alte Datei", "Farbe"])
    assert found == {"word_accuracy": pytest.approx(60.0)}
    # one word too many shifts nothing: only that word counts
    assert metrics.word_accuracy(["a b c d"], ["x a b c d"]) == {"word_accuracy": pytest.approx(75.0)}


def test_character_accuracy_by_hand():
    # 'u' for 'ü' and one missing 'e' in 4 + 4 characters, counted as characters and not as bytes
    found = metrics.character_accuracy(["fürs", "Ende"], ["furs", "End"])
    assert found == {"character_accuracy": pytest.approx(75.0)}


def test_accuracy_does_not_fall_below_zero():
    assert metrics.character_accuracy(["ab"], ["xxxxxxxxxx"]) == {"character_accuracy": 0.0}
    assert metrics.word_accuracy(["a"], ["x y z"]) == {"word_accuracy": 0.0}


def test_an_empty_prediction_loses_everything():
    assert metrics.word_accuracy(["a b"], [""]) == {"word_accuracy": 0.0}
    assert metrics.character_accuracy(["a b"], [""]) == {"character_accuracy": 0.0}


def test_targets_without_units_are_refused():
    with pytest.raises(UserError, match="hold no word"):
        metrics.word_accuracy([" "], ["a"])


def slow_edit_distance(a: str, b: str) -> int:
    """The recurrence written out."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return table[len(a), len(b)]


def test_edit_distance_equals_the_recurrence():
    draw = random.Random(0)
    for _ in range(300):
        a = "".join(draw.choices("abc", k=draw.randrange(9)))
        b = "".join(draw.choices("abc", k=draw.randrange(9)))
        assert metrics.edit_distance(a, b) == slow_edit_distance(a, b), (a, b)
    assert metrics.edit_distance("kitten", "sitting") == 3


def test_the_documented_signatures_are_those_used():
    targets, predictions = ["Die Datei ist offen."], ["Die Datei war offen."]
    scorer = sacrebleu.metrics.BLEU()
    score = scorer.corpus_score(predictions, [targets]).score
    assert metrics.bleu(targets, predictions) == {"bleu": pytest.approx(score)}
    assert str(scorer.get_signature()).rsplit("|", 1)[0] in metrics.bleu.__doc__
    scorer = sacrebleu.metrics.CHRF()
    score = scorer.corpus_score(predictions, [targets]).score
    assert metrics.chrf(targets, predictions) == {"chrf": pytest.approx(score)}
    assert str(scorer.get_signature()).rsplit("|", 1)[0] in metrics.chrf.__doc__


def test_metrics_and_folding_load_no_tensorflow():
    code = (
        "import sys; from speccascade_t5x.tasks import folding, metrics; "
        "print([m for m in ('tensorflow', 'seqio', 'gin', 'clu') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
