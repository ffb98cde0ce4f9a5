"""A NaN of either model never passes unseen: whatever the rule, the drafter and the execution, log_prob is NaN.

What follows token 3 is broken by one NaN among the logits. Every decode holds, side by side and from the same noise,
rows of healthy models, of a broken verifier and of each broken drafter. Two properties:

  a row whose output has a position that was decided on a broken law has log_prob NaN;
  a row without NaN is, token by token, the healthy one: nothing broken had a part in it.

Four tokens are decoded without jit, or compiling a program per rule would take minutes. The last tests are compiled, at
the width of a real vocabulary, where XLA's CPU compiler loses NaN in reductions.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import cases
from decoding.tables import EOS
from deferral import fitted_rules
from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.decoding import loop
from speccascade_t5x.drafting import Confidence, Deferral
from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_DRAFTER,
    SOURCE_RESIDUAL,
    SOURCE_VERIFIER,
    Array,
    Bound,
    PyTree,
)

VOCAB, CONTEXTS, BAD, ROWS, MAX_LEN = 4, 4, 3, 24, 4
WIDE = 32_128
EVERY = tuple(range(6))  # who wrote a token
PLAIN = decoding.Sampling(np.float32(1), np.int32(0), np.float32(1), np.float32(0))
SHAPED = decoding.Sampling(np.float32(0.8), np.int32(3), np.float32(0.95), np.float32(0))
GREEDY = decoding.Sampling(np.float32(0), np.int32(0), np.float32(1), np.float32(0))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Versions:
    """A LanguageModel whose next token depends on the last one, modulo CONTEXTS, and on the row's version of it."""

    vocab_size: int

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        return {"version": jnp.asarray(inputs["version"])}

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        return jnp.zeros(len(inputs["version"]), jnp.int32), jnp.zeros(len(inputs["version"]), jnp.int32)

    def extend(
        self, params: PyTree, cache: PyTree, tokens: Array, positions: Array, capture: tuple[str, ...] = ()
    ) -> tuple[Array, PyTree]:
        return params[cache["version"][:, None], tokens % CONTEXTS], cache


@functools.cache
def pair(count: int = 2, vocab: int = VOCAB) -> list[Bound]:
    """The verifier and count - 1 drafters; in version i + 1 the i-th of them is broken. Alike, not equal, EOS rare."""
    common = np.random.default_rng(9).normal(0, 0.6, (CONTEXTS, vocab))
    found = []
    for model in range(count):
        logits = common + np.random.default_rng(model).normal(0, 0.6, common.shape)
        logits[:, [EOS, BAD]] -= [2.0, 0.8]
        versions = np.stack([logits] * (count + 1)).astype(np.float32)
        versions[model + 1, BAD, (7 * model + 2) % vocab] = np.nan
        found.append(Bound(Versions(vocab), jnp.asarray(versions)))
    return found


def config_of(draft_len: int = 2, **options) -> decoding.DecodeConfig:
    return decoding.DecodeConfig(**{"max_len": MAX_LEN, "draft_len": draft_len, **options})


def run(program: decoding.Program, count: int = 2, jit: bool = False) -> list[dict[str, np.ndarray]]:
    """Output columns of every version, healthy first."""
    version = np.repeat(np.arange(count + 1), ROWS)
    ids = jnp.asarray(np.tile(np.arange(ROWS), count + 1), jnp.int32)
    if jit:
        output = decoding.decode(program, {"version": version}, jax.random.key(0), ids)
    else:
        with jax.disable_jit():
            state = loop.init(program, {"version": version}, jax.random.key(0), ids)
            state = loop.run(program, state, program.max_rounds, loop="python")
            output = decoding.finish(program.config, state)
    columns = {name: np.asarray(getattr(output, name)) for name in ("tokens", "source", "lengths", "log_probs")}
    return [{name: column[version == i] for name, column in columns.items()} for i in range(count + 1)]


def lost(rows: dict[str, np.ndarray]) -> np.ndarray:
    return np.isnan(rows["log_probs"])


def decided(rows: dict[str, np.ndarray], writers: tuple[int, ...]) -> np.ndarray:
    """[B] bool: an output position after BAD that one of these wrote."""
    before = np.pad(rows["tokens"][:, :-1], ((0, 0), (1, 0))) % CONTEXTS
    inside = np.arange(before.shape[1]) < rows["lengths"][:, None]
    return (inside & (before == BAD) & np.isin(rows["source"], writers)).any(axis=1)


