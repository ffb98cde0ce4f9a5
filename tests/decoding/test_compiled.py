"""A decode compiled ahead gives what the jitted one gives, and one program serves all traced values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.tables import inputs, random_tables
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.decoding import api
from speccascade_t5x.decoding.compiled import CompiledDecoder, shape_key
from speccascade_t5x.models import bigram

CONFIG = decoding.DecodeConfig(max_len=12, draft_len=3)
ROWS, VOCABULARY = 6, 9
IDS = np.arange(ROWS, dtype=np.int32)


def program(alpha=0.3, temperature=1.0, config=CONFIG, vocab=VOCABULARY, rule="token_v3", seed=0):
    drafter, verifier = random_tables(seed, vocab, 1)
    sampling = decoding.Sampling(jnp.float32(temperature), jnp.int32(0), jnp.float32(1), jnp.float32(0))
    alpha = alpha if rules.get(rule).alpha_range else None
    return decoding.speculative_program(bigram(drafter), bigram(verifier), rules.by_name(rule, alpha), config, sampling)


@pytest.fixture(scope="module")
def compiled() -> CompiledDecoder:
    return CompiledDecoder(program(), inputs(ROWS))


def leaves(output: decoding.Output) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(output)]


def test_it_decodes_as_the_jitted_entry_point_does(compiled):
    for alpha, temperature, seed, key in ((0.3, 1.0, 0, 0), (0.9, 1.0, 0, 1), (0.3, 0.0, 0, 1), (0.3, 0.7, 4, 2)):
        chosen = program(alpha, temperature, seed=seed)
        expected = decoding.decode(chosen, inputs(ROWS), jax.random.key(key), IDS)
        found = compiled(chosen, inputs(ROWS), jax.random.key(key), jnp.asarray(IDS))
        for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_traced_values_reach_the_compiled_program(compiled):
    def tokens(key=0, **values):
        output = compiled(program(**values), inputs(ROWS), jax.random.key(key), jnp.asarray(IDS))
        return np.asarray(output.tokens).tolist()

    plain = tokens()
    assert tokens() == plain  # nothing of the program or its parameters was donated away
    for change in ({"alpha": 1.0}, {"temperature": 0.0}, {"seed": 7}, {"key": 1}):
        assert tokens(**change) != plain, change


def test_decoding_traces_nothing(compiled):
    caches = [function._cache_size() for function in (api.start, api.run, api.finish)]
    compiled(program(alpha=0.6), inputs(ROWS), jax.random.key(0), jnp.asarray(IDS))
    assert [function._cache_size() for function in (api.start, api.run, api.finish)] == caches


def test_one_key_for_what_can_share_a_program():
    same = shape_key(program(), inputs(ROWS))
    assert hash(same) == hash(shape_key(program(alpha=0.9, temperature=0.0, seed=3), inputs(ROWS)))
    assert same == shape_key(program(alpha=0.9, temperature=0.0, seed=3), inputs(ROWS))
    others = [
        shape_key(program(), inputs(ROWS + 1)),
        shape_key(program(vocab=VOCABULARY + 1), inputs(ROWS)),
        shape_key(program(rule="lossless"), inputs(ROWS)),
        shape_key(program(rule="chow"), inputs(ROWS)),
    ]
    for change in ({"draft_len": 4}, {"verification": "block"}, {"num_samples": 2}, {"stop_sequences": ((3,),)}):
        others.append(shape_key(program(config=dataclasses.replace(CONFIG, **change)), inputs(ROWS)))
    assert same not in others
    assert len(set(others)) == len(others)


def test_it_says_what_compiling_took_and_what_the_loop_holds(compiled):
    assert compiled.seconds > 0
    assert compiled.temporary_bytes() > 0
    stages = compiled.start(program(), inputs(ROWS), jax.random.key(0), jnp.asarray(IDS))
    assert not np.asarray(stages.done).any()
    whole = compiled(program(), inputs(ROWS), jax.random.key(0), jnp.asarray(IDS))
    by_stages = compiled.finish(compiled.run(program(), stages))
    np.testing.assert_array_equal(by_stages.tokens, whole.tokens)
