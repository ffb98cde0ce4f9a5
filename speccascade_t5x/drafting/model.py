"""A language model as drafter: it samples up to `draft_len` tokens one after another from Tr(q)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import probs
from speccascade_t5x.drafting.stop import DraftStop
from speccascade_t5x.interfaces import Array, LanguageModel, Proposal, PyTree


@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """See `interfaces.Drafter`.

    The drafter's cache must hold every committed token before it drafts. If the rule reads q (`score_bonus`), the
    model is also called after its last drafted token, which fills that slot. Otherwise that call is saved: the first
    block of a round feeds the last TWO committed tokens, which costs one position and fills the slot that a wholly
    accepted draft left empty.

    Attributes:
      sampling: how the drafter's distribution is shaped; traced.
      model: the language model.
      draft_len: G.
      width: V; logits are cut to it.
      vocab_size: ids at or above it are never drafted.
      score_bonus: whether q is wanted at the bonus position.
      stop: when a row stops drafting before `draft_len`; None always drafts `draft_len` tokens. Its thresholds are
        traced.
      report_q: whether q and q_raw are reported, with G columns, even if the bonus position is not scored.
      report_hidden: whether the model's last hidden states are reported beside q, for rules that read them.
    """

    sampling: probs.Sampling
    model: LanguageModel
    draft_len: int
    width: int
    vocab_size: int | None
    score_bonus: bool
    stop: DraftStop | None = None
    report_q: bool = False
    report_hidden: bool = False

    @property
    def models(self) -> tuple[LanguageModel]:
        """The one model."""
        return (self.model,)

    @property
    def noise_size(self) -> int:
        """The uniforms of one draw per drafted token."""
        return self.draft_len * probs.DRAW

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Starts the model's cache; remembers where each row begins."""
        _, first = self.model.first(inputs)
        return {
            "cache": self.model.start(params, inputs, batch_size, room),
            "first": jnp.repeat(first, batch_size // first.shape[0]),
        }

    def propose(
        self, params: PyTree, state: PyTree, tokens: Array, positions: Array, noise: Array
    ) -> tuple[Proposal, PyTree]:
        """Drafts G tokens after `tokens`; see the Protocol."""
        found, cache = self._catch_up(params, state, tokens, positions)
        batch, steps = tokens.shape[0], self.draft_len if self.score_bonus else self.draft_len - 1
        draws = noise.reshape(batch, self.draft_len, probs.DRAW).swapaxes(0, 1)

        def draw(logits: Array, uniforms: Array, going: Array) -> tuple[Array, Array, Array]:
            if self.stop is not None:
                law_raw = probs.raw(logits, self.vocab_size)
                # A NaN passes no test for what it is: it is drafted from, where verification finds it.
                going &= ~self.stop.stops(law_raw) | probs.is_broken(law_raw)
            law = probs.truncate(probs.tempered(logits, self.sampling.temperature, self.vocab_size), self.sampling)
            return probs.sample(law, uniforms), law, going

        def step(carry, xs):
            found, cache, going = carry
            i, uniforms = xs
            token, law, going = draw(found[0], uniforms, going)
            feed = lambda cache: self._extend(params, cache, token[:, None], positions + 1 + i)  # noqa: E731
            if self.stop is None:
                after, cache = feed(cache)
            else:  # once every row has stopped, the rest of the draft costs nothing
                idle = lambda cache: (jax.tree.map(lambda x: x[:, None], found), cache)  # noqa: E731
                after, cache = jax.lax.cond(jnp.any(going), feed, idle, cache)
            return (jax.tree.map(lambda x: x[:, 0], after), cache, going), (token, law, found, going)

        carry = (found, cache, jnp.ones(batch, bool))
        xs = (jnp.arange(steps), draws[:steps])
        (found, cache, going), (drafted, laws, seen, kept) = jax.lax.scan(step, carry, xs)
        calls = 1 + jnp.sum(kept, axis=0, dtype=jnp.int32)
        if self.score_bonus or self.report_q:
            seen = jax.tree.map(lambda past, last: jnp.append(past, last[None], 0).swapaxes(0, 1), seen, found)
        if not self.score_bonus:
            token, law, going = draw(found[0], draws[-1], going)
            drafted, laws, kept = (
                jnp.append(done, last[None], 0) for done, last in ((drafted, token), (laws, law), (kept, going))
            )
        q = q_raw = hidden = None
        if self.score_bonus or self.report_q:
            logits, hidden = seen
            q_raw = probs.raw(logits, self.vocab_size)
            q = probs.tempered(logits, self.sampling.temperature, self.vocab_size, q_raw)
        lengths = jnp.sum(kept, axis=0, dtype=jnp.int32)
        proposal = Proposal(drafted.T, lengths, laws.swapaxes(0, 1), q, q_raw, calls, hidden=hidden)
        return proposal, {**state, "cache": cache}

    def commit(self, state: PyTree, lengths: Array) -> PyTree:
        """Nothing to do: the next round starts lower and overwrites."""
        del lengths
        return state

    def _catch_up(self, params: PyTree, state: PyTree, tokens: Array, positions: Array) -> tuple[PyTree, PyTree]:
        """Feeds the last committed token(s); returns ((logits [B, V], hidden [B, D]) after the last one, cache)."""
        if self.score_bonus:
            found, cache = self._extend(params, state["cache"], tokens[:, 1:], positions)
            return jax.tree.map(lambda x: x[:, 0], found), cache
        # A row with only its first token has no token before it: it feeds that token at its own slot, and
        # the second column is a filler that the first drafted token overwrites.
        begin = jnp.maximum(positions - 1, state["first"])
        found, cache = self._extend(params, state["cache"], tokens, begin)
        return jax.tree.map(lambda x: jnp.where((positions == begin)[:, None], x[:, 0], x[:, 1]), found), cache

    def _extend(self, params: PyTree, cache: PyTree, tokens: Array, positions: Array) -> tuple[PyTree, PyTree]:
        """(logits [B, T, width], hidden [B, T, D] or None) of a block, and the cache."""
        if self.report_hidden:
            (logits, captured), cache = self.model.extend(params, cache, tokens, positions, ("hidden",))
        else:
            (logits, cache), captured = self.model.extend(params, cache, tokens, positions), {}
        return (logits[..., : self.width].astype(jnp.float32), captured.get("hidden")), cache


trees.register(
    ModelDrafter, static=["model", "draft_len", "width", "vocab_size", "score_bonus", "report_q", "report_hidden"]
)
