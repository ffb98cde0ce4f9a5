"""Whole outputs of every execution follow their exact law, and their counters are what was really run.

Full-prefix tables (every prefix has laws of its own, V = 3) are decoded in one batch of independent rows by the
compiled decoder and compared with the law enumerated in float64 (`oracles.tables.agreement`): 50,000 rows find a law
that is off by 0.045 in total variation with certainty, at 1e-7 false alarms per comparison.
"""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from decoding.executions import (
    ALPHAS,
    KEEPING,
    MAX_LEN,
    ROWS,
    STOPS,
    TABLES,
    TRUNCATIONS,
    bild,
    cascade,
    check,
    config_of,
    decode,
    drafted_scores,
    dynamic,
    law_of,
    middle,
    sampling_of,
    sequence,
)
from decoding.tables import exact_law, outputs
from oracles import sampler
from oracles.tables import lookup
from speccascade_t5x import decoding
from speccascade_t5x.interfaces import SOURCE_DRAFTER, SOURCE_VERIFIER

FEW = 4


DYNAMIC = [(s, r, v) for s in STOPS for r in ("lossless", "chow", "token_v3") for v in ("token", "block")]
# Every stop, rule and verification at least once.
QUICK = [
    ("confidence", "lossless", "block"),
    ("confidence", "chow", "token"),
    ("confidence", "token_v3", "block"),
    ("entropy", "token_v3", "token"),
]


@pytest.mark.parametrize(
    ("stop", "rule", "verification"),
    [pytest.param(*p, marks=() if p in QUICK else pytest.mark.slow) for p in DYNAMIC],
)
def test_dynamic_draft_lengths_leave_the_law_alone(stop, rule, verification):
    for temperature, truncation in ((1.0, "off"), (0.5, "top_p")):
        program = dynamic(stop, rule, config_of(verification=verification), sampling_of(temperature, truncation))
        output = check(program, law_of(rule, temperature, truncation))
        counts = jax.device_get(output.counts)
        assert 0.1 < counts.drafted.sum() / (3 * counts.rounds.sum()) < 0.9  # drafts of many lengths


@pytest.mark.parametrize("verification", ["token", "block"])
def test_bild_as_published(verification):
    for temperature, truncation in ((1.0, "off"), (0.5, "top_k")):
        program = bild(config_of(verification=verification), sampling_of(temperature, truncation))
        check(program, law_of("bild", temperature, truncation))


@pytest.mark.parametrize(
    ("rule", "draft_len", "settings"),
    [
        ("chow", 1, [(1.0, "off")]),
        ("chow", 2, [(1.0, "off"), (0.5, "top_k")]),
        ("chow_log", 1, [(1.0, "top_k")]),
        ("chow_log", 2, [(1.0, "off")]),
    ],
)
def test_token_cascade(rule, draft_len, settings):
    for setting in settings:
        program = cascade(rule, config_of(draft_len), sampling_of(*setting))
        output = check(program, law_of(rule, *setting, tables=KEEPING))
        assert_cascade_counters(output, draft_len)
        if setting == (1.0, "off"):  # the drafter itself ended rows, by EOS and at the length limit
            lengths = np.asarray(output.lengths)
            by_drafter = np.asarray(output.source)[np.arange(ROWS), lengths - 1] == SOURCE_DRAFTER
            assert (by_drafter & (lengths < MAX_LEN)).any() and (by_drafter & (lengths == MAX_LEN)).any()


