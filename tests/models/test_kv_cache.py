"""The decode cache: blocks, single steps and the teacher-forced forward are the same function."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.tables import lookup
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import (
    T5,
    T5Config,
    TableModel,
    bigram,
    init_params,
    kv_cache,
    logical_axes,
    param_shapes,
)

LENGTH = 9
SOURCE = 7
TINY = {
    "vocab_size": 19,
    "emb_dim": 16,
    "num_heads": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "head_dim": 6,  # 2 x 6 is not emb_dim, so a swapped axis shows
    "mlp_dim": 24,
}
SMALLER = {**TINY, "num_encoder_layers": 1, "num_decoder_layers": 1}
KINDS = {
    "1.0-tied": T5Config(**TINY, mlp_activations=("relu",), logits_via_embedding=True),
    "1.0-untied": T5Config(**SMALLER, mlp_activations=("relu",)),
    "1.1-tied": T5Config(**SMALLER, mlp_activations=("gelu", "linear"), logits_via_embedding=True),
    "1.1-untied": T5Config(**TINY, mlp_activations=("gelu", "linear")),
    "table-per-layer": T5Config(**TINY, mlp_activations=("gelu", "linear"), relative_position_tables="per_layer"),
}


@functools.cache
def tiny(kind: str):
    """(model, params) whose norms and position tables are not the initialisers' ones and small numbers."""
    config = KINDS[kind]
    params = init_params(config, jax.random.key(0))
    rng = np.random.default_rng(1)
    shaken = jax.tree.map(lambda x: x + np.asarray(rng.normal(0, 0.3, x.shape), np.float32) * (x.ndim < 2), params)

    def spread(path, x):
        table = path[-1].key == "rel_embedding"
        return x + rng.normal(0, 1, x.shape).astype("f4") if table else x

    return T5(config), jax.tree_util.tree_map_with_path(spread, shaken)


