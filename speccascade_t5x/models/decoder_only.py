"""T5X's decoder-only network, as a causal or as a prefix LM, as a module and as a LanguageModel.

`DecoderOnlyModule` is the Flax network: teacher-forced forward for training and scoring, prefill of ragged prompts,
and block decoding on a per-row cache. `DecoderOnly` is the LanguageModel the decoding loop sees.

Facts after T5X's example of that name and its `DecoderOnlyModel`: T5's decoder without cross-attention; distances to
later tokens, which only a prefix LM sees, share the bucket of distance 0; the prompt is the start token and all the
input tokens, and the first output token is predicted at the last of them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import Array, PyTree, UserError
from speccascade_t5x.models import prompts, transformer
from speccascade_t5x.models.attention import meeting
from speccascade_t5x.models.layers import Embed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOnlyConfig(transformer.TransformerConfig):
    """Architecture, with the field names of T5X's decoder-only TransformerConfig; see `TransformerConfig`.

    Attributes:
      inputs_bidirectional_attention: prefix LM: the tokens of a prompt all see each other. T5X keeps this in
        `models.DecoderOnlyModel`, as the parameters are those of a causal LM.
    """

    num_layers: int = 6
    inputs_bidirectional_attention: bool = False

    @property
    def module(self) -> DecoderOnlyModule:
        """The Flax network."""
        return DecoderOnlyModule(self)


class PrefixDecoder(transformer.Decoder):
    """A decoder with its embedding: all of a decoder-only network sits below "decoder"."""

    def setup(self) -> None:
        super().setup()
        self.token_embedder = transformer.embed(self.config)


class DecoderOnlyModule(transformer.Network):
    """The whole network. Parameters sit where T5X puts them."""

    config: DecoderOnlyConfig

    def setup(self) -> None:
        self.decoder = PrefixDecoder(self.config, self.config.num_layers)

    def embedder(self) -> Embed:
        """See `Network`."""
        return self.decoder.token_embedder

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
        mask &= meeting(real, real, decoder_segment_ids, decoder_segment_ids)
        return self.run(decoder_input_tokens, mask, deterministic=deterministic)[0]

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
        _, stored = self.decoder(self.embedder()(tokens), self._mask(tokens.shape[1], prefix))
        pads = ((0, 0), (0, 0), (0, max(room - 1, 0)), (0, 0))
        cache: PyTree = {"self": jax.tree.map(lambda x: jnp.pad(jnp.repeat(x, repeats, axis=0), pads), stored)}
        if self.config.inputs_bidirectional_attention:
            cache["prompt"] = jnp.repeat(lengths, repeats)
        return cache

    def visible(self, cache: PyTree, positions: Array, length: int, slots: int) -> Array:
        """See `Network`; the prompt of a prefix LM sees all of itself."""
        seen = super().visible(cache, positions, length, slots)
        if self.config.inputs_bidirectional_attention:
            prompt = cache["prompt"][:, None]
            query = (positions[:, None] + jnp.arange(length)) < prompt
            seen |= query[:, :, None] & (jnp.arange(slots) < prompt)[:, None, :]
        return seen


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DecoderOnly(transformer.NetworkModel):
    """A decoder-only network as a LanguageModel; see `NetworkModel`. `start_id` is the token before every prompt.

    `inputs` is {"decoder_input_tokens": [rows, S]}, prompts of any length behind the start token and padded on the
    right, and perhaps "decoder_causal_attention", which says how long they are (see `models.prompts`). A row gets
    S - 1 + room cache slots: `room` counts from the last prompt token on, which stands where the start token of an
    encoder-decoder does, so callers ask for the same room whatever the prompts.
    """

    config: DecoderOnlyConfig
    input_name: ClassVar[str] = prompts.TOKENS

    def inputs(self, tokens: Array) -> dict[str, Array]:
        """What `start` reads, of prompts [rows, S] that are padded with 0 on the right."""
        return prompts.from_rows(tokens, self.start_id)

    def read(self, inputs: PyTree) -> tuple[Array, Array]:
        """The prompts and their lengths."""
        return prompts.read(inputs)

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        """The last prompt token of every row at its own position; the start token at 0 where a prompt is empty."""
        return prompts.last(inputs)
