"""Decoder-only models: parity with T5X, and prompt, block, step and teacher-forced forward as one function."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from models.fixtures import parameters
from oracles import decoder_only as oracle
from oracles.tables import lookup
from speccascade_t5x import decoding
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models import DecoderOnly, DecoderOnlyConfig, bigram, init_params, logical_axes, param_shapes

VOCAB, LENGTH = 19, 12
PROMPTS = np.array([1, 4, 6])  # slots, start token included: the first row has none but it
WIDTH = 7  # of the padded prompts, wider than the longest
TINY = {"vocab_size": VOCAB, "emb_dim": 16, "num_heads": 2, "num_layers": 2, "head_dim": 6, "mlp_dim": 24}
GATED = {"mlp_activations": ("gelu", "linear")}
KINDS = {
    "causal": DecoderOnlyConfig(**TINY, logits_via_embedding=True),
    "prefix": DecoderOnlyConfig(**TINY, **GATED, inputs_bidirectional_attention=True),
}


@pytest.fixture(params=["causal", "prefix"])
def reference(request, fixtures):
    """(bound model, expected arrays, suffix of their names) made with the real T5X library."""
    folder = fixtures / "t5x_decoder_only"
    fields = json.loads((folder / "config.json").read_text())["config"]
    prefix = request.param == "prefix"
    config = DecoderOnlyConfig(**fields, inputs_bidirectional_attention=prefix)
    with np.load(folder / "expected.npz") as stored:
        expected = dict(stored)
    return Bound(DecoderOnly(config), parameters(folder)), expected, "_prefix_lm" if prefix else ""


def test_reference_logits(reference):
    bound, expected, suffix = reference
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_causal_attention")
    logits = bound.model.module.apply({"params": bound.params}, *(expected[name] for name in names))
    np.testing.assert_allclose(logits, expected[f"logits{suffix}"], atol=1e-5, rtol=0)  # they reach 4


def test_reference_greedy_decode_of_a_t5x_batch(reference):
    """T5X bounds prompt and output together; ids after the prompt, their log-probabilities, and no prompt."""
    bound, expected, suffix = reference
    names = ("decoder_input_tokens", "decoder_causal_attention")
    inputs = {name: expected[f"decode_{name}"] for name in names}
    whole = inputs[names[0]].shape[1]
    lengths = whole - inputs[names[1]].sum(axis=1) + 1
    noise = np.where(inputs[names[1]] > 0, 0, 77).astype(np.int32)  # T5X's batches hold the targets there
    for given in (inputs, {names[0]: inputs[names[0]]}, {**inputs, names[0]: inputs[names[0]] + noise}):
        output = decoding.autoregressive(
            model=bound,
            inputs=given,
            config=decoding.DecodeConfig(max_len=whole, trace=True),
            sampling=decoding.Sampling(temperature=0.0),
            key=jax.random.key(0),
            example_ids=np.arange(len(lengths)),
        )
        inside = np.arange(whole) < lengths[:, None]
        np.testing.assert_array_equal(np.where(inside, output.tokens, 0), expected[f"greedy{suffix}_ids"])
        log_probs = np.where(inside, output.trace.log_prob, 0.0).sum(axis=1)
        np.testing.assert_allclose(log_probs, expected[f"greedy{suffix}_log_prob"], atol=1e-3, rtol=0)


def test_reference_parameter_tree(reference, fixtures):
    bound, _, _ = reference
    wanted = json.loads((fixtures / "t5x_decoder_only" / "params_tree.json").read_text())
    shapes = traverse_util.flatten_dict(param_shapes(bound.model.config), sep="/")
    assert {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in shapes.items()} == wanted


@functools.cache
def tiny(kind: str):
    """(model, params) whose norms and position tables are neither the initialisers' ones nor small numbers."""
    params = init_params(KINDS[kind], jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + np.asarray(rng.normal(0, 0.3, x.shape), np.float32) * (x.ndim < 2), params)
    table = params["decoder"]["relpos_bias"]["rel_embedding"]
    params["decoder"]["relpos_bias"]["rel_embedding"] = table + rng.normal(0, 1, table.shape).astype(np.float32)
    return DecoderOnly(KINDS[kind]), params


@functools.cache
def jitted(kind: str):
    model, params = tiny(kind)
    start = jax.jit(lambda inputs, size, room: model.start(params, inputs, size, room), static_argnums=(1, 2))
    extend = jax.jit(lambda cache, tokens, at: model.extend(params, cache, tokens, at))
    return start, extend


