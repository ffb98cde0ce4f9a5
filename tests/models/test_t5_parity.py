"""T5 against the real T5X network: fixtures made with the library itself, and the trained pair."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from models.fixtures import load
from speccascade_t5x import decoding
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import param_shapes

FIXTURES = ("t5x_native", "t5x_v1_0")
TOLERANCE = 1e-5  # of logits that reach about 4; the promise is 1e-4


@pytest.fixture(params=FIXTURES)
def fixture(request, fixtures) -> Path:
    return fixtures / request.param


def forward(bound: Bound, *arrays, **more) -> np.ndarray:
    apply = jax.jit(lambda params: bound.model.module.apply({"params": params}, *arrays, **more))
    logits = apply(bound.params)
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def arguments(expected: dict, prefix: str = "") -> list[np.ndarray]:
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    return [expected[prefix + name] for name in names]


def test_logits(fixture):
    bound, expected = load(fixture)
    np.testing.assert_allclose(forward(bound, *arguments(expected)), expected["logits"], atol=TOLERANCE, rtol=0)


def test_logits_without_padding_mask_of_the_targets(fixture):
    bound, expected = load(fixture)
    *tokens, targets = arguments(expected)
    np.testing.assert_allclose(
        forward(bound, *tokens, np.ones_like(targets)),
        expected["logits_targets_all_ones"],
        atol=TOLERANCE,
        rtol=0,
    )


def test_encoder_output(fixture):
    bound, expected = load(fixture)
    tokens = expected["encoder_input_tokens"]
    encoded = bound.model.module.apply({"params": bound.params}, tokens, method="encode")
    np.testing.assert_allclose(encoded, expected["encoded"], atol=TOLERANCE, rtol=0)


def test_packed_examples_do_not_see_each_other(fixture):
    bound, expected = load(fixture)
    segments = [expected[f"packed_{side}_segment_ids"] for side in ("encoder", "decoder")]
    assert segments[0].max() > 1
    np.testing.assert_allclose(
        forward(bound, *arguments(expected, "packed_"), *segments),
        expected["packed_logits"],
        atol=TOLERANCE,
        rtol=0,
    )


def test_every_relative_position_bucket(fixture):
    """Lengths 160 and 150 pass max_distance 128, and hit distances on the boundary of two buckets."""
    bound, expected = load(fixture)
    logits = forward(bound, *arguments(expected, "long_"))
    np.testing.assert_allclose(logits[:, expected["long_logits_positions"]], expected["long_logits"], atol=3e-5, rtol=0)


def test_bfloat16_activations(fixture):
    """Rounding alone moves these logits by up to 0.05 from float32; twice that is the tolerance here."""
    bound, expected = load(fixture, dtype="bfloat16")
    logits = forward(bound, *arguments(expected))
    np.testing.assert_allclose(logits, expected["logits_bf16_activations"], atol=0.1, rtol=0)
    assert np.abs(logits - expected["logits"]).max() > 1e-3  # bfloat16 really was used


def test_parameter_tree(fixture):
    bound, _ = load(fixture)
    wanted = json.loads((fixture / "params_tree.json").read_text())
    found = {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for name, leaf in traverse_util.flatten_dict(param_shapes(bound.model.config), sep="/").items()
    }
    assert found == wanted


def test_greedy_decode(fixture):
    bound, expected = load(fixture)
    check_greedy(bound, expected["encoder_input_tokens"], 16, expected)


def check_greedy(bound: Bound, inputs: np.ndarray, max_len: int, expected: dict) -> None:
    """Checks a greedy decode against T5X's ids and log-probabilities."""
    output = decoding.autoregressive(
        model=bound,
        inputs={"encoder_input_tokens": inputs},
        config=decoding.DecodeConfig(max_len=max_len),
        sampling=decoding.Sampling(temperature=0.0),
        key=jax.random.key(0),
        example_ids=np.arange(len(inputs)),
    )
    np.testing.assert_array_equal(output.tokens, expected["greedy_ids"])
    np.testing.assert_allclose(output.log_probs, expected["greedy_log_prob"], atol=1e-3, rtol=0)
    np.testing.assert_array_equal(output.lengths, np.asarray(output.counts.committed))


@pytest.fixture
def trained(fixtures):
    return load(fixtures / "restore_de_drafter")


def test_logits_of_a_trained_model(trained):
    bound, expected = trained
    wanted = expected["logits_first8"]
    rows, length = wanted.shape[:2]
    encoder, decoder, _ = (array[:rows] for array in arguments(expected))
    decoder = decoder[:, :length]
    logits = forward(bound, encoder, decoder, np.ones_like(decoder))
    # Trained logits reach far higher than the fixtures' (tens, not four).
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)


def test_greedy_decode_of_a_trained_model(trained):
    bound, expected = trained
    check_greedy(bound, expected["encoder_input_tokens"], 96, expected)
