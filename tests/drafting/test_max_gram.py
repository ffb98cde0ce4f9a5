"""Max-Gram, prompt lookup and n-gram tables against slow searches and counts."""

from __future__ import annotations

import collections

import jax
import numpy as np
import pytest

from decoding.tables import random_tables
from oracles import sampler as oracle
from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.interfaces import Bound, Drafter, UserError
from speccascade_t5x.models import bigram

VOCAB, SIZE, ROWS, STEPS = 6, 5, 300, 9


def search(prompt, output, most, top, low=1, high=10**9, latest=False):
    """What followed the longest earlier occurrence of the output's end, position by position."""
    best, places = 0, []
    for text, ends in ((prompt, len(prompt) - 1), (output, len(output) - 1)):
        for end in range(ends):
            size = 0
            while (
                size < min(high, len(output)) and end - size >= 0 and text[end - size] == output[len(output) - 1 - size]
            ):
                size += 1
            places.append((size, text[end + 1 : end + 1 + most]))
            best = max(best, size)
    if best < low:
        return []
    found = [copy for size, copy in places if size == best]
    copy = list(found[-1 if latest else 0])
    bad = [i for i, token in enumerate(copy) if token >= top]
    return copy[: bad[0]] if bad else copy


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({}, 1, 10**9),
        ({"latest": True}, 1, 10**9),
        ({"max_ngram": 3, "min_ngram": 2}, 2, 3),
        ({"prompt": None}, 1, 10**9),
        ({"vocab_size": 5}, 1, 10**9),
    ],
)
def test_copies_are_those_of_a_slow_search(options, low, high):
    """Rounds of every row at its own pace; without a table the draft ends with the copy."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, VOCAB, (ROWS, 12)).astype(np.int32)
    sizes = rng.integers(1, 13, ROWS)
    prompts[np.arange(12) >= sizes[:, None]] = 0
    bound = drafting.max_gram(SIZE, VOCAB, **options)
    drafter = bound.model
    assert isinstance(drafter, Drafter)
    assert drafter.noise_size == 0
    state = drafter.start(bound.params, {"encoder_input_tokens": prompts}, ROWS, 64)
    propose = jax.jit(drafter.propose)
    outputs = [[0] for _ in range(ROWS)]
    lengths = set()
    for _ in range(STEPS):
        last_two = np.array([(o[-2] if len(o) > 1 else o[-1], o[-1]) for o in outputs], np.int32)
        positions = np.array([len(o) - 1 for o in outputs], np.int32)
        proposal, state = propose(bound.params, state, last_two, positions, np.zeros((ROWS, 0), np.float32))
        proposal = jax.device_get(proposal)
        np.testing.assert_array_equal(proposal.calls, 0)
        assert proposal.q is None
        for row, output in enumerate(outputs):
            prompt = [] if "prompt" in options else prompts[row, : sizes[row]].tolist()
            top = options.get("vocab_size", VOCAB)
            wanted = search(prompt, output, SIZE, top, low, high, options.get("latest", False))
            size = proposal.lengths[row]
            assert proposal.tokens[row, :size].tolist() == wanted, (prompt, output)
            np.testing.assert_array_equal(proposal.law[row, :size], np.eye(VOCAB)[wanted].reshape(size, VOCAB))
            lengths.add(int(size))
            kept = rng.integers(0, size + 1)
            output.extend([*wanted[:kept], int(rng.integers(1, VOCAB))])
        state = drafter.commit(state, np.array([len(o) - 1 for o in outputs], np.int32))
    assert lengths >= {0, 1, SIZE}
    assert propose._cache_size() == 1  # one program, whatever was matched
    text = str(jax.make_jaxpr(drafter.propose)(bound.params, state, last_two, positions, np.zeros((ROWS, 0))))
    assert "callback" not in text  # and it never leaves the device


def corpus(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(VOCAB, rng.integers(1, 12), p=(0.05, 0.3, 0.3, 0.2, 0.15, 0.0)) for _ in range(30)]


def counted(order: int, most: int) -> dict:
    """context -> law, by counting: interpolated absolute discounting (0.5), `most` successors, add-one unigrams."""
    after = collections.defaultdict(collections.Counter)
    unigram = np.ones(VOCAB)
    for line in corpus():
        text = [0, *line.tolist()]
        for i in range(1, len(text)):
            unigram[text[i]] += 1
            for size in range(1, order):
                if i - size >= 0:
                    after[tuple(text[i - size : i])][text[i]] += 1
    unigram /= unigram.sum()

    def law(context):
        if not context:
            return unigram
        lower = law(context[1:])
        counts = after.get(context)
        if not counts:
            return lower
        kept = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
        share = np.zeros(VOCAB)
        for token, number in kept:
            share[token] = (number - 0.5) / sum(counts.values())
        return share + (1 - share.sum()) * lower

    return law


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("most", [2, 16])
def test_a_table_holds_the_counted_law_and_its_argmax(order, most):
    table = drafting.build_table(corpus(), VOCAB, order=order, successors=most)
    table = jax.tree.map(np.asarray, table)
    law = counted(order, most)
    before, last = (x.ravel() for x in np.mgrid[-1:VOCAB, 0:VOCAB].astype(np.int32))
    found = np.asarray(jax.jit(lambda t, a, b: t.law(a, b))(table, before, last))
    best = np.asarray(jax.jit(lambda t, a, b: t.best(a, b, 4))(table, before, last))
    assert found.min() > 0
    for i, (a, b) in enumerate(zip(before.tolist(), last.tolist(), strict=True)):
        context = (b,) if a < 0 else (a, b)
        wanted = law(context[-(order - 1) :])
        np.testing.assert_allclose(found[i], wanted, atol=1e-6)
        ties = np.flatnonzero(wanted[:4] > wanted[:4].max() - 1e-7)
        assert best[i] in ties


def test_positions_beyond_the_copy_are_filled_from_the_table():
    """The argmax continues one-hot; a sampled fill has Tr of the table's law, and a copied token never has."""
    rows = 4000
    table = drafting.build_table(corpus(), VOCAB, order=3)
    law = counted(3, 16)
    prompt = {"encoder_input_tokens": np.array([[2, 5, 0]], np.int32)}
    start, at = np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32)
    for fill, setting in (("argmax", {}), ("sample", {"temperature": 0.7, "top_k": 3})):
        bound = drafting.max_gram(3, VOCAB, table, Sampling(**setting), fill=fill)
        propose = jax.jit(bound.model.propose)
        state = bound.model.start(bound.params, prompt, rows, 20)
        noise = np.random.default_rng(0).random((rows, bound.model.noise_size), np.float32)
        # The start token came first, then 2: the prompt holds a 2, and 5 follows it.
        _, state = propose(bound.params, state, start, at, noise)
        proposal = jax.device_get(propose(bound.params, state, start + [0, 2], at + 1, noise)[0])
        np.testing.assert_array_equal(proposal.lengths, 3)
        np.testing.assert_array_equal(proposal.tokens[:, 0], 5)
        np.testing.assert_array_equal(proposal.law[:, 0], np.eye(VOCAB)[np.full(rows, 5)])
        for row in range(0, rows, 97):
            context = [2, 5]
            for slot in (1, 2):
                context.append(int(proposal.tokens[row, slot]))
                wanted = law(tuple(context[slot - 1 : slot + 1]))
                if fill == "argmax":
                    assert context[-1] == wanted.argmax()
                    wanted = np.eye(VOCAB)[wanted.argmax()]
                else:
                    wanted = oracle.truncate(oracle.tempered(np.log(wanted), 0.7), top_k=3)
                np.testing.assert_allclose(proposal.law[row, slot], wanted, atol=1e-6)
        if fill == "sample":
            seen = np.bincount(proposal.tokens[:, 1], minlength=VOCAB) / rows
            # Hoeffding, six tokens: exceeded by chance in 1e-7 of all runs.
            assert np.abs(seen - proposal.law[0, 1]).max() < np.sqrt(np.log(12 / 1e-7) / (2 * rows))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda: drafting.build_table([], VOCAB), "empty"),
        (lambda: drafting.build_table([[1, VOCAB]], VOCAB), "vocabulary has 6"),
        (lambda: drafting.build_table([[1]], VOCAB, order=4), "order=4"),
        (lambda: drafting.build_table([[1]], VOCAB, discount=1.0), "discount"),
        (lambda: drafting.build_table([[1]], VOCAB, successors=0), "successors"),
        (lambda: drafting.max_gram(0, VOCAB), "draft_len=0"),
        (lambda: drafting.max_gram(2, VOCAB, fill="best"), "fill"),
        (lambda: drafting.prompt_lookup(2, VOCAB, max_ngram=2, min_ngram=3), "min_ngram"),
        (lambda: drafting.max_gram(2, 9, drafting.build_table([[1]], VOCAB)), "6 ids"),
        (lambda: drafting.max_gram(2, VOCAB, prompt="question").model.prompt_of({"text": 0}, 1), "'question'"),
    ],
)
def test_mistakes_are_named(broken, words):
    with pytest.raises(UserError, match=words):
        broken()


