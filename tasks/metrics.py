"""Metric functions over texts, with the signature seqio asks for: (targets, predictions) -> dict.

Every value is a percentage, 0 to 100, higher is better. All but ROUGE are corpus figures: counts are summed
over the examples before they are divided, so a long text weighs more than a short one.
Loads no TensorFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import sacrebleu

from speccascade_t5x.interfaces import UserError


def _check(targets: Sequence[str], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions):
        raise UserError(
            f"a metric needs one prediction per target, got {len(targets)} targets and {len(predictions)} predictions"
        )
    if not targets:
        raise UserError("a metric needs at least one example, got none")


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU of sacrebleu: one reference, case kept, tokeniser '13a', smoothing 'exp'.

    Signature `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`.

    Raises:
      UserError: no example, or not as many predictions as targets.
    """
    _check(targets, predictions)
    score = sacrebleu.corpus_bleu(list(predictions), [list(targets)], tokenize="13a", smooth_method="exp")
    return {"bleu": float(score.score)}


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus chrF2 of sacrebleu: character 1- to 6-grams, no word n-grams, white space left out.

    Signature `nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no`.

    Raises:
      UserError: no example, or not as many predictions as targets.
    """
    _check(targets, predictions)
    score = sacrebleu.corpus_chrf(list(predictions), [list(targets)], char_order=6, word_order=0)
    return {"chrf": float(score.score)}


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-Lsum of rouge-score: mean F-measure over the examples, words as they stand.

    No stemming, as T5 evaluates. For ROUGE-Lsum every line is a sentence, and so is what a " . " ends.

    Raises:
      UserError: no example, or not as many predictions as targets.
    """
    from rouge_score import rouge_scorer  # it brings nltk, which takes a while to load

    _check(targets, predictions)
    kinds = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=False)
    totals = dict.fromkeys(kinds, 0.0)
    for target, prediction in zip(targets, predictions, strict=True):
        scores = scorer.score(target.replace(" . ", " .\n"), prediction.replace(" . ", " .\n"))
        for kind in kinds:
            totals[kind] += scores[kind].fmeasure
    return {kind: 100.0 * total / len(targets) for kind, total in totals.items()}


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions equal to their target, character for character.

    Raises:
      UserError: no example, or not as many predictions as targets.
    """
    _check(targets, predictions)
    hits = sum(t == p for t, p in zip(targets, predictions, strict=True))
    return {"exact_match": 100.0 * hits / len(targets)}


def word_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """One minus the word error rate, never below 0.

    Words are what `str.split` gives. Errors are the edit distance (insert, delete, replace: one
    each) between the word lists, summed over examples and divided by the words of all targets.

    Raises:
      UserError: no example, not as many predictions as targets, or targets without a word.
    """
    return {"word_accuracy": _accuracy(targets, predictions, str.split, "word")}


def character_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """One minus the character error rate, never below 0.

    Errors are the edit distance between the texts in Unicode code points, summed over examples
    and divided by the characters of all targets.

    Raises:
      UserError: no example, not as many predictions as targets, or targets without a character.
    """
    return {"character_accuracy": _accuracy(targets, predictions, list, "character")}


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Least number of insertions, deletions and replacements that turn `left` into `right`.

    Levenshtein's recurrence, one numpy row per item of `left`. Insertions inside a row depend on
    the cell before; a running minimum of (cost - column) resolves all of them at once.
    """
    ids = {item: i for i, item in enumerate(dict.fromkeys([*left, *right]))}
    columns = np.array([ids[item] for item in right], dtype=np.int64)
    steps = np.arange(len(right) + 1)
    row = steps.copy()
    for item in left:
        below = row + 1
        below[1:] = np.minimum(below[1:], row[:-1] + (columns != ids[item]))
        row = np.minimum.accumulate(below - steps) + steps
    return int(row[-1])


def _accuracy(
    targets: Sequence[str],
    predictions: Sequence[str],
    split: Callable[[str], Sequence[str]],
    unit: str,
) -> float:
    """Returns 100 * max(0, 1 - edits / units of the targets)."""
    _check(targets, predictions)
    references = [split(t) for t in targets]
    units = sum(map(len, references))
    if not units:
        raise UserError(f"the targets hold no {unit}, so {unit} accuracy is not defined")
    edits = sum(edit_distance(r, split(p)) for r, p in zip(references, predictions, strict=True))
    return 100.0 * max(0.0, 1.0 - edits / units)