def assert_cascade_counters(output: decoding.Output, draft_len: int) -> None:
    """Whoever wrote the tokens tells how often the verifier ran: once per chunk up to each deferred position.

    So it never ran where nothing was deferred, such as after EOS or at the length limit.
    """
    counts, sources = jax.device_get(output.counts), np.asarray(output.source)
    assert set(np.unique(sources)) <= {0, SOURCE_VERIFIER, SOURCE_DRAFTER}
    calls, seen = np.zeros(len(sources), int), np.zeros(len(sources), int)
    for position in range(sources.shape[1]):
        deferred = sources[:, position] == SOURCE_VERIFIER
        calls += np.where(deferred, -(-(position + 1 - seen) // (draft_len + 1)), 0)
        seen = np.where(deferred, position + 1, seen)
    np.testing.assert_array_equal(counts.verifier_calls, calls)
    np.testing.assert_array_equal(counts.scored, calls * (draft_len + 1))
    np.testing.assert_array_equal(counts.deferred, (sources == SOURCE_VERIFIER).sum(1))
    np.testing.assert_array_equal(counts.accepted + counts.examined, 0)


def test_oracle_is_charged_only_where_the_rule_defers():
    output = check(cascade("diff", oracle=True), law_of("diff"))
    counts, sources = jax.device_get(output.counts), np.asarray(output.source)
    assert set(np.unique(sources)) == {0, SOURCE_VERIFIER, SOURCE_DRAFTER}
    deferred = (sources == SOURCE_VERIFIER).sum(1)
    for found in (counts.verifier_calls, counts.scored, counts.deferred):
        np.testing.assert_array_equal(found, deferred)
    for found in (counts.drafter_calls, counts.rounds, counts.committed):
        np.testing.assert_array_equal(found, output.lengths)
    assert not counts.drafted.any()


@pytest.mark.parametrize("confidence", ["sum", "mean", "quantile"])
def test_sequence_cascade(confidence):
    scores = drafted_scores(confidence, 0.25)
    for temperature, truncation in ((1.0, "off"), (0.5, "top_k")):
        setting = (temperature, TRUNCATIONS[truncation])
        drafter, verifier = (exact_law("lossless", None, t, t, MAX_LEN, *setting) for t in TABLES)
        threshold = middle(scores, drafter)
        deferred = sum(share for output, share in drafter.items() if scores[output] < threshold)
        assert 0.2 < deferred < 0.8
        kept = {output: share for output, share in drafter.items() if scores[output] >= threshold}
        law = {o: kept.get(o, 0.0) + deferred * verifier.get(o, 0.0) for o in {*drafter, *verifier}}
        law = {o: share for o, share in law.items() if share > 0}
        program = sequence(threshold, sampling=sampling_of(temperature, truncation), confidence=confidence)
        output = check(program, law)
        assert_sequence_counters(output)
        assert_sequence_log_probs(output)
        for end, wanted, code in ((-np.inf, drafter, SOURCE_DRAFTER), (np.inf, verifier, SOURCE_VERIFIER)):
            program = sequence(end, sampling=sampling_of(temperature, truncation), confidence=confidence)
            output = check(program, wanted)
            assert set(np.unique(output.source)) == {0, code}


def assert_sequence_counters(output: decoding.Output) -> None:
    """A kept row cost the drafter its length; a deferred one the drafter's whole draft and the verifier's length."""
    counts, lengths = jax.device_get(output.counts), np.asarray(output.lengths)
    by_verifier = np.asarray(output.source)[:, 0] == SOURCE_VERIFIER
    for found in (counts.verifier_calls, counts.scored, counts.deferred):
        np.testing.assert_array_equal(found, np.where(by_verifier, lengths, 0))
    np.testing.assert_array_equal(counts.drafter_calls[~by_verifier], lengths[~by_verifier])
    assert set(np.unique(counts.drafter_calls[by_verifier])) <= set(range(1, MAX_LEN + 1))
    np.testing.assert_array_equal(counts.rounds, counts.drafter_calls + counts.verifier_calls)
    np.testing.assert_array_equal(counts.committed, lengths)


def assert_sequence_log_probs(output: decoding.Output, rows: int = 200) -> None:
    """log_probs are those of the model that wrote the row."""
    for index, tokens in enumerate(outputs(output)[:rows]):
        table = TABLES[int(output.source[index, 0] == SOURCE_VERIFIER)]
        laws = [sampler.tempered(lookup(table, tokens[:i])) for i in range(len(tokens))]
        wanted = sum(math.log(law[x]) for law, x in zip(laws, tokens, strict=True))
        assert output.log_probs[index] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("rule", ["lossless", "chow", "token_v3", "bild"])
def test_temperature_0(rule):
    """Every dynamic draft length writes the one output the rule's law leaves."""
    greedy = sampling_of(0.0)
    wanted = exact_law(rule, ALPHAS[rule], *TABLES, MAX_LEN, 0.0)
    assert list(wanted.values()) == [1.0]
    program = bild(sampling=greedy) if rule == "bild" else dynamic("confidence", rule, sampling=greedy)
    assert outputs(decode(program, FEW)) == list(wanted) * FEW
    if rule == "chow":
        wanted = law_of(rule, 0.0, tables=KEEPING)
        assert outputs(decode(cascade(rule, sampling=greedy), FEW)) == list(wanted) * FEW
