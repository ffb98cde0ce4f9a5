"""n-gram tables as LanguageModels: free drafters, and laws small enough to enumerate in tests."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x.interfaces import Array, Bound, PyTree, UserError
from speccascade_t5x.models import prompts


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TableModel:
    """Next-token logits looked up by the last `order` tokens.

    Parameters are {"logits": [V] * order + [V]}. Contexts that reach before the first token are filled with
    `start_id`. Inputs only tell how many rows there are, unless they hold the prompts of decoder-only models
    (`models.prompts`): a table then writes on after them, beside such a model or alone.

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
            raise UserError(f"a table model has no hidden state {capture[0]!r}")
        put = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,))  # noqa: E731
        stored = jax.vmap(put)(cache["tokens"], tokens.astype(jnp.int32), positions)
        query = positions[:, None] + jnp.arange(tokens.shape[1])
        context = []
        for back in reversed(range(self.order)):
            slot = query - back
            token = jnp.take_along_axis(stored, jnp.maximum(slot, 0), axis=1)
            context.append(jnp.where(slot < 0, self.start_id, token))
        return params["logits"][tuple(context)], {"tokens": stored}


def bigram(logits: Array, start_id: int = 0) -> Bound:
    """A bound table model.

    Args:
      logits: [V, V] of the next token given the last one; more leading axes give a longer context.
      start_id: decoder start token.

    Raises:
      UserError: the axes of `logits` are not all of one size.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim < 2 or len(set(logits.shape)) != 1:
        raise UserError(f"a table needs two or more axes of one size V, but has shape {logits.shape}")
    return Bound(TableModel(logits.shape[-1], logits.ndim - 1, start_id), {"logits": logits})
