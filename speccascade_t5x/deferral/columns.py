"""Prepares collected columns for a fit: checks them, keeps the positions that count, moves them to the device."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from speccascade_t5x.deferral import labels
from speccascade_t5x.deferral.head import HeadConfig
from speccascade_t5x.interfaces import Array, UserError

_LABELS = ("log_q", "log_p", "hit_q", "hit_p", "distance")
CANDIDATES = ("candidate_ids", "candidate_valid", "candidate_features", "candidate_log_p", "candidate_log_rest")

Columns = Mapping[str, np.ndarray]


def check(columns: Columns, config: HeadConfig) -> None:
    """Rejects data that nothing can be learned from.

    Raises:
      UserError: no position, a single example, columns that are not finite, or labels that are all the same.
    """
    if not len(columns["features"]):
        raise UserError("the fitting split holds no position: collect more examples, or give it a larger share")
    if len(np.unique(columns["example"])) < 2:
        raise UserError("the fitting split holds one example only, and cross-validation needs 2 or more: collect more")
    for column in ("features", "log_q", "log_p", "distance"):
        if not np.isfinite(columns[column]).all():
            raise UserError(f"the fitting split holds NaN or infinite {column}: check the models' logits")
    if config.kind == "prefix":
        gap = labels.gap(columns, config.loss)
        if gap.min() == gap.max():
            raise UserError(
                f"every label of the fitting split is the same: the losses of drafter and verifier differ by "
                f"{gap.flat[0]:+.3g} at every token, so no deferral can be learned: use another loss, or collect more "
                "examples"
            )


def joined(*parts: Columns) -> dict[str, np.ndarray]:
    """Concatenates the positions of several splits."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def heard(columns: Columns, config: HeadConfig) -> np.ndarray:
    """[N] bool: positions whose loss depends on the head. A gated head is 0 by construction where both argmaxes agree.

    The other positions would only dilute the minibatches and distort the scales of features.
    """
    if not config.gated:
        return np.ones(len(columns["features"]), bool)
    return columns["features"][:, config.features.names.index("agree")] == 0


def hidden(columns: Columns, config: HeadConfig) -> np.ndarray:
    """Both hidden states a head reads, side by side, [N, D]."""
    parts = [columns[name] for name in ("hidden_q", "hidden_p") if getattr(config.features, name)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def on_device(columns: Columns, config: HeadConfig) -> dict[str, Array]:
    """What an objective reads, on the device."""
    of_q, of_p = labels.losses(columns, config.loss)
    names = ["features", "tokens", *_LABELS] + (list(CANDIDATES) if config.kind == "token" else [])
    found = {name: jnp.asarray(columns[name]) for name in names}
    found = {name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in found.items()}
    found |= {"loss_q": jnp.asarray(of_q, jnp.float32), "loss_p": jnp.asarray(of_p, jnp.float32)}
    if config.features.hidden:
        found["hidden"] = jnp.asarray(hidden(columns, config))
    return found
