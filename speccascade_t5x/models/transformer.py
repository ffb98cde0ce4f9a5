"""What the networks share: configuration, decoder stack, block decoding on a per-row cache, LanguageModel.

A network of its own kind subclasses what differs: its configuration names the module, its decoder builds the layers
and says how each layer's self-attention is biased, its module says how inputs become a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import Array, PyTree, UserError
from speccascade_t5x.models import kv_cache
from speccascade_t5x.models.attention import Attention, mask_bias
from speccascade_t5x.models.layers import ACTIVATIONS, MLP, Dense, Embed, RelativePositionBias, RMSNorm, dropout
from speccascade_t5x.models.prompts import repeats

KeysValues = tuple[Array, Array]  # each [B, H, S, K]
Cross = tuple[Array, Array, Array]  # keys and values of the encoder, and their bias [B, 1, 1 or T, S]

_RANGES = {
    **dict.fromkeys(("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"), (1,)),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_layers"), (0,)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Architecture, with T5X's field names. Hashable: static under jit.

    Attributes:
      dtype: of activations ("float32" or "bfloat16"); parameters and logits are float32.
      logits_via_embedding: tied logits scaled by emb_dim^-0.5 (T5 1.0) instead of a projection of their own.
      mlp_activations: ("relu",) for T5 1.0, ("gelu", "linear") for the gated MLP of 1.1.
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("relu",)
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        except TypeError:
            raise UserError(f"dtype={self.dtype!r} is unknown: use 'float32' or 'bfloat16'") from None
        checks.fields(self, dropout_rate=(0.0, 1.0 - 2.0**-24), **_RANGES)
        unknown = sorted(set(self.mlp_activations) - set(ACTIVATIONS))
        if unknown:
            raise UserError(f"unknown mlp activation {unknown[0]!r}: use some of {', '.join(ACTIVATIONS)}")

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as jax.numpy has it."""
        return jnp.dtype(self.dtype)

    @property
    def module(self) -> nn.Module:
        """The Flax network."""
        raise NotImplementedError


def norm(config: TransformerConfig) -> RMSNorm:
    return RMSNorm(dtype=config.activation_dtype)


def attention(config: TransformerConfig) -> Attention:
    return Attention(config.num_heads, config.head_dim, config.dropout_rate, config.activation_dtype)


def mlp(config: TransformerConfig) -> MLP:
    return MLP(config.mlp_dim, config.mlp_activations, config.dropout_rate, config.activation_dtype)


def embed(config: TransformerConfig) -> Embed:
    return Embed(config.vocab_size, config.emb_dim, config.activation_dtype)


def position_table(config: TransformerConfig, bidirectional: bool) -> RelativePositionBias:
    # In float32: it is added to float32 attention logits and costs nothing beside them.
    return RelativePositionBias(config.num_heads, bidirectional)


class DecoderLayer(nn.Module):
    """Causal self-attention, perhaps cross-attention, and MLP, each behind a norm and inside a residual."""

    config: TransformerConfig
    cross: bool = False
    own_table: bool = False

    def setup(self) -> None:
        self.pre_self_attention_layer_norm = norm(self.config)
        self.self_attention = attention(self.config)
        if self.cross:
            self.pre_cross_attention_layer_norm = norm(self.config)
            self.encoder_decoder_attention = attention(self.config)
        self.pre_mlp_layer_norm = norm(self.config)
        self.mlp = mlp(self.config)
        self.dropout = dropout(self.config.dropout_rate)
        if self.own_table:
            self.relpos_bias = position_table(self.config, bidirectional=False)

    def __call__(
        self,
        x: Array,
        bias: Array,
        positions: Array,
        stored: KeysValues | None,
        cross: Cross | None,
        deterministic: bool,
    ) -> tuple[Array, KeysValues]:
        """x [B, T, D] -> (x, the layer's cache). Without `stored`, the block is its own whole context."""
        normed = self.pre_self_attention_layer_norm(x)
        keys, values = self.self_attention.keys_values(normed)
        if stored is not None:
            keys, values = kv_cache.write(stored[0], keys, positions), kv_cache.write(stored[1], values, positions)
        attended = self.self_attention(normed, keys, values, bias, deterministic)
        x = x + self.dropout(attended, deterministic=deterministic)
        if cross is not None:
            normed = self.pre_cross_attention_layer_norm(x)
            attended = self.encoder_decoder_attention(normed, *cross, deterministic)
            x = x + self.dropout(attended, deterministic=deterministic)
        transformed = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(transformed, deterministic=deterministic), (keys, values)


class Stack(nn.Module):
    """Layers of one width, with one table of relative positions (`relpos_bias`) or one in each of the `layers`."""

    config: TransformerConfig
    num_layers: int
    table_per_layer: bool = False

    def biases(self, mask: Array, positions: Array) -> list[Array]:
        """Additive bias of self-attention for each layer: one array for all where they share a table.

        Args:
          mask: [B or 1, T, S] bool, who sees whom.
          positions: [B] of the first query of each row; a scalar where all rows agree.
        """
        tables = [layer.relpos_bias for layer in self.layers] if self.table_per_layer else [self.relpos_bias]
        biases = [mask_bias(mask[:, None], table(positions, *mask.shape[1:])) for table in tables]
        return biases if self.table_per_layer else biases * self.num_layers


