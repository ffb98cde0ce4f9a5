"""Traces: every column equals what numpy makes of the two models along the emitted prefix."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from decoding.tables import inputs, outputs, random_tables
from oracles import rules as oracle_rules
from oracles import sampler
from oracles.tables import lookup
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.drafting import Confidence
from speccascade_t5x.interfaces import SOURCE_VERIFIER
from speccascade_t5x.models import bigram

ROWS, VOCAB = 40, 4
TABLES = random_tables(8, VOCAB, 3)
MODELS = [*map(bigram, TABLES)]
ALPHAS = {"lossless": None, "token_v3": 0.5, "diff": 0.02, "chow": 0.45}
COLUMNS = [field.name for field in dataclasses.fields(decoding.Trace)]
SHAPED = {"temperature": 0.6, "top_k": 3, "top_p": 0.9, "min_p": 0.0}
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def sampling_of(values: dict) -> decoding.Sampling:
    whole = {"top_k": np.int32}
    return decoding.Sampling(**{name: whole.get(name, np.float32)(value) for name, value in values.items()})


def rule_of(name: str) -> rules.Rule:
    alpha = ALPHAS[name]
    return rules.by_name(name, None if alpha is None else np.float32(alpha))


def decode(make, trace: bool = True, shape: dict = PLAIN, draft_len: int = 3, **options) -> decoding.Output:
    """`make` is one of the decoding module's programs of (config, sampling)."""
    config = decoding.DecodeConfig(**{"max_len": 8, "draft_len": draft_len, "trace": trace, **options})
    return decoding.decode(make(config, sampling_of(shape)), inputs(ROWS), jax.random.key(2), np.arange(ROWS))


def speculative(rule: str, stop=None):
    return lambda config, sampling: decoding.speculative_program(*MODELS, rule_of(rule), config, sampling, stop)


def token_cascade(rule: str, oracle: bool = False):
    return lambda config, sampling: decoding.token_cascade_program(*MODELS, rule_of(rule), config, sampling, oracle)


def sequence_cascade(config, sampling):
    return decoding.sequence_cascade_program(*MODELS, config, sampling, -1.0)


def alone(role: str):
    model = MODELS[role == "verifier"]
    return lambda config, sampling: decoding.autoregressive_program(model, config, sampling, role)


@functools.cache
def deferral(rule: str, q_raw: tuple, p_raw: tuple, q: tuple) -> float:
    """The probability that the rule turns to the verifier, of a prefix rule or a token rule."""
    alpha = float(np.float32(ALPHAS[rule] or 0))
    if rule in oracle_rules.PREFIX_TESTS:
        return float(oracle_rules.PREFIX_TESTS[rule](q, None, q_raw, p_raw, alpha))
    if rule in oracle_rules.TOKEN_TESTS:
        test = oracle_rules.TOKEN_TESTS[rule]
        return sum(q[v] for v in range(VOCAB) if test(q_raw, p_raw, v, alpha))
    return 1.0


def recomputed(rule: str, tokens: tuple[int, ...], temperature: float) -> dict[str, list[float]]:
    """Every column along one output, in float64."""
    columns = {name: [] for name in COLUMNS}
    for place, token in enumerate(tokens):
        logits = [lookup(table, tokens[:place]) for table in TABLES]
        q_raw, p_raw = (sampler.tempered(x) for x in logits)
        q, p = (sampler.tempered(x, temperature) for x in logits)
        pi = oracle_rules.target(rule, q_raw, p_raw, q_raw, p_raw, float(np.float32(ALPHAS[rule] or 0)))
        values = {
            "log_prob": math.log(pi[token]),
            "max_q": max(q_raw),
            "max_p": max(p_raw),
            "total_variation": sum(max(0.0, a - b) for a, b in zip(p, q, strict=True)),
            "entropy_q": oracle_rules.entropy(q_raw),
            "entropy_p": oracle_rules.entropy(p_raw),
            "deferral": deferral(rule, tuple(q_raw), tuple(p_raw), tuple(q)),
        }
        for name, value in values.items():
            columns[name].append(value)
    return columns


def assert_columns(output: decoding.Output, rule: str, temperature: float, names=COLUMNS) -> None:
    lengths = np.asarray(output.lengths)
    assert 0 < (lengths < 8).sum() < ROWS
    for row, tokens in enumerate(outputs(output)):
        wanted = recomputed(rule, tokens, temperature)
        for name in names:
            column = np.asarray(getattr(output.trace, name))[row]
            np.testing.assert_allclose(column[: len(tokens)], wanted[name], atol=2e-5, err_msg=f"{name} of {row}")
            assert np.isnan(column[len(tokens) :]).all()


def assert_sums(output: decoding.Output) -> None:
    """The trace adds up to the row's log-probability and counters."""
    np.testing.assert_allclose(np.nansum(output.trace.log_prob, axis=1), output.log_probs, atol=1e-4)
    np.testing.assert_allclose(np.nansum(output.trace.deferral, axis=1), output.counts.deferred, atol=1e-4)


@pytest.mark.parametrize("rule", ["token_v3", "diff"])
def test_columns_of_speculation(rule):
    for shape in (PLAIN, SHAPED):
        output = decode(speculative(rule), shape=shape)
        assert output.trace.max_q.shape == output.tokens.shape
        assert_columns(output, rule, shape["temperature"])
        assert_sums(output)


