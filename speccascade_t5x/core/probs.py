"""From logits to distributions: the one order of sampling steps, used by drafter, verifier, target and bonus alike.

The order is: vocabulary mask, temperature, top-k, renormalise, top-p, min-p, renormalise. `raw` and
`tempered` are the part up to temperature; `truncate` (written Tr in the docs) is the part after it.
All distributions are float32, [..., V], and sum to 1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.interfaces import NEG_INF, Array

# Width of a chunk in reductions of two levels, one TPU lane register; the chunks of `sample` are multiples of it.
_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a distribution is shaped before it is sampled. All fields are traced: sweeping them never recompiles.

    Attributes:
      temperature: 0 takes the argmax (ties to the lower id), 1 leaves the distribution as it is. Scalar or [B].
      top_k: keep the k most likely tokens; 0 is off. Scalar or [B].
      top_p: keep a token iff the mass strictly before it, in descending order, is below top_p; 1 is off.
        Scalar or [B].
      min_p: of what top-k and top-p left, keep a token iff its probability is at least min_p times the
        largest; 0 is off. Scalar or [B].
    """

    temperature: Array | float = 1.0
    top_k: Array | int = 0
    top_p: Array | float = 1.0
    min_p: Array | float = 0.0


trees.register(Sampling)


def expand_right(value: Array | float, rank: int) -> Array:
    """Gives a scalar or [B] value trailing axes of 1 until it has `rank` axes, so that B meets axis 0."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (rank - value.ndim))


def mask_vocabulary(logits: Array, vocab_size: int | None) -> Array:
    """Casts [..., V] logits to float32 and rules out ids >= vocab_size (the padded tail of the embedding)."""
    logits = logits.astype(jnp.float32)
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, NEG_INF)


def raw(logits: Array, vocab_size: int | None = None) -> Array:
    """softmax(logits) at temperature 1, [..., V]: what the deferral tests of the rules read."""
    return jax.nn.softmax(mask_vocabulary(logits, vocab_size), axis=-1)


def is_broken(law: Array) -> Array:
    """Whether NaN went into distributions as `raw` and `tempered` make them: [..., V] -> [...] bool.

    A softmax with one NaN is NaN everywhere, so one entry is enough. No reduction is used, because XLA may lose a NaN
    in a maximum (on CPUs it does, above some size).
    """
    return jnp.isnan(law[..., 0])


def argmax(values: Array) -> Array:
    """Index of the largest of the last axis, ties to the lower: [..., V] -> [...] int32. NaN gives the index 0.

    In two levels, and by reductions of one operand each: on a CPU jnp.argmax over a vocabulary costs as much
    as seven softmaxes, because its reduction of two operands is not vectorised.
    """
    chunks = _chunked(values, -jnp.inf, _CHUNK)
    chunk = _first_largest(jnp.max(chunks, axis=-1))
    inside = jnp.take_along_axis(chunks, chunk[..., None, None], axis=-2)[..., 0, :]
    return chunk * _CHUNK + _first_largest(inside)


def greedy(logits: Array) -> Array:
    """The one-hot distribution of the argmax, ties to the lower id."""
    return jax.nn.one_hot(argmax(logits), logits.shape[-1], dtype=jnp.float32)


def tempered(
    logits: Array, temperature: Array | float, vocab_size: int | None = None, law_raw: Array | None = None
) -> Array:
    """softmax(logits / temperature), [..., V]; the one-hot argmax where temperature is 0.

    Args:
      logits: [..., V].
      temperature: scalar or [B], B being axis 0 of `logits`.
      vocab_size: ids at or above it get probability 0.
      law_raw: `raw` of the same logits where it is known: no second softmax then runs at temperatures 0 and 1.
    """
    logits = mask_vocabulary(logits, vocab_size)
    temperature = expand_right(jnp.asarray(temperature, jnp.float32), logits.ndim)
    is_greedy = temperature == 0.0
    # Below 1e-6 nothing but the argmax and its ties are left, and the quotient must not overflow.
    divisor = jnp.where(is_greedy, 1.0, jnp.maximum(temperature, 1e-6))

    def soften() -> Array:
        return jax.nn.softmax(logits / divisor, axis=-1)

    def sharpened(law: Array) -> Array:
        # A NaN among the logits must stay visible at temperature 0 too, where an argmax would hide it.
        return jnp.where(is_greedy & ~jnp.isnan(law), greedy(logits), law)

    any_greedy = jnp.any(is_greedy)
    if law_raw is None:
        return jax.lax.cond(any_greedy, sharpened, lambda law: law, soften())
    # One branch per case, not one cond after another: a branch that hands on a distribution still in use copies it.
    case = 2 * any_greedy.astype(jnp.int32) + jnp.any(divisor != 1.0)
    cases = (lambda: law_raw, soften, lambda: sharpened(law_raw), lambda: sharpened(soften()))
    return jax.lax.switch(case, cases)


def gather(laws: Array, tokens: Array) -> Array:
    """The probability of each token under its distribution: [..., V] x [...] -> [...]."""
    return jnp.take_along_axis(laws, tokens[..., None], axis=-1)[..., 0]


def normalise(weights: Array) -> Array:
    """weights / sum(weights) over the last axis; all-zero rows stay zero."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _truncate_sorted(law: Array, sampling: Sampling) -> Array:
    vocab = law.shape[-1]
    order = jnp.argsort(law, axis=-1, descending=True, stable=True)
    rank = jnp.argsort(order, axis=-1)
    top_k = expand_right(jnp.asarray(sampling.top_k, jnp.int32), law.ndim)
    top_p = expand_right(jnp.asarray(sampling.top_p, jnp.float32), law.ndim)
    law = normalise(jnp.where(rank < jnp.where(top_k > 0, top_k, vocab), law, 0.0))
    descending = jnp.take_along_axis(law, order, axis=-1)
    before = jnp.cumsum(descending, axis=-1) - descending
    # top_p = 1 must keep all of a distribution whose float32 cumulative sum overshoots 1.
    keep = (before < top_p) | (top_p >= 1.0)
    return jnp.where(jnp.take_along_axis(keep, rank, axis=-1), law, 0.0)


