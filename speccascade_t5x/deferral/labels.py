"""What a fit learns from: losses of both models at a label, expected ones where the data distribution is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from speccascade_t5x import trees
from speccascade_t5x.core import probs
from speccascade_t5x.deferral.features import safe_log
from speccascade_t5x.interfaces import Array, UserError


@dataclasses.dataclass(frozen=True)
class Labels:
    """Per position, [...] float32.

    Attributes:
      log_q, log_p: log-probability of the label under the raw distributions, cut at `features.LOG_FLOOR`.
      hit_q, hit_p: 1 where the label is the argmax.
    """

    log_q: Array
    log_p: Array
    hit_q: Array
    hit_p: Array


trees.register(Labels)


def realised(q_raw: Array, p_raw: Array, tokens: Array) -> Labels:
    """Labels of the realised tokens [...] under distributions [..., V]."""
    hits = [(probs.argmax(law) == tokens).astype(jnp.float32) for law in (q_raw, p_raw)]
    return Labels(*(safe_log(probs.gather(law, tokens)) for law in (q_raw, p_raw)), *hits)


def expected_gap(truth: Array, q_raw: Array, p_raw: Array, loss: str) -> Array:
    """The exact g = E_P[loss(v, q)] - E_P[loss(v, p)] where P is known, [...].

    Args:
      truth: [..., V] P.
      q_raw, p_raw: [..., V] the models' distributions.
      loss: "zero_one" or "log".
    """
    if loss == "zero_one":
        return probs.gather(truth, probs.argmax(p_raw)) - probs.gather(truth, probs.argmax(q_raw))
    return jnp.sum(truth * (safe_log(p_raw) - safe_log(q_raw)), axis=-1)


def losses(columns: Mapping[str, np.ndarray], loss: str) -> tuple[np.ndarray, np.ndarray]:
    """(loss of the drafter, loss of the verifier) at each label, from collected columns of the names in `Labels`."""
    if loss == "zero_one":
        return 1.0 - columns["hit_q"], 1.0 - columns["hit_p"]
    if loss == "log":
        return -columns["log_q"], -columns["log_p"]
    raise UserError(f"loss={loss!r} is unknown: use 'zero_one' or 'log'")


def gap(columns: Mapping[str, np.ndarray], loss: str) -> np.ndarray:
    """y_t = loss(x_t, q) - loss(x_t, p)."""
    of_q, of_p = losses(columns, loss)
    return of_q - of_p
