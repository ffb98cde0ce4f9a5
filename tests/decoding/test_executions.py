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

from decoding.tables import EOS, exact_law, inputs, outputs, random_tables, tally
from decoding.test_ends import row, script, source
from models.test_t5_parity import load
from oracles import sampler
from oracles.tables import agreement, lookup
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.decoding import loop
from speccascade_t5x.drafting import Confidence, Entropy, ModelDrafter
from speccascade_t5x.interfaces import SOURCE_DRAFTER, SOURCE_VERIFIER, Bound, UserError
from speccascade_t5x.models import bigram

ROWS, VOCAB, MAX_LEN = 50_000, 3, 4
TABLES = random_tables(0, VOCAB, MAX_LEN)
# For token cascades: the rules keep two tokens and more before they defer, so the verifier has to catch up.
KEEPING = random_tables(27, VOCAB, MAX_LEN)
ALPHAS = {"lossless": None, "chow": 0.45, "chow_log": 0.9, "token_v3": 0.6, "bild": 1.2, "diff": 0.02}
# Thresholds that stop about half of the drafts of these tables.
STOPS = {"confidence": (Confidence, 0.6), "entropy": (Entropy, 0.9)}
TRUNCATIONS = {"off": {}, "top_k": {"top_k": 2}, "top_p": {"top_p": 0.7}}


def sampling_of(temperature: float = 1.0, truncation: str = "off") -> decoding.Sampling:
    """All fields as arrays of one dtype, so that every setting meets the same compiled program."""
    values = {"top_k": 0, "top_p": 1.0, **TRUNCATIONS[truncation]}
    return decoding.Sampling(
        np.float32(temperature), np.int32(values["top_k"]), np.float32(values["top_p"]), np.float32(0)
    )


def config_of(draft_len: int = 3, **options) -> decoding.DecodeConfig:
    return decoding.DecodeConfig(**{"max_len": MAX_LEN, "draft_len": draft_len, "eos_id": EOS, **options})


def rule_of(name: str, alpha=None) -> rules.Rule:
    alpha = ALPHAS[name] if alpha is None else alpha
    return rules.by_name(name, None if alpha is None else np.asarray(alpha, np.float32))


def dynamic(stop: str, rule: str = "token_v3", config=None, sampling=None, threshold=None) -> decoding.Program:
    """Speculation whose drafts end early."""
    cls, usual = STOPS[stop]
    halt = cls(np.asarray(usual if threshold is None else threshold, np.float32))
    return decoding.speculative_program(
        *map(bigram, TABLES), rule_of(rule), config or config_of(), sampling or sampling_of(), halt
    )


def bild(config=None, sampling=None, rollback=None) -> decoding.Program:
    """BiLD as published: the draft stops where the rule falls back."""
    rule = rule_of("bild", rollback)
    stop = Confidence(np.float32(rule.fallback))
    parts = (config or config_of(), sampling or sampling_of(), stop)
    return decoding.speculative_program(*map(bigram, TABLES), rule, *parts)


def cascade(rule: str, config=None, sampling=None, oracle: bool = False, alpha=None) -> decoding.Program:
    """A token cascade, or the oracle."""
    tables = TABLES if oracle else KEEPING
    return decoding.token_cascade_program(
        *map(bigram, tables), rule_of(rule, alpha), config or config_of(2), sampling or sampling_of(), oracle
    )


def sequence(
    threshold=-0.8, config=None, sampling=None, confidence: str = "mean", quantile=0.25
) -> decoding.Program:
    """A sequence cascade."""
    return decoding.sequence_cascade_program(
        *map(bigram, TABLES), config or config_of(), sampling or sampling_of(), threshold, confidence, quantile
    )


def decode(program: decoding.Program, rows: int = ROWS, seed: int = 0) -> decoding.Output:
    return decoding.decode(program, inputs(rows), jax.random.key(seed), np.arange(rows))


def check(program, law: dict, output=None) -> decoding.Output:
    """The outputs of `program` agree with `law`."""
    output = decode(program) if output is None else output
    found = agreement(tally(output, VOCAB), law)
    assert found.surely_detected < 0.045
    assert found.holds, found
    return output


def law_of(rule: str, temperature: float = 1.0, truncation: str = "off", tables=TABLES) -> dict:
    return exact_law(rule, ALPHAS[rule], *tables, MAX_LEN, temperature, TRUNCATIONS[truncation])


