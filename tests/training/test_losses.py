"""Losses against slow float64 numpy, and against what T5X computed."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.training import losses, teacher_forcing

B, T, V = 3, 5, 11


@pytest.fixture
def random():
    return np.random.default_rng(1)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def oracle_cross_entropy(logits, targets, smoothing, z_loss):
    """T5X's definition with a whole smoothed one-hot label per position, minus that label's entropy."""
    log_q = log_softmax(logits)
    label = np.full((*targets.shape, V), smoothing / (V - 1))
    np.put_along_axis(label, targets[..., None], 1.0 - smoothing, axis=-1)
    entropy = -sum(mass * math.log(mass) for mass in label[0, 0] if mass > 0)
    z = z_loss * np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2
    return -(label * log_q).sum(-1) - entropy, z


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_cross_entropy(random, smoothing, z_loss):
    logits, targets = random.normal(size=(B, T, V)) * 3, random.integers(0, V, (B, T))
    expected = oracle_cross_entropy(logits, targets, smoothing, z_loss)
    found = losses.cross_entropy(jnp.float32(logits), targets, smoothing, z_loss)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_perfect_smoothed_model_has_no_loss():
    label = np.full(V, 0.2 / (V - 1))
    label[4] = 0.8
    loss, _ = losses.cross_entropy(jnp.log(jnp.float32(label)), jnp.int32(4), 0.2)
    assert abs(float(loss)) < 1e-6


@pytest.mark.parametrize("fixture", ["t5x_native", "t5x_v1_0"])
def test_loss_and_scores_of_t5x(fixtures, fixture):
    folder = fixtures / fixture
    expected = np.load(folder / "expected.npz")
    bound = checkpoints.load(folder / "checkpoint_3")
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    batch = {name: jnp.asarray(expected[name]) for name in names}
    logits = teacher_forcing.logits(bound.model.config, bound.params, batch)
    config = losses.LossConfig(z_loss=1e-4)
    loss, _ = losses.objective(logits, batch, losses.normalized_weights(batch, "none"), config)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    nll, _ = losses.cross_entropy(logits, batch["decoder_target_tokens"])
    scores = -jnp.sum(nll * (batch["decoder_target_tokens"] > 0), axis=-1)
    np.testing.assert_allclose(scores, expected["score_batch"], rtol=1e-5)


def make_batch(random, packed=False):
    targets = random.integers(1, V, (B, T)).astype(np.int32)
    weights = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0.5, 1, 1, 0]], np.float32)
    batch = {"decoder_target_tokens": targets, "decoder_loss_weights": weights}
    if packed:
        batch["decoder_segment_ids"] = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [1, 1, 2, 2, 0]], np.int32)
    return batch


def test_normalizers(random):
    batch = make_batch(random)
    weights = batch["decoder_loss_weights"]
    total = weights.sum()
    for normalizer, expected in {
        "none": weights,
        "real_tokens": weights / total,
        "all_tokens": weights / 15,
        7.0: weights / 7,
        "sequences": weights / weights.sum(1, keepdims=True) / 3,
    }.items():
        np.testing.assert_allclose(losses.normalized_weights(batch, normalizer), expected, rtol=1e-6)
    packed = make_batch(random, packed=True)
    found = np.asarray(losses.normalized_weights(packed, "sequences"))
    # Rows 0 and 2 hold two sequences each; each of the five weighs the same.
    sums = [found[0, :2], found[0, 2:], found[1], found[2, :2], found[2, 2:]]
    np.testing.assert_allclose([part.sum() for part in sums], [0.2] * 5, rtol=1e-6)
    del batch["decoder_loss_weights"]
    batch["decoder_target_tokens"][1, 3:] = 0
    assert float(losses.normalized_weights(batch, "none").sum()) == 13  # padding has no weight of its own


@pytest.mark.parametrize("name", losses.DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_divergence(random, name, temperature):
    ours, teacher = random.normal(size=(2, B, T, V)) * 2
    q, p = (np.exp(log_softmax(x / temperature)) for x in (ours, teacher))
    expected = {
        "forward_kl": (p * np.log(p / q)).sum(-1),
        "reverse_kl": (q * np.log(q / p)).sum(-1),
        "total_variation": 1 - np.minimum(p, q).sum(-1),
    }[name]
    config = losses.DistillConfig(name, 1.0, temperature)
    found = losses.divergence(jnp.float32(ours), jnp.float32(teacher), config)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses.divergence(ours, ours, config), 0, atol=1e-6)


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_divergence_and_its_gradient_are_finite_for_certain_models(name):
    ours, teacher = jnp.array([0.0, 500.0, -1e4]), jnp.array([500.0, 0.0, -1e4])
    value, slope = jax.value_and_grad(losses.divergence)(ours, teacher, losses.DistillConfig(name))
    assert np.isfinite(value) and np.isfinite(slope).all() and value > 0.9


def test_objective_mixes_and_leaves_the_teacher_alone(random):
    batch = make_batch(random)
    ours, teacher = jnp.float32(random.normal(size=(2, B, T, V)))
    weights = losses.normalized_weights(batch, "real_tokens")
    config, distill = losses.LossConfig(z_loss=0.2, label_smoothing=0.1), losses.DistillConfig("reverse_kl", 0.3)
    loss, sums = losses.objective(ours, batch, weights, config, teacher, distill)
    ce, z = oracle_cross_entropy(ours, batch["decoder_target_tokens"], 0.1, 0.2)
    q, p = log_softmax(ours), log_softmax(teacher)
    kl = (np.exp(q) * (q - p)).sum(-1)
    counted = batch["decoder_loss_weights"]
    np.testing.assert_allclose(loss, (counted * (0.7 * ce + 0.3 * kl + z)).sum() / counted.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["divergence"], (counted * kl).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["correct"], (counted * (q.argmax(-1) == batch["decoder_target_tokens"])).sum())
    objective = lambda x, y: losses.objective(x, batch, weights, config, y, distill)[0]  # noqa: E731
    of_ours, of_teacher = jax.grad(objective, (0, 1))(ours, teacher)
    assert np.abs(of_ours).max() > 1e-3 and not np.abs(of_teacher).any()
    assert not np.abs(of_ours[1, 3:]).any()  # no weight, no gradient


def test_evaluation_means(random):
    batch = make_batch(random)
    ours, teacher = random.normal(size=(2, B, T, V))
    teacher = np.concatenate([teacher, np.full((B, T, 2), -50.0)], axis=-1)  # a padded tail
    found = losses.means(losses.evaluation_sums(jnp.float32(ours), batch, jnp.float32(teacher)))
    q, p = log_softmax(ours), log_softmax(teacher)
    targets, counted = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    mean = lambda x: (x * counted).sum() / counted.sum()  # noqa: E731
    label = lambda x: np.take_along_axis(x, targets[..., None], -1)[..., 0]  # noqa: E731
    expected = {
        "nll": mean(-label(q)),
        "accuracy": mean(q.argmax(-1) == targets),
        "acceptance": mean(np.minimum(np.exp(q), np.exp(p[..., :V])).sum(-1)),
        "greedy_agreement": mean(q.argmax(-1) == p.argmax(-1)),
        "teacher_nll": mean(-label(p)),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.LossConfig(normalizer="tokens"), "normalizer='tokens' is unknown: use a number or none"),
        (lambda: losses.LossConfig(normalizer=0.0), "must be above 0"),
        (lambda: losses.LossConfig(label_smoothing=1.0), "label_smoothing"),
        (lambda: losses.LossConfig(z_loss=-1.0), "z_loss"),
        (lambda: losses.DistillConfig("kl"), "use forward_kl, reverse_kl, total_variation"),
        (lambda: losses.DistillConfig(weight=1.5), "weight"),
        (lambda: losses.DistillConfig(temperature=0.0), "temperature"),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(UserError, match=words):
        make()
