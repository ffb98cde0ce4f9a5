"""Metrics against values worked out by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import answer_metrics as m
from speccascade_t5x.tasks import metrics


def test_normal_forms():
    assert m.squad_normal("The U.S.  Army's a-team!") == "us armys ateam"
    assert m.trivia_normal("The U.S.  Army's ‘a-team’_x") == "u s army s team x"
    assert m.squad_normal("An a the") == ""
    assert m.squad_normal("theatre") == "theatre"


@pytest.mark.parametrize(
    ("target", "prediction", "value"),
    [
        ("cat sat", "cat sat", 1.0),
        ("cat sat down", "cat ran", 2 * 1 / (3 + 2)),
        ("cat cat dog", "cat dog dog", 2 * 2 / (3 + 3)),  # a word counts as often as both have it
        ("cat", "dog", 0.0),
        ("", "", 1.0),
        ("", "dog", 0.0),
        ("dog", "", 0.0),
    ],
)
def test_f1(target, prediction, value):
    assert m.f1(target, prediction) == pytest.approx(value)


def test_squad_takes_the_best_reference():
    scores = m.squad([["Denver Broncos", "The Broncos"], ["1967"]], ["broncos", "in 1967"])
    assert scores == {"exact_match": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 2)}


def test_squad_v2_with_and_without_answers():
    scores = m.squad_v2([["Rollo"], [], [], ["Rollo", "Normandy"]], ["rollo.", "", "x", ""])
    assert scores == {
        "exact_match": 50.0, "f1": 50.0, "exact_match_has_answer": 50.0, "f1_has_answer": 50.0,
        "exact_match_no_answer": 50.0, "f1_no_answer": 50.0,
    }  # fmt: skip
    assert "f1_no_answer" not in m.squad_v2([["x"]], ["x"])


def test_trivia_qa_differs_from_squad_at_punctuation():
    assert m.trivia_qa([["D.M."]], ["d m"])["exact_match"] == 100.0
    assert m.squad([["D.M."]], ["d m"])["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 12 and 7\n#### 1,234", "1234"),
        ("#### -3.50 apples of 9", "-3.5"),
        ("#### 4 then #### $18.", "18"),
        ("first 7, then 42.", "42"),
        ("1,2,3", "3"),
        ("it costs $1,200.00", "1200"),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert m.last_number(text) == (None if number is None else Decimal(number))


def test_final_number():
    scores = m.final_number(["#### 5", "#### 1,000", "#### 2"], ["5.0", "It is 1000", "#### 3 not 2"])
    assert scores == {"final_number": pytest.approx(200 / 3)}
    with pytest.raises(UserError, match="holds no number"):
        m.final_number(["none"], ["1"])


@pytest.mark.parametrize("metric", [m.squad, m.trivia_qa, m.squad_v2, m.final_number, metrics.rouge])
def test_examples_are_needed_in_pairs(metric):
    with pytest.raises(UserError, match="got 1 targets and 2 predictions"):
        metric(["1"], ["1", "2"])
    with pytest.raises(UserError, match="at least one example"):
        metric([], [])


def test_an_example_without_reference_is_named():
    with pytest.raises(UserError, match="example 1 has no reference"):
        m.squad([["a"], []], ["a", "b"])


def test_rouge_by_hand():
    """Words in lower case; bigrams of 'the cat sat down' and 'the cat ran': 1 shared of 3 and of 2."""
    scores = metrics.rouge(["The cat sat down", "rain"], ["the cat ran", "rain"])
    assert scores["rouge2"] == pytest.approx(100 * (2 * 1 / (3 + 2) + 0) / 2)  # one word has no bigram
    assert scores["rouge1"] == pytest.approx(100 * (2 * 2 / (4 + 3) + 1) / 2)
    assert scores["rougeLsum"] == pytest.approx(100 * (2 * 2 / (4 + 3) + 1) / 2)


def test_rouge_lsum_takes_lines_for_sentences():
    """Swapped sentences keep every word in some common subsequence only if they are sentences of their own."""
    two = metrics.rouge(["a b c\nd e f"], ["d e f\na b c"])["rougeLsum"]
    assert two == pytest.approx(100.0)
    assert metrics.rouge(["a b c . d e f"], ["d e f . a b c"])["rougeLsum"] == pytest.approx(100.0)
    assert metrics.rouge(["a b c d e f"], ["d e f a b c"])["rougeLsum"] == pytest.approx(50.0)
