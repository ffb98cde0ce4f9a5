"""Options of a decode: alpha per row, vocabularies, log-probabilities, bad numbers, compile count."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest

from decoding.tables import decoder, inputs, outputs, random_tables
from oracles import rules as oracle_rules
from oracles import sampler as oracle_sampler
from oracles.tables import lookup
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import bigram

ORDER = 3
CONFIG = decoding.DecodeConfig(max_len=6, draft_len=3)
PLAIN = decoding.Sampling(np.float32(1.0), np.int32(0), np.float32(1.0), np.float32(0.0))


@functools.cache
def logits() -> tuple[np.ndarray, np.ndarray]:
    return random_tables(2, 5, ORDER)


PER_ROW = [(rule, rows) for rule in ("token_v3", "opt", "min_p") for rows in (3, 5)]


@pytest.mark.parametrize(
    ("rule", "rows"),
    # Each rule and each number of rows every day; the rest differs from these in nothing that alpha meets.
    [pytest.param(*p, marks=() if p in (("token_v3", 5), ("opt", 3)) else pytest.mark.slow) for p in PER_ROW],
)
def test_alpha_per_row(rule, rows):
    """3 rows are as many as drafted tokens, 5 as many as the vocabulary has: axes must not be confused."""
    alphas = np.linspace(0.05, 0.95, rows).astype(np.float32)
    if rule == "opt":
        alphas = 4 * alphas - 2
    run = decoder(CONFIG, rule, rows)
    differs = 0
    for seed in range(6):
        key = jax.random.key(seed)
        together = outputs(run(alphas, *logits(), PLAIN, key))
        scalar = [outputs(run(alpha, *logits(), PLAIN, key))[i] for i, alpha in enumerate(alphas)]
        assert together == scalar
        differs += together != outputs(run(alphas[:1].mean(), *logits(), PLAIN, key))
    assert differs  # alpha did change what these rows hold


def test_temperature_and_truncation_per_row():
    rows = 3
    sampling = decoding.Sampling(
        temperature=np.array([0.0, 0.5, 1.3], np.float32),
        top_k=np.array([0, 2, 3], np.int32),
        top_p=np.array([1.0, 0.9, 0.6], np.float32),
        min_p=np.array([0.0, 0.1, 0.0], np.float32),
    )
    run = decoder(CONFIG, "token_v3", rows)
    for seed in range(6):
        together = outputs(run(np.float32(0.5), *logits(), sampling, jax.random.key(seed)))
        for row in range(rows):
            own = jax.tree.map(lambda x: x[row], sampling)  # noqa: B023
            single = outputs(run(np.float32(0.5), *logits(), own, jax.random.key(seed)))
            assert together[row] == single[row]


def test_alpha_of_another_number_of_rows_is_refused():
    with pytest.raises(UserError, match="alpha has 4 rows, but there are 3 inputs"):
        decoding.speculative(
            drafter=bigram(logits()[0]),
            verifier=bigram(logits()[1]),
            rule=rules.by_name("chow", [0.1, 0.2, 0.3, 0.4]),
            inputs=inputs(3),
            config=CONFIG,
            key=jax.random.key(0),
            example_ids=np.arange(3),
        )


def test_alpha_belongs_to_an_input_and_all_its_samples():
    config = decoding.DecodeConfig(max_len=6, draft_len=3, num_samples=2)
    alphas = np.array([0.1, 0.5, 0.9], np.float32)
    run, key = decoder(config, "token_v3", 3), jax.random.key(0)
    together = outputs(run(alphas, *logits(), PLAIN, key))
    for i, alpha in enumerate(alphas):
        single = outputs(run(alpha, *logits(), PLAIN, key))
        assert together[2 * i : 2 * i + 2] == single[2 * i : 2 * i + 2]


def oracle_scores(rule: str, alpha: float, tokens: tuple[int, ...]) -> tuple[float, float]:
    """(sum of log pi at temperature 1, sum of the deferral probabilities) of one output."""
    total, deferred = 0.0, 0.0
    for size, token in enumerate(tokens):
        q, p = (oracle_sampler.tempered(lookup(table, tokens[:size])) for table in logits())
        pi = oracle_rules.target(rule, q, p, q, p, alpha)
        total += math.log(pi[token])
        if rule in oracle_rules.PREFIX_TESTS:
            deferred += oracle_rules.PREFIX_TESTS[rule](q, p, q, p, alpha)
        elif rule in oracle_rules.TOKEN_TESTS:
            test = oracle_rules.TOKEN_TESTS[rule]
            deferred += sum(q[v] for v in range(len(q)) if test(q, p, v, alpha))
        else:
            deferred += 1.0
    return total, deferred


@pytest.mark.parametrize(("rule", "alpha"), [("token_v3", 0.5), ("opt", 0.3), ("min_p", 0.7)])
def test_log_probabilities_and_deferral(rule, alpha):
    """log_probs are of pi at temperature 1, untruncated, whatever was sampled from."""
    run = decoder(CONFIG, rule, 64)
    plain = run(np.float32(alpha), *logits(), PLAIN, jax.random.key(1))
    scores = [oracle_scores(rule, float(np.float32(alpha)), tokens) for tokens in outputs(plain)]
    np.testing.assert_allclose(plain.log_probs, [s[0] for s in scores], atol=1e-4)
    np.testing.assert_allclose(plain.counts.deferred, [s[1] for s in scores], atol=1e-4)
    narrow = decoding.Sampling(np.float32(0.6), np.int32(3), np.float32(0.9), np.float32(0.0))
    shaped = run(np.float32(alpha), *logits(), narrow, jax.random.key(1))
    scores = [oracle_scores(rule, float(np.float32(alpha)), tokens) for tokens in outputs(shaped)]
    np.testing.assert_allclose(shaped.log_probs, [s[0] for s in scores], atol=1e-4)


def speculate(drafter, verifier, rule=None, rows=200, **options) -> decoding.Output:
    return decoding.speculative(
        drafter=bigram(drafter),
        verifier=bigram(verifier),
        rule=rule or rules.Lossless(),
        inputs=inputs(rows),
        config=decoding.DecodeConfig(**{"max_len": 6, "draft_len": 3, **options}),
        key=jax.random.key(0),
        example_ids=np.arange(rows),
    )


def widened(table: np.ndarray, size: int) -> np.ndarray:
    """A bigram table with a tail of very likely, meaningless ids."""
    wide = np.full((size, size), 9.0, np.float32)
    wide[: len(table), : len(table)] = table
    return wide


def test_padded_vocabularies_are_masked():
    """Tails of different widths are never emitted, and change nothing else."""
    drafter, verifier = random_tables(2, 5, 1)
    wanted = speculate(drafter, verifier, rules.by_name("token_v3", 0.5))
    rule = rules.by_name("token_v3", 0.5)
    for sizes in ((8, 8), (6, 8), (8, 5)):
        wide = [widened(t, size) for t, size in zip((drafter, verifier), sizes, strict=True)]
        found = speculate(*wide, rule, vocab_size=5)
        assert outputs(found) == outputs(wanted)
        np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)
    alone = decoding.autoregressive(
        model=bigram(widened(verifier, 8)),
        inputs=inputs(200),
        config=decoding.DecodeConfig(max_len=6, vocab_size=5),
        key=jax.random.key(0),
        example_ids=np.arange(200),
    )
    assert max(max(tokens) for tokens in outputs(alone)) == 4


@pytest.mark.parametrize("vocab_size", [None, 6])
def test_vocabularies_that_differ_are_refused(vocab_size):
    with pytest.raises(UserError, match="drafter has 5 logits and the verifier 8"):
        speculate(np.zeros((5, 5)), np.zeros((8, 8)), vocab_size=vocab_size)


@pytest.mark.parametrize("who", ["verifier", "drafter"])
@pytest.mark.parametrize("rule", ["lossless", "token_v3"])
def test_nan_parameters_show_in_the_log_probabilities(who, rule):
    """The decode ends, and says that its output means nothing."""
    drafter, verifier = (table.copy() for table in random_tables(2, 5, 1))
    (drafter if who == "drafter" else verifier)[...] = np.nan
    alpha = None if rule == "lossless" else 0.5
    output = speculate(drafter, verifier, rules.by_name(rule, alpha), rows=4)
    assert np.isnan(np.asarray(output.log_probs)).all()


def test_nan_of_one_row_stays_in_it():
    """Only rows whose prefix meets the bad parameters are lost."""
    drafter, verifier = (table.copy() for table in random_tables(2, 5, 1))
    verifier[3] = np.nan
    output = speculate(drafter, verifier)
    met = np.array([3 in tokens[:-1] for tokens in outputs(output)])
    assert 0 < met.sum() < len(met)
    np.testing.assert_array_equal(np.isnan(np.asarray(output.log_probs)), met)


def test_sweeping_traced_values_compiles_once():
    drafter, verifier = (bigram(table) for table in random_tables(4, 5, 1))
    config = decoding.DecodeConfig(max_len=5, draft_len=2)

    def decode(alpha, **sampling):
        return decoding.speculative(
            drafter=drafter,
            verifier=verifier,
            rule=rules.by_name("token_v3", alpha),
            inputs=inputs(3),
            config=config,
            sampling=decoding.Sampling(**sampling),
            key=jax.random.key(0),
            example_ids=np.arange(3),
        )

    functions = (decoding.start, decoding.run, decoding.finish)
    decode(0.1)
    sizes = [f._cache_size() for f in functions]
    for alpha in (0.2, 0.9, 1.0):
        decode(alpha)
    for sampling in (
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"temperature": 0.5, "top_k": 2, "top_p": 0.9},
    ):
        decode(0.3, **sampling)
    assert [f._cache_size() for f in functions] == sizes
    decode([0.1, 0.2, 0.3])  # another shape of alpha is another program: the counter does count
    assert decoding.run._cache_size() == sizes[1] + 1
