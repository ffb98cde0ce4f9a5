"""Features and heads against plain numpy, on pairs that are near ties, certain, or both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import cases
from deferral import fitted_rules
from deferral.fitted_rules import CLASSES, SPEC, TOP, VOCAB
from oracles import deferral as oracle
from speccascade_t5x.core import probs
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.deferral import FeatureSpec, Head, HeadConfig, features, labels
from speccascade_t5x.deferral.head import as_tree, fresh, from_tree
from speccascade_t5x.interfaces import UserError


def some_pair(rows: int = 12) -> Pair:
    drafter, verifier = cases.random_logits(4, rows, VOCAB)
    drafter[0] = verifier[0]
    drafter[1] = [60.0, 0.0, 0.0, 0.0]  # certain: the others underflow to nothing
    verifier[2] = [1.0, 1.0, 1.0, 1.0]  # a tie
    q, p = probs.raw(jnp.asarray(drafter)), probs.raw(jnp.asarray(verifier))
    return Pair(q, p, q, p, position=jnp.arange(rows))


def test_prefix_features_are_the_oracles():
    pair, classes = some_pair(), jnp.asarray(CLASSES)
    found = jax.jit(lambda pair: features.prefix_features(pair, SPEC, classes))(pair)
    assert found.shape == (12, len(SPEC.names)) and np.isfinite(found).all()
    for i, (q, p) in enumerate(zip(np.asarray(pair.q, float), np.asarray(pair.p, float), strict=True)):
        wanted = oracle.prefix_features(q.tolist(), p.tolist(), i, TOP, CLASSES, 2)
        np.testing.assert_allclose(found[i], wanted, rtol=0, atol=2e-5, err_msg=str(i))


def test_a_fitted_law_is_the_oracles_and_sums_to_one():
    pair, head = some_pair(), fitted_rules.head("token")
    found = np.asarray(jax.jit(lambda pair: head.law(pair))(pair))
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-5)
    variables = jax.tree.map(np.asarray, head.variables)
    for i, (q, p) in enumerate(zip(np.asarray(pair.q, float), np.asarray(pair.p, float), strict=True)):
        wanted = oracle.fitted_law(variables, q.tolist(), p.tolist(), i, TOP, CLASSES, 2, 2)
        np.testing.assert_allclose(found[i], wanted, rtol=0, atol=2e-5, err_msg=str(i))


def test_a_fresh_token_head_says_what_the_verifier_says():
    config = HeadConfig("token", SPEC)
    pair = some_pair()
    head = Head(config, fresh(config, jax.random.key(0), 10), jnp.asarray(CLASSES))
    np.testing.assert_allclose(head.law(pair), pair.p_raw, atol=1e-6)


def test_a_head_survives_its_files():
    head = fitted_rules.head("prefix")
    again = from_tree(head.config, jax.tree.map(np.asarray, as_tree(head)))
    np.testing.assert_array_equal(again.gap(some_pair()), head.gap(some_pair()))


def test_what_a_head_cannot_read_is_said():
    pair = some_pair()
    with pytest.raises(UserError, match="needs a token head"):
        fitted_rules.head("prefix").law(pair)
    with pytest.raises(UserError, match="output position"):
        features.prefix_features(Pair(pair.q, pair.p, pair.q, pair.p), SPEC, jnp.asarray(CLASSES))
    with pytest.raises(UserError, match="hidden_p of width 3, but none is known"):
        features.hidden_states(pair, FeatureSpec(hidden_p=3))
    with pytest.raises(UserError, match="top >= 2"):
        FeatureSpec(top=1)


def test_labels_and_the_exact_gap():
    pair = some_pair()
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(VOCAB), 12)
    by_token = []
    for token in range(VOCAB):
        found = labels.realised(pair.q, pair.p, jnp.full(12, token))
        columns = {name: np.asarray(getattr(found, name)) for name in ("log_q", "log_p", "hit_q", "hit_p")}
        np.testing.assert_allclose(columns["hit_q"], [oracle.ranked(law)[0] == token for law in np.asarray(pair.q)])
        by_token.append([labels.gap(columns, loss) for loss in ("zero_one", "log")])
    # The exact gap is the mean of the realised one over tokens of P.
    for i, loss in enumerate(("zero_one", "log")):
        wanted = sum(truth[:, token] * by_token[token][i] for token in range(VOCAB))
        found = labels.expected_gap(jnp.asarray(truth, jnp.float32), pair.q, pair.p, loss)
        np.testing.assert_allclose(found, wanted, atol=1e-4)
