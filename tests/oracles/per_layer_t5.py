"""T5 1.1 with a relative position table per layer (T5X's `scalable_t5`), in float64, one row and one head at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from oracles.decoder_only import bucket, feed_forward, norm

Params = Mapping[str, np.ndarray]  # flat names joined by "/"


def encoder_bucket(distance: int) -> int:
    """Of 32, the upper 16 for later tokens: distances up to 7 have one each, the rest grow by the 8th root of 16."""
    upper, distance = (16 if distance < 0 else 0), abs(distance)
    if distance < 8:
        return upper + distance
    step = max(k for k in range(8 + 1) if 16**k * 8**8 <= min(distance, 128) ** 8)
    return upper + min(8 + step, 15)


def position_bias(table: np.ndarray, length: int, to_bucket) -> np.ndarray:
    """[H, T, T] of a table [H, buckets]."""
    by_distance = {d: table[:, to_bucket(d)] for d in range(1 - length, length)}
    rows = [[by_distance[query - key] for key in range(length)] for query in range(length)]
    return np.moveaxis(np.array(rows, float), -1, 0)


def attend(params: Params, place: str, heads: int, x: np.ndarray, context: np.ndarray, bias, seen) -> np.ndarray:
    """x [T, D] attends to context [S, D] where `seen` [T, S] holds; bias [H, T, S] or zeros."""
    kernel = lambda name: params[f"{place}/{name}/kernel"].astype(float)  # noqa: E731
    q, k, v = (y @ kernel(name) for y, name in ((x, "query"), (context, "key"), (context, "value")))
    mixed = []
    for head, (q_h, k_h, v_h) in enumerate(zip(*(np.split(y, heads, axis=1) for y in (q, k, v)), strict=True)):
        weights = np.where(seen, np.exp(q_h @ k_h.T + bias[head]), 0.0)
        mixed.append(weights / weights.sum(1, keepdims=True) @ v_h)
    return np.concatenate(mixed, axis=1) @ kernel("out")


def stack_height(params: Params, stack: str) -> int:
    return sum(name.startswith(f"{stack}/layers_") and name.endswith("rel_embedding") for name in params)


def forward(params: Params, heads: int, encoder: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] with no target masked; 0 in `encoder` is padding on the right."""
    return np.stack([one_row(params, heads, e[e > 0], d) for e, d in zip(encoder, decoder, strict=True)])


def one_row(params: Params, heads: int, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    embedding = params["token_embedder/embedding"].astype(float)
    scale = lambda name: params[f"{name}/scale"].astype(float)  # noqa: E731
    x = embedding[source]
    for i in range(stack_height(params, "encoder")):
        layer = f"encoder/layers_{i}"
        bias = position_bias(params[f"{layer}/relpos_bias/rel_embedding"], len(source), encoder_bucket)
        normed = norm(x, scale(f"{layer}/pre_attention_layer_norm"))
        x = x + attend(params, f"{layer}/attention", heads, normed, normed, bias, True)
        x = x + feed_forward(params, layer, norm(x, scale(f"{layer}/pre_mlp_layer_norm")))
    encoded = norm(x, scale("encoder/encoder_norm"))
    y, causal = embedding[target], np.tril(np.ones((len(target),) * 2, bool))
    for i in range(stack_height(params, "decoder")):
        layer = f"decoder/layers_{i}"
        bias = position_bias(params[f"{layer}/relpos_bias/rel_embedding"], len(target), bucket)
        normed = norm(y, scale(f"{layer}/pre_self_attention_layer_norm"))
        y = y + attend(params, f"{layer}/self_attention", heads, normed, normed, bias, causal)
        normed = norm(y, scale(f"{layer}/pre_cross_attention_layer_norm"))
        y = y + attend(params, f"{layer}/encoder_decoder_attention", heads, normed, encoded, np.zeros(heads), True)
        y = y + feed_forward(params, layer, norm(y, scale(f"{layer}/pre_mlp_layer_norm")))
    return norm(y, scale("decoder/decoder_norm")) @ params["decoder/logits_dense/kernel"].astype(float)
