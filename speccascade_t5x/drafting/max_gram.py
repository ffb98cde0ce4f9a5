"""Copied drafts: Max-Gram and prompt lookup, filled up from n-gram tables. They cost no model call.

Source: Max-Gram of "Cascade Speculative Drafting" (Chen et al., NeurIPS 2024).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import probs
from speccascade_t5x.core.ngram import NGramTable, token_before, write_rows
from speccascade_t5x.interfaces import Array, Bound, Proposal, PyTree, UserError

# Marks of the searched text, none of which equals an id or another mark.
_GAP, _AHEAD, _BEFORE = -1, -2, -3


@dataclasses.dataclass(frozen=True)
class MaxGram:
    """Copies what followed the longest earlier occurrence of the output's last tokens; see `interfaces.Drafter`.

    It searches the prompt (for an encoder-decoder the encoder's input, which shares the vocabulary) and the row's own
    output. If there is an n-gram table, it fills the positions beyond the copy; otherwise the draft ends with the copy,
    and is empty if nothing matches. Prompt lookup is this drafter with a small `max_ngram` and no table.

    Parameters are {"table": NGramTable or None}. A copied token has the one-hot distribution, and so has a filled one
    unless `fill` is "sample"; a sampled token has Tr of the table's distribution.

    Attributes:
      sampling: shapes the table's distribution where `fill` is "sample"; traced.
      draft_len: G.
      width: V of the distributions.
      vocab_size: ids at or above it are never drafted.
      max_ngram: longest match that is looked for; None sets no limit (Max-Gram).
      min_ngram: shortest match that is used.
      fill: "argmax" or "sample" of the table.
      latest: whether the last of equally long matches is taken instead of the first.
      prompt: the input that is searched, in which id 0 is padding; None searches the output alone.
    """

    sampling: probs.Sampling
    draft_len: int
    width: int
    vocab_size: int | None = None
    max_ngram: int | None = None
    min_ngram: int = 1
    fill: Literal["argmax", "sample"] = "argmax"
    latest: bool = False
    prompt: str | None = "encoder_input_tokens"

    def __post_init__(self) -> None:
        if self.fill not in ("argmax", "sample"):
            raise UserError(f"fill={self.fill!r} is unknown: use 'argmax' or 'sample'")
        if self.draft_len < 1:
            raise UserError(f"draft_len={self.draft_len} is too small: a drafter drafts 1 token or more")
        if self.min_ngram < 1 or (self.max_ngram is not None and self.max_ngram < self.min_ngram):
            raise UserError(
                f"matches from {self.min_ngram} to {self.max_ngram} tokens: min_ngram must be 1 or more, "
                "and max_ngram no less than it"
            )

    @property
    def noise_size(self) -> int:
        """The uniforms of one draw per position that may be sampled."""
        return self.draft_len * probs.DRAW if self.fill == "sample" else 0

    @property
    def _top(self) -> int:
        """Ids below it may be drafted."""
        return self.width if self.vocab_size is None else min(self.vocab_size, self.width)

    @property
    def score_bonus(self) -> bool:
        """False: a copied token has no model's distribution q."""
        return False

    @property
    def models(self) -> tuple[()]:
        """No language model is run."""
        return ()

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Remembers the prompt; the output is empty."""
        del params
        return {
            "prompt": self.prompt_of(inputs, batch_size),
            "tokens": jnp.zeros((batch_size, room + self.draft_len + 1), jnp.int32),
            "first": jnp.full(batch_size, -1, jnp.int32),
        }

    def propose(
        self, params: PyTree, state: PyTree, tokens: Array, positions: Array, noise: Array
    ) -> tuple[Proposal, PyTree]:
        """Copies and fills; see the Protocol."""
        first = jnp.where(state["first"] < 0, positions, state["first"])
        end = positions - first
        history = remember(state["tokens"], tokens, end)
        drafted, lengths, law = self.draft(params, state["prompt"], history, end, self.draft_len, noise)
        history = write_rows(history, drafted, end + 1)
        none = jnp.zeros_like(lengths)
        proposal = Proposal(drafted, lengths, law, None, None, none)
        return proposal, {**state, "tokens": history, "first": first}

    def commit(self, state: PyTree, lengths: Array) -> PyTree:
        """Nothing to do: the next round overwrites what was rejected."""
        del lengths
        return state

    def prompt_of(self, inputs: PyTree, batch_size: int) -> Array:
        """[B, S] ids to search before the output; padding is _GAP."""
        if self.prompt is None:
            return jnp.zeros((batch_size, 0), jnp.int32)
        if self.prompt not in inputs:
            raise UserError(
                f"there is no input {self.prompt!r} to search (the inputs are {', '.join(sorted(inputs))}): "
                "name one of them as prompt, or None to search the output alone"
            )
        prompt = jnp.asarray(inputs[self.prompt], jnp.int32)
        prompt = jnp.repeat(prompt, batch_size // prompt.shape[0], axis=0)
        return jnp.where(prompt == 0, _GAP, prompt)

    def draft(
        self, params: PyTree, prompt: Array, history: Array, end: Array, size: int, noise: Array
    ) -> tuple[Array, Array, Array]:
        """Drafts after history[b, end[b]].

        Args:
          params: the parameters.
          prompt: from `prompt_of`.
          history: [B, N] the output so far, start token first.
          end: [B] index of its last token.
          size: most tokens to draft; static.
          noise: [B, size * probs.DRAW] uniforms where `fill` is "sample".

        Returns:
          (tokens [B, size], lengths [B], their distributions [B, size, V]).
        """
        copied, count = self._copy(prompt, history, end, size)
        table: NGramTable | None = params["table"]
        if table is None:
            return copied, count, jax.nn.one_hot(copied, self.width, dtype=jnp.float32)
        whole = jnp.full_like(count, size)
        if self.fill == "argmax":

            def filled(copied: Array) -> Array:
                return self._fill(table, history, end, copied, count, None)[0]

            tokens = jax.lax.cond(jnp.any(count < size), filled, lambda copied: copied, copied)
            return tokens, whole, jax.nn.one_hot(tokens, self.width, dtype=jnp.float32)
        tokens, law = self._fill(table, history, end, copied, count, noise)
        return tokens, whole, law

    def _copy(self, prompt: Array, history: Array, end: Array, size: int) -> tuple[Array, Array]:
        """What followed the best match: (tokens [B, size], how many of them are good [B])."""
        batch, slots = history.shape
        known = jnp.where(jnp.arange(slots) <= end[:, None], history, _AHEAD)
        text = jnp.concatenate([prompt, jnp.full((batch, 1), _GAP, jnp.int32), known], axis=1)
        longest = slots if self.max_ngram is None else min(self.max_ngram, slots)
        behind = jnp.pad(text, ((0, 0), (longest, 0)), constant_values=_GAP)
        last_tokens = jnp.pad(history, ((0, 0), (longest, 0)), constant_values=_BEFORE)

        def matching(carry: tuple[Array, Array, Array]) -> Array:
            return (carry[0] < longest) & jnp.any(carry[1])

        def one_more(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            back, alive, length = carry
            shifted = jax.lax.dynamic_slice_in_dim(behind, longest - back, text.shape[1], axis=1)
            wanted = jnp.take_along_axis(last_tokens, (end + longest - back)[:, None], axis=1)
            alive &= shifted == wanted
            return back + 1, alive, length + alive

        # A match must be followed by a token: that also rules out the output's own end.
        followed = jnp.pad(text[:, 1:] >= 0, ((0, 0), (0, 1)))
        length = jax.lax.while_loop(matching, one_more, (jnp.int32(0), followed, jnp.zeros_like(text)))[2]
        best = jnp.max(length, axis=1)
        place = jnp.arange(text.shape[1])
        among = length == best[:, None]
        at = jnp.max(jnp.where(among, place, -1), axis=1) if self.latest else jnp.argmax(among, axis=1)
        ahead = jnp.pad(text, ((0, 0), (0, size + 1)), constant_values=_GAP)
        copied = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (size,)))(ahead, at + 1)
        good = (copied >= 0) & (copied < self._top) & (best >= self.min_ngram)[:, None]
        count = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=1), axis=1)
        return jnp.where(jnp.arange(size) < count[:, None], copied, 0), count

    def _fill(
        self, table: NGramTable, history: Array, end: Array, copied: Array, count: Array, noise: Array | None
    ) -> tuple[Array, Array | Any]:
        """Continues a copy of `count` tokens from the table: (tokens [B, size], `law` [B, size, V] or None)."""
        ends = end[:, None]
        earlier, last = token_before(history, ends, 1, -1)[:, 0], token_before(history, ends, 0, -1)[:, 0]
        size = copied.shape[1]

        def step(carry, xs):
            earlier, last = carry
            i, copy, uniforms = xs
            if noise is None:
                token, law = table.best(earlier, last, self._top), None
            else:
                law = self._sampled_law(table.law(earlier, last))
                token = probs.sample(law, uniforms)
            token = jnp.where(i < count, copy, token)
            return (last, token), (token, law)

        draws = jnp.zeros((size, 0)) if noise is None else noise.reshape(-1, size, probs.DRAW).swapaxes(0, 1)
        _, (tokens, laws) = jax.lax.scan(step, (earlier, last), (jnp.arange(size), copied.T, draws))
        if noise is None:
            return tokens.T, None
        sure = (jnp.arange(size) < count[:, None])[..., None]
        one_hot = jax.nn.one_hot(tokens.T, self.width, dtype=jnp.float32)
        return tokens.T, jnp.where(sure, one_hot, laws.swapaxes(0, 1))

    def _sampled_law(self, law: Array) -> Array:
        """Tr of the table's distribution at the sampling temperature, [B, V]."""
        logits = jnp.log(law[..., : self.width])
        return probs.truncate(probs.tempered(logits, self.sampling.temperature, self.vocab_size), self.sampling)


trees.register(MaxGram, static=[f.name for f in dataclasses.fields(MaxGram) if f.name != "sampling"])


def remember(history: Array, last_two: Array, end: Array) -> Array:
    """Writes the last two committed tokens [B, 2] so that the second is at end[b].

    If only the start token exists, `last_two` holds it twice, and it is written to index 0.
    """
    history = write_rows(history, last_two[:, :1], jnp.maximum(end - 1, 0))
    return write_rows(history, last_two[:, 1:], end)


def max_gram(
    draft_len: int,
    width: int,
    table: NGramTable | None = None,
    sampling: probs.Sampling | None = None,
    **options,
) -> Bound:
    """A bound Max-Gram drafter. `options` are the further attributes of MaxGram.

    Raises:
      UserError: an option out of range, or a table of another vocabulary.
    """
    if table is not None and table.vocab_size < width:
        raise UserError(
            f"the n-gram table has {table.vocab_size} ids, but distributions have {width}: build it for {width} ids"
        )
    drafter = MaxGram(sampling or probs.Sampling(), draft_len, width, **options)
    return Bound(drafter, {"table": jax.tree.map(jnp.asarray, table)})


def prompt_lookup(draft_len: int, width: int, max_ngram: int = 3, min_ngram: int = 1, **options) -> Bound:
    """Prompt lookup: Max-Gram with matches of `min_ngram` to `max_ngram` tokens, no draft without a match."""
    return max_gram(draft_len, width, None, max_ngram=max_ngram, min_ngram=min_ngram, **options)
