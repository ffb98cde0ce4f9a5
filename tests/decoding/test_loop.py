"""Invariants of the loop: what a row's output may depend on, and what it may not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.decoding import loop
from speccascade_t5x.models import bigram

from . import tiny_pair
from .tables import EOS, inputs, outputs, random_tables

CONFIG = decoding.DecodeConfig(max_len=12, draft_len=3)
KEY = jax.random.key(11)


def fields(output: decoding.Output) -> list[np.ndarray]:
    """Everything of an output that must not depend on the batch: all but the float log-probabilities."""
    return [np.asarray(x) for x in (output.tokens, output.lengths, output.source, output.counts.rounds)]


def assert_same_rows(one, other, rows_of_one=slice(None), rows_of_other=slice(None)) -> None:
    for a, b in zip(fields(one), fields(other), strict=True):
        np.testing.assert_array_equal(a[rows_of_one], b[rows_of_other])
    np.testing.assert_allclose(
        np.asarray(one.log_probs)[rows_of_one],
        np.asarray(other.log_probs)[rows_of_other],
        atol=1e-4,
    )


@functools.cache
def table_program(vocab=4, **options) -> decoding.Program:
    drafter, verifier = random_tables(3, vocab, 2)
    config = decoding.DecodeConfig(**{"max_len": 12, "draft_len": 3, **options})
    return decoding.speculative_program(bigram(drafter), bigram(verifier), rules.by_name("token_v3", 0.5), config)


def t5_decode(source, ids, rule=None, temperature=1.0, config=CONFIG) -> decoding.Output:
    drafter, verifier = tiny_pair.pair()
    return decoding.speculative(
        drafter=drafter,
        verifier=verifier,
        rule=rule or rules.Lossless(),
        inputs=source,
        config=config,
        sampling=decoding.Sampling(temperature=np.float32(temperature)),
        key=KEY,
        example_ids=ids,
    )


def alone(source, ids, temperature=1.0, config=CONFIG) -> decoding.Output:
    return decoding.autoregressive(
        model=tiny_pair.pair()[1],
        inputs=source,
        config=config,
        sampling=decoding.Sampling(temperature=np.float32(temperature)),
        key=KEY,
        example_ids=ids,
    )


def test_greedy_lossless_is_the_verifiers_own_output():
    source, ids = tiny_pair.sources(8), np.arange(8)
    speculative, single = (f(source, ids, temperature=0.0) for f in (t5_decode, alone))
    np.testing.assert_array_equal(speculative.tokens, single.tokens)
    np.testing.assert_allclose(speculative.log_probs, single.log_probs, atol=1e-4)
    accepted, examined = (np.asarray(x) for x in (speculative.counts.accepted, speculative.counts.examined))
    assert 0 < accepted.sum() < examined.sum()  # the drafter was right at times, and wrong at times


def test_draft_length_zero_is_the_model_alone():
    source, ids = tiny_pair.sources(8), np.arange(8)
    nothing = decoding.DecodeConfig(max_len=12, draft_len=0)
    output = t5_decode(source, ids, config=nothing)
    assert_same_rows(output, alone(source, ids))
    assert not np.asarray(output.counts.drafter_calls).any()


@pytest.mark.parametrize("verification", ["token", "block"])
def test_equal_models_never_reject(verification):
    table = bigram(random_tables(3, 4, 2)[0])
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.8)):
        output = decoding.speculative(
            drafter=table,
            verifier=table,
            rule=rules.Lossless(),
            inputs=inputs(4000),
            config=decoding.DecodeConfig(max_len=12, draft_len=3, verification=verification),
            sampling=decoding.Sampling(np.float32(temperature), top_p=np.float32(top_p)),
            key=KEY,
            example_ids=np.arange(4000),
        )
        np.testing.assert_array_equal(output.counts.accepted, output.counts.examined)
        assert {1, 3} <= set(np.unique(output.source).tolist()) <= {0, 1, 3}


def test_a_row_does_not_depend_on_its_batch():
    """The same examples in another order, with other mates, and alone (which has its own write path)."""
    source = tiny_pair.sources(8)
    tokens = source["encoder_input_tokens"]
    ids = np.array([5, 900, 3, 77, 12, 2**31 - 1, 0, 1])
    wanted = t5_decode(source, ids)
    order = np.array([4, 0, 5, 7, 2, 1, 6, 3])
    turned = {"encoder_input_tokens": tokens[order]}
    assert_same_rows(t5_decode(turned, ids[order]), wanted, rows_of_other=order)
    others = tiny_pair.sources(8, seed=1)
    others["encoder_input_tokens"][2] = tokens[3]
    mixed = t5_decode(others, np.array([1, 2, 77, 4, 6, 8, 9, 10]))
    assert_same_rows(mixed, wanted, [2], [3])
    padded = {"encoder_input_tokens": np.where(np.arange(8)[:, None] < 5, tokens, 0)}
    assert_same_rows(t5_decode(padded, np.where(np.arange(8) < 5, ids, 0)), wanted, slice(5), slice(5))
    for index in (0, 3):
        one = {"encoder_input_tokens": tokens[[index]]}
        assert_same_rows(t5_decode(one, ids[[index]]), wanted, rows_of_other=[index])


def test_the_key_and_the_example_id_matter():
    program, ids = table_program(), np.arange(30)
    one = decoding.decode(program, inputs(30), KEY, ids)
    assert outputs(one) == outputs(decoding.decode(program, inputs(30), KEY, ids))
    raw = jax.random.key_data(KEY)
    assert outputs(one) == outputs(decoding.decode(program, inputs(30), raw, ids))
    for key, names in ((jax.random.key(12), ids), (KEY, ids + 30)):
        other = decoding.decode(program, inputs(30), key, names)
        assert sum(a == b for a, b in zip(outputs(one), outputs(other), strict=True)) < 10
    same_id = decoding.decode(program, inputs(30), KEY, np.zeros(30))
    assert len(set(outputs(same_id))) == 1


@pytest.mark.parametrize("verification", ["token", "block"])
def test_python_loop_and_segments_equal_the_compiled_loop(verification):
    program, ids = table_program(verification=verification), np.arange(10)
    wanted = decoding.decode(program, inputs(10), KEY, ids)
    state = decoding.start(program, inputs(10), KEY, ids)
    with jax.disable_jit():  # or every branch of every round is compiled anew
        eager = loop.run(program, state, 12, loop="python")
    assert_same_rows(decoding.finish(program.config, eager), wanted)
    rounds = 0
    while not np.asarray(state.done).all():
        state = decoding.run(program, state, 1)
        rounds += 1
    assert rounds == np.asarray(wanted.counts.rounds).max() > 2
    assert_same_rows(decoding.finish(program.config, state), wanted)
    np.testing.assert_array_equal(state.counts.scored, wanted.counts.scored)


def test_an_unfinished_decode_can_be_read():
    program, ids = table_program(), np.arange(10)
    whole = outputs(decoding.decode(program, inputs(10), KEY, ids))
    state = decoding.run(program, decoding.start(program, inputs(10), KEY, ids), 1)
    partial = outputs(decoding.finish(program.config, state))
    assert all(1 <= len(p) <= 4 for p in partial)
    assert partial == [w[: len(p)] for p, w in zip(partial, whole, strict=True)]


def test_refilled_rows_decode_as_fresh_ones():
    drafter, verifier = tiny_pair.pair()
    sampling = decoding.Sampling(temperature=np.float32(1.0))
    program = decoding.speculative_program(drafter, verifier, rules.Lossless(), CONFIG, sampling)
    source, later = tiny_pair.sources(8), tiny_pair.sources(8, seed=1)
    ids, later_ids = np.arange(8), np.arange(10, 18)
    first, second = t5_decode(source, ids), t5_decode(later, later_ids)
    state = decoding.run(program, decoding.start(program, source, KEY, ids), 3)
    rows = np.arange(8) % 3 == 0
    state = decoding.refill(program, state, rows, later, KEY, later_ids)
    mixed = decoding.finish(CONFIG, decoding.run(program, state, CONFIG.max_len))
    assert_same_rows(mixed, second, rows, rows)
    assert_same_rows(mixed, first, ~rows, ~rows)


def test_samples_of_one_example():
    program, many = table_program(num_samples=3), np.arange(20)
    output = decoding.decode(program, inputs(20), KEY, many)
    samples = np.array(outputs(output), dtype=object).reshape(20, 3)
    assert output.tokens.shape == (60, 12)
    assert sum(len(set(row)) == 3 for row in samples) > 15
    single = outputs(decoding.decode(table_program(), inputs(20), KEY, many))
    assert [row[0] for row in samples] == single  # sample 0 does not depend on num_samples
    few = np.array([7, 2])
    again = outputs(decoding.decode(program, inputs(2), KEY, few))
    assert again == [*samples[7], *samples[2]]


def test_samples_of_one_input_share_its_encoder_output():
    source, ids = tiny_pair.sources(8), np.arange(8)
    config = decoding.DecodeConfig(max_len=12, draft_len=3, num_samples=2)
    first_samples = slice(0, None, 2)
    assert_same_rows(t5_decode(source, ids, config=config), t5_decode(source, ids), first_samples)


@pytest.mark.sharding
def test_eight_devices_give_what_one_gives(devices):
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    source, ids = tiny_pair.sources(8), jnp.arange(8)
    wanted = t5_decode(source, ids)
    drafter, verifier = jax.device_put(tiny_pair.pair(), everywhere)
    output = decoding.speculative(
        drafter=drafter,
        verifier=verifier,
        rule=rules.Lossless(),
        inputs=jax.device_put(source, by_row),
        config=CONFIG,
        sampling=jax.device_put(decoding.Sampling(temperature=np.float32(1.0)), everywhere),
        key=jax.device_put(KEY, everywhere),
        example_ids=jax.device_put(ids, by_row),
    )
    assert len(output.tokens.sharding.device_set) == 8
    assert_same_rows(output, wanted)


def test_eos_ends_every_row_that_has_one():
    """Over many sampled rows: EOS stands last or nowhere, and a row without it is full."""
    output = decoding.decode(table_program(), inputs(2000), KEY, np.arange(2000))
    found = outputs(output)
    assert all(EOS not in tokens[:-1] for tokens in found)
    assert all(tokens[-1] == EOS or len(tokens) == 12 for tokens in found)
    assert {len(tokens) for tokens in found} == set(range(1, 13))
    sources, accepted = np.asarray(output.source), np.asarray(output.counts.accepted)
    np.testing.assert_array_equal((sources == 1).sum(axis=1), accepted)
    np.testing.assert_array_equal((sources != 0).sum(axis=1), output.lengths)
    np.testing.assert_array_equal(output.counts.committed, output.lengths)
    rejected = np.asarray(output.counts.examined) - accepted
    np.testing.assert_array_equal((sources == 2).sum(axis=1), rejected)
    np.testing.assert_array_equal(output.counts.scored, 4 * np.asarray(output.counts.rounds))
    np.testing.assert_array_equal(output.counts.drafter_calls, output.counts.scored)
