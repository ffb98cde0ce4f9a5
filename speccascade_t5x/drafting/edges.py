"""The target distribution of an edge: what one drafter makes of a smaller drafter's draft.

There are three kinds of edge. s is the distribution each drafted token was drawn from, m the upper model's:
  exact     Tr(m);
  lenient   min(s, L m) + (1 - sum) norm(max(0, m - s)), L = 1/l >= 1, and m at the bonus position: "Cascade
            Speculative Drafting" (its lossy acceptance min(1, L m / s));
  by rule   Tr(rule(Q, M)), Q being the lower drafter's model distribution: three or more models under rules.
In each case `core.verify.token` samples from it, and it becomes the distribution d of the resulting tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import probs
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.core.rules import Pair, Rule
from speccascade_t5x.interfaces import Array


@dataclasses.dataclass(frozen=True)
class ModelLaw:
    """Distributions of a model, or of a rule over models, at each position.

    Attributes:
      tempered: [B, T, V] after temperature, untruncated: what a rule above mixes.
      raw: [B, T, V] at temperature 1: what its tests read.
      sampled: [B, T, V] Tr of the tempered distribution: what tokens are drawn from.
      broken: [B, T] bool, NaN went into it, whatever a rule has made of that.
    """

    tempered: Array
    raw: Array
    sampled: Array
    broken: Array

    def broken_within(self, lengths: Array) -> Array:
        """[B] bool: NaN went into the distribution after 0 to lengths[b] of the drafted tokens."""
        return jnp.any(self.broken & (jnp.arange(self.broken.shape[1]) <= lengths[:, None]), axis=1)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A draft as the reviewer above sees it.

    Attributes:
      tokens: [B, G] ids.
      lengths: [B] how many count.
      law: [B, G, V] d.
      confidence: [B, G] raw probability of each token under the model that reviewed it last; 1 for a copied token.
        At temperature 0 a lenient edge compares with it.
      broken: [B] bool, NaN went into a distribution behind it.
    """

    tokens: Array
    lengths: Array
    law: Array
    confidence: Array
    broken: Array


trees.register(ModelLaw)
trees.register(Draft)


def model_law(logits: Array, sampling: Sampling, vocab_size: int | None) -> ModelLaw:
    """One model's distribution from its logits [B, T, V]."""
    tempered = probs.tempered(logits, sampling.temperature, vocab_size)
    sampled = probs.truncate(tempered, sampling)
    return ModelLaw(tempered, probs.raw(logits, vocab_size), sampled, probs.is_broken(tempered))


def raw_chance(logits: Array, tokens: Array, vocab_size: int | None) -> Array:
    """The probability of each token at temperature 1, [..., V] x [...] -> [...], without a full softmax."""
    logits = probs.mask_vocabulary(logits, vocab_size)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def rule_law(rule: Rule, lower: ModelLaw | None, upper: ModelLaw, sampling: Sampling) -> ModelLaw:
    """The distribution of a rule over two drafters: q' = rule(q1, q2), and q'_raw of the raw pair.

    Args:
      rule: the edge's rule.
      lower: the smaller drafter's; None where the rule does not read it.
      upper: the larger model's.
      sampling: its truncation is applied to the inputs of a rule with `truncates_inputs`, else to its result.
    """
    kind = "sampled" if rule.truncates_inputs else "tempered"
    q, q_raw = (None, None) if lower is None else (getattr(lower, kind), lower.raw)
    greedy = jnp.asarray(sampling.temperature) == 0.0
    mixed = rule.target(Pair(q=q, p=getattr(upper, kind), q_raw=q_raw, p_raw=upper.raw, greedy=greedy))
    raw = rule.target(Pair(q=q_raw, p=upper.raw, q_raw=q_raw, p_raw=upper.raw))
    sampled = mixed if rule.truncates_inputs else probs.truncate(mixed, sampling)
    return ModelLaw(mixed, raw, sampled, upper.broken if lower is None else upper.broken | lower.broken)


def lenient_target(draft: Draft, upper: ModelLaw, sure: Array, lenience: Array | float, sampling: Sampling) -> Array:
    """The target distribution of a lenient edge, [B, G + 1, V]; position i is the distribution after i drafted tokens.

    `sure` [B, G] is the raw probability of each drafted token under the upper model.
    At temperature 0 it is the published acceptance: the token is kept if it is the upper model's argmax, or if its
    raw probability there exceeds 1/L of its recorded one; otherwise the argmax replaces it.
    """
    size = draft.tokens.shape[1]
    lenience = jnp.asarray(lenience, jnp.float32)
    m = upper.sampled[:, :size]
    kept = jnp.minimum(draft.law, probs.expand_right(lenience, 3) * m)
    missing = jnp.maximum(1.0 - jnp.sum(kept, axis=-1, keepdims=True), 0.0)
    gain = jnp.maximum(m - draft.law, 0.0)
    empty = jnp.sum(gain, axis=-1, keepdims=True) <= 0.0  # only by rounding: then next to nothing is missing
    sampled = kept + missing * probs.normalise(jnp.where(empty, m, gain))

    def published(sampled: Array) -> Array:
        scale = probs.expand_right(lenience, 2)
        stands = (scale > 1.0) & (scale * sure > draft.confidence)
        chosen = jax.nn.one_hot(draft.tokens, m.shape[-1], dtype=jnp.float32)
        greedy = probs.expand_right(jnp.asarray(sampling.temperature) == 0.0, 3)
        return jnp.where(greedy, jnp.where(stands[..., None], chosen, m), sampled)

    is_greedy = jnp.any(jnp.asarray(sampling.temperature) == 0.0)
    sampled = jax.lax.cond(is_greedy, published, lambda law: law, sampled)
    drafted = (jnp.arange(size) < draft.lengths[:, None])[..., None]
    return jnp.concatenate([jnp.where(drafted, sampled, m), upper.sampled[:, size:]], axis=1)
