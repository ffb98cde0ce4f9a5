"""T5 encoder-decoder, 1.0 and 1.1, with T5X's parameter tree, as a module and as a LanguageModel.

`T5Module` is the Flax network: teacher-forced forward for training and scoring, encoder, and block
decoding on a per-row cache. `T5` is the LanguageModel the decoding loop sees.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import Array, PyTree, UserError
from speccascade_t5x.models import cache as kv_cache
from speccascade_t5x.models.attention import Attention, mask_bias
from speccascade_t5x.models.layers import ACTIVATIONS, MLP, Dense, Embed, RelativePositionBias, RMSNorm, dropout
from speccascade_t5x.models.parameters import init_params as init_params
from speccascade_t5x.models.parameters import logical_axes as logical_axes
from speccascade_t5x.models.parameters import param_shapes as param_shapes
from speccascade_t5x.models.prompts import repeats

TABLES = ("shared", "per_layer")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture, with the field names of T5X's T5Config. Hashable: static under jit.

    Attributes:
      dtype: of activations ("float32" or "bfloat16"); parameters are float32, laws and logits too.
      logits_via_embedding: tied logits scaled by emb_dim^-0.5 (T5 1.0) instead of a projection of their own.
      mlp_activations: ("relu",) for T5 1.0, ("gelu", "linear") for 1.1.
      relative_position_tables: "shared" by the layers of a stack, as T5 has them, or "per_layer", as T5X's
        `scalable_t5` (and so umT5) has them.
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("relu",)
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"
    relative_position_tables: str = "shared"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        unknown = sorted(set(self.mlp_activations) - set(ACTIVATIONS))
        if unknown:
            raise UserError(f"unknown mlp activation {unknown[0]!r}: use some of {', '.join(ACTIVATIONS)}")
        if self.relative_position_tables not in TABLES:
            raise UserError(
                f"relative_position_tables={self.relative_position_tables!r} is unknown: use {' or '.join(TABLES)}"
            )

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as jax.numpy has it."""
        return jnp.dtype(self.dtype)

    @property
    def table_per_layer(self) -> bool:
        """Whether every layer has a relative position table of its own."""
        return self.relative_position_tables == "per_layer"

    @property
    def module(self) -> T5Module:
        """The Flax network."""
        return T5Module(self)


def _norm(config: T5Config) -> RMSNorm:
    return RMSNorm(dtype=config.activation_dtype)


def _attention(config: T5Config) -> Attention:
    return Attention(config.num_heads, config.head_dim, config.dropout_rate, config.activation_dtype)


def _mlp(config: T5Config) -> MLP:
    return MLP(config.mlp_dim, config.mlp_activations, config.dropout_rate, config.activation_dtype)


def _position_bias(config: T5Config, bidirectional: bool) -> RelativePositionBias:
    # In float32: it is added to float32 attention logits and costs nothing beside them.
    return RelativePositionBias(config.num_heads, bidirectional)


def _layer_biases(stack: Encoder | Decoder, mask: Array, *where: Any) -> list[Array]:
    """Additive bias of self-attention for each layer of a stack: one array for all where they share a table.

    Args:
      stack: whose tables are read.
      mask: broadcasts to [B, H, T, S].
      *where: arguments of `RelativePositionBias`.
    """
    if stack.config.table_per_layer:
        return [mask_bias(mask, layer.position_bias(*where)) for layer in stack.layers]
    return [mask_bias(mask, stack.relpos_bias(*where))] * len(stack.layers)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and inside a residual."""

    config: T5Config

    def setup(self) -> None:
        self.pre_attention_layer_norm = _norm(self.config)
        self.attention = _attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = _mlp(self.config)
        self.dropout = dropout(self.config.dropout_rate)
        if self.config.table_per_layer:
            self.relpos_bias = _position_bias(self.config, bidirectional=True)

    def position_bias(self, positions: Array, length: int, keys: int) -> Array:
        """Bias of the layer's own table, see `RelativePositionBias`."""
        return self.relpos_bias(positions, length, keys)

    def __call__(self, x: Array, bias: Array, deterministic: bool) -> Array:
        normed = self.pre_attention_layer_norm(x)
        keys, values = self.attention.keys_values(normed)
        attended = self.attention(normed, keys, values, bias, deterministic)
        x = x + self.dropout(attended, deterministic=deterministic)
        transformed = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(transformed, deterministic=deterministic)


