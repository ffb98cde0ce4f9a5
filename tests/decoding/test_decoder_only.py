"""Decoder-only pairs in the loop: every execution and drafter over ragged prompts, and the law of what comes out."""

from __future__ import annotations

import functools
from collections import Counter

import jax
import numpy as np
import pytest
from flax import traverse_util

from decoding import tiny_pair
from oracles import decoder_only as oracle
from oracles import rules as oracle_rules
from oracles.tables import agreement, output_law
from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.interfaces import SOURCE_ACCEPTED, Bound, UserError
from speccascade_t5x.models import DecoderOnly, DecoderOnlyConfig, bigram, init_params

VOCAB, EOS = 24, 1
GREEDY = Sampling(temperature=np.float32(0.0))
CONFIG = decoding.DecodeConfig(max_len=12, draft_len=3)


def model(seed: int, layers: int = 1, vocab: int = VOCAB, prefix: bool = True) -> Bound:
    """Random weights, logits scaled so that laws are neither flat nor certain."""
    config = DecoderOnlyConfig(
        vocab_size=vocab,
        emb_dim=16,
        num_heads=2,
        num_layers=layers,
        head_dim=8,
        mlp_dim=32,
        inputs_bidirectional_attention=prefix,
    )
    params = init_params(config, jax.random.key(seed))
    params["decoder"]["logits_dense"]["kernel"] *= 1.5
    return Bound(DecoderOnly(config), params)


def near(bound: Bound, seed: int, distance: float) -> Bound:
    """A model of its own that often agrees with `bound`."""
    rng = np.random.default_rng(seed)
    shaken = lambda x: x + distance * np.std(x) * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return Bound(bound.model, jax.tree.map(shaken, bound.params))


@functools.cache
def pair() -> tuple[Bound, Bound]:
    """(drafter, verifier)."""
    verifier = model(1, layers=2)
    return near(verifier, 0, 0.3), verifier


def prompts(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Ragged prompts; the first is empty."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCAB, (rows, 8)).astype(np.int32)
    lengths = np.concatenate([[1], rng.integers(2, 9, rows - 1)])
    tokens[np.arange(8) >= lengths[:, None]] = 0
    tokens[:, 0] = 0
    return {"decoder_input_tokens": tokens}


def run(program: decoding.Program, inputs, seed: int = 0) -> decoding.Output:
    rows = len(inputs["decoder_input_tokens"])
    return decoding.decode(program, inputs, jax.random.key(seed), np.arange(rows))


def speculative(drafter: Bound, verifier: Bound, rule: rules.Rule, config=CONFIG, sampling=GREEDY) -> decoding.Program:
    return decoding.speculative_program(drafter, verifier, rule, config, sampling)


@functools.cache
def greedy(role: str = "verifier") -> decoding.Output:
    """One model of the pair alone."""
    bound = pair()[role == "verifier"]
    return run(decoding.autoregressive_program(bound, CONFIG, GREEDY, role), prompts(5))


def test_the_models_alone_continue_their_prompts():
    """What the loop writes is what the oracle thinks most likely, token by token."""
    params = flat(pair()[1])
    tokens, output = prompts(5)["decoder_input_tokens"], greedy()
    for row, length in enumerate((tokens != 0).sum(axis=1) + 1):
        written = np.asarray(output.tokens)[row, : output.lengths[row]].tolist()
        logits = oracle.logits(params, [*tokens[row, :length], *written[:-1]], prefix=length)
        assert logits[length - 1 :].argmax(axis=1).tolist() == written


def flat(bound: Bound) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(bound.params, sep="/").items()}


def drafters() -> dict[str, Bound]:
    """Every kind of drafter there is."""
    small, middle = pair()[0], near(pair()[1], 1, 0.1)
    table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB, VOCAB)) + 6 * np.eye(VOCAB)  # likes to repeat
    return {
        "model": small,
        "table": bigram(table),
        "copies": drafting.prompt_lookup(3, VOCAB, min_ngram=1, prompt="decoder_input_tokens"),
        "cascade": drafting.cascade([middle, small], [[2, 1], [0, 2]], sampling=GREEDY, width=VOCAB),
    }


@pytest.mark.parametrize("kind", drafters())
def test_lossless_speculation_is_the_verifiers_greedy_decode(kind):
    output = run(speculative(drafters()[kind], pair()[1], rules.Lossless()), prompts(5))
    np.testing.assert_array_equal(output.tokens, greedy().tokens)
    np.testing.assert_allclose(output.log_probs, greedy().log_probs, atol=1e-4)
    assert (np.asarray(output.source) == SOURCE_ACCEPTED).any()
    assert int(output.counts.rounds.sum()) < int(greedy().counts.rounds.sum())


def test_a_rule_that_reads_the_drafter():
    """Token V3 at alpha = 1 rules nothing out: the law is the drafter's."""
    output = run(speculative(*pair(), rules.TokenV3(alpha=1.0)), prompts(5))
    np.testing.assert_array_equal(output.tokens, greedy("drafter").tokens)
    assert (np.asarray(greedy("drafter").tokens) != np.asarray(greedy().tokens)).any()


