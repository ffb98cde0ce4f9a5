"""Features that a head reads at a prefix: figures of both models' distributions at temperature 1, and of candidates.

They depend on (q_raw, p_raw, position) alone, so a head fitted on teacher-forced data reads the same numbers in the
loop, whatever the temperature or truncation of sampling.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.core import divergences, probs
from speccascade_t5x.core.rules import Pair
from speccascade_t5x.interfaces import Array, UserError

LOG_FLOOR = -20.0  # natural logarithms are clipped here, so that a probability of 0 gives a finite number
_SLOW_POSITION = 100.0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Which features are computed.

    Attributes:
      top: how many of the largest probabilities of each distribution are read; a token head's candidates are these
        tokens.
      classes: token classes, whose mass under each distribution is read; 0 for none.
      hidden_q: width of the drafter's last hidden state if it is read, 0 if not.
      hidden_p: the verifier's likewise.
    """

    top: int = 4
    classes: int = 0
    hidden_q: int = 0
    hidden_p: int = 0

    def __post_init__(self) -> None:
        if self.top < 2 or min(self.classes, self.hidden_q, self.hidden_p) < 0:
            raise UserError("a FeatureSpec needs top >= 2, and classes and hidden widths of 0 or more")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of `prefix_features`."""
        found: list[str] = []
        for law in "qp":
            found += [f"log_top{i}_{law}" for i in range(self.top)]
            found += [f"max_{law}", f"margin_{law}", f"entropy_{law}"]
        found += ["total_variation", "kl_pq", "kl_qp"]
        found += ["log_p_of_argmax_q", "log_q_of_argmax_p", "p_of_argmax_q", "q_of_argmax_p"]
        found += ["rank_in_p_of_argmax_q", "rank_in_q_of_argmax_p", "agree", "log_position", "position"]
        found += [f"class{i}_mass_{law}" for law in "qp" for i in range(self.classes)]
        return tuple(found)

    @property
    def hidden(self) -> int:
        """Width of both hidden states side by side."""
        return self.hidden_q + self.hidden_p


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The few tokens a token head scores: the most likely of either distribution.

    Attributes:
      ids: [..., K] token ids, K = 2 top; the drafter's first.
      valid: [..., K] bool, False for a drafter's token that is among the verifier's too.
      features: [..., K, Fc] of each.
      log_p: [..., K] log p_raw of each, cut at LOG_FLOOR.
      log_rest: [...] log of the mass p_raw leaves to all other tokens, cut likewise.
    """

    ids: Array
    valid: Array
    features: Array
    log_p: Array
    log_rest: Array


trees.register(Candidates)


def safe_log(law: Array) -> Array:
    """Natural logarithm, no lower than LOG_FLOOR."""
    return jnp.maximum(jnp.log(jnp.maximum(law, 1e-30)), LOG_FLOOR)


def prefix_features(pair: Pair, spec: FeatureSpec, classes: Array | None = None) -> Array:
    """Features of a prefix, [..., F] float32, in the order of `spec.names`.

    Args:
      pair: q_raw, p_raw [..., V] and position [...] are read.
      spec: which features.
      classes: [V] int32 class of each token; needed where spec.classes is not 0.

    Raises:
      UserError: a distribution or the position is missing.
    """
    if pair.q_raw is None or pair.position is None:
        raise UserError(
            "a learned rule reads both models' distributions and the output position, which are missing here: use it "
            "between a drafter model and its verifier"
        )
    q, p = pair.q_raw.astype(jnp.float32), pair.p_raw.astype(jnp.float32)
    (top_q, ids_q), (top_p, ids_p) = jax.lax.top_k(q, spec.top), jax.lax.top_k(p, spec.top)
    columns = []
    for law, top in ((q, top_q), (p, top_p)):
        logs = safe_log(top)
        columns += [logs[..., i] for i in range(spec.top)]
        columns += [top[..., 0], top[..., 0] - top[..., 1], divergences.entropy(law)]
    log_q, log_p = safe_log(q), safe_log(p)
    crossed_p, crossed_q = probs.gather(p, ids_q[..., 0]), probs.gather(q, ids_p[..., 0])
    columns += [
        divergences.total_variation(p, q),
        jnp.sum(p * (log_p - log_q), axis=-1),
        jnp.sum(q * (log_q - log_p), axis=-1),
        safe_log(crossed_p),
        safe_log(crossed_q),
        crossed_p,
        crossed_q,
        _log_rank(p, crossed_p),
        _log_rank(q, crossed_q),
        (ids_q[..., 0] == ids_p[..., 0]).astype(jnp.float32),
    ]
    position = jnp.broadcast_to(jnp.asarray(pair.position, jnp.float32), q.shape[:-1])
    columns += [jnp.log1p(position), position / _SLOW_POSITION]
    features = jnp.stack(columns, axis=-1)
    if not spec.classes:
        return features
    kinds = _one_hot(classes, spec)
    return jnp.concatenate([features, q @ kinds, p @ kinds], axis=-1)