# Whole outputs


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


def drafted_scores(confidence: str, quantile: float) -> dict:
    """{whole output: the drafter's confidence in it}, from its laws at temperature 1."""
    measure = {"sum": np.sum, "mean": np.mean, "quantile": lambda x: np.quantile(x, quantile)}[confidence]
    scores = {}
    for output in exact_law("lossless", None, TABLES[0], TABLES[0], MAX_LEN):
        laws = [sampler.tempered(lookup(TABLES[0], output[:i])) for i in range(len(output))]
        scores[output] = float(measure([math.log(law[x]) for law, x in zip(laws, output, strict=True)]))
    return scores


def middle(scores: dict, law: dict) -> float:
    """A threshold that defers about half of the mass, as far as can be from the scores beside it."""
    ordered = sorted(law, key=scores.__getitem__)
    at = int(np.searchsorted(np.cumsum([law[o] for o in ordered]), 0.5))
    threshold = (scores[ordered[at]] + scores[ordered[at + 1]]) / 2
    assert min(abs(score - threshold) for score in scores.values()) > 1e-4
    return threshold


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


# What a row's output may depend on. (program of (config, knob), a knob per input)

FEW = 4
KNOBS = np.array([0.4, 0.55, 0.6, 0.75], np.float32)
EXECUTIONS = {
    "confidence": (lambda config, knob: dynamic("confidence", config=config, threshold=knob), KNOBS),
    "entropy": (lambda config, knob: dynamic("entropy", "chow", config, threshold=knob), KNOBS + 0.3),
    "bild": (lambda config, knob: bild(config, rollback=knob), 2 * KNOBS),
    "token_cascade": (lambda config, knob: cascade("chow", config, alpha=knob), 1 - KNOBS),
    "oracle": (lambda config, knob: cascade("diff", config, oracle=True, alpha=knob), KNOBS - 0.55),
    "sequence_cascade": (lambda config, knob: sequence(knob, config), KNOBS - 1.4),
}
# The others run through the same code as these: one of each kind is enough for every day.
DAILY = ("confidence", "token_cascade", "sequence_cascade")
EXECUTION = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in EXECUTIONS]
)


def fields(output: decoding.Output) -> list[tuple]:
    """Everything of each row but the float log-probabilities."""
    counts = [np.asarray(leaf) for leaf in jax.tree.leaves(output.counts)]
    columns = [output.tokens, output.source, *(count[:, None] for count in counts)]
    return [tuple(line) for line in np.concatenate(columns, axis=1).tolist()]


@EXECUTION
def test_a_knob_per_input_and_samples(name):
    """A knob belongs to an input and all its samples; sample 0 does not depend on how many there are."""
    make, knobs = EXECUTIONS[name]
    two = config_of(num_samples=2)
    differs, samples_differ = 0, 0
    for seed in range(4):
        together = fields(decode(make(two, knobs), FEW, seed))
        each = [fields(decode(make(two, knob), FEW, seed)) for knob in knobs]
        for i in range(FEW):
            assert together[2 * i : 2 * i + 2] == each[i][2 * i : 2 * i + 2]
        assert fields(decode(make(config_of(), knobs[0]), FEW, seed)) == each[0][::2]
        differs += together != each[0]
        samples_differ += each[0][::2] != each[0][1::2]
    assert differs and samples_differ


@EXECUTION
def test_a_row_does_not_depend_on_its_batch_or_on_the_loop(name):
    make, knobs = EXECUTIONS[name]
    program, key = make(config_of(), knobs[1]), jax.random.key(3)
    ids = np.array([5, 900, 3, 77])
    wanted = fields(decoding.decode(program, inputs(FEW), key, ids))
    order = np.array([2, 0, 3, 1])
    assert fields(decoding.decode(program, inputs(FEW), key, ids[order])) == [wanted[i] for i in order]
    mixed = fields(decoding.decode(program, inputs(FEW), key, np.array([1, 77, 6, 900])))
    assert (mixed[1], mixed[3]) == (wanted[3], wanted[1])
    assert len(set(wanted)) > 1
    state = decoding.start(program, inputs(FEW), key, ids)
    eager = loop.run(program, state, program.max_rounds, loop="python")
    assert fields(decoding.finish(program.config, eager)) == wanted


