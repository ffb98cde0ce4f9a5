"""Counters of every execution, worked out by hand on scripted tables at temperature 0."""

from __future__ import annotations

import pytest

from decoding.executions import decode
from decoding.tables import EOS, outputs
from decoding.test_ends import row, script, source
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.drafting import Confidence
from speccascade_t5x.models import bigram

GREEDY = decoding.Sampling(temperature=0.0)
DRAFTER = script(2, 3)  # certain of 2 3, then of 5 6 after 4 and of EOS after 7; flat elsewhere
for _last, _next in ((4, 5), (5, 6), (7, EOS)):
    DRAFTER[_last, _next] = 8.0
VERIFIER = script(2, 3, 4, 5, 6, 7, EOS)
SCRIPTED = [bigram(DRAFTER), bigram(VERIFIER)]
PATH = (2, 3, 4, 5, 6, 7, EOS)


def expected(**counts: float) -> dict:
    return {"committed": 7, "accepted": 0, "examined": 0, "drafted": 0, **counts}


def scripted(program: decoding.Program) -> decoding.Output:
    return decode(program, rows=1)


def test_counters_of_dynamic_drafts():
    """Drafts 2 3 | 5 6 | EOS, each cut by the stop test, each followed by the verifier's bonus token."""
    config = decoding.DecodeConfig(10, 4)
    output = scripted(decoding.speculative_program(*SCRIPTED, rules.Lossless(), config, GREEDY, Confidence(0.5)))
    assert (outputs(output), source(output)) == ([PATH], [1, 1, 3, 1, 1, 3, 1])
    assert row(output) == expected(
        rounds=3, drafter_calls=8, verifier_calls=3, drafted=5, accepted=5, examined=5, scored=15, deferred=7
    )


@pytest.mark.parametrize(("draft_len", "calls", "scored"), [(1, 4, 8), (2, 2, 6), (5, 2, 12)])
def test_counters_of_a_token_cascade(draft_len, calls, scored):
    """The verifier is asked at 4 and at 7 only, having to catch up over three positions each time.

    Drafter calls of each round at draft_len 2: 2 3 costs two, for nothing is scored after a whole draft; the round
    that defers at once costs one; EOS and the stop after it cost two. So 2 + 1 + 2 + 1 + 2.
    """
    config = decoding.DecodeConfig(10, draft_len)
    output = scripted(decoding.token_cascade_program(*SCRIPTED, rules.by_name("chow", 0.5), config, GREEDY))
    assert (outputs(output), source(output)) == ([PATH], [5, 5, 4, 5, 5, 4, 5])
    rounds, drafter_calls = {1: (7, 7), 2: (5, 8), 5: (3, 8)}[draft_len]
    assert row(output) == expected(
        rounds=rounds, drafter_calls=drafter_calls, verifier_calls=calls, drafted=5, scored=scored, deferred=2
    )


def test_a_token_cascade_does_not_ask_the_verifier_at_the_length_limit():
    """After 2 3 the rule would defer, but the row is full."""
    config = decoding.DecodeConfig(2, 3)
    output = scripted(decoding.token_cascade_program(*SCRIPTED, rules.by_name("chow", 0.5), config, GREEDY))
    assert (outputs(output), source(output)) == ([(2, 3)], [5, 5])
    counts = row(output)
    assert (counts["verifier_calls"], counts["scored"], counts["deferred"]) == (0, 0, 0)


def test_a_token_cascade_does_not_ask_the_verifier_after_a_stop_sequence():
    """After 2 3 the rule would defer, but the row has ended."""
    config = decoding.DecodeConfig(10, 3, stop_sequences=((2, 3),))
    output = scripted(decoding.token_cascade_program(*SCRIPTED, rules.by_name("chow", 0.5), config, GREEDY))
    assert (outputs(output), source(output)) == ([(2, 3)], [5, 5])
    counts = row(output)
    assert (counts["verifier_calls"], counts["scored"], counts["deferred"]) == (0, 0, 0)


def test_greedy_lossy_speculation_defers_where_the_drafters_token_falls():
    """The verifier finds 9 after 4 impossible or not, as alpha says; all else is the drafter's own."""
    drafter = script(2, 3, 4, 9, 5, 6, 7, EOS)
    for alpha, path, deferred in ((1.0, (2, 3, 4, 9, 5, 6, 7, EOS), 0), (0.5, PATH, 1)):
        verifier = script(2, 3, 4, 5, 6, 7, EOS, after_9=5)
        program = decoding.speculative_program(
            bigram(drafter), bigram(verifier), rules.by_name("lossy_sd", alpha), decoding.DecodeConfig(10, 3), GREEDY
        )
        output = scripted(program)
        assert (outputs(output), row(output)["deferred"]) == ([path], deferred)


def test_counters_of_an_oracle():
    config = decoding.DecodeConfig(10, 4)
    rule = rules.by_name("diff", 0.5)
    output = scripted(decoding.token_cascade_program(*SCRIPTED, rule, config, GREEDY, oracle=True))
    assert (outputs(output), source(output)) == ([PATH], [5, 5, 4, 5, 5, 4, 5])
    assert row(output) == expected(rounds=7, drafter_calls=7, verifier_calls=2, scored=2, deferred=2)


@pytest.mark.parametrize(("threshold", "rewrites"), [(-1.0, False), (-0.001, True)])
def test_counters_of_a_sequence_cascade(threshold, rewrites):
    """The drafter's 2 3 EOS has about -0.004 a token; what it cost stays counted when the verifier writes anew."""
    drafter = script(2, 3, EOS)
    config = decoding.DecodeConfig(10, 4)
    program = decoding.sequence_cascade_program(bigram(drafter), SCRIPTED[1], config, GREEDY, threshold)
    output = scripted(program)
    if rewrites:
        assert (outputs(output), source(output)) == ([PATH], [4] * 7)
        assert row(output) == expected(rounds=10, drafter_calls=3, verifier_calls=7, scored=7, deferred=7)
    else:
        assert (outputs(output), source(output)) == ([(2, 3, EOS)], [5] * 3)
        assert row(output) == expected(rounds=3, drafter_calls=3, verifier_calls=0, scored=0, deferred=0, committed=3)
