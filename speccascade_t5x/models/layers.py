"""Building blocks of T5 in Flax, with T5X's parameter names, initialisers and logical axis names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.interfaces import Array

Initializer = Callable[..., Array]

attention_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
mlp_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=True),
    "silu": nn.silu,
    "linear": lambda x: x,
}


def axes(init: Initializer, *names: str) -> Initializer:
    """Attaches logical axis names to a parameter initialiser."""
    return nn.with_logical_partitioning(init, names)


class Dense(nn.Module):
    """x @ kernel, no bias: [..., in] -> [..., features]."""

    features: int
    kernel_axes: tuple[str, str]
    kernel_init: Initializer = mlp_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param(
            "kernel", axes(self.kernel_init, *self.kernel_axes), (x.shape[-1], self.features), jnp.float32
        )
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """T5's layer norm: x / rms(x) * scale, in float32, epsilon 1e-6, no centring and no bias."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", axes(nn.initializers.ones, "embed"), (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + 1e-6)).astype(self.dtype) * scale.astype(self.dtype)


class Embed(nn.Module):
    """Token embedding, shared with the output projection where logits are tied."""

    vocab_size: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            axes(nn.initializers.normal(stddev=1.0), "vocab", "embed"),
            (self.vocab_size, self.features),
            jnp.float32,
        )

    def __call__(self, tokens: Array) -> Array:
        """[...] ids -> [..., D]."""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def attend(self, x: Array) -> Array:
        """Tied logits in float32, scaled by D^-0.5: [..., D] -> [..., V]."""
        scaled = x.astype(jnp.float32) / np.sqrt(self.features)
        return jnp.einsum("...D,VD->...V", scaled, self.embedding)


class MLP(nn.Module):
    """T5's feed-forward block: one activation (1.0), or a product of several (gated, 1.1)."""

    mlp_dim: int
    activations: Sequence[str]
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        hidden = None
        for i, name in enumerate(self.activations):
            wi = Dense(
                self.mlp_dim,
                ("embed", "mlp"),
                dtype=self.dtype,
                name="wi" if len(self.activations) == 1 else f"wi_{i}",
            )
            branch = ACTIVATIONS[name](wi(x))
            hidden = branch if hidden is None else hidden * branch
        hidden = dropout(self.dropout_rate)(hidden, deterministic=deterministic)
        return Dense(x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="wo")(hidden)


def dropout(rate: float) -> nn.Dropout:
    """Dropout with one mask for all positions of a sequence, as T5 does."""
    return nn.Dropout(rate, broadcast_dims=(-2,))


@functools.cache
def _distance_buckets(bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each clipped distance d = query - key, at index d + max_distance: [2 * max_distance + 1].

    T5's scheme (Raffel et al. 2020, section 2.1): half of the buckets count distances one by one, the rest
    grow logarithmically up to max_distance; bidirectional stacks give the future its own half of the buckets.
    Built in float64 with a nudge, so that a distance lying exactly on a bucket boundary falls into the upper
    one, as in T5X and Mesh TensorFlow.
    """
    distance = np.arange(-max_distance, max_distance + 1)
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = np.where(distance < 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = buckets // 2
    growth = np.log(np.maximum(distance, 1) / exact + 1e-7) / np.log(max_distance / exact)
    grown = np.minimum(exact + (growth * (buckets - exact)).astype(np.int64), buckets - 1)
    return (offset + np.where(distance < exact, distance, grown)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """T5's relative position table: one scalar per head and distance bucket, shared by the layers of a stack."""

    heads: int
    bidirectional: bool
    buckets: int = 32
    max_distance: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, positions: Array, length: int, keys: int) -> Array:
        """Bias of the queries at positions[b] + t to the keys 0 .. keys - 1.

        The bias of a query is a window of one vector over distances, so each is one slice and no gather of
        single scalars.

        Args:
          positions: [B] of the first query of each row; a scalar where all rows agree.
          length: T, queries per row.
          keys: S.

        Returns:
          [B, H, T, S], or [H, T, S] for a scalar position.
        """
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = self.param(
            "rel_embedding", axes(init, "heads", "relpos_buckets"), (self.heads, self.buckets), jnp.float32
        )
        top = keys + length - 2  # column c of `window` holds the bias at distance top - c
        distance = np.clip(np.arange(top, -keys, -1), -self.max_distance, self.max_distance)
        distance_bucket = _distance_buckets(self.bidirectional, self.buckets, self.max_distance)
        window = table[:, distance_bucket[distance + self.max_distance]].astype(self.dtype)
        query = positions[..., None] + jnp.arange(length)
        begin = top - query  # column of key 0, whose distance is the query's position

        def take(at: Array) -> Array:
            return jax.lax.dynamic_slice(window, (0, at), (self.heads, keys))

        if query.ndim == 1:
            return jax.vmap(take, out_axes=1)(begin)
        return jax.vmap(jax.vmap(take, out_axes=1))(begin)
