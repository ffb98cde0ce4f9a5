"""Keys of every kind: a row's noise depends on the key, its example and its sample alone, and rows are independent.

Of JAX's generators only threefry draws under `vmap` from each row's own key; T5X on TPUs sets another.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import cases
from decoding import executions
from decoding.tables import inputs, random_tables
from deferral import fitted_rules
from optimized import optimized_jit
from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import noise, rules
from speccascade_t5x.decoding import loop, rounds
from speccascade_t5x.decoding.compiled import CompiledDecoder
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import bigram

IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
KINDS = {f"typed-{impl}": functools.partial(jax.random.key, impl=impl) for impl in IMPLS}
KINDS |= {f"raw-{impl}": lambda seed, impl=impl: jax.random.key_data(jax.random.key(seed, impl=impl)) for impl in IMPLS}
KIND = pytest.mark.parametrize("kind", KINDS)
VOCAB = 4
CONFIG = decoding.DecodeConfig(max_len=5, draft_len=2)
PLAIN = executions.sampling_of()


@KIND
def test_every_rows_key_is_its_own(kind):
    """Keys of the state are threefry's; no two rows share noise, and a row's is the same wherever it stands."""
    ids = np.array([5, 900, 3, 77, 12, 41, 8, 2], np.int32)
    state = loop.init(program("lossless"), inputs(8), KINDS[kind](3), ids)
    assert state.keys.dtype == noise.from_seed(0).dtype
    drawn = np.asarray(rounds.row_uniforms(state, 6))
    assert len(np.unique(drawn)) == drawn.size
    for row in (0, 3, 7):
        alone = loop.init(program("lossless"), inputs(1), KINDS[kind](3), ids[row : row + 1])
        np.testing.assert_array_equal(rounds.row_uniforms(alone, 6)[0], drawn[row])
    other = loop.init(program("lossless"), inputs(8), KINDS[kind](4), ids)
    assert not np.intersect1d(rounds.row_uniforms(other, 6), drawn).size


def test_raw_and_typed_keys_say_the_same_and_every_word_counts():
    for impl in IMPLS:
        found = [jax.random.key_data(noise.threefry(KINDS[f"{form}-{impl}"](7))) for form in ("typed", "raw")]
        np.testing.assert_array_equal(*found)
    words = np.array([1, 2, 3, 4], np.uint32)
    keys = {
        tuple(jax.random.key_data(noise.threefry(words + change)).tolist()) for change in np.eye(4, dtype=np.uint32)
    }
    assert len(keys) == 4
    np.testing.assert_array_equal(jax.random.key_data(noise.threefry(words[:2])), words[:2])  # threefry's own stays


@pytest.mark.parametrize(
    "key", [7, np.int32(7), np.zeros(2), np.zeros((2, 2), np.uint32), jax.random.split(jax.random.key(0)), None]
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(UserError, match=r"not a random key: give jax.random.key|holds \(2,\) random keys"):
        decoding.decode(program("lossless"), inputs(2), key, np.arange(2))


def program(name: str) -> decoding.Program:
    """A rule by speculation, or another execution or drafter."""
    drafter, verifier = map(bigram, random_tables(3, VOCAB, 1))
    if name == "alone":
        return decoding.autoregressive_program(verifier, CONFIG, PLAIN)
    if name in ("token_cascade", "oracle"):
        rule = rules.by_name("chow", 0.6)
        return decoding.token_cascade_program(drafter, verifier, rule, CONFIG, PLAIN, name == "oracle")
    if name == "sequence_cascade":
        return decoding.sequence_cascade_program(drafter, verifier, CONFIG, PLAIN, -1.0)
    if name == "cascade_of_drafters":
        table = drafting.build_table([[2, 3, 0, 2], [3, 3, 0]], VOCAB)
        copier = drafting.max_gram(1, VOCAB, table, fill="sample", prompt=None)
        bound = drafting.cascade([drafter], [[1, 1], [0, 1]], copier=copier, sampling=PLAIN)
        return decoding.speculative_program(bound, verifier, rules.Lossless(), CONFIG, PLAIN)
    if name.startswith("fitted-"):
        rule = fitted_rules.rule(name.removeprefix("fitted-"))
    else:
        alpha = rules.get(name).alpha_range
        rule = rules.by_name(name, None if alpha is None else np.float32(0.3))
    return decoding.speculative_program(drafter, verifier, rule, CONFIG, PLAIN)


EXECUTIONS = ("alone", "token_cascade", "oracle", "sequence_cascade", "cascade_of_drafters")
TABLE_RULES = [name for name in rules.names() if name not in cases.NOT_A_TABLE_RULE]
EVERY = [*EXECUTIONS, *TABLE_RULES, *(f"fitted-{name}" for name in fitted_rules.ALPHAS)]
DAILY = ("alone", "token_cascade", "cascade_of_drafters", "token_v3")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in EVERY])
def test_batch_of_one_and_of_eight(name):
    """Compiled once per batch size: keys of all kinds reach the same program."""
    made, ids = program(name), np.arange(8, dtype=np.int32) * 7
    many, one = (CompiledDecoder(made, inputs(size)) for size in (8, 1))
    seen = set()
    for kind, make in KINDS.items():
        whole = many(made, inputs(8), make(1), ids)
        seen.add(np.asarray(whole.tokens).tobytes())
        assert len(np.unique(np.asarray(whole.tokens), axis=0)) > 1, kind
        for row in (0, 5):
            alone = one(made, inputs(1), make(1), ids[row : row + 1])
            np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row], err_msg=kind)
            np.testing.assert_allclose(alone.log_probs[0], whole.log_probs[row], atol=1e-5)
    assert len(seen) == 2  # raw or typed is one key; rbg's and unsafe_rbg's differ in what is folded or split, not here


@pytest.mark.parametrize("name", ["verifier", pytest.param("lossless", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "seed"), [("typed-rbg", 5), ("raw-unsafe_rbg", 3)])
def test_outputs_follow_their_law(kind, seed, name):
    """Rows of one key are independent draws. With the noise of row 0's key they are 0.13 and 0.41 (the verifier alone)
    or 0.02 off at these seeds, at which row 0 would end early: the others then met the same noise in every round.
    """
    config = executions.config_of()
    drafter, verifier = map(bigram, executions.TABLES)
    made = {
        "verifier": lambda: decoding.autoregressive_program(verifier, config, PLAIN),
        "lossless": lambda: decoding.speculative_program(drafter, verifier, rules.Lossless(), config, PLAIN),
    }[name]()
    rows = executions.ROWS
    run = optimized_jit(lambda program, key: decoding.decode(program, inputs(rows), key, jnp.arange(rows)))
    executions.check(made, executions.law_of("lossless"), run(made, KINDS[kind](seed)))


def test_the_default_generator_does_not_matter():
    """What is made of a seed here is the same under any `jax_default_prng_impl`; raw keys of four words are read."""
    made = program("token_v3")
    decoder, ids = CompiledDecoder(made, inputs(4)), np.arange(4, dtype=np.int32)
    wanted = decoder(made, inputs(4), noise.from_seed(5), ids).tokens
    for impl in ("rbg", "unsafe_rbg"):
        with jax.default_prng_impl(impl):
            again = CompiledDecoder(made, inputs(4))
            np.testing.assert_array_equal(again(made, inputs(4), noise.from_seed(5), ids).tokens, wanted)
            given = jax.random.PRNGKey(5)
            assert given.shape == (4,)
            found = again(made, inputs(4), given, ids).tokens
        np.testing.assert_array_equal(decoder(made, inputs(4), KINDS[f"typed-{impl}"](5), ids).tokens, found)