def _one_hot(classes: Array | None, spec: FeatureSpec) -> Array:
    """[V] -> [V, classes]."""
    if classes is None:
        raise UserError("these features read token classes, but none were given: pass the class of each token")
    return jax.nn.one_hot(classes, spec.classes, dtype=jnp.float32)


def hidden_states(pair: Pair, spec: FeatureSpec) -> Array | None:
    """Both hidden states side by side, [..., spec.hidden], or None where none is read.

    Raises:
      UserError: one that is read is missing, or of another width.
    """
    found = []
    for name, width in (("hidden_q", spec.hidden_q), ("hidden_p", spec.hidden_p)):
        state = getattr(pair, name)
        if width and (state is None or state.shape[-1] != width):
            got = "none is known here" if state is None else f"it has width {state.shape[-1]}"
            raise UserError(f"the head reads {name} of width {width}, but {got}: fit the head for this pair")
        if width:
            found.append(state.astype(jnp.float32))
    return jnp.concatenate(found, axis=-1) if found else None


def candidates(pair: Pair, spec: FeatureSpec, classes: Array | None = None) -> Candidates:
    """The tokens a token head scores. Reads what `prefix_features` reads, but for the position."""
    q, p = pair.q_raw.astype(jnp.float32), pair.p_raw.astype(jnp.float32)
    ids_q, ids_p = jax.lax.top_k(q, spec.top)[1], jax.lax.top_k(p, spec.top)[1]
    ids = jnp.concatenate([ids_q, ids_p], axis=-1)
    doubled = jnp.any(ids_q[..., :, None] == ids_p[..., None, :], axis=-1)
    valid = jnp.concatenate([~doubled, jnp.ones_like(doubled)], axis=-1)
    at_q, at_p = (jnp.take_along_axis(law, ids, axis=-1) for law in (q, p))
    columns = [safe_log(at_q), safe_log(at_p), at_q, at_p, _log_rank(q, at_q), _log_rank(p, at_p)]
    columns += [(ids == best[..., :1]).astype(jnp.float32) for best in (ids_q, ids_p)]
    features = jnp.stack(columns, axis=-1)
    if spec.classes:
        features = jnp.concatenate([features, jnp.take(_one_hot(classes, spec), ids, axis=0)], axis=-1)
    rest = 1.0 - jnp.sum(jnp.where(valid, at_p, 0.0), axis=-1)
    return Candidates(ids, valid, features, safe_log(at_p), safe_log(rest))


def _log_rank(law: Array, value: Array) -> Array:
    """log(1 + how many tokens are more likely than `value`): distribution [..., V], value [...] or [..., K]."""
    if value.ndim == law.ndim:
        return jnp.log1p(jnp.sum(law[..., None, :] > value[..., None], axis=-1).astype(jnp.float32))
    return jnp.log1p(jnp.sum(law > value[..., None], axis=-1).astype(jnp.float32))