# Counters by hand, on scripted tables at temperature 0

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
    output = scripted(
        decoding.speculative_program(*SCRIPTED, rules.Lossless(), config, GREEDY, Confidence(0.5))
    )
    assert (outputs(output), source(output)) == ([PATH], [1, 1, 3, 1, 1, 3, 1])
    assert row(output) == expected(
        rounds=3, drafter_calls=8, verifier_calls=3, drafted=5, accepted=5, examined=5, scored=15, deferred=7
    )


@pytest.mark.parametrize(("draft_len", "calls", "scored"), [(1, 4, 8), (2, 2, 6), (5, 2, 12)])
def test_counters_of_a_token_cascade(draft_len, calls, scored):
    """The verifier is asked at 4 and at 7 only, having to catch up over three positions each time."""
    config = decoding.DecodeConfig(10, draft_len)
    output = scripted(decoding.token_cascade_program(*SCRIPTED, rules.by_name("chow", 0.5), config, GREEDY))
    assert (outputs(output), source(output)) == ([PATH], [5, 5, 4, 5, 5, 4, 5])
    rounds, drafter_calls = {1: (7, 12), 2: (5, 10), 5: (3, 8)}[draft_len]
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
        assert row(output) == expected(
            rounds=3, drafter_calls=3, verifier_calls=0, scored=0, deferred=0, committed=3
        )


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


def test_greedy_lossless_with_dynamic_drafts_on_the_trained_pair(shared):
    """The verifier's greedy output, whatever the drafter's confidence does to the draft lengths."""
    folder = shared / "pair_t5x"
    if not folder.is_dir():
        pytest.skip("needs the trained T5X pair (pair_t5x) of the shared material")
    (drafter, _), (verifier, wanted) = (load(folder / name) for name in ("drafter", "verifier"))
    output = decoding.speculative(
        drafter=drafter,
        verifier=verifier,
        rule=rules.Lossless(),
        inputs={"encoder_input_tokens": wanted["encoder_input_tokens"][:64]},
        config=decoding.DecodeConfig(max_len=96, draft_len=5),
        sampling=decoding.Sampling(temperature=0.0),
        key=jax.random.key(0),
        example_ids=np.arange(64),
        draft_stop=Confidence(0.9),
    )
    np.testing.assert_array_equal(output.tokens, wanted["greedy_ids"][:64])
    np.testing.assert_allclose(output.log_probs, wanted["greedy_log_prob"][:64], atol=1e-3)
    counts = jax.device_get(output.counts)
    assert counts.rounds.sum() < counts.drafted.sum() < 5 * counts.rounds.sum()  # some drafts were cut, not all


# Combinations that make no sense


def test_refused_combinations_say_what_to_use_instead():
    config = config_of()
    models = [*map(bigram, TABLES)]
    with pytest.raises(UserError, match=r"whole positions, which TokenV3 does not: use chow or chow_log, or run"):
        decoding.token_cascade_program(*models, rule_of("token_v3"), config)
    with pytest.raises(UserError, match=r"test of Diff reads the verifier.*use chow or chow_log, the oracle, or run"):
        decoding.token_cascade_program(*models, rule_of("diff"), config)
    sampling = sampling_of()
    ready = ModelDrafter(sampling, models[0].model, 3, VOCAB, None, False)
    with pytest.raises(UserError, match=r"draft_stop needs a language model.*decides its lengths itself"):
        decoding.speculative_program(
            Bound(ready, models[0].params), models[1], rules.Lossless(), config, sampling, Confidence(0.5)
        )
    with pytest.raises(UserError, match=r"confidence='median' is unknown: use 'sum', 'mean' or 'quantile'"):
        decoding.sequence_cascade_program(*models, config, confidence="median")


def test_a_knob_of_another_number_of_rows_is_refused():
    for name, program in (
        ("threshold", dynamic("confidence", threshold=KNOBS)),
        ("alpha", bild(rollback=KNOBS)),
        ("alpha", cascade("chow", alpha=KNOBS)),
        ("threshold", sequence(KNOBS)),
    ):
        with pytest.raises(UserError, match=f"{name} has 4 rows, but there are 3 inputs"):
            decode(program, rows=3)
