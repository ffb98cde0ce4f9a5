"""Cascades of drafters: a drafter's draft is itself made by speculative decoding from smaller drafters.

This is the vertical and horizontal cascade of "Cascade Speculative Drafting" (Chen et al., NeurIPS 2024) at any depth.
Every drafted token carries its distribution d, so the last review is exact whatever happened below it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import probs, verify
from speccascade_t5x.core.ngram import write_rows
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.core.rules import Rule
from speccascade_t5x.drafting.edges import Draft, ModelLaw, lenient_target, model_law, raw_chance, rule_law
from speccascade_t5x.drafting.k_matrix import KMatrix
from speccascade_t5x.drafting.max_gram import MaxGram, remember
from speccascade_t5x.interfaces import Array, LanguageModel, Proposal, PyTree

# What the drafting of one round carries (`_Carry`): {"history": [B, N] tokens by output index, "caches": one per
# model, "valid": [B] per model, how many leading slots of its cache hold the history's tokens, "calls": [B] per
# model}. What lies beyond a row's current token is left over from earlier rounds, and later writes replace it.
_Carry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What stays the same while a round is drafted: parameters, prompt, and each row's first position [B]."""

    params: PyTree
    prompt: PyTree
    first: Array


@dataclasses.dataclass(frozen=True)
class CascadeDrafter:
    """See `interfaces.Drafter`; `drafting.cascade` builds it.

    Every review is one block of one model: the tokens missing from its cache, the current token and the inner draft.
    Where much is missing, the inner draft is cut short so that the block keeps its size; whether to draft on may
    depend on what has been drafted, so no distribution changes. More than a block is caught up in separate calls.

    Parameters are {"models": one tree per model, "copier": the copying drafter's or None}.

    Attributes:
      sampling: how distributions are shaped; traced.
      lenience: per model, L >= 1 between it and the draft it reviews, or None for an exact review; traced.
      rules: per model, the rule between it and the drafter below, or None; its alpha is traced.
      copier: the last drafter, if it copies.
      models: the language models, from the largest.
      plan: the K matrix.
      width: V; logits are cut to it.
      vocab_size: ids at or above it are never drafted.
      reads: index of the model whose distribution q is reported at every drafted and bonus position, at the price of
        one more call a round; None reports none. Where that model has a rule with the one below, q is the distribution
        of that rule.
    """

    sampling: Sampling
    lenience: tuple[Array | float | None, ...]
    rules: tuple[Rule | None, ...]
    copier: MaxGram | None
    models: tuple[LanguageModel, ...]
    plan: KMatrix
    width: int
    vocab_size: int | None
    reads: int | None

    @property
    def draft_len(self) -> int:
        """G, the sum of the K matrix's first row."""
        return self.plan.length(0)

    @property
    def noise_size(self) -> int:
        """Uniforms of every review that can happen in a round, each used at most once."""
        return self.plan.draft_noise(0)

    @property
    def score_bonus(self) -> bool:
        """Whether q is reported."""
        return self.reads is not None

    @property
    def _margin(self) -> int:
        """Slots beyond the longest draft that blocks may touch."""
        return self.plan.longest + 4

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Starts every model."""
        slots = room + self._margin
        caches = [
            model.start(tree, inputs, batch_size, slots)
            for model, tree in zip(self.models, params["models"], strict=True)
        ]
        _, first = self.models[0].first(inputs)
        zero = jnp.zeros(batch_size, jnp.int32)
        return {
            "caches": caches,
            "valid": [zero for _ in self.models],
            "history": jnp.zeros((batch_size, slots), jnp.int32),
            "first": jnp.repeat(first, batch_size // first.shape[0]),
            "prompt": self.copier and self.copier.prompt_of(inputs, batch_size),
            "committed": zero,
            "pending": jnp.zeros((batch_size, len(self.models)), jnp.int32),
            "level_calls": jnp.zeros((batch_size, len(self.models)), jnp.int32),
        }

    def propose(
        self, params: PyTree, state: PyTree, tokens: Array, positions: Array, noise: Array
    ) -> tuple[Proposal, PyTree]:
        """Drafts after `tokens`; see the Protocol."""
        job = _Job(params, state["prompt"], state["first"])
        end = positions - job.first
        carry: _Carry = {
            "history": remember(state["history"], tokens, end),
            "caches": state["caches"],
            "valid": [jnp.minimum(valid, end) for valid in state["valid"]],
            "calls": [jnp.zeros_like(end) for _ in self.models],
        }
        limit = jnp.full_like(end, self.draft_len)
        carry, draft = self._draft(job, 0, carry, end, limit, noise)
        q = q_raw = None
        broken = draft.broken
        if self.reads is not None:
            every = jnp.ones_like(end, bool)
            carry, law = self._score(job, self.reads, carry, end, draft.lengths, self.draft_len, every)
            q, q_raw, broken = law.tempered, law.raw, broken | law.broken_within(draft.lengths)
        calls = jnp.stack(carry["calls"], axis=1)
        proposal = Proposal(
            draft.tokens, draft.lengths, draft.law, q, q_raw, jnp.sum(calls, axis=1), calls, broken=broken
        )
        kept = {name: carry[name] for name in ("history", "caches", "valid")}
        return proposal, {**state, **kept, "pending": calls}

    def commit(self, state: PyTree, lengths: Array) -> PyTree:
        """Counts the calls of the rows that grew; the next round overwrites what was rejected."""
        grew = (lengths > state["committed"])[:, None]
        counted = state["level_calls"] + jnp.where(grew, state["pending"], 0)
        return {**state, "committed": lengths, "level_calls": counted}

    def _draft(
        self, job: _Job, row: int, carry: _Carry, start: Array, limit: Array, noise: Array
    ) -> tuple[_Carry, Draft]:
        """Writes the draft of one row of the K matrix after history[b, start[b]], at most limit[b] tokens."""
        size, batch = self.plan.length(row), start.shape[0]
        room = size + self.plan.widest(row)  # a block may be written after the last token that counts
        written = {
            "count": jnp.zeros_like(start),
            "law": jnp.zeros((batch, room, self.width), jnp.float32),
            "confidence": jnp.ones((batch, room), jnp.float32),
            "broken": jnp.zeros(batch, bool),
        }
        share = used = 0
        for drafter, most in enumerate(self.plan.rows[row] if size else ()):
            if not most:
                continue
            share += most
            goal = jnp.minimum(share, limit)
            if drafter == len(self.models) and self.copier is not None:
                part = noise[:, used : used + most * probs.DRAW]
                carry, written = self._copy(self.copier, job, carry, written, start, goal, most, part)
                continue
            span = self.plan.review_noise(drafter)
            part = noise[:, used : used + most * span].reshape(batch, most, span).swapaxes(0, 1)
            used += most * span

            def review(state, uniforms, drafter=drafter, goal=goal):
                carry, written = state
                return self._review(job, drafter, carry, written, start, goal, limit, uniforms)

            def step(state, uniforms, review=review, goal=goal):
                unfinished = jnp.any(state[1]["count"] < goal)
                return jax.lax.cond(unfinished, review, lambda state, _: state, state, uniforms), None

            (carry, written), _ = jax.lax.scan(step, (carry, written), part)
        tokens = _window(carry["history"], start + 1, size)
        law, confidence = (written[name][:, :size] for name in ("law", "confidence"))
        return carry, Draft(tokens, written["count"], law, confidence, written["broken"])

    @staticmethod
    def _copy(
        copier: MaxGram, job: _Job, carry: _Carry, written: PyTree, start: Array, goal: Array, most: int, noise: Array
    ) -> tuple[_Carry, PyTree]:
        """The copying drafter fills the draft up to goal[b] tokens."""
        count, history = written["count"], carry["history"]
        end = start + count
        tokens, lengths, law = copier.draft(job.params["copier"], job.prompt, history, end, most, noise)
        lengths = jnp.clip(goal - count, 0, lengths)
        written = {
            "count": count + lengths,
            "law": write_rows(written["law"], law, count),
            "confidence": write_rows(written["confidence"], jnp.ones(tokens.shape, jnp.float32), count),
            "broken": written["broken"],
        }
        return {**carry, "history": write_rows(history, tokens, end + 1)}, written

    def _review(
        self,
        job: _Job,
        drafter: int,
        carry: _Carry,
        written: PyTree,
        start: Array,
        goal: Array,
        limit: Array,
        noise: Array,
    ) -> tuple[_Carry, PyTree]:
        """One inner draft and its review by model `drafter`, in the rows that have not reached their goal."""
        count = written["count"]
        active, end = count < goal, start + count
        size = self.plan.length(drafter + 1)
        block = self.plan.block(drafter)
        lag = end - carry["valid"][drafter]
        lag = jnp.where(active, lag % block, lag)  # what remains after blocks that only catch up
        inner = jnp.where(active, jnp.minimum(limit - count, block - lag) - 1, 0)
        below, tests, draw = jnp.split(noise, [noise.shape[1] - size - probs.DRAW, noise.shape[1] - probs.DRAW], axis=1)
        carry, draft = self._draft(job, drafter + 1, carry, end, jnp.clip(inner, 0, size), below)
        carry, target, sure, broken = self._target(job, drafter, carry, draft, end, lag, block, active)
        outcome = verify.token(draft.tokens, draft.lengths, draft.law, target, tests, draw)
        after = end + outcome.accepted + 1
        history = write_rows(carry["history"], outcome.token[:, None], after)
        tokens = _window(history, end + 1, size + 1)
        confidence = jnp.ones(tokens.shape, jnp.float32)
        if any(value is not None for value in self.lenience):  # nothing else reads it
            confidence = sure(tokens)
        written = {
            "count": jnp.where(active, after - start, count),
            "law": write_rows(written["law"], target, count),
            "confidence": write_rows(written["confidence"], confidence, count),
            "broken": written["broken"] | (active & (broken | draft.broken)),
        }
        own = jnp.where(active, after, carry["valid"][drafter])
        smaller = [jnp.where(active, jnp.minimum(valid, after), valid) for valid in carry["valid"][drafter + 1 :]]
        valid = [*carry["valid"][:drafter], own, *smaller]
        return {**carry, "history": history, "valid": valid}, written

    def _target(
        self, job: _Job, drafter: int, carry: _Carry, draft: Draft, end: Array, lag: Array, block: int, rows: Array
    ) -> tuple[_Carry, Array, Callable[[Array], Array], Array]:
        """What follows each token of an inner draft.

        Returns:
          (carry, target distribution [B, G + 1, V], function of tokens [B, G + 1] to their raw probabilities there,
          whether NaN went into that distribution [B]).
        """
        size, rule = draft.tokens.shape[1], self.rules[drafter]
        lower = None
        if rule is not None and rule.reads_drafter:
            carry, lower = self._score(job, drafter + 1, carry, end, draft.lengths, size, rows)
        carry, logits = self._read(job, drafter, carry, end - lag, block, rows)
        places = jnp.minimum(lag[:, None] + jnp.arange(size + 1), block - 1)
        logits = jnp.take_along_axis(logits, places[..., None], axis=1)
        law = self._law(logits)
        if rule is not None:
            law = rule_law(rule, lower, law, self.sampling)
        broken = law.broken_within(draft.lengths)
        if rule is not None:
            return carry, law.sampled, lambda tokens: probs.gather(law.raw, tokens), broken
        sure = functools.partial(raw_chance, logits, vocab_size=self.vocab_size)
        lenience = self.lenience[drafter]
        if lenience is None or not size:
            return carry, law.sampled, sure, broken
        drafted = sure(jnp.pad(draft.tokens, ((0, 0), (0, 1))))[:, :-1]
        return carry, lenient_target(draft, law, drafted, lenience, self.sampling), sure, broken

    def _score(
        self, job: _Job, drafter: int, carry: _Carry, start: Array, lengths: Array, size: int, rows: Array
    ) -> tuple[_Carry, ModelLaw]:
        """The distribution of model `drafter` around each of `size` drafted tokens, in one more block of `rows`."""
        lower, rule = None, self.rules[drafter]
        if rule is not None and rule.reads_drafter:
            carry, lower = self._score(job, drafter + 1, carry, start, lengths, size, rows)
        carry, logits = self._read(job, drafter, carry, start, size + 1, rows)
        valid = list(carry["valid"])
        valid[drafter] = jnp.where(rows, jnp.maximum(valid[drafter], start + lengths + 1), valid[drafter])
        carry, law = {**carry, "valid": valid}, self._law(logits)
        return carry, law if rule is None else rule_law(rule, lower, law, self.sampling)

    def _read(
        self, job: _Job, drafter: int, carry: _Carry, last: Array, block: int, rows: Array
    ) -> tuple[_Carry, Array]:
        """Feeds a model the tokens before last[b] that are missing from its cache, then the block that begins there.

        The blocks that only catch up and the last one run in one loop, so the model is compiled once here. Rows that
        need fewer blocks read their last one again. "valid" is not changed.

        Returns:
          (carry, logits [B, block, V] of the block that begins at last[b]); the calls are counted for `rows`.
        """
        model, params = self.models[drafter], job.params["models"][drafter]
        history, valid = carry["history"], carry["valid"][drafter]

        def read(state: tuple) -> tuple:
            begin, done, cache, calls, _ = state
            tokens = _window(history, begin, block)
            logits, cache = model.extend(params, cache, tokens, job.first + begin)
            logits = logits[..., : self.width].astype(jnp.float32)
            return jnp.minimum(begin + block, last), done | (begin == last), cache, calls + ~done, logits

        begin = jnp.where(rows, jnp.minimum(valid, last), last)
        nothing = jnp.zeros((*begin.shape, block, self.width), jnp.float32)
        state = begin, ~rows, carry["caches"][drafter], carry["calls"][drafter], nothing
        _, _, cache, calls, logits = jax.lax.while_loop(lambda state: ~jnp.all(state[1]), read, state)
        caches, counted = list(carry["caches"]), list(carry["calls"])
        caches[drafter], counted[drafter] = cache, calls
        return {**carry, "caches": caches, "calls": counted}, logits

    def _law(self, logits: Array) -> ModelLaw:
        return model_law(logits, self.sampling, self.vocab_size)


trees.register(CascadeDrafter, static=["models", "plan", "width", "vocab_size", "reads"])


def _window(history: Array, begin: Array, size: int) -> Array:
    """[B, size] entries of history [B, N] from begin[b] on."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (size,)))(history, begin)
