"""What a rule is, and the registry of rules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from speccascade_t5x import trees
from speccascade_t5x.common import checks
from speccascade_t5x.core import probs
from speccascade_t5x.interfaces import Array, UserError


@dataclasses.dataclass(frozen=True)
class Pair:
    """Everything a rule may read at one or many positions.

    Attributes:
      q: [..., V] drafter's distribution after temperature, untruncated (None for rules that read no drafter; the type
        spares every other rule a check).
      p: [..., V] verifier's, likewise.
      q_raw: [..., V] drafter's distribution at temperature 1 (None likewise).
      p_raw: [..., V] verifier's (p and p_raw are None for the tests of a drafter alone).
      greedy: True where temperature is 0; bool, traced or not, scalar or [B].
      position: [...] output position, for rules that read it.
      hidden_q: [..., D] drafter's last hidden state, for learned rules.
      hidden_p: [..., D] verifier's.
    """

    q: Array | Any
    p: Array | Any
    q_raw: Array | Any
    p_raw: Array | Any
    greedy: Array | bool = False
    position: Array | None = None
    hidden_q: Array | None = None
    hidden_p: Array | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A rule as accept probabilities and residual, for drafts from q. It is derived from pi; the loop does not use it.

    Attributes:
      accept: [..., V] min(1, pi / q), 0 where q is 0.
      residual: [..., V] norm(max(0, pi - q)), all zero where pi == q.
    """

    accept: Array
    residual: Array


trees.register(Pair)
trees.register(Verdict)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of all rules.

    Class attributes, static per program:
      reads_drafter: whether pi depends on q. If so the drafter must also be scored at the bonus position.
      reads_hidden: whether it reads the models' last hidden states; for a learned rule this depends on its head.
      truncates_inputs: whether truncation (top-k, top-p, min-p) applies to p and q before the rule, not to pi after it.
      alpha_range: (lowest, highest) valid alpha; None where the rule takes no alpha.
      ends: the lossless and the drafter-only end of alpha, as text for users.
      source: where the rule comes from.
    """

    reads_drafter: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False
    truncates_inputs: ClassVar[bool] = False
    alpha_range: ClassVar[tuple[float, float] | Any] = None
    ends: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def target(self, pair: Pair) -> Array:
        """The target distribution pi, [..., V]."""
        raise NotImplementedError

    def target_at(self, pair: Pair, tokens: Array) -> Array:
        """pi of one token per position, [...]: `target` gathered at tokens [...].

        Derived from `target`. A class may override it to avoid building a distribution over the vocabulary; the values
        must stay the same, so a subclass that overrides `target` overrides this as well.
        """
        return probs.gather(self.target(pair), tokens)

    def deferral(self, pair: Pair) -> Array:
        """[...] the probability that the rule turns to the verifier here: r of prefix rules, eta of token rules."""
        return jnp.ones(pair.p.shape[:-1], jnp.float32)

    def verdict(self, pair: Pair) -> Verdict:
        """The same distribution as accept probabilities and residual against drafts from `pair.q`."""
        target = self.target(pair)
        ratio = target / jnp.where(pair.q > 0, pair.q, 1.0)
        accept = jnp.where(pair.q > 0, jnp.minimum(1.0, ratio), 0.0)
        return Verdict(accept, probs.normalise(jnp.maximum(target - pair.q, 0.0)))


@dataclasses.dataclass(frozen=True)
class AlphaRule(Rule):
    """A rule with the trade-off alpha, a traced leaf (scalar or [B]), so that a sweep compiles once."""

    alpha: Array | float

    def _alpha(self, rank: int) -> Array:
        """alpha in float32 with trailing axes of 1, so that [B] meets axis 0 of a rank-`rank` array."""
        return probs.expand_right(jnp.asarray(self.alpha, jnp.float32), rank)


@dataclasses.dataclass(frozen=True)
class PrefixRule(AlphaRule):
    """pi = (1 - r) q + r p, with r(prefix) in {0, 1}: the whole position is the drafter's or the verifier's.

    Class attribute `tests_drafter_alone`: the test reads q_raw only, so it can be made before the verifier runs.
    """

    tests_drafter_alone: ClassVar[bool] = False

    def defers(self, pair: Pair) -> Array:
        """[...] bool r: True where the position is the verifier's."""
        raise NotImplementedError

    def target(self, pair: Pair) -> Array:
        return jnp.where(self.defers(pair)[..., None], pair.p, pair.q)

    def target_at(self, pair: Pair, tokens: Array) -> Array:
        return jnp.where(self.defers(pair), probs.gather(pair.p, tokens), probs.gather(pair.q, tokens))

    def deferral(self, pair: Pair) -> Array:
        return self.defers(pair).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TokenRule(AlphaRule):
    """pi(v) = q(v) (1 - r(v)) + eta p(v), eta = sum_v' r(v') q(v'): single tokens of the drafter are ruled out.

    At temperature 0 the drafter's argmax is emitted iff the test keeps it, else the verifier's argmax: with
    one-hot q and p that is what the same formula says.
    """

    def rejects(self, pair: Pair) -> Array:
        """[..., V] bool r(v): True for tokens the drafter may not emit here."""
        raise NotImplementedError

    def target(self, pair: Pair) -> Array:
        # q - q r is q or 0 exactly, and reads what the sum has stored: a second selection would be stored as well.
        return pair.q - self._ruled_out(pair) + self.deferral(pair)[..., None] * pair.p

    def target_at(self, pair: Pair, tokens: Array) -> Array:
        kept = jnp.where(probs.gather(self.rejects(pair), tokens), 0.0, probs.gather(pair.q, tokens))
        return kept + self.deferral(pair) * probs.gather(pair.p, tokens)

    def deferral(self, pair: Pair) -> Array:
        return jnp.sum(self._ruled_out(pair), axis=-1)

    def _ruled_out(self, pair: Pair) -> Array:
        """q(v) r(v), [..., V]."""
        return jnp.where(self.rejects(pair), pair.q, 0.0)


