"""T5X's decoder-only network, as a causal or as a prefix LM, as a module and as a LanguageModel.

`DecoderOnlyModule` is the Flax network: teacher-forced forward for training and scoring, prefill of ragged prompts,
and block decoding on a per-row cache. `DecoderOnly` is the LanguageModel the decoding loop sees.

Facts after T5X's example of that name and its `DecoderOnlyModel`: T5's decoder without cross-attention; distances to
later tokens, which only a prefix LM sees, share the bucket of distance 0; the prompt is the start token and all the
input tokens, and the first output token is predicted at the last of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import Array, PyTree, UserError
from speccascade_t5x.models import cache as kv_cache
from speccascade_t5x.models import prompts
from speccascade_t5x.models.attention import Attention, mask_bias
from speccascade_t5x.models.layers import ACTIVATIONS, MLP, Dense, Embed, RelativePositionBias, RMSNorm, dropout


@dataclasses.dataclass(frozen=True)
class DecoderOnlyConfig:
    """Architecture, with the field names of T5X's decoder-only TransformerConfig. Hashable: static under jit.

    Attributes:
      inputs_bidirectional_attention: prefix LM: the tokens of a prompt all see each other. T5X keeps this in
        `models.DecoderOnlyModel`, as the parameters are those of a causal LM.
      dtype: of activations ("float32" or "bfloat16"); parameters are float32, laws and logits too.
      logits_via_embedding: tied logits scaled by emb_dim^-0.5 instead of a projection of their own.
      mlp_activations: ("relu",), or ("gelu", "linear") for a gated MLP.
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 8
    num_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: tuple[str, ...] = ("relu",)
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"
    inputs_bidirectional_attention: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        unknown = sorted(set(self.mlp_activations) - set(ACTIVATIONS))
        if unknown:
            raise UserError(f"unknown mlp activation {unknown[0]!r}: use some of {', '.join(ACTIVATIONS)}")

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as jax.numpy has it."""
        return jnp.dtype(self.dtype)

    @property
    def module(self) -> DecoderOnlyModule:
        """The Flax network."""
        return DecoderOnlyModule(self)


class SelfAttentionLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and inside a residual."""

    config: DecoderOnlyConfig

    def setup(self) -> None:
        config, dtype = self.config, self.config.activation_dtype
        self.pre_self_attention_layer_norm = RMSNorm(dtype=dtype)
        self.self_attention = Attention(config.num_heads, config.head_dim, config.dropout_rate, dtype)
        self.pre_mlp_layer_norm = RMSNorm(dtype=dtype)
        self.mlp = MLP(config.mlp_dim, config.mlp_activations, config.dropout_rate, dtype)
        self.dropout = dropout(config.dropout_rate)

    def __call__(
        self,
        x: Array,
        bias: Array,
        stored: tuple[Array, Array] | None = None,
        positions: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, tuple[Array, Array]]:
        """x [B, T, D] -> (x, the layer's cache). Without `stored`, the block is its own whole context."""
        normed = self.pre_self_attention_layer_norm(x)
        block = self.self_attention.keys_values(normed)
        if stored is None:
            stored = block
        else:
            stored = tuple(kv_cache.write(s, b, positions) for s, b in zip(stored, block, strict=True))
        attended = self.self_attention(normed, *stored, bias, deterministic)
        x = x + self.dropout(attended, deterministic=deterministic)
        transformed = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
        return x + self.dropout(transformed, deterministic=deterministic), stored