def test_columns_with_dynamic_drafts_and_block_verification():
    output = decode(speculative("token_v3", Confidence(np.float32(0.5))), verification="block")
    assert_columns(output, "token_v3", 1.0)
    assert_sums(output)


def test_columns_of_the_oracle():
    output = decode(token_cascade("diff", oracle=True))
    assert_columns(output, "diff", 1.0)
    assert_sums(output)


def test_columns_of_a_token_cascade():
    """The verifier's law is known only where it was asked."""
    output = decode(token_cascade("chow"))
    assert_columns(output, "chow", 1.0, ["log_prob", "max_q", "entropy_q", "deferral"])
    assert_sums(output)
    deferred = np.asarray(output.source) == SOURCE_VERIFIER
    for name in ("max_p", "entropy_p", "total_variation"):
        np.testing.assert_array_equal(np.isnan(getattr(output.trace, name)), ~deferred)
    for row, tokens in enumerate(outputs(output)):
        wanted = recomputed("chow", tokens, 1.0)
        for place in np.flatnonzero(deferred[row]):
            for name in ("max_p", "entropy_p", "total_variation"):
                assert getattr(output.trace, name)[row, place] == pytest.approx(wanted[name][place], abs=2e-5)


def of_one_model(output: decoding.Output, letter: str, rows) -> None:
    """Only the columns of the model that wrote these rows are filled."""
    other = {"q": "p", "p": "q"}[letter]
    for row in rows:
        size = int(output.lengths[row])
        wanted = recomputed("lossless", outputs(output)[row], 1.0)
        for name in ("max", "entropy"):
            mine, others = (np.asarray(getattr(output.trace, f"{name}_{x}"))[row] for x in (letter, other))
            np.testing.assert_allclose(mine[:size], wanted[f"{name}_{letter}"], atol=2e-5)
            assert np.isnan(others).all() and np.isnan(mine[size:]).all()
    assert np.isnan(output.trace.total_variation).all()


@pytest.mark.parametrize("name", ["token_cascade", "sequence_cascade"])
def test_what_is_not_known_is_nan_at_the_width_of_a_vocabulary(name):
    """Where XLA loses NaN in maxima: a column is NaN where its model was not asked, and finite everywhere else."""
    tables = random_tables(8, 384, 1)
    both, config = [*map(bigram, tables)], decoding.DecodeConfig(max_len=8, draft_len=3, trace=True)
    if name == "token_cascade":
        program = decoding.token_cascade_program(*both, rules.by_name("chow", np.float32(0.975)), config)
    else:
        program = decoding.sequence_cascade_program(*both, config, threshold=-5.5)
    output = decoding.decode(program, inputs(ROWS), jax.random.key(2), np.arange(ROWS))
    inside = np.arange(8) < np.asarray(output.lengths)[:, None]
    by_verifier = np.asarray(output.source) == SOURCE_VERIFIER
    assert 0 < by_verifier.sum() < inside.sum()
    of_drafter = inside & ~by_verifier if name == "sequence_cascade" else inside
    known = {"log_prob": inside, "deferral": inside, "total_variation": of_drafter & by_verifier}
    known |= {f"{column}_q": of_drafter for column in ("max", "entropy")}
    known |= {f"{column}_p": by_verifier for column in ("max", "entropy")}
    for column, where in known.items():
        values = np.asarray(getattr(output.trace, column))
        np.testing.assert_array_equal(np.isfinite(values), where, err_msg=column)
        assert np.isnan(values[~where]).all()


def test_columns_of_a_sequence_cascade():
    output = decode(sequence_cascade)
    assert_sums(output)
    rewritten = np.asarray(output.source)[:, 0] == SOURCE_VERIFIER
    assert 0 < rewritten.sum() < ROWS
    of_one_model(output, "p", np.flatnonzero(rewritten))
    of_one_model(output, "q", np.flatnonzero(~rewritten))


@pytest.mark.parametrize(("role", "letter"), [("verifier", "p"), ("drafter", "q")])
def test_columns_of_a_model_alone(role, letter):
    output = decode(alone(role))
    assert_sums(output)
    of_one_model(output, letter, range(ROWS))


@pytest.mark.parametrize(
    ("make", "draft_len"),
    [
        (speculative("token_v3"), 3),
        (speculative("lossless"), 3),
        (speculative("lossless"), 0),
        (token_cascade("chow"), 2),
        (sequence_cascade, 0),
        (alone("verifier"), 0),
    ],
    ids=["token_v3", "lossless", "lossless-0", "token_cascade", "sequence_cascade", "verifier"],
)
def test_a_trace_changes_no_token(make, draft_len):
    plain, traced = (decode(make, trace, draft_len=draft_len) for trace in (False, True))
    assert plain.trace is None
    assert outputs(traced) == outputs(plain)
    np.testing.assert_array_equal(traced.source, plain.source)
    np.testing.assert_allclose(traced.log_probs, plain.log_probs, atol=1e-5)
    for field in dataclasses.fields(plain.counts):
        if field.name not in (
            "drafter_calls",
            "level_calls",
        ):  # a trace wants the drafter's law at the bonus position too
            ours, theirs = (getattr(output.counts, field.name) for output in (traced, plain))
            np.testing.assert_allclose(ours, theirs, atol=1e-5 if field.name == "deferred" else 0)