def batch(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(encoder tokens of ragged length, decoder inputs that begin with 0 and hold another 0)."""
    rng = np.random.default_rng(rows)
    encoder = rng.integers(2, 19, (rows, SOURCE))
    encoder[-1, 4:] = 0
    decoder = rng.integers(0, 19, (rows, LENGTH))
    decoder[:, 0] = 0
    decoder[0, 3] = 0
    return encoder.astype(np.int32), decoder.astype(np.int32)


@functools.cache
def jitted(kind: str):
    model, params = tiny(kind)
    module = model.module
    start = jax.jit(
        lambda tokens, size, room: model.start(params, {"encoder_input_tokens": tokens}, size, room),
        static_argnums=(1, 2),
    )
    extend = jax.jit(lambda cache, tokens, at: model.extend(params, cache, tokens, at))
    whole = jax.jit(lambda *x: module.apply({"params": params}, *x))
    return start, extend, whole


def forward(kind: str, encoder, decoder) -> np.ndarray:
    """Teacher-forced logits with no target masked."""
    return np.asarray(jitted(kind)[2](encoder, decoder, np.ones_like(decoder)))


def feed(kind, encoder, decoder, blocks, room=LENGTH, at=None, cache=None):
    """Scores the columns of `decoder` in blocks of the given lengths; returns (logits, cache)."""
    start, extend, _ = jitted(kind)
    rows = len(decoder)
    cache = start(encoder, rows, room) if cache is None else cache
    at = np.zeros(rows, np.int32) if at is None else at
    scores, column = [], 0
    for size in blocks:
        logits, cache = extend(cache, decoder[:, column : column + size], at + column)
        scores.append(logits)
        column += size
    return np.concatenate(scores, axis=1), cache


@pytest.mark.parametrize(("kind", "rows"), [*((kind, 3) for kind in KINDS), ("1.1-untied", 1)], ids=str)
def test_block_step_and_forward_agree(kind, rows):
    """One row and several rows take different write paths."""
    encoder, decoder = batch(rows)
    wanted = forward(kind, encoder, decoder)
    whole = [[LENGTH], [4, 2, 2, 1]] if kind == "1.1-untied" else []
    for blocks in ([1] * LENGTH, [2, 2, 1, 2, 2], *whole):
        scores, _ = feed(kind, encoder, decoder, blocks)
        np.testing.assert_allclose(scores, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["1.0-tied", "1.1-untied"])
def test_rows_at_positions_of_their_own(kind):
    encoder, decoder = batch(3)
    wanted = forward(kind, encoder, decoder)
    start, extend, _ = jitted(kind)
    cache = start(encoder, 3, LENGTH)
    at = np.zeros(3, np.int32)
    rng = np.random.default_rng(0)
    row, steps = np.arange(3)[:, None], np.arange(2)
    while at.min() < LENGTH - 2:
        logits, cache = extend(cache, decoder[row, at[:, None] + steps], at)
        np.testing.assert_allclose(logits, wanted[row, at[:, None] + steps], atol=1e-5, rtol=0)
        at = np.minimum(at + rng.integers(0, 3, 3), LENGTH - 2).astype(np.int32)
    assert (at == LENGTH - 2).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_rollback_overwrites(rows):
    """Garbage written ahead leaves no trace once the block is written again from lower down."""
    kind = "1.1-untied"
    encoder, decoder = batch(rows)
    wanted = forward(kind, encoder, decoder)
    start, extend, _ = jitted(kind)
    cache = start(encoder, rows, LENGTH)
    garbage = (decoder + 5) % 19
    committed = 0
    for kept in (1, 3, 1, 4):
        at = np.full(rows, committed, np.int32)
        block = np.concatenate(
            [
                decoder[:, committed : committed + kept],
                garbage[:, committed + kept : committed + 4],
            ],
            1,
        )
        logits, cache = extend(cache, block, at)
        np.testing.assert_allclose(logits[:, :kept], wanted[:, committed : committed + kept], atol=1e-5, rtol=0)
        if kept < block.shape[1]:
            different = np.abs(logits[:, kept:] - wanted[:, committed + kept : committed + 4])
            assert different.max() > 1e-2  # the garbage did matter where it stood
        committed += kept


@pytest.mark.parametrize("rows", [1, 3])
def test_brim_of_the_buffer(rows):
    """A block that ends in the last slot is written where it belongs, and a later slot changes nothing."""
    kind, blocks = "1.1-untied", [4, 1, 4]
    encoder, decoder = batch(rows)
    wanted = forward(kind, encoder, decoder)
    exact, _ = feed(kind, encoder, decoder, blocks)
    np.testing.assert_allclose(exact, wanted, atol=1e-5, rtol=0)
    roomy, _ = feed(kind, encoder, decoder, blocks, room=LENGTH + 4)
    np.testing.assert_allclose(roomy, wanted, atol=1e-5, rtol=0)


def test_write_touches_its_own_slots_alone():
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(3, 2, 6, 4)).astype(np.float32)
    block = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    positions = np.array([0, 4, 1])  # row 1 ends in the last slot
    wanted = stored.copy()
    for row, at in enumerate(positions):
        wanted[row, :, at : at + 2] = block[row]
    np.testing.assert_array_equal(kv_cache.write(jnp.array(stored), block, positions), wanted)
    one = kv_cache.write(jnp.array(stored[1:2]), block[1:2], positions[1:2])
    np.testing.assert_array_equal(one, wanted[1:2])
    np.testing.assert_array_equal(kv_cache.selected(stored, block, positions), wanted)


@pytest.mark.parametrize(
    ("block", "slots", "by_slices"),
    [
        (6, kv_cache.MOST_BYTES // (2 * 4 * 4), ["cpu"]),
        (6, kv_cache.MOST_BYTES // (2 * 4 * 4) + 1, ["cpu", "tpu"]),
        (kv_cache.MOST_SELECTED + 1, 40, ["cpu", "tpu"]),
    ],
)
def test_a_tpu_selects_short_blocks_in_caches_that_are_not_large(block, slots, by_slices):
    """Seen in what is lowered, which needs no TPU."""
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((3, 2, slots, 4), (3, 2, block, 4))]
    traced = jax.jit(kv_cache.write).trace(*shapes, jax.ShapeDtypeStruct((3,), np.int32))
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert [name for name, text in texts.items() if "stablehlo.scatter" in text] == by_slices


def test_visible_slots():
    seen = kv_cache.visible(jnp.array([0, 2]), 2, 5)
    np.testing.assert_array_equal(
        seen.astype(int),
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]],
    )


def test_samples_of_an_input_lie_side_by_side():
    kind = "1.1-untied"
    encoder, decoder = batch(2)
    wide = np.repeat(decoder, 3, axis=0)
    scores, cache = feed(kind, encoder, wide, [LENGTH])
    wanted = np.repeat(forward(kind, encoder, decoder), 3, axis=0)
    np.testing.assert_allclose(scores, wanted, atol=1e-5, rtol=0)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache)} == {6}
    model, params = tiny(kind)
    with pytest.raises(ValueError, match="not a multiple"):
        model.start(params, {"encoder_input_tokens": encoder}, 5, LENGTH)


def test_padding_of_the_input_is_not_seen():
    kind = "1.1-untied"
    encoder, decoder = batch(3)
    wider = np.pad(encoder, ((0, 0), (0, 4)))
    scores, _ = feed(kind, wider, decoder, [LENGTH])
    np.testing.assert_allclose(scores, forward(kind, encoder, decoder), atol=1e-5, rtol=0)


def test_capture_returns_what_the_logits_are_made_of():
    kind = "1.1-untied"
    model, params = tiny(kind)
    encoder, decoder = batch(3)
    inputs = {"encoder_input_tokens": encoder}
    cache = jax.jit(lambda: model.start(params, inputs, 3, LENGTH))()
    tokens, positions = model.first(inputs)
    np.testing.assert_array_equal(tokens, [0, 0, 0])
    np.testing.assert_array_equal(positions, [0, 0, 0])
    extend = jax.jit(functools.partial(model.extend, capture=("hidden",)))
    (logits, states), _ = extend(params, cache, decoder, positions)
    np.testing.assert_allclose(logits, forward(kind, encoder, decoder), atol=1e-5, rtol=0)
    assert states["hidden"].shape == (3, LENGTH, 16)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_allclose(states["hidden"] @ kernel, logits, atol=1e-5, rtol=0)


def test_dropout():
    config = T5Config(**TINY, dropout_rate=0.3)
    model, params = T5(config), init_params(config, jax.random.key(0))
    encoder, decoder = batch(2)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(deterministic, seed):
        return model.module.apply(
            {"params": params},
            encoder,
            decoder,
            np.ones_like(decoder),
            deterministic=deterministic,
            rngs={"dropout": jax.random.key(seed)},
        )

    np.testing.assert_array_equal(logits(True, 0), logits(True, 1))
    np.testing.assert_array_equal(logits(False, 0), logits(False, 0))
    assert np.abs(logits(False, 0) - logits(False, 1)).max() > 0.1
    assert np.abs(logits(False, 0) - logits(True, 0)).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_shapes_and_axes_name_the_same_tree(kind):
    config = KINDS[kind]
    params = init_params(config, jax.random.key(0))
    shapes = param_shapes(config)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for have, want in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (have.shape, have.dtype) == (want.shape, want.dtype)
    names = logical_axes(config)
    flat = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
    assert [len(n) for n in flat] == [len(s.shape) for s in jax.tree.leaves(shapes)]
    layer = names["decoder"]["layers_0"]
    assert names["token_embedder"]["embedding"] == ("vocab", "embed")
    assert layer["self_attention"]["query"]["kernel"] == ("embed", "joined_kv")
    assert layer["encoder_decoder_attention"]["out"]["kernel"] == ("joined_kv", "embed")
    assert layer["mlp"]["wo"]["kernel"] == ("mlp", "embed")
    assert layer["pre_mlp_layer_norm"]["scale"] == ("embed",)
    tables = layer if config.table_per_layer else names["decoder"]
    assert tables["relpos_bias"]["rel_embedding"] == ("heads", "relpos_buckets")
    assert ("relpos_bias" in names["encoder"]["layers_1" if config.num_encoder_layers > 1 else "layers_0"]) == (
        config.table_per_layer
    )
    assert ("relpos_bias" in names["encoder"]) != config.table_per_layer
    if config.logits_via_embedding:
        assert "logits_dense" not in names["decoder"]
    else:
        assert names["decoder"]["logits_dense"]["kernel"] == ("embed", "vocab")


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(UserError, match="swish9"):
        T5Config(**TINY, mlp_activations=("swish9",))
    with pytest.raises(UserError, match="relative_position_tables='per_head' is unknown: use shared or per_layer"):
        T5Config(**TINY, relative_position_tables="per_head")


@pytest.mark.parametrize("start_id", [0, 2])
@pytest.mark.parametrize("order", [1, 3])
def test_table_model_is_a_lookup_under_rollback(order, start_id):
    vocab, rows, room = 4, 3, 8
    rng = np.random.default_rng(order)
    table = rng.normal(size=(vocab,) * (order + 1)).astype(np.float32)
    bound = bigram(table, start_id)
    model = bound.model
    assert (model.order, model.vocab_size) == (order, vocab)
    inputs = {"anything": np.zeros(rows)}
    cache = model.start(bound.params, inputs, rows, room)
    tokens, at = model.first(inputs)
    np.testing.assert_array_equal(tokens, [start_id] * rows)
    outputs: list[list[int]] = [[] for _ in range(rows)]
    at, last = np.array(at), np.array(tokens)
    while at.max() < room - 3:
        block = rng.integers(0, vocab, (rows, 2))
        fed = np.concatenate([last[:, None], block], axis=1)
        logits, cache = model.extend(bound.params, cache, fed, at)
        for row in range(rows):
            for column in range(3):
                prefix = outputs[row] + block[row, :column].tolist()
                wanted = lookup(table, prefix, start_id)
                np.testing.assert_array_equal(logits[row, column], wanted)
            kept = int(rng.integers(0, 3))  # the rest of the block is rolled back
            outputs[row] += block[row, :kept].tolist()
            at[row] += kept
            last[row] = ([start_id] + outputs[row])[-1]


def test_table_model_refuses_what_it_has_not():
    with pytest.raises(UserError, match="shape"):
        bigram(np.zeros((3, 4)))
    model = TableModel(3)
    cache = model.start({}, {}, 1, 4)
    with pytest.raises(UserError, match="hidden"):
        model.extend(
            {"logits": np.zeros((3, 3))},
            cache,
            np.zeros((1, 1), int),
            np.zeros(1, int),
            ("hidden",),
        )