def assert_seen(healthy: dict, broken: dict, writers: tuple[int, ...] | None) -> None:
    """Both properties; `writers` are those whose tokens are decided on the broken model's law (None: not told)."""
    assert not lost(healthy).any()
    assert lost(broken).any() and not lost(broken).all()
    if writers is not None:
        assert decided(broken, writers).any() and lost(broken)[decided(broken, writers)].all()
    kept = ~lost(broken)
    for name in ("tokens", "source", "lengths"):
        np.testing.assert_array_equal(broken[name][kept], healthy[name][kept])
    np.testing.assert_allclose(broken["log_probs"][kept], healthy["log_probs"][kept], atol=1e-5)


VARIANTS = {cases.variant_id(variant): variant for variant in cases.variants(rules.names())}
RULES = [*VARIANTS, *(f"fitted-{name}" for name in fitted_rules.ALPHAS)]


def rule_of(name: str) -> rules.Rule:
    """One that keeps and defers here."""
    if name.startswith("fitted-"):
        return fitted_rules.rule(name.removeprefix("fitted-"))
    known, options = VARIANTS[name]
    alphas = cases.ALPHAS[known]
    return rules.by_name(known, alphas[len(alphas) // 2], **options)


def test_every_registered_rule_is_here():
    assert {type(rule_of(name)) for name in RULES} == {rules.get(name) for name in rules.names()}


# Verification knows no rules: by blocks, one of each kind is enough for every day, and one fitted rule of each class.
DAILY = {(name, "token") for name in VARIANTS} | {(name, "block") for name in ("lossless", "diff", "token_v3", "min_p")}
DAILY |= {(f"fitted-{name}", "token") for name in ("gap", "token_v1", "opt_isotonic")}


@pytest.mark.parametrize(
    ("name", "verification"),
    [
        pytest.param(name, how, marks=() if (name, how) in DAILY else pytest.mark.slow)
        for name in RULES
        for how in ("token", "block")
    ],
)
def test_speculation(name, verification):
    rule, (verifier, drafter) = rule_of(name), pair()
    program = decoding.speculative_program(drafter, verifier, rule, config_of(verification=verification), PLAIN)
    healthy, of_verifier, of_drafter = run(program)
    assert_seen(healthy, of_verifier, EVERY)
    assert_seen(healthy, of_drafter, EVERY if rule.reads_drafter else (SOURCE_ACCEPTED, SOURCE_RESIDUAL))


@pytest.mark.parametrize("sampling", [SHAPED, GREEDY], ids=["shaped", "greedy"])
@pytest.mark.parametrize("name", ["chow", "min_p", "lossy_sd-shifted"])
def test_speculation_at_other_temperatures(name, sampling):
    """Truncation turns a law of NaN into zeros, an argmax into token 0."""
    verifier, drafter = pair()
    rule = rule_of(name)
    healthy, *broken = run(decoding.speculative_program(drafter, verifier, rule, config_of(), sampling))
    for rows, writers in zip(broken, (EVERY, EVERY if rule.reads_drafter else (1, 2)), strict=True):
        if sampling is GREEDY:  # one path: all of its rows are lost, or none has met BAD
            assert lost(rows).all() == decided(rows, writers).all() and not lost(healthy).any()
        else:
            assert_seen(healthy, rows, writers)


@pytest.mark.parametrize(
    "stop", [Confidence(0.4), Deferral(rules.by_name("chow", 0.0))], ids=["confidence", "deferral"]
)
def test_drafts_that_end_early(stop):
    """A stop test that is passed or failed by NaN must not hide it."""
    verifier, drafter = pair()
    program = decoding.speculative_program(drafter, verifier, rules.Lossless(), config_of(), PLAIN, stop)
    healthy, of_verifier, of_drafter = run(program)
    assert_seen(healthy, of_verifier, EVERY)
    assert_seen(healthy, of_drafter, None)


@pytest.mark.parametrize("role", ["verifier", "drafter"])
def test_a_model_alone(role):
    healthy, broken, _ = run(decoding.autoregressive_program(pair()[0], config_of(), PLAIN, role))
    assert_seen(healthy, broken, EVERY)


@pytest.mark.parametrize(("rule", "alpha"), [("chow", 0.55), ("chow", 0.2), ("chow_log", 1.2)])
def test_token_cascade(rule, alpha):
    verifier, drafter = pair()
    made = decoding.token_cascade_program(drafter, verifier, rules.by_name(rule, alpha), config_of(), PLAIN)
    healthy, of_verifier, of_drafter = run(made)
    assert_seen(healthy, of_verifier, (SOURCE_VERIFIER,))
    assert_seen(healthy, of_drafter, EVERY)  # its law is read where it defers, too


def test_oracle():
    verifier, drafter = pair()
    made = decoding.token_cascade_program(drafter, verifier, rules.by_name("diff", 0.03), config_of(), PLAIN, True)
    healthy, *broken = run(made, jit=True)  # JAX knows no scan of length 0 without jit
    for rows in broken:
        assert_seen(healthy, rows, EVERY)


@pytest.mark.parametrize("confidence", ["sum", "mean", "quantile"])
def test_sequence_cascade(confidence):
    verifier, drafter = pair()
    threshold = {"sum": -5.0, "mean": -1.2, "quantile": -1.5}[confidence]
    made = decoding.sequence_cascade_program(drafter, verifier, config_of(), PLAIN, threshold, confidence, 0.25)
    healthy, of_verifier, of_drafter = run(made)
    assert {SOURCE_DRAFTER, SOURCE_VERIFIER} <= set(np.unique(healthy["source"]))
    assert_seen(healthy, of_verifier, (SOURCE_VERIFIER,))
    assert_seen(healthy, of_drafter, (SOURCE_DRAFTER,))


# K matrix, lenience, rules between drafters, the rule of the verifier's review, whose law it reads.
CASCADES = {
    "exact": ([[2, 0], [0, 1]], None, (None, None), "lossless", None),
    "lenient": ([[2, 1], [0, 2]], 2.0, (None, None), "lossless", None),
    "rule_hides": ([[2, 0], [0, 2]], None, (("diff", 0.4), None), "lossless", None),
    "min_p_hides": ([[2, 0], [0, 2]], None, (("min_p", 0.5), None), "lossless", None),
    "reads": ([[2, 0], [0, 2]], None, (("diff", 0.4), None), "chow", 0),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("exact", "rule_hides") else pytest.mark.slow) for n in CASCADES]
)
def test_cascade_of_drafters(name):
    """A NaN of a smaller drafter changes what the larger one is said to have drafted: lossless is then wrong."""
    k, lenience, between, rule, reads = CASCADES[name]
    verifier, *drafters = pair(3)
    between = [rule and rules.by_name(*rule) for rule in between]
    bound = drafting.cascade(drafters, k, lenience=lenience, rules=between, sampling=PLAIN, reads=reads)
    made = decoding.speculative_program(bound, verifier, rule_of(rule), config_of(sum(k[0])), PLAIN)
    healthy, of_verifier, *of_drafters = run(made, 3, jit=True)
    assert_seen(healthy, of_verifier, EVERY)
    for rows in of_drafters:
        assert_seen(healthy, rows, None)


