"""A relative position table per layer, as T5X's `scalable_t5` has them, against a network in plain numpy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from oracles.per_layer_t5 import forward
from speccascade_t5x import decoding
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import T5, T5Config, param_shapes

SHARED = T5Config(
    vocab_size=23,
    emb_dim=12,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=2,
    head_dim=5,
    mlp_dim=16,
    mlp_activations=("gelu", "linear"),
)
PER_LAYER = dataclasses.replace(SHARED, relative_position_tables="per_layer")
TABLE = "relpos_bias/rel_embedding"


def flat_params(config: T5Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = traverse_util.flatten_dict(param_shapes(config), sep="/")
    return {name: rng.normal(0, 0.5, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}


def bound(config: T5Config, flat: dict[str, np.ndarray]) -> Bound:
    return Bound(T5(config), traverse_util.unflatten_dict(flat, sep="/"))


def tokens(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(source)
    encoder, decoder = rng.integers(1, 23, (2, source)), rng.integers(1, 23, (2, target))
    encoder[1, source - 3 :] = 0
    return encoder, decoder


def logits(model: Bound, encoder: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    apply = jax.jit(model.model.module.apply)
    return np.asarray(apply({"params": model.params}, encoder, decoder, np.ones_like(decoder)))


@pytest.mark.parametrize("lengths", [(7, 5), (150, 140)], ids=str)  # the second passes max_distance 128
def test_the_network_in_numpy_agrees(lengths):
    flat = flat_params(PER_LAYER)
    encoder, decoder = tokens(*lengths)
    wanted = forward(flat, PER_LAYER.num_heads, encoder, decoder)
    np.testing.assert_allclose(logits(bound(PER_LAYER, flat), encoder, decoder), wanted, atol=2e-4, rtol=0)
    swapped = {**flat, f"decoder/layers_0/{TABLE}": flat[f"decoder/layers_1/{TABLE}"]}
    other = logits(bound(PER_LAYER, swapped), encoder, decoder)
    assert np.abs(other - wanted).max() > 1e-2  # each layer reads a table of its own


def test_equal_tables_are_a_shared_one():
    flat = flat_params(SHARED)
    copied = {name: value for name, value in flat.items() if not name.endswith(TABLE)}
    for stack, count in (("encoder", 3), ("decoder", 2)):
        copied |= {f"{stack}/layers_{i}/{TABLE}": flat[f"{stack}/{TABLE}"] for i in range(count)}
    assert set(copied) == set(traverse_util.flatten_dict(param_shapes(PER_LAYER), sep="/"))
    encoder, decoder = tokens(7, 5)
    wanted = logits(bound(SHARED, flat), encoder, decoder)
    np.testing.assert_array_equal(logits(bound(PER_LAYER, copied), encoder, decoder), wanted)


def test_one_shared_table_is_read_once_per_stack():
    """The bias of a stack is computed once however many layers there are; per layer it is computed by each."""

    def tables_read(config: T5Config) -> int:
        params = traverse_util.unflatten_dict(flat_params(config), sep="/")
        encoder, decoder = tokens(7, 5)
        apply = lambda p: config.module.apply({"params": p}, encoder, decoder, decoder)  # noqa: E731
        program = str(jax.make_jaxpr(apply)(params))
        return program.count("dynamic_slice[") + program.count("gather[")

    more = dataclasses.replace(SHARED, num_encoder_layers=4, num_decoder_layers=4)
    assert tables_read(more) == tables_read(SHARED)
    assert tables_read(PER_LAYER) > tables_read(SHARED)


def test_a_greedy_decode_follows_the_numpy_network():
    flat = flat_params(PER_LAYER)
    encoder, _ = tokens(7, 5)
    decoder = np.zeros((2, 1), int)
    for _ in range(8):
        best = forward(flat, PER_LAYER.num_heads, encoder, decoder)[:, -1].argmax(-1)
        decoder = np.concatenate([decoder, best[:, None]], axis=1)
    model = bound(PER_LAYER, flat)
    options = {"config": decoding.DecodeConfig(max_len=8, eos_id=22), "sampling": decoding.Sampling(temperature=0.0)}
    found = decoding.autoregressive(
        model=model,
        inputs={"encoder_input_tokens": encoder.astype(np.int32)},
        key=jax.random.key(0),
        example_ids=np.arange(2),
        **options,
    )
    for row in range(2):
        length = int(found.lengths[row])
        np.testing.assert_array_equal(found.tokens[row, :length], decoder[row, 1 : 1 + length])