class PrefixDecoder(nn.Module):
    """Embedding, stack and output projection: all of a decoder-only network sits below "decoder"."""

    config: DecoderOnlyConfig

    def setup(self) -> None:
        config = self.config
        self.token_embedder = Embed(config.vocab_size, config.emb_dim, config.activation_dtype)
        self.relpos_bias = RelativePositionBias(config.num_heads, bidirectional=False)
        self.layers = [SelfAttentionLayer(config) for _ in range(config.num_layers)]
        self.decoder_norm = RMSNorm(dtype=config.activation_dtype)
        self.dropout = dropout(config.dropout_rate)
        if not config.logits_via_embedding:
            # float32 whatever the activations: the laws are float32.
            self.logits_dense = Dense(config.vocab_size, ("embed", "vocab"))

    def project(self, hidden: Array) -> Array:
        """[B, T, D] -> float32 logits [B, T, V]."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(hidden)
        return self.logits_dense(hidden)

    def __call__(
        self, tokens: Array, mask: Array, deterministic: bool = True
    ) -> tuple[Array, list[tuple[Array, Array]]]:
        """tokens [B, T], mask [B or 1, T, T] bool -> (hidden [B, T, D], keys and values of each layer)."""
        length = tokens.shape[1]
        bias = mask_bias(mask[:, None], self.relpos_bias(jnp.array(0), length, length))
        x, stored = self.dropout(self.token_embedder(tokens), deterministic=deterministic), []
        for layer in self.layers:
            x, own = layer(x, bias, deterministic=deterministic)
            stored.append(own)
        return self.dropout(self.decoder_norm(x), deterministic=deterministic), stored

    def extend(self, tokens: Array, cache: PyTree, positions: Array) -> tuple[Array, PyTree]:
        """One block at per-row positions: tokens [B, T] -> (hidden [B, T, D], cache)."""
        length, slots = tokens.shape[1], cache["self"][0][0].shape[2]
        seen = kv_cache.visible(positions, length, slots)
        if self.config.inputs_bidirectional_attention:
            prompt = cache["prompt"][:, None]
            query = (positions[:, None] + jnp.arange(length)) < prompt
            seen |= query[:, :, None] & (jnp.arange(slots) < prompt)[:, None, :]
        bias = mask_bias(seen[:, None], self.relpos_bias(positions, length, slots))
        x, stored = self.token_embedder(tokens), []
        for layer, own in zip(self.layers, cache["self"], strict=True):
            x, own = layer(x, bias, own, positions)
            stored.append(own)
        return self.decoder_norm(x), {**cache, "self": stored}


class DecoderOnlyModule(nn.Module):
    """The whole network. Parameters sit where T5X puts them."""

    config: DecoderOnlyConfig

    def setup(self) -> None:
        self.decoder = PrefixDecoder(self.config)

    def __call__(
        self,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        decoder_causal_attention: Array | None = None,
        decoder_segment_ids: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Teacher-forced logits.

        Args:
          decoder_input_tokens: [B, T], prompt and targets shifted right.
          decoder_target_tokens: [B, T]; 0 is padding and masks its position.
          decoder_causal_attention: [B, T], 1 where tokens see each other; read by a prefix LM alone, which needs it.
          decoder_segment_ids: [B, T] of packed examples.
          deterministic: False applies dropout (needs the rng "dropout").

        Returns:
          [B, T, V] float32.

        Raises:
          UserError: a prefix LM without decoder_causal_attention.
        """
        real = decoder_target_tokens > 0
        mask = self._mask(real.shape[1], decoder_causal_attention)
        mask &= real[:, :, None] & real[:, None, :]
        if decoder_segment_ids is not None:
            mask &= decoder_segment_ids[:, :, None] == decoder_segment_ids[:, None, :]
        hidden, _ = self.decoder(decoder_input_tokens, mask, deterministic)
        return self.decoder.project(hidden)

    def _mask(self, length: int, prefix: Array | None) -> Array:
        """[B or 1, T, T] bool: tokens see themselves and earlier ones; a prefix LM's prefix sees all of itself."""
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        if not self.config.inputs_bidirectional_attention:
            return causal
        if prefix is None:
            raise UserError("a prefix LM needs decoder_causal_attention, which says where the inputs stand")
        inside = prefix > 0
        return causal | (inside[:, :, None] & inside[:, None, :])

    def start(self, tokens: Array, lengths: Array, repeats: int, room: int) -> PyTree:
        """Prefills ragged prompts [B, S] once and returns the decode cache, each row repeated `repeats` times.

        Slots beyond a row's own prompt hold leftovers of its padding, which no query sees before they are overwritten.
        """
        prefix = jnp.arange(tokens.shape[1]) < lengths[:, None]
        _, stored = self.decoder(tokens, self._mask(tokens.shape[1], prefix))
        pads = ((0, 0), (0, 0), (0, max(room - 1, 0)), (0, 0))
        spread = lambda x: jnp.pad(jnp.repeat(x, repeats, axis=0), pads)  # noqa: E731
        cache = {"self": [(spread(keys), spread(values)) for keys, values in stored]}
        if self.config.inputs_bidirectional_attention:
            cache["prompt"] = jnp.repeat(lengths, repeats)
        return cache

    def extend(self, cache: PyTree, tokens: Array, positions: Array) -> tuple[Array, Array, PyTree]:
        """[B, T] ids at per-row positions -> (logits [B, T, V], hidden [B, T, D], cache)."""
        hidden, cache = self.decoder.extend(tokens, cache, positions)
        return self.decoder.project(hidden), hidden, cache


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DecoderOnly:
    """A decoder-only network as a LanguageModel (see `interfaces.LanguageModel`).

    `inputs` is {"decoder_input_tokens": [rows, S]}, prompts of any length behind the start token and padded on the
    right, and perhaps "decoder_causal_attention", which says how long they are (see `models.prompts`).

    Attributes:
      config: the architecture.
      start_id: the token before every prompt.
    """

    config: DecoderOnlyConfig
    start_id: int = 0
    input_name: ClassVar[str] = prompts.TOKENS

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.config.vocab_size

    @property
    def module(self) -> DecoderOnlyModule:
        """The Flax module, for training and scoring."""
        return self.config.module

    def inputs(self, tokens: Array) -> dict[str, Array]:
        """What `start` reads, of prompts [rows, S] that are padded with 0 on the right."""
        return prompts.from_rows(tokens, self.start_id)

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Prefills the prompts once per input; see the Protocol.

        A row has S - 1 + room slots: `room` counts from the last prompt token on, which stands where the start token
        of an encoder-decoder does, so callers ask for the same room whatever the prompts.
        """
        tokens, lengths = prompts.read(inputs)
        samples = prompts.repeats(batch_size, tokens.shape[0])
        return self.module.apply({"params": params}, tokens, lengths, samples, room, method="start")

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        """The last prompt token of every row at its own position; the start token at 0 where a prompt is empty."""
        return prompts.last(inputs)

    def extend(
        self, params: PyTree, cache: PyTree, tokens: Array, positions: Array, capture: tuple[str, ...] = ()
    ) -> tuple[Any, PyTree]:
        """Scores a block; see the Protocol. `capture` knows "hidden", the final norm's output."""
        unknown = set(capture) - {"hidden"}
        if unknown:
            raise UserError(f"a decoder-only model has no hidden state {unknown.pop()!r} to capture: ask for 'hidden'")
        logits, hidden, cache = self.module.apply({"params": params}, cache, tokens, positions, method="extend")
        return ((logits, {"hidden": hidden}) if capture else logits), cache
