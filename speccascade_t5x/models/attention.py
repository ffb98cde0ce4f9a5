"""Multi-head attention as T5 does it: no biases, no 1/sqrt(K) scaling, position and mask as one additive bias."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import NEG_INF, Array
from speccascade_t5x.models.layers import Dense, Initializer, attention_init


def mask_bias(mask: Array, bias: Array | None = None) -> Array:
    """Additive bias: `bias` (or 0) where the mask holds, NEG_INF elsewhere. Shapes broadcast to [B, H, T, S]."""
    return jnp.where(mask, 0.0 if bias is None else bias, NEG_INF)


def meeting(
    queries: Array, keys: Array, query_segments: Array | None = None, key_segments: Array | None = None
) -> Array:
    """[B, T, S] bool: both the query [B, T] and the key [B, S] are real, and of one packed example where there are any.

    Args:
      queries: [B, T] bool, False at padding.
      keys: [B, S] bool likewise.
      query_segments: [B, T], the packed example each query belongs to; None where nothing is packed.
      key_segments: [B, S] likewise.
    """
    mask = queries[:, :, None] & keys[:, None, :]
    if query_segments is None or key_segments is None:
        return mask
    return mask & (query_segments[:, :, None] == key_segments[:, None, :])


class Attention(nn.Module):
    """One attention layer, in two halves so that keys and values can be cached between them.

    Kernels are 2D as T5X stores them, the joined axis head major: [D, H * K].
    """

    heads: int
    width: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.nowrap
    def _projection(self, init: Initializer) -> Dense:
        return Dense(self.heads * self.width, ("embed", "joined_kv"), kernel_init=init, dtype=self.dtype)

    def setup(self) -> None:
        def query_init(*args: Any) -> Array:
            return attention_init(*args) / jnp.sqrt(self.width)  # T5 folds the 1/sqrt(K) of logits in here

        self.query = self._projection(query_init)
        self.key = self._projection(attention_init)
        self.value = self._projection(attention_init)
        self.weights_dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

    @nn.nowrap
    def _split(self, x: Array) -> Array:
        """[B, T, H * K] -> [B, H, T, K]."""
        return x.reshape(x.shape[:-1] + (self.heads, self.width)).swapaxes(-3, -2)

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """Projects [B, S, D] to keys and values, each [B, H, S, K]."""
        return self._split(self.key(x)), self._split(self.value(x))

    @nn.compact
    def __call__(self, x: Array, keys: Array, values: Array, bias: Array, deterministic: bool = True) -> Array:
        """Attends.

        Args:
          x: [B, T, D] queries.
          keys: [B, H, S, K].
          values: [B, H, S, K].
          bias: broadcasts to [B, H, T, S]; masked places hold NEG_INF.
          deterministic: False applies dropout to the weights.

        Returns:
          [B, T, D].
        """
        queries = self._split(self.query(x))
        logits = jnp.einsum("BHTK,BHSK->BHTS", queries, keys.astype(queries.dtype))
        weights = jax.nn.softmax(logits.astype(jnp.float32) + bias, axis=-1).astype(self.dtype)
        weights = self.weights_dropout(weights, deterministic=deterministic)
        mixed = jnp.einsum("BHTS,BHSK->BHTK", weights, values.astype(weights.dtype))
        joined = mixed.swapaxes(-3, -2).reshape(x.shape[:-1] + (self.heads * self.width,))
        out = Dense(x.shape[-1], ("joined_kv", "embed"), kernel_init=attention_init, dtype=self.dtype, name="out")
        return out(joined)
