"""Every method by name, on the packaged pair; options that clash are refused.

One shape for all: prompts of 32 ids, outputs of 12, draft length 3, so that each method compiles once.
"""

from __future__ import annotations

import pytest

import speccascade_t5x
from speccascade_t5x.inference.generate import LoadedPair
from speccascade_t5x.inference.methods import METHODS
from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_BONUS,
    SOURCE_DRAFTER,
    SOURCE_RESIDUAL,
    SOURCE_VERIFIER,
    UserError,
)

TEXTS = ["konnen sie mich horen", "masse"]  # the two models restore them differently
SHAPE = {"max_input_len": 32, "max_len": 12, "draft_len": 3, "batch_size": 2, "temperature": 0.0}
SPECULATIVE = {SOURCE_ACCEPTED, SOURCE_RESIDUAL, SOURCE_BONUS}
# One set of options per method, and who may have written its tokens.
CHOICES = {
    "speculative": ({"rule": "token_v3", "alpha": 0.3}, SPECULATIVE),
    "verifier": ({}, {SOURCE_VERIFIER}),
    "drafter": ({}, {SOURCE_DRAFTER}),
    "bild": ({"alpha": 2.0}, SPECULATIVE),
    "token_cascade": ({"rule": "chow", "alpha": 0.1}, {SOURCE_VERIFIER, SOURCE_DRAFTER}),
    "oracle": ({"rule": "diff", "alpha": 0.0}, {SOURCE_VERIFIER, SOURCE_DRAFTER}),
    "sequence_cascade": ({"alpha": -0.05}, {SOURCE_VERIFIER, SOURCE_DRAFTER}),
}


@pytest.fixture(scope="module")
def pair() -> LoadedPair:
    return speccascade_t5x.load("restore_de_pair")


def tokens(pair, method: str, **options) -> list[list[int]]:
    return [record["tokens"] for record in pair.generate(TEXTS, method=method, **SHAPE, **options)]


def test_every_method_has_a_choice_here():
    assert list(CHOICES) == list(METHODS)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs(pair, method):
    options, writers = CHOICES[method]
    for record in pair.generate(TEXTS, method=method, **SHAPE, **options):
        assert 0 < len(record["tokens"]) <= SHAPE["max_len"]
        assert set(record["source"]) <= writers
        assert record["counts"]["committed"] == len(record["tokens"])
        assert record["log_prob"] < 0


# (method, options) that leave the verifier's output, or the drafter's; all are values of compiled programs.
ENDS = {
    "verifier": [
        ("token_cascade", {"rule": "chow", "alpha": 0.0}),
        ("oracle", {"rule": "diff", "alpha": -1.0}),
        ("sequence_cascade", {"alpha": 1e9}),
        ("bild", {"rule_options": {"fallback": 2.0}}),
    ],
    "drafter": [
        ("token_cascade", {"rule": "chow", "alpha": 1.0}),
        ("oracle", {"rule": "diff", "alpha": 1.0}),
        ("sequence_cascade", {"alpha": -1e9}),
        ("bild", {"alpha": 1e9, "rule_options": {"fallback": 0.0}}),
    ],
}


@pytest.mark.parametrize("alone", list(ENDS))
def test_both_ends_of_every_method(pair, alone):
    wanted = tokens(pair, alone)
    assert wanted != tokens(pair, "drafter" if alone == "verifier" else "verifier")
    for method, options in ENDS[alone]:
        assert tokens(pair, method, **options) == wanted, (method, options)


def test_a_dynamic_draft_is_shorter_and_writes_the_same(pair):
    whole, cut = (
        pair.generate(TEXTS, rule="lossless", **SHAPE, **stop)
        for stop in ({}, {"draft_stop": "confidence", "stop_threshold": 0.9})
    )
    assert [record["tokens"] for record in cut] == [record["tokens"] for record in whole]
    drafted, rounds = (sum(record["counts"][name] for record in cut) for name in ("drafted", "rounds"))
    assert 0 < drafted < 3 * rounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "speculativ"}, r"method='speculativ' is unknown: use one of speculative, verifier, drafter, bild"),
        ({"method": "verifier", "rule": "chow"}, r"'verifier' does not read rule: .* speculative, token_cascade"),
        ({"method": "drafter", "alpha": 0.3}, r"'drafter' does not read alpha: leave it out, or use one of"),
        ({"method": "bild", "rule": "chow"}, r"'bild' does not read rule: .* speculative, token_cascade, oracle"),
        ({"method": "bild", "draft_stop": "entropy"}, r"'bild' does not read draft_stop: .* speculative"),
        ({"method": "oracle", "stop_threshold": 0.5}, r"'oracle' does not read stop_threshold: .* speculative"),
        ({"confidence": "sum"}, r"'speculative' does not read confidence: .* one of sequence_cascade"),
        ({"quantile": 0.5}, r"'speculative' does not read quantile: .* one of sequence_cascade"),
        ({"method": "sequence_cascade"}, r"'sequence_cascade' needs an alpha: the log-probability below"),
        (
            {"method": "sequence_cascade", "alpha": -1.0, "confidence": "median"},
            r"confidence='median' is unknown: use 'sum', 'mean' or 'quantile'",
        ),
        (
            {"method": "token_cascade", "rule": "token_v3", "alpha": 0.3},
            r"TokenV3 does not: use chow or chow_log, or run this rule by speculation",
        ),
        (
            {"method": "token_cascade", "rule": "diff", "alpha": 0.3},
            r"Diff reads the verifier.*use chow or chow_log, the oracle, or run this rule by speculation",
        ),
        ({"method": "oracle", "rule": "cos", "alpha": 0.3}, r"whole positions, which CoS does not: use chow"),
        ({"stop_threshold": 0.5}, r"stop_threshold is read by draft_stop only: set draft_stop"),
        ({"draft_stop": "entropy"}, r"draft_stop='entropy' needs a stop_threshold"),
        ({"draft_stop": "rule", "stop_threshold": 1.0}, r"draft_stop='rule' is unknown: use one of confidence"),
        ({"method": "bild", "alpha": -1.0}, r"alpha=-1\.0 is outside the range of the rule 'bild': 0 or more"),
    ],
)
def test_options_that_clash_name_the_alternatives(pair, options, message):
    with pytest.raises(UserError, match=message):
        pair.generate(TEXTS, **SHAPE, **options)


def test_what_only_changes_how_a_law_is_executed_may_stay(pair):
    """draft_len and verification are left in place while methods are compared."""
    assert tokens(pair, "verifier", verification="block") == tokens(pair, "verifier")