def test_a_rule_that_reads_the_drafter_is_refused_and_lossless_is_not():
    verifier = bigram(random_tables(0, VOCAB, 1)[1])
    config = decoding.DecodeConfig(max_len=10, draft_len=3)
    bound = drafting.prompt_lookup(3, VOCAB)
    with pytest.raises(UserError, match="copied token has none.*lossless"):
        decoding.speculative_program(bound, verifier, rules.by_name("token_v3", 0.3), config)
    wide = Bound(drafting.max_gram(3, VOCAB + 1).model, bound.params)
    masked = decoding.DecodeConfig(max_len=10, draft_len=3, vocab_size=VOCAB)
    with pytest.raises(UserError, match="width=6"):
        decoding.speculative_program(wide, verifier, rules.Lossless(), masked)
    program = decoding.speculative_program(bound, verifier, rules.Lossless(), config, Sampling(np.float32(0)))
    prompt = {"encoder_input_tokens": np.arange(1, 6, dtype=np.int32)[None]}
    output = decoding.decode(program, prompt, jax.random.key(0), np.arange(1))
    alone = [0]
    while len(alone) <= config.max_len and 1 not in alone:
        alone.append(int(random_tables(0, VOCAB, 1)[1][alone[-1]].argmax()))
    assert np.asarray(output.tokens)[0, : len(alone) - 1].tolist() == alone[1:]
    assert int(output.lengths[0]) == len(alone) - 1
    assert int(output.counts.drafter_calls[0]) == 0
    assert int(output.counts.rounds[0]) <= int(output.lengths[0])
