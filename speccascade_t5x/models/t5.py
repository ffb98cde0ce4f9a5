"""T5 encoder-decoder, 1.0 and 1.1, with T5X's parameter tree, as a module and as a LanguageModel.

`T5Module` is the Flax network: teacher-forced forward for training and scoring, encoder, and block
decoding on a per-row cache. `T5` is the LanguageModel the decoding loop sees.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import Array, PyTree, UserError
from speccascade_t5x.models import kv_cache, transformer
from speccascade_t5x.models.attention import mask_bias, meeting
from speccascade_t5x.models.layers import dropout
from speccascade_t5x.models.parameters import init_params as init_params
from speccascade_t5x.models.parameters import logical_axes as logical_axes
from speccascade_t5x.models.parameters import param_shapes as param_shapes

TABLES = ("shared", "per_layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(transformer.TransformerConfig):
    """Architecture of an encoder-decoder, with the field names of T5X's T5Config; see `TransformerConfig`.

    Attributes:
      relative_position_tables: "shared" by the layers of a stack, as T5 has them, or "per_layer", as T5X's
        `scalable_t5` (and so umT5) has them.
    """

    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    relative_position_tables: str = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relative_position_tables not in TABLES:
            raise UserError(
                f"relative_position_tables={self.relative_position_tables!r} is unknown: use {' or '.join(TABLES)}"
            )

    @property
    def table_per_layer(self) -> bool:
        """Whether every layer has a relative position table of its own."""
        return self.relative_position_tables == "per_layer"

    @property
    def module(self) -> T5Module:
        """The Flax network."""
        return T5Module(self)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and inside a residual."""

    config: T5Config

    def setup(self) -> None:
        self.pre_attention_layer_norm = transformer.norm(self.config)
        self.attention = transformer.attention(self.config)
        self.pre_mlp_layer_norm = transformer.norm(self.config)
        self.mlp = transformer.mlp(self.config)
        self.dropout = dropout(self.config.dropout_rate)
        if self.config.table_per_layer:
            self.relpos_bias = transformer.position_table(self.config, bidirectional=True)

    def __call__(self, x: Array, bias: Array, deterministic: bool) -> Array:
        normed = self.pre_attention_layer_norm(x)
        keys, values = self.attention.keys_values(normed)
        attended = self.attention(normed, keys, values, bias, deterministic)
        x = x + self.dropout(attended, deterministic=deterministic)
        transformed = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(transformed, deterministic=deterministic)


class Encoder(transformer.Stack):
    """[B, S] ids -> [B, S, D]."""

    def setup(self) -> None:
        if not self.table_per_layer:
            self.relpos_bias = transformer.position_table(self.config, bidirectional=True)
        self.layers = [EncoderLayer(self.config) for _ in range(self.num_layers)]
        self.encoder_norm = transformer.norm(self.config)
        self.dropout = dropout(self.config.dropout_rate)

    def __call__(self, embedded: Array, mask: Array, deterministic: bool) -> Array:
        """embedded [B, S, D], mask [B, S, S] bool -> [B, S, D]."""
        x = self.dropout(embedded, deterministic=deterministic)
        for layer, bias in zip(self.layers, self.biases(mask, jnp.array(0)), strict=True):
            x = layer(x, bias, deterministic)
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class T5Module(transformer.Network):
    """The whole network. Parameters sit where T5X puts them."""

    config: T5Config

    def setup(self) -> None:
        config = self.config
        self.token_embedder = transformer.embed(config)
        self.encoder = Encoder(config, config.num_encoder_layers, config.table_per_layer)
        self.decoder = transformer.Decoder(config, config.num_decoder_layers, config.table_per_layer, cross=True)

    def encode(
        self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None, deterministic: bool = True
    ) -> Array:
        """[B, S] ids (0 is padding) -> [B, S, D]."""
        real = encoder_input_tokens > 0
        mask = meeting(real, real, encoder_segment_ids, encoder_segment_ids)
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
        mask = jnp.tril(jnp.ones((real.shape[1],) * 2, bool))
        mask &= meeting(real, real, decoder_segment_ids, decoder_segment_ids)
        cross_mask = meeting(real, encoder_input_tokens > 0, decoder_segment_ids, encoder_segment_ids)
        cross_bias = mask_bias(cross_mask[:, None])
        cross = [(*keys_values, cross_bias) for keys_values in self.decoder.cross_keys_values(encoded)]
        return self.run(decoder_input_tokens, mask, cross=cross, deterministic=deterministic)[0]

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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class T5(transformer.NetworkModel):
    """T5 as a LanguageModel; see `NetworkModel`. `inputs` is {"encoder_input_tokens": [rows, S]}."""

    config: T5Config
    input_name: ClassVar[str] = "encoder_input_tokens"

    def inputs(self, tokens: Array) -> dict[str, Array]:
        """What `start` reads, of inputs [rows, S] that are padded with 0 on the right."""
        return {self.input_name: jnp.asarray(tokens)}

    def read(self, inputs: PyTree) -> tuple[Array]:
        """The encoder's input."""
        return (inputs[self.input_name],)

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        """The decoder start token at position 0 of every row."""
        rows = inputs[self.input_name].shape[0]
        return jnp.full(rows, self.start_id, jnp.int32), jnp.zeros(rows, jnp.int32)