def _truncates(sampling: Sampling) -> tuple[Array, Array]:
    """Whether (top-k or top-p, any truncation) is on in any row; bool, traced."""
    sorts = jnp.any(jnp.asarray(sampling.top_k) > 0) | jnp.any(jnp.asarray(sampling.top_p) < 1.0)
    return sorts, sorts | jnp.any(jnp.asarray(sampling.min_p) > 0.0)


def is_plain(sampling: Sampling) -> Array:
    """Whether every row samples at temperature 1 without truncation, that is, from `raw`; bool, traced."""
    return jnp.all(jnp.asarray(sampling.temperature) == 1.0) & ~_truncates(sampling)[1]


def truncate(law: Array, sampling: Sampling) -> Array:
    """Tr(law): top-k, renormalise, top-p, min-p, renormalise. [..., V] -> [..., V].

    The sort runs only when top-k or top-p asks for it, and nothing runs when no truncation is on.
    """
    needs_sort, needs_any = _truncates(sampling)

    def shortened(law):
        law = jax.lax.cond(needs_sort, lambda x: _truncate_sorted(x, sampling), lambda x: x, law)
        min_p = expand_right(jnp.asarray(sampling.min_p, jnp.float32), law.ndim)
        keep = law >= min_p * jnp.max(law, axis=-1, keepdims=True)
        return normalise(jnp.where(keep, law, 0.0))

    return jax.lax.cond(needs_any, shortened, lambda x: x, law)


DRAW = 2  # uniforms that `sample` takes for one id


def sample(law: Array, uniforms: Array) -> Array:
    """Draws ids from distributions by inverse cumulative sums: one uniform finds a chunk of ids, one the id inside it.

    So no scan runs over a whole vocabulary, and the grid of the uniforms is that of a short sum: with N chunks of W
    ids, the draw is within (N + W) / 2^25 of the distribution in total variation, apart from rounding of the sums,
    whereas one uniform over all V ids could not draw part of the tail (V / 2^25). An id of probability 0 is never
    returned, whatever the rounding, unless the whole distribution is zero (then 0 is).

    Args:
      law: [..., V] distributions, or non-negative weights, which are taken relative to their sum.
      uniforms: [..., DRAW] in [0, 1), on a grid of 2^-24 (see `core.noise.uniforms`).

    Returns:
      [...] int32 ids.
    """
    width = chunk_width(law.shape[-1])
    chunks = _chunked(law, 0.0, width)
    chunk = _invert(jnp.sum(chunks, axis=-1), uniforms[..., 0])
    inside = jnp.take_along_axis(chunks, chunk[..., None, None], axis=-2)[..., 0, :]
    return chunk * width + _invert(inside, uniforms[..., 1])


def chunk_width(vocab: int) -> int:
    """Width of the chunks that `sample` cuts V ids into: the least padding, then the fewest terms of both sums."""

    def cost(width: int) -> tuple[int, int]:
        chunks = -(-vocab // width)
        return chunks * width, chunks + width

    return min((_CHUNK * n for n in range(1, 17)), key=cost)


def _chunked(values: Array, filler: float, width: int) -> Array:
    """[..., V] -> [..., chunks, width], the last chunk filled up."""
    vocab = values.shape[-1]
    chunks = -(-vocab // width)
    room = [(0, 0)] * (values.ndim - 1) + [(0, chunks * width - vocab)]
    return jnp.pad(values, room, constant_values=filler).reshape(values.shape[:-1] + (chunks, width))


def _invert(weights: Array, uniform: Array) -> Array:
    """The place of each uniform [...] among the cumulative sums of weights [..., N]: [...] int32."""
    cumulative = jnp.cumsum(weights, axis=-1)
    return _first_above(cumulative, weights, uniform * cumulative[..., -1])


def _first_largest(values: Array) -> Array:
    """Index of the first of the largest: [..., N] -> [...] int32."""
    size = values.shape[-1]
    # A maximum of the places left, not a minimum of indices, which XLA does not vectorise on a CPU.
    left = size - jnp.arange(size, dtype=jnp.int32)
    largest = values == jnp.max(values, axis=-1, keepdims=True)
    found = jnp.max(jnp.where(largest, left, 0), axis=-1)
    return jnp.where(found > 0, size - found, 0)


def _first_above(cumulative: Array, weights: Array, threshold: Array) -> Array:
    """Index of the first positive weight whose cumulative sum exceeds the threshold, else of the last positive."""
    positive = weights > 0
    index = jnp.arange(weights.shape[-1], dtype=jnp.int32)
    last = jnp.max(jnp.where(positive, index, 0), axis=-1)
    first = jnp.min(jnp.where(positive & (cumulative > threshold[..., None]), index, weights.shape[-1]), axis=-1)
    return jnp.minimum(first, last).astype(jnp.int32)