def wide_program(name: str) -> tuple[decoding.Program, tuple[int, ...], tuple[int, ...]]:
    """(program, who is decided on the verifier's law, on the drafter's)."""
    verifier, drafter = pair(vocab=WIDE)
    config, both = config_of(), (drafter, verifier)
    if name == "token_cascade":
        made = decoding.token_cascade_program(*both, rules.by_name("chow", 0.999), config, PLAIN)
        return made, (SOURCE_VERIFIER,), EVERY
    if name == "sequence_cascade":
        made = decoding.sequence_cascade_program(*both, config, PLAIN, -10.7, "quantile", 0.25)
        return made, (SOURCE_VERIFIER,), (SOURCE_DRAFTER,)
    rule, verification = name.split("-")
    config = dataclasses.replace(config, verification=verification)
    made = decoding.speculative_program(*both, rule_of(rule), config, PLAIN)
    return made, EVERY, EVERY if made.rule.reads_drafter else (SOURCE_ACCEPTED, SOURCE_RESIDUAL)


@pytest.mark.parametrize("name", ["chow-token", "min_p-block", "token_cascade", "sequence_cascade"])
def test_a_real_vocabulary_compiled(name):
    made, by_verifier, by_drafter = wide_program(name)
    healthy, of_verifier, of_drafter = run(made, jit=True)
    assert_seen(healthy, of_verifier, by_verifier)
    assert_seen(healthy, of_drafter, by_drafter)
