"""A cascade of drafters by enumeration: every draft it can write, with its probability and the law of each token.

Plain recursion over one row, without caches, blocks or noise. A branch of the enumeration is one history of
accepted and rejected inner drafts; two histories may write the same tokens from different laws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from . import rules as rule_oracle
from . import sampler
from .verify import BRANCHES, LawAt, Prefix, token_branches

LogitsAt = Callable[[Prefix], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One way a draft can come about.

    Attributes:
      tokens: what was drafted.
      laws: the law of each token given everything before it was drawn.
      sure: recorded raw probability of each token (1 for a copied one), which greedy lenience reads.
      chance: probability of this way.
      held: per model, how many tokens its cache holds, the start token counted.
    """

    tokens: Prefix
    laws: tuple[np.ndarray, ...]
    sure: tuple[float, ...]
    chance: float
    held: tuple[int, ...]

    def then(self, more: Leaf) -> Leaf:
        """This, and after it `more`."""
        return Leaf(
            self.tokens + more.tokens,
            self.laws + more.laws,
            self.sure + more.sure,
            self.chance * more.chance,
            more.held,
        )


@dataclasses.dataclass(frozen=True)
class Cascade:
    """What drafts.

    Attributes:
      logits: per language model, from the largest.
      match: (prefix, most) -> tokens to copy after it; None where no drafter copies.
      fill: prefix -> law of a token beyond the copy; None where the draft ends with the copy.
      k: the K matrix, its last row and column the copying drafter's where there is one.
      lenience: per model, L or None.
      rules: per model, (rule name, alpha) or None.
      temperature: as everywhere.
      truncation: arguments of `sampler.truncate`.
    """

    logits: Sequence[LogitsAt]
    k: Sequence[Sequence[int]]
    match: Callable[[Prefix, int], Prefix] | None = None
    fill: LawAt | None = None
    lenience: Sequence[float | None] = (None,) * 9
    rules: Sequence[tuple[str, float] | None] = (None,) * 9
    temperature: float = 1.0
    truncation: dict = dataclasses.field(default_factory=dict)

    def size(self, row: int) -> int:
        """Most tokens of a draft of this row."""
        return sum(self.k[row]) if row < len(self.k) else 0

    def law(self, model: int, prefix: Prefix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(after temperature, raw, as sampled) of a model, or of the rule between it and the model below."""
        logits = self.logits[model](prefix)
        upper, raw = sampler.tempered(logits, self.temperature), sampler.tempered(logits)
        if self.rules[model] is None:
            return upper, raw, sampler.truncate(upper, **self.truncation)
        name, alpha = self.rules[model]
        cuts_first = name in rule_oracle.TRUNCATES_INPUTS
        lower, lower_raw, lower_cut = self.law(model + 1, prefix)
        if cuts_first:
            lower, upper = lower_cut, sampler.truncate(upper, **self.truncation)
        greedy = self.temperature == 0
        mixed = rule_oracle.target(name, lower, upper, lower_raw, raw, alpha, greedy=greedy)
        mixed_raw = rule_oracle.target(name, lower_raw, raw, lower_raw, raw, alpha)
        return mixed, mixed_raw, mixed if cuts_first else sampler.truncate(mixed, **self.truncation)

    def leaves(self, prefix: Prefix = (), held: tuple[int, ...] | None = None) -> list[Leaf]:
        """Every draft for the verifier after `prefix`."""
        held = (0,) * len(self.logits) if held is None else held
        return list(self._row(0, prefix, self.size(0), held))

    def _row(self, row: int, prefix: Prefix, limit: int, held: tuple[int, ...]) -> Iterator[Leaf]:
        nothing = Leaf((), (), (), 1.0, held)
        if row < len(self.k):
            yield from self._go_on(row, row, prefix, limit, nothing)
        else:
            yield nothing

    def _go_on(self, row: int, drafter: int, prefix: Prefix, limit: int, draft: Leaf) -> Iterator[Leaf]:
        """Continues a draft of `row` with `drafter`, then the smaller ones."""
        if drafter == len(self.k):
            yield draft
            return
        written, share = len(draft.tokens), self.k[row][drafter]
        goal = min(sum(self.k[row][: drafter + 1]), limit)
        here = prefix + draft.tokens
        if not share or written >= goal:
            yield from self._go_on(row, drafter + 1, prefix, limit, draft)
        elif drafter == len(self.logits):
            for more in self._copy(here, goal - written, share, draft.held):
                yield from self._go_on(row, drafter + 1, prefix, limit, draft.then(more))
        else:
            for more in self._review(drafter, here, limit - written, draft.held):
                yield from self._go_on(row, drafter, prefix, limit, draft.then(more))

    def _copy(self, prefix: Prefix, most: int, share: int, held: tuple[int, ...]) -> Iterator[Leaf]:
        copied = tuple(self.match(prefix, share))[:most]
        size = len(self.logits[0](prefix))
        laws = tuple(rule_oracle.one_hot(token, size) for token in copied)
        yield from self._fill_up(prefix, most, Leaf(copied, laws, (1.0,) * len(copied), 1.0, held))

    def _fill_up(self, prefix: Prefix, most: int, draft: Leaf) -> Iterator[Leaf]:
        if len(draft.tokens) == most or self.fill is None:
            yield draft
            return
        law = self.fill(prefix + draft.tokens)
        for token in np.flatnonzero(law):
            one = Leaf((int(token),), (law,), (1.0,), float(law[token]), draft.held)
            yield from self._fill_up(prefix, most, draft.then(one))

    def _review(self, model: int, prefix: Prefix, limit: int, held: tuple[int, ...]) -> Iterator[Leaf]:
        """One inner draft and its review: one to `limit` tokens.

        The model reads blocks of a fixed size: what its cache lacks, the current token, the inner draft. So the
        inner draft is shorter where the cache lags behind.
        """
        inner_size = self.size(model + 1)
        block = inner_size + 1 if inner_size else 2
        lag = len(prefix) - held[model]
        while lag >= block:
            lag -= block
        inner_limit = min(inner_size, limit - 1, block - lag - 1)
        scored = range(model + 1, self._lowest_read(model) + 1)
        for inner in self._row(model + 1, prefix, inner_limit, held):
            targets, raws = self._targets(model, prefix, inner)
            branches = token_branches(inner.tokens, inner.laws, targets)
            for kept, weight in enumerate(branches.weights):
                for token, chance in enumerate(branches.next_laws[kept]):
                    if weight * chance <= 0:
                        continue
                    tokens = (*inner.tokens[:kept], token)
                    after = len(prefix) + len(tokens)
                    now = list(inner.held)
                    for lower in scored:  # the rule has had them score the whole inner draft
                        now[lower] = len(prefix) + len(inner.tokens) + 1
                    now = [h if i < model else min(h, after) for i, h in enumerate(now)]
                    now[model] = after
                    sure = tuple(float(raws[i][x]) for i, x in enumerate(tokens))
                    law = tuple(targets[: kept + 1])
                    yield Leaf(tokens, law, sure, inner.chance * weight * chance, tuple(now))

    def _lowest_read(self, model: int) -> int:
        """The smallest model whose law the law of `model` depends on."""
        while self.rules[model] is not None and self.rules[model][0] not in rule_oracle.IGNORES_DRAFTER:
            model += 1
        return model

    def _targets(self, model: int, prefix: Prefix, inner: Leaf) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(target laws, raw laws) at every token of the inner draft and after it."""
        targets, raws = [], []
        for i in range(len(inner.tokens) + 1):
            _, raw, sampled = self.law(model, prefix + inner.tokens[:i])
            lenience = self.lenience[model]
            if lenience is not None and i < len(inner.tokens):
                x = inner.tokens[i]
                if self.temperature == 0:
                    if lenience > 1 and raw[x] > inner.sure[i] / lenience:
                        sampled = rule_oracle.one_hot(x, len(raw))
                else:
                    sampled = lenient(inner.laws[i], sampled, lenience)
            targets.append(sampled)
            raws.append(raw)
        return targets, raws


def lenient(s: Sequence[float], m: Sequence[float], lenience: float) -> np.ndarray:
    """What comes out when drafts from s stand with probability min(1, L m / s), else norm(max(0, m - s)) is drawn."""
    kept = [min(a, lenience * b) for a, b in zip(s, m, strict=True)]
    missing = 1.0 - math.fsum(kept)
    gain = [max(0.0, b - a) for a, b in zip(s, m, strict=True)]
    if not math.fsum(gain) > 0:
        return np.array(kept)
    return np.array(kept) + missing * sampler.normalise(gain)


def round_law(leaves: Sequence[Leaf], target_law: LawAt, how: str) -> dict[Prefix, float]:
    """{committed tokens: probability} of one verifier's round over drafts that begin at the empty prefix."""
    law: dict[Prefix, float] = {}
    for leaf in leaves:
        targets = [target_law(leaf.tokens[:i]) for i in range(len(leaf.tokens) + 1)]
        branches = BRANCHES[how](leaf.tokens, leaf.laws, targets)
        for kept, weight in enumerate(branches.weights):
            for x, chance in enumerate(branches.next_laws[kept]):
                committed = (*leaf.tokens[:kept], x)
                if weight * chance > 0:
                    law[committed] = law.get(committed, 0.0) + leaf.chance * weight * chance
    return law
