"""T5X's decoder-only network in float64, one query at a time; tanh gelu or relu, heads and buckets by plain loops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Params = Mapping[str, np.ndarray]  # flat names joined by "/"


def bucket(distance: int) -> int:
    """Of 32: distances up to 15 have one each, the rest grow by the 16th root of 8; all later tokens share bucket 0."""
    if distance < 16:
        return max(distance, 0)
    # The largest k with 16 * 8^(k / 16) <= distance, in whole numbers.
    step = max(k for k in range(16 + 1) if 8**k * 16**16 <= min(distance, 128) ** 16)
    return min(16 + step, 31)


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feed_forward(params: Params, layer: str, x: np.ndarray) -> np.ndarray:
    wi = lambda name: x @ params[f"{layer}/mlp/{name}/kernel"].astype(float)  # noqa: E731
    hidden = np.maximum(wi("wi"), 0) if f"{layer}/mlp/wi/kernel" in params else gelu(wi("wi_0")) * wi("wi_1")
    return hidden @ params[f"{layer}/mlp/wo/kernel"].astype(float)


def logits(params: Params, tokens: Sequence[int], prefix: int = 0) -> np.ndarray:
    """[T, V] of the next token after each of `tokens`, the first `prefix` of which all see each other."""
    embedding = params["decoder/token_embedder/embedding"].astype(float)
    table = params["decoder/relpos_bias/rel_embedding"].astype(float)
    heads, length = len(table), len(tokens)
    x = embedding[list(tokens)]
    layers = sum(name.endswith("self_attention/out/kernel") for name in params)
    for i in range(layers):
        layer = f"decoder/layers_{i}"
        kernel = lambda name, layer=layer: params[f"{layer}/self_attention/{name}/kernel"].astype(float)  # noqa: E731
        normed = norm(x, params[f"{layer}/pre_self_attention_layer_norm/scale"])
        q, k, v = ((normed @ kernel(name)).reshape(length, heads, -1) for name in ("query", "key", "value"))
        mixed = np.zeros_like(q)
        for here in range(length):
            seen = prefix if here < prefix else here + 1
            for head in range(heads):
                bias = [table[head, bucket(here - there)] for there in range(seen)]
                weights = np.exp(k[:seen, head] @ q[here, head] + bias)
                mixed[here, head] = weights / weights.sum() @ v[:seen, head]
        x = x + mixed.reshape(length, -1) @ kernel("out")
        x = x + feed_forward(params, layer, norm(x, params[f"{layer}/pre_mlp_layer_norm/scale"]))
    x = norm(x, params["decoder/decoder_norm/scale"])
    if "decoder/logits_dense/kernel" in params:
        return x @ params["decoder/logits_dense/kernel"].astype(float)
    return x @ embedding.T / math.sqrt(embedding.shape[1])