def peak(law: Array) -> Array:
    """Largest probability, [..., V] -> [...]."""
    return jnp.max(law, axis=-1)


_REGISTRY: dict[str, type[Rule]] = {}


def register(name: str, cls: type[Rule]) -> type[Rule]:
    """Makes a rule selectable by name and its fields pytree leaves. Returns the class.

    Raises:
      ValueError: the name is taken by another class.
    """
    if _REGISTRY.get(name, cls) is not cls:
        raise ValueError(f"the rule name {name!r} is taken by {_REGISTRY[name].__name__}")
    _REGISTRY[name] = cls
    return trees.register(cls)


def names() -> list[str]:
    """Registered rule names, sorted."""
    return sorted(_REGISTRY)


def get(name: str) -> type[Rule]:
    """The class registered under `name`.

    Raises:
      UserError: no such rule; the message names the nearest.
    """
    return _REGISTRY[checks.one_of("rule named", name, names())]


def by_name(name: str, alpha: Any = None, **options: Any) -> Rule:
    """Builds a rule from its registry name, checking alpha.

    Args:
      name: a registry name, e.g. "token_v3".
      alpha: number or sequence of numbers (one per row); None for rules without alpha.
      **options: further fields of the rule.

    Raises:
      UserError: unknown rule, alpha missing, superfluous or outside the rule's range, unknown option.

    >>> type(by_name("token_v3", alpha=0.3)).__name__
    'TokenV3'
    >>> by_name("lossless", alpha=0.3)
    Traceback (most recent call last):
    speccascade_t5x.interfaces.UserError: the rule 'lossless' takes no alpha, but alpha=0.3 was given: leave it out
    """
    cls: Any = get(name)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"the rule {name!r} has no option {unknown[0]!r}; it takes {sorted(known) or 'none'}")
    if cls.alpha_range is None:
        if alpha is not None:
            raise UserError(f"the rule {name!r} takes no alpha, but alpha={alpha} was given: leave it out")
        return cls(**options)
    if alpha is None:
        raise UserError(f"the rule {name!r} needs an alpha ({describe_range(cls)}; {cls.ends})")
    low, high = cls.alpha_range
    for value in np.ravel(alpha):
        checks.real("alpha", value)
        if not low <= value <= high:
            raise UserError(
                f"alpha={value} is outside the range of the rule {name!r}: {describe_range(cls)} ({cls.ends})"
            )
    return cls(alpha=jnp.asarray(alpha, jnp.float32), **options)


def describe_range(cls: type[Rule]) -> str:
    """The valid alphas in words."""
    low, high = cls.alpha_range
    if math.isinf(low) and math.isinf(high):
        return "any real number"
    if math.isinf(high):
        return f"{low:g} or more"
    if math.isinf(low):
        return f"{high:g} or less"
    return f"from {low:g} to {high:g}"
