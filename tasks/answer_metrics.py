"""Metrics of question answering and sums, with the signature seqio asks for: (targets, predictions) -> dict.

Every value is a percentage, 0 to 100: the mean over examples of the best score against any reference. Loads no
TensorFlow.
"""

from __future__ import annotations

import collections
import decimal
import re
import string
from collections.abc import Callable, Sequence

from speccascade_t5x.interfaces import UserError

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_TRIVIA_MARKS = string.punctuation + "‘’´`"
# A number in running text; "," only between groups of three digits.
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_MARK = "####"


def squad_normal(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016)."""
    return _normal(text.lower(), string.punctuation, "")


def trivia_normal(text: str) -> str:
    """TriviaQA's normal form: as SQuAD's, but punctuation becomes a space (Joshi et al. 2017)."""
    return _normal(text.lower(), _TRIVIA_MARKS, " ")


def _normal(text: str, marks: str, instead: str) -> str:
    text = text.translate({ord(mark): instead for mark in marks})
    return " ".join(_ARTICLES.sub(" ", text).split())


def f1(target: str, prediction: str) -> float:
    """Harmonic mean of precision and recall over the words two normal texts share, 0 to 1.

    Two empty texts score 1, an empty and another one 0, as SQuAD 2 has it.
    """
    wanted, given = target.split(), prediction.split()
    if not wanted or not given:
        return float(wanted == given)
    common = sum((collections.Counter(wanted) & collections.Counter(given)).values())
    return 2.0 * common / (len(wanted) + len(given))


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 in SQuAD's normal form, the best over all references.

    Raises:
      UserError: no example, an example without a reference, or not as many predictions as targets.
    """
    return _answers(targets, predictions, squad_normal)


def trivia_qa(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 in TriviaQA's normal form, the best over all aliases.

    Raises:
      UserError: as `squad`.
    """
    return _answers(targets, predictions, trivia_normal)


def squad_v2(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of SQuAD 2, over all questions and over those with and without an answer.

    Args:
      targets: references of each question, [] where it has none.
      predictions: "" says that there is no answer.

    Raises:
      UserError: no example, or not as many predictions as targets.
    """
    scored = _scores([list(found) or [""] for found in targets], predictions, squad_normal)
    results = _means(scored)
    for name, wanted in (("has_answer", True), ("no_answer", False)):
        part = [score for score, found in zip(scored, targets, strict=True) if bool(found) is wanted]
        if part:
            results |= {f"{key}_{name}": value for key, value in _means(part).items()}
    return results


def final_number(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions whose final number equals the target's, as numbers ("1,200.0" is "1200").

    Raises:
      UserError: no example, not as many predictions as targets, or a target without a number.
    """
    _check(targets, predictions)
    hits = 0
    for target, prediction in zip(targets, predictions, strict=True):
        wanted = last_number(target)
        if wanted is None:
            raise UserError(f"the target {target!r} holds no number, so nothing can be compared with it")
        hits += last_number(prediction) == wanted
    return {"final_number": 100.0 * hits / len(targets)}


def last_number(text: str) -> decimal.Decimal | None:
    """The number after the last "####", or the last one of a text without the mark; None if there is none."""
    _, mark, after = text.rpartition(_MARK)
    found = _NUMBER.findall(after)
    if not found:
        return None
    return decimal.Decimal((found[0] if mark else found[-1]).replace(",", ""))


def _check(targets: Sequence, predictions: Sequence) -> None:
    if len(targets) != len(predictions):
        raise UserError(
            f"a metric needs one prediction per target, got {len(targets)} targets and {len(predictions)} predictions"
        )
    if not targets:
        raise UserError("a metric needs at least one example, got none")


def _answers(
    targets: Sequence[Sequence[str]], predictions: Sequence[str], normal: Callable[[str], str]
) -> dict[str, float]:
    return _means(_scores(targets, predictions, normal))


def _scores(
    targets: Sequence[Sequence[str]], predictions: Sequence[str], normal: Callable[[str], str]
) -> list[tuple[float, float]]:
    """(exact match, F1) of each example."""
    _check(targets, predictions)
    scores = []
    for i, (found, prediction) in enumerate(zip(targets, predictions, strict=True)):
        if not found:
            raise UserError(f"example {i} has no reference to compare its prediction with")
        given = normal(prediction)
        wanted = [normal(text) for text in found]
        scores.append((float(given in wanted), max(f1(text, given) for text in wanted)))
    return scores


def _means(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    exact, overlap = (100.0 * sum(column) / len(scores) for column in zip(*scores, strict=True))
    return {"exact_match": exact, "f1": overlap}