class Decoder(Stack):
    """The decoder stack up to the final norm, and the output projection where logits are untied."""

    cross: bool = False

    def setup(self) -> None:
        config = self.config
        if not self.table_per_layer:
            self.relpos_bias = position_table(config, bidirectional=False)
        self.layers = [DecoderLayer(config, self.cross, self.table_per_layer) for _ in range(self.num_layers)]
        self.decoder_norm = norm(config)
        self.dropout = dropout(config.dropout_rate)
        if not config.logits_via_embedding:
            # float32 whatever the activations: the distributions are float32.
            self.logits_dense = Dense(config.vocab_size, ("embed", "vocab"))

    def cross_keys_values(self, encoded: Array) -> list[KeysValues]:
        """[B, S, D] -> keys and values of each layer's cross-attention."""
        return [layer.encoder_decoder_attention.keys_values(encoded) for layer in self.layers]

    def project(self, hidden: Array, embedder: Embed) -> Array:
        """[B, T, D] -> float32 logits [B, T, V]."""
        if self.config.logits_via_embedding:
            return embedder.attend(hidden)
        return self.logits_dense(hidden)

    def __call__(
        self,
        embedded: Array,
        mask: Array,
        positions: Array | None = None,
        stored: Sequence[KeysValues] | None = None,
        cross: Sequence[Cross] | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, list[KeysValues]]:
        """A block at per-row positions of a cache, or, without `stored`, a whole sequence from position 0.

        Args:
          embedded: [B, T, D].
          mask: [B or 1, T, S] bool over the S slots of the cache, or over the T positions of the sequence.
          positions: [B] of the first token of each row, where there is a cache.
          stored: the cache of each layer.
          cross: what each layer's cross-attention reads.
          deterministic: False applies dropout.

        Returns:
          (hidden [B, T, D], the cache of each layer).
        """
        positions = jnp.array(0) if positions is None else positions
        absent = [None] * self.num_layers
        biases = self.biases(mask, positions)
        x, kept = self.dropout(embedded, deterministic=deterministic), []
        for layer, bias, own, context in zip(self.layers, biases, stored or absent, cross or absent, strict=True):
            x, own = layer(x, bias, positions, own, context, deterministic)
            kept.append(own)
        return self.dropout(self.decoder_norm(x), deterministic=deterministic), kept


class Network(nn.Module):
    """Block decoding of a network with a `decoder`.

    The cache that its `start` makes is {"self": [(keys, values) of each layer]}, and of an encoder-decoder also
    {"cross": [(keys, values) of each layer], "cross_bias": [B, 1, 1, S]}.
    """

    config: TransformerConfig

    def embedder(self) -> Embed:
        """The token embedding, which tied logits share."""
        return self.token_embedder

    def visible(self, cache: PyTree, positions: Array, length: int, slots: int) -> Array:
        """[B, length, slots] bool: which slots the queries at positions[b] + t may see."""
        del cache
        return kv_cache.visible(positions, length, slots)

    def run(self, tokens: Array, mask: Array, *cached: Any, **options: Any) -> tuple[Array, Array, list[KeysValues]]:
        """[B, T] ids -> (logits [B, T, V], hidden [B, T, D], cache of each layer); arguments as of `Decoder`."""
        hidden, stored = self.decoder(self.embedder()(tokens), mask, *cached, **options)
        return self.decoder.project(hidden, self.embedder()), hidden, stored

    def extend(self, cache: PyTree, tokens: Array, positions: Array) -> tuple[Array, Array, PyTree]:
        """[B, T] ids at per-row positions -> (logits [B, T, V], hidden [B, T, D], cache)."""
        seen = self.visible(cache, positions, tokens.shape[1], cache["self"][0][0].shape[2])
        cross = [(*keys_values, cache["cross_bias"]) for keys_values in cache["cross"]] if "cross" in cache else None
        logits, hidden, stored = self.run(tokens, seen, positions, cache["self"], cross)
        return logits, hidden, {**cache, "self": stored}


@dataclasses.dataclass(frozen=True)
class NetworkModel:
    """A network as a LanguageModel (see `interfaces.LanguageModel`).

    Attributes:
      config: the architecture.
      start_id: decoder start token.
    """

    config: TransformerConfig
    start_id: int = 0

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.config.vocab_size

    @property
    def module(self) -> Any:
        """The Flax module, for training and scoring."""
        return self.config.module

    def read(self, inputs: PyTree) -> tuple[Array, ...]:
        """The arrays that the network's `start` takes, rows first."""
        raise NotImplementedError

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Runs the encoder, or the prompts, once per input; see the Protocol."""
        arrays = self.read(inputs)
        samples = repeats(batch_size, arrays[0].shape[0])
        return self.module.apply({"params": params}, *arrays, samples, room, method="start")

    def extend(
        self, params: PyTree, cache: PyTree, tokens: Array, positions: Array, capture: tuple[str, ...] = ()
    ) -> tuple[Any, PyTree]:
        """Scores a block; see the Protocol. `capture` knows "hidden", the final norm's output."""
        unknown = set(capture) - {"hidden"}
        if unknown:
            raise UserError(f"{type(self).__name__} has no hidden state {unknown.pop()!r} to capture: ask for 'hidden'")
        logits, hidden, cache = self.module.apply({"params": params}, cache, tokens, positions, method="extend")
        return ((logits, {"hidden": hidden}) if capture else logits), cache
