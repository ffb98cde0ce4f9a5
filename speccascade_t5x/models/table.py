"""n-gram tables as LanguageModels: drafters that call no network, and models small enough to enumerate in tests."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x.core import ngram
from speccascade_t5x.interfaces import Array, Bound, PyTree, UserError
from speccascade_t5x.models import prompts


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TableModel:
    """Next-token logits looked up by the last `order` tokens.

    Parameters are {"logits": [V] * order + [V]}. Contexts that reach before the first token are filled with
    `start_id`. Inputs only give the number of rows, unless they hold the prompts of decoder-only models
    (`models.prompts`): the table then continues them, beside such a model or alone.

    Attributes:
      vocab_size: V.
      order: how many tokens of context; 1 is a bigram table.
      start_id: decoder start token.
    """

    vocab_size: int
    order: int = 1
    start_id: int = 0

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """The cache is the row's own tokens, prompt included; see the Protocol."""
        del params
        if not prompts.given(inputs):
            return {"tokens": jnp.full((batch_size, room), self.start_id, jnp.int32)}
        tokens, _ = prompts.read(inputs)
        tokens = jnp.repeat(tokens, prompts.repeats(batch_size, tokens.shape[0]), axis=0)
        return {"tokens": jnp.pad(tokens, ((0, 0), (0, max(room - 1, 0))))}

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        """The start token at position 0 of every row, or the last token of each prompt."""
        if prompts.given(inputs):
            return prompts.last(inputs)
        rows = jax.tree.leaves(inputs)[0].shape[0]
        return jnp.full(rows, self.start_id, jnp.int32), jnp.zeros(rows, jnp.int32)

    def extend(
        self, params: PyTree, cache: PyTree, tokens: Array, positions: Array, capture: tuple[str, ...] = ()
    ) -> tuple[Array, PyTree]:
        """Scores a block by lookup; see the Protocol. There are no hidden states to capture."""
        if capture:
            raise UserError(f"a table model has no hidden state {capture[0]!r}: capture nothing")
        stored = ngram.write_rows(cache["tokens"], tokens, positions)
        query = positions[:, None] + jnp.arange(tokens.shape[1])
        return self._logits(params, stored, query), {"tokens": stored}

    def _logits(self, params: PyTree, stored: Array, query: Array) -> Array:
        """[B, T, V] after the tokens of `stored` [B, N] at the positions `query` [B, T]."""
        context = [ngram.token_before(stored, query, back, self.start_id) for back in reversed(range(self.order))]
        return params["logits"][tuple(context)]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NGramModel(TableModel):
    """An `NGramTable` as a LanguageModel: it calls no network, and its distribution q can be read by rules.

    Parameters are {"table": NGramTable}. The token before the first one is unknown, not `start_id`.
    """

    def _logits(self, params: PyTree, stored: Array, query: Array) -> Array:
        earlier, last = (ngram.token_before(stored, query, back, -1) for back in (1, 0))
        law = params["table"].law(earlier.reshape(-1), last.reshape(-1))
        return jnp.log(law).reshape(*query.shape, self.vocab_size)


def bigram(logits: Array, start_id: int = 0) -> Bound:
    """A bound table model.

    Args:
      logits: [V, V] of the next token given the last one; more leading axes give a longer context.
      start_id: decoder start token.

    Raises:
      UserError: the axes of `logits` are not all of one size.

    >>> counting = bigram(jnp.eye(3, k=1))  # the likeliest token after 0 is 1, after 1 it is 2
    >>> counting.model.vocab_size, counting.model.order
    (3, 1)
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim < 2 or len(set(logits.shape)) != 1:
        raise UserError(f"a table needs two or more axes of one size V, but has shape {logits.shape}")
    return Bound(TableModel(logits.shape[-1], logits.ndim - 1, start_id), {"logits": logits})


def ngram_model(table: ngram.NGramTable, start_id: int = 0) -> Bound:
    """A bound `NGramModel`."""
    return Bound(NGramModel(table.vocab_size, start_id=start_id), {"table": jax.tree.map(jnp.asarray, table)})