def text(rows: int = len(PROMPTS)) -> np.ndarray:
    """[rows, LENGTH] tokens behind the start token; one 0 stands inside an output."""
    tokens = np.random.default_rng(2).integers(2, VOCAB, (rows, LENGTH)).astype(np.int32)
    tokens[:, 0] = 0
    tokens[0, 5] = 0
    return tokens


def prompts(tokens: np.ndarray, width: int = WIDTH) -> dict[str, np.ndarray]:
    return {"decoder_input_tokens": np.where(np.arange(width) < PROMPTS[:, None], tokens[:, :width], 0)}


def forward(kind: str, tokens: np.ndarray) -> np.ndarray:
    """Teacher-forced logits."""
    model, params = tiny(kind)
    prefix = (np.arange(tokens.shape[1]) < PROMPTS[:, None]).astype(np.int32)
    return np.asarray(jax.jit(model.module.apply)({"params": params}, tokens, np.ones_like(tokens), prefix))


def take(array: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    return array[np.arange(len(array))[:, None], at[:, None] + np.arange(size)]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_oracles(kind):
    """150 tokens pass max_distance 128; the oracle knows nothing of masks, caches and windows of buckets."""
    model, params = tiny(kind)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 150)).astype(np.int32)
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(params, sep="/").items()}
    prefix = (np.arange(150) < 60).astype(np.int32)[None]
    found = jax.jit(model.module.apply)({"params": params}, tokens, np.ones_like(tokens), prefix)
    wanted = oracle.logits(flat, tokens[0], 60 if kind == "prefix" else 0)
    np.testing.assert_allclose(found[0], wanted, atol=3e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_do_not_see_each_other(kind):
    model, params = tiny(kind)
    tokens, lengths = text(), np.array([12, 9, 7])
    prefix = (np.arange(LENGTH) < PROMPTS[:, None]).astype(np.int32)
    apart = forward(kind, tokens)
    row = lambda each: np.concatenate([x[:n] for x, n in zip(each, lengths, strict=True)])[None]  # noqa: E731
    segments = np.repeat([1, 2, 3], lengths)[None]
    arrays = (row(tokens), np.ones_like(row(tokens)), row(prefix), segments)
    packed = jax.jit(model.module.apply)({"params": params}, *arrays)
    np.testing.assert_allclose(packed, row(apart), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [[1] * 6, [2, 3, 1], [6]], ids=str)
def test_ragged_prefill_then_blocks_is_the_forward(kind, blocks):
    """Each row goes on from its own prompt; the buffer has not one slot more than it needs."""
    start, extend = jitted(kind)
    tokens = text()
    wanted = forward(kind, tokens)
    cache, at = start(prompts(tokens), 3, 6), PROMPTS - 1
    assert {leaf.shape[2] for leaf in jax.tree.leaves(cache) if leaf.ndim == 4} == {WIDTH - 1 + 6}
    for size in blocks:
        logits, cache = extend(cache, take(tokens, at, size), at)
        np.testing.assert_allclose(logits, take(wanted, at, size), atol=1e-5, rtol=0)
        at = at + size


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_may_begin_inside_the_prompt(kind):
    """Prompt slots see each other as the model defines, even when they are scored once more."""
    start, extend = jitted(kind)
    tokens = text()
    at = np.array([0, 1, 3])
    logits, _ = extend(start(prompts(tokens), 3, 6), take(tokens, at, 6), at)
    np.testing.assert_allclose(logits, take(forward(kind, tokens), at, 6), atol=1e-5, rtol=0)


def test_a_prefix_lm_sees_the_whole_prompt_and_a_causal_one_does_not():
    tokens = text()
    other = tokens.copy()
    other[2, 5] = (other[2, 5] + 1) % VOCAB  # the last prompt token of row 2
    moved = {kind: np.abs(forward(kind, other) - forward(kind, tokens))[2, :5].max() for kind in KINDS}
    assert moved["causal"] == 0.0 and moved["prefix"] > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_overwrites(kind):
    start, extend = jitted(kind)
    tokens = text()
    wanted, garbage = forward(kind, tokens), (tokens + 5) % VOCAB
    cache, at = start(prompts(tokens), 3, 6), PROMPTS - 1
    for kept in (np.array([1, 2, 1]), np.array([3, 1, 2])):
        good = np.arange(3) < kept[:, None]
        block = np.where(good, take(tokens, at, 3), take(garbage, at, 3))
        logits, cache = extend(cache, block, at)
        np.testing.assert_allclose(logits[good], take(wanted, at, 3)[good], atol=1e-5, rtol=0)
        at = at + kept


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_samples_change_nothing(kind):
    start, extend = jitted(kind)
    tokens = text()
    wide, at = np.repeat(tokens, 2, axis=0), np.repeat(PROMPTS, 2) - 1
    cache = start(prompts(tokens, 10), 6, 4)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache)} == {6}
    logits, _ = extend(cache, take(wide, at, 3), at)
    wanted = np.repeat(forward(kind, tokens), 2, axis=0)
    np.testing.assert_allclose(logits, take(wanted, at, 3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="not a multiple"):
        tiny(kind)[0].start({}, prompts(tokens), 5, 4)


def test_where_a_row_begins():
    model, _ = tiny("causal")
    tokens = np.array([[0, 5, 0, 7, 0, 0], [0, 0, 0, 0, 0, 0], [0, 3, 4, 5, 6, 7]], np.int32)
    first = lambda **inputs: [x.tolist() for x in model.first(inputs)]  # noqa: E731
    assert first(decoder_input_tokens=tokens) == [[7, 0, 7], [3, 0, 5]]  # a 0 inside a prompt is a token
    mask = np.array([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    assert first(decoder_input_tokens=tokens, decoder_causal_attention=mask) == [[0, 0, 4], [4, 0, 2]]
    made = DecoderOnly(KINDS["causal"], start_id=2).inputs(np.array([[5, 6], [7, 0]]))
    np.testing.assert_array_equal(made["decoder_input_tokens"], [[2, 5, 6], [2, 7, 0]])


def test_what_is_no_prompt_is_refused():
    model, params = tiny("causal")
    with pytest.raises(UserError, match=r"'decoder_input_tokens', but the inputs are encoder_input_tokens"):
        model.first({"encoder_input_tokens": np.ones((2, 3))})
    with pytest.raises(UserError, match=r"has shape \(4,\): give \[rows, 1 or more\]"):
        model.start(params, {"decoder_input_tokens": np.ones(4)}, 4, 3)
    with pytest.raises(UserError, match=r"has shape \(2, 2\), but decoder_input_tokens \(2, 3\)"):
        model.first({"decoder_input_tokens": np.ones((2, 3)), "decoder_causal_attention": np.ones((2, 2))})
    with pytest.raises(UserError, match="needs decoder_causal_attention"):
        model, params = tiny("prefix")
        model.module.apply({"params": params}, np.ones((1, 3), int), np.ones((1, 3), int))
    with pytest.raises(UserError, match="swish9"):
        DecoderOnlyConfig(**TINY, mlp_activations=("swish9",))


def test_capture_returns_what_the_logits_are_made_of():
    model, params = tiny("prefix")
    tokens = text()
    inputs = prompts(tokens)
    extend = jax.jit(functools.partial(model.extend, capture=("hidden",)))
    (logits, states), _ = extend(params, jitted("prefix")[0](inputs, 3, 4), tokens[:, :2], PROMPTS - 1)
    assert states["hidden"].shape == (3, 2, 16)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_allclose(states["hidden"] @ kernel, logits, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="'attention'"):
        model.extend(params, {}, tokens, PROMPTS, ("attention",))


def test_logical_axes():
    names = logical_axes(KINDS["prefix"])["decoder"]
    assert names["token_embedder"]["embedding"] == ("vocab", "embed")
    assert names["layers_1"]["self_attention"]["query"]["kernel"] == ("embed", "joined_kv")
    assert names["logits_dense"]["kernel"] == ("embed", "vocab")


@pytest.mark.parametrize("order", [1, 3])
def test_a_table_writes_on_after_a_prompt(order):
    tokens = np.random.default_rng(0).integers(1, 4, (3, LENGTH)).astype(np.int32)
    tokens[:, 0] = 0
    table = np.random.default_rng(order).normal(size=(4,) * (order + 1)).astype(np.float32)
    bound = bigram(table)
    cache = bound.model.start(bound.params, prompts(tokens), 6, 6)
    at = np.asarray(bound.model.first(prompts(tokens))[1])
    np.testing.assert_array_equal(at, PROMPTS - 1)
    wide, at = np.repeat(tokens, 2, axis=0), np.repeat(at, 2)
    logits, _ = bound.model.extend(bound.params, cache, take(wide, at, 6), at)
    for row, begin in enumerate(at):
        for column in range(6):
            wanted = lookup(table, wide[row, 1 : begin + column + 1].tolist())
            np.testing.assert_array_equal(logits[row, column], wanted)