def test_sequential_executions():
    rule = rules.by_name("chow", 0.6)
    expected = run(speculative(*pair(), rule), prompts(5))
    output = run(decoding.token_cascade_program(*pair(), rule, CONFIG, GREEDY), prompts(5))
    np.testing.assert_array_equal(output.tokens, expected.tokens)
    kinds = set(np.asarray(output.source)[np.asarray(output.tokens) > 0].tolist())
    assert len(kinds) == 2  # both models wrote
    for threshold, role in ((np.inf, "verifier"), (-np.inf, "drafter")):
        program = decoding.sequence_cascade_program(*pair(), CONFIG, GREEDY, threshold)
        np.testing.assert_array_equal(run(program, prompts(5)).tokens, greedy(role).tokens)


def test_refilled_rows_are_what_they_are_alone():
    program = speculative(*pair(), rules.TokenV3(alpha=0.3), sampling=Sampling())
    every, key = prompts(5), jax.random.key(3)
    wanted = run(program, every, seed=3)
    some = lambda rows: {name: x[list(rows)] for name, x in every.items()}  # noqa: E731
    state = decoding.start(program, some([0, 1]), key, np.array([0, 1]))
    state = decoding.run(program, state, 2)
    state = decoding.refill(program, state, np.array([True, False]), some([4, 1]), key, np.array([4, 1]))
    found = decoding.finish(program.config, decoding.run(program, state, 100))
    np.testing.assert_array_equal(found.tokens, np.asarray(wanted.tokens)[[4, 1]])


def test_kinds_of_models_are_not_mixed():
    encoder_decoder = tiny_pair.pair()[0]
    cascaded = drafting.cascade([encoder_decoder], [[3]], sampling=GREEDY, width=VOCAB)
    for drafter in (encoder_decoder, cascaded):
        with pytest.raises(UserError, match="encoder-decoders and decoder-only models cannot be mixed"):
            speculative(drafter, pair()[1], rules.Lossless())
    with pytest.raises(UserError, match="'decoder_input_tokens' and another 'encoder_input_tokens'"):
        decoding.sequence_cascade_program(pair()[0], encoder_decoder, CONFIG)
    with pytest.raises(UserError, match=r"no input 'encoder_input_tokens' to search .*decoder_input_tokens"):
        run(speculative(drafting.prompt_lookup(3, VOCAB), pair()[1], rules.Lossless()), prompts(2))


SAMPLES, SMALL, OUTPUT_LEN = 20_000, 4, 3
PROMPTS = {"decoder_input_tokens": np.array([[0, 3, 2, 2, 3], [0, 2, 0, 0, 0]], np.int32)}
PROMPT_LENGTHS = (5, 2)


@functools.cache
def small_pair(prefix: bool) -> tuple[Bound, Bound]:
    """Four tokens, and laws far from each other."""
    return tuple(model(seed, 1, SMALL, prefix) for seed in (3, 4))


def exact_laws(rule: str, alpha: float | None, prefix: bool) -> list[dict[tuple[int, ...], float]]:
    """The law of whole outputs after each prompt, enumerated with the oracle's network."""
    models = [flat(bound) for bound in small_pair(prefix)]
    laws = []
    for row, length in zip(PROMPTS["decoder_input_tokens"].tolist(), PROMPT_LENGTHS, strict=True):

        def law_at(written, prompt=row[:length], seen=length if prefix else 0):
            logits = (oracle.logits(params, [*prompt, *written], seen)[-1] for params in models)
            return oracle_rules.draft_and_target(rule, *logits, alpha, 1.0, None)[1]

        laws.append(output_law(law_at, OUTPUT_LEN, EOS))
    return laws


@pytest.mark.parametrize(
    ("rule", "alpha", "verification", "prefix"),
    [("lossless", None, "block", True), ("token_v3", 0.5, "token", True), ("lossless", None, "token", False)],
)
def test_samples_after_ragged_prompts_follow_the_target_law(rule, alpha, verification, prefix):
    """One draw from a law 0.07 away in total variation would be found; the prompts' own laws are further apart."""
    config = decoding.DecodeConfig(OUTPUT_LEN, 2, eos_id=EOS, verification=verification, num_samples=SAMPLES)
    program = speculative(*small_pair(prefix), rules.by_name(rule, alpha), config, Sampling())
    output = run(program, PROMPTS, seed=1)
    written = [
        tuple(row[:n].tolist()) for row, n in zip(np.asarray(output.tokens), np.asarray(output.lengths), strict=True)
    ]
    tallies = [Counter(written[i * SAMPLES : (i + 1) * SAMPLES]) for i in range(2)]
    laws = exact_laws(rule, alpha, prefix)
    for tally, law, other in zip(tallies, laws, laws[::-1], strict=True):
        found = agreement(tally, law)
        assert found.surely_detected < 0.07
        assert found.holds, found
        assert not agreement(tally, other).holds  # a row that read its neighbour's prompt would show