class Encoder(nn.Module):
    """[B, S] ids -> [B, S, D]."""

    config: T5Config

    def setup(self) -> None:
        if not self.config.table_per_layer:
            self.relpos_bias = _position_bias(self.config, bidirectional=True)
        self.layers = [EncoderLayer(self.config) for _ in range(self.config.num_encoder_layers)]
        self.encoder_norm = _norm(self.config)
        self.dropout = dropout(self.config.dropout_rate)

    def __call__(self, embedded: Array, mask: Array, deterministic: bool) -> Array:
        """embedded [B, S, D], mask [B, S, S] bool -> [B, S, D]."""
        length = embedded.shape[1]
        biases = _layer_biases(self, mask[:, None], jnp.array(0), length, length)
        x = self.dropout(embedded, deterministic=deterministic)
        for layer, bias in zip(self.layers, biases, strict=True):
            x = layer(x, bias, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention and MLP, each behind a norm and inside a residual."""

    config: T5Config

    def setup(self) -> None:
        self.pre_self_attention_layer_norm = _norm(self.config)
        self.self_attention = _attention(self.config)
        self.pre_cross_attention_layer_norm = _norm(self.config)
        self.encoder_decoder_attention = _attention(self.config)
        self.pre_mlp_layer_norm = _norm(self.config)
        self.mlp = _mlp(self.config)
        self.dropout = dropout(self.config.dropout_rate)
        if self.config.table_per_layer:
            self.relpos_bias = _position_bias(self.config, bidirectional=False)

    def position_bias(self, positions: Array, length: int, keys: int) -> Array:
        """Bias of the layer's own table, see `RelativePositionBias`."""
        return self.relpos_bias(positions, length, keys)

    def cross_keys_values(self, encoded: Array) -> tuple[Array, Array]:
        """[B, S, D] -> keys and values of the cross-attention, each [B, H, S, K]."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def __call__(
        self,
        x: Array,
        stored: tuple[Array, Array] | None,
        positions: Array | None,
        self_bias: Array,
        cross: tuple[Array, Array],
        cross_bias: Array,
        deterministic: bool = True,
    ) -> tuple[Array, tuple[Array, Array]]:
        """x [B, T, D] -> (x, the layer's cache). Without `stored`, the block is its own whole context."""
        normed = self.pre_self_attention_layer_norm(x)
        block = self.self_attention.keys_values(normed)
        if stored is None:
            stored = block
        else:
            stored = tuple(kv_cache.write(s, b, positions) for s, b in zip(stored, block, strict=True))
        attended = self.self_attention(normed, *stored, self_bias, deterministic)
        x = x + self.dropout(attended, deterministic=deterministic)
        normed = self.pre_cross_attention_layer_norm(x)
        attended = self.encoder_decoder_attention(normed, *cross, cross_bias, deterministic)
        x = x + self.dropout(attended, deterministic=deterministic)
        transformed = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(transformed, deterministic=deterministic), stored


class Decoder(nn.Module):
    """The decoder stack up to the final norm, and the output projection where logits are untied."""

    config: T5Config

    def setup(self) -> None:
        if not self.config.table_per_layer:
            self.relpos_bias = _position_bias(self.config, bidirectional=False)
        self.layers = [DecoderLayer(self.config) for _ in range(self.config.num_decoder_layers)]
        self.decoder_norm = _norm(self.config)
        self.dropout = dropout(self.config.dropout_rate)
        if not self.config.logits_via_embedding:
            # float32 whatever the activations: the laws are float32.
            self.logits_dense = Dense(self.config.vocab_size, ("embed", "vocab"))

    def cross_keys_values(self, encoded: Array) -> list[tuple[Array, Array]]:
        return [layer.cross_keys_values(encoded) for layer in self.layers]

    def project(self, hidden: Array, embedder: Embed) -> Array:
        """[B, T, D] -> float32 logits [B, T, V]."""
        if self.config.logits_via_embedding:
            return embedder.attend(hidden)
        return self.logits_dense(hidden)

    def __call__(self, embedded: Array, mask: Array, encoded: Array, cross_mask: Array, deterministic: bool) -> Array:
        """Teacher-forced: embedded [B, T, D], mask [B, T, T], encoded [B, S, D], cross_mask [B, T, S] -> [B, T, D]."""
        length = embedded.shape[1]
        biases = _layer_biases(self, mask[:, None], jnp.array(0), length, length)
        cross_bias = mask_bias(cross_mask[:, None])
        x = self.dropout(embedded, deterministic=deterministic)
        for layer, bias, cross in zip(self.layers, biases, self.cross_keys_values(encoded), strict=True):
            x, _ = layer(x, None, None, bias, cross, cross_bias, deterministic)
        return self.dropout(self.decoder_norm(x), deterministic=deterministic)

    def extend(self, embedded: Array, cache: PyTree, positions: Array) -> tuple[Array, PyTree]:
        """One block at per-row positions: embedded [B, T, D] -> ([B, T, D], cache)."""
        length, slots = embedded.shape[1], cache["self"][0][0].shape[2]
        seen = kv_cache.visible(positions, length, slots)
        biases = _layer_biases(self, seen[:, None], positions, length, slots)
        x, stored = embedded, []
        for layer, bias, own, cross in zip(self.layers, biases, cache["self"], cache["cross"], strict=True):
            x, own = layer(x, own, positions, bias, cross, cache["cross_bias"])
            stored.append(own)
        return self.decoder_norm(x), {**cache, "self": stored}


class T5Module(nn.Module):
    """The whole network. Parameters sit where T5X puts them."""

    config: T5Config

    def setup(self) -> None:
        self.token_embedder = Embed(self.config.vocab_size, self.config.emb_dim, self.config.activation_dtype)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(
        self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None, deterministic: bool = True
    ) -> Array:
        """[B, S] ids (0 is padding) -> [B, S, D]."""
        real = encoder_input_tokens > 0
        mask = real[:, :, None] & real[:, None, :]
        if encoder_segment_ids is not None:
            mask &= encoder_segment_ids[:, :, None] == encoder_segment_ids[:, None, :]
        return self.encoder(self.token_embedder(encoder_input_tokens), mask, deterministic)

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Teacher-forced logits.

        Args:
          encoder_input_tokens: [B, S]; 0 is padding.
          decoder_input_tokens: [B, T], targets shifted right.
          decoder_target_tokens: [B, T]; 0 is padding and masks its position.
          encoder_segment_ids: [B, S] of packed examples.
          decoder_segment_ids: [B, T] of packed examples.
          deterministic: False applies dropout (needs the rng "dropout").

        Returns:
          [B, T, V] float32.
        """
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, deterministic)
        real = decoder_target_tokens > 0
        causal = jnp.tril(jnp.ones((real.shape[1],) * 2, bool))
        mask = causal & real[:, :, None] & real[:, None, :]
        cross_mask = real[:, :, None] & (encoder_input_tokens > 0)[:, None, :]
        if decoder_segment_ids is not None:
            mask &= decoder_segment_ids[:, :, None] == decoder_segment_ids[:, None, :]
            cross_mask &= decoder_segment_ids[:, :, None] == encoder_segment_ids[:, None, :]
        embedded = self.token_embedder(decoder_input_tokens)
        hidden = self.decoder(embedded, mask, encoded, cross_mask, deterministic)
        return self.decoder.project(hidden, self.token_embedder)

    def start(self, encoder_input_tokens: Array, repeats: int, room: int) -> PyTree:
        """Encodes once and returns the decode cache, each row repeated `repeats` times."""
        encoded = self.encode(encoder_input_tokens)
        cross = [tuple(jnp.repeat(x, repeats, axis=0) for x in kv) for kv in self.decoder.cross_keys_values(encoded)]
        config, batch = self.config, encoder_input_tokens.shape[0] * repeats
        fresh = (batch, config.num_heads, room, config.head_dim, config.activation_dtype)
        cross_bias = mask_bias(encoder_input_tokens[:, None, None, :] > 0)
        return {
            "self": [kv_cache.empty(*fresh) for _ in range(config.num_decoder_layers)],
            "cross": cross,
            "cross_bias": jnp.repeat(cross_bias, repeats, axis=0),
        }

    def extend(self, cache: PyTree, tokens: Array, positions: Array) -> tuple[Array, Array, PyTree]:
        """[B, T] ids at per-row positions -> (logits [B, T, V], hidden [B, T, D], cache)."""
        hidden, cache = self.decoder.extend(self.token_embedder(tokens), cache, positions)
        return self.decoder.project(hidden, self.token_embedder), hidden, cache


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class T5:
    """T5 as a LanguageModel (see `interfaces.LanguageModel`). `inputs` is {"encoder_input_tokens": [rows, S]}.

    Attributes:
      config: the architecture.
      start_id: decoder start token.
    """

    config: T5Config
    start_id: int = 0
    input_name: ClassVar[str] = "encoder_input_tokens"

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.config.vocab_size

    @property
    def module(self) -> T5Module:
        """The Flax module, for training and scoring."""
        return self.config.module

    def inputs(self, tokens: Array) -> dict[str, Array]:
        """What `start` reads, of inputs [rows, S] that are padded with 0 on the right."""
        return {self.input_name: jnp.asarray(tokens)}

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Runs the encoder once per input; see the Protocol."""
        tokens = inputs["encoder_input_tokens"]
        samples = repeats(batch_size, tokens.shape[0])
        return self.module.apply({"params": params}, tokens, samples, room, method="start")

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        """The decoder start token at position 0 of every row."""
        rows = inputs["encoder_input_tokens"].shape[0]
        return jnp.full(rows, self.start_id, jnp.int32), jnp.zeros(rows, jnp.int32)

    def extend(
        self, params: PyTree, cache: PyTree, tokens: Array, positions: Array, capture: tuple[str, ...] = ()
    ) -> tuple[Any, PyTree]:
        """Scores a block; see the Protocol. `capture` knows "hidden", the final norm's output."""
        unknown = set(capture) - {"hidden"}
        if unknown:
            raise UserError(f"T5 has no hidden state {unknown.pop()!r} to capture: ask for 'hidden'")
        logits, hidden, cache = self.module.apply({"params": params}, cache, tokens, positions, method="extend")
        return ((logits, {"hidden": hidden}) if capture else logits), cache
