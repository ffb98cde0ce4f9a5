"""Training losses over teacher-forced logits, in T5X's convention, and the sums that reports are made of.

Everything is a sum over target positions, each weighted by `decoder_loss_weights`; T5X's default does not divide it,
because Adafactor is invariant to the scale of a loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from speccascade_t5x.common import checks
from speccascade_t5x.core import divergences
from speccascade_t5x.interfaces import Array, UserError

NORMALIZERS = ("none", "real_tokens", "all_tokens", "sequences")
DIVERGENCES = ("forward_kl", "reverse_kl", "total_variation")

Batch = Mapping[str, Any]  # arrays, of numpy or jax, or their shapes


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
      z_loss: c of the penalty c (log sum_v exp logit_v)^2 per position; T5X pretrains with 1e-4.
      label_smoothing: mass that is moved from the label to the other ids, in equal shares. The entropy of the smoothed
        label is subtracted, as T5X does, so that a perfect model has loss 0.
      normalizer: divisor of the sum: "none" (T5X's default), "real_tokens" (the sum of the loss weights),
        "all_tokens" (padding included) or "sequences" (each sequence counts the same), or a number above 0.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    normalizer: str | float = "none"

    def __post_init__(self) -> None:
        checks.fields(self, z_loss=(0.0,), label_smoothing=(0.0, 0.999), normalizer=(0.0,))
        if isinstance(self.normalizer, str):
            if self.normalizer not in NORMALIZERS:
                raise UserError(f"normalizer={self.normalizer!r} is unknown: use a number or {', '.join(NORMALIZERS)}")
        elif not self.normalizer > 0:
            raise UserError(f"normalizer={self.normalizer!r} must be above 0")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher's token distributions p as well as from the labels; q is the model that learns.

    Attributes:
      divergence: "forward_kl" KL(p || q), "reverse_kl" KL(q || p), or "total_variation", which is one minus the
        acceptance of speculative decoding at a position (DistillSpec, Zhou et al. 2023, arXiv 2310.08461).
      weight: w of the loss (1 - w) cross entropy + w divergence.
      temperature: both distributions are softmax(logits / temperature). The divergence is not rescaled by it.
    """

    divergence: str = "forward_kl"
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checks.fields(self, weight=(0.0, 1.0), temperature=(1e-3,))
        if self.divergence not in DIVERGENCES:
            raise UserError(f"divergence={self.divergence!r} is unknown: use {', '.join(DIVERGENCES)}")


def loss_weights(batch: Batch) -> Array:
    """[B, T] float32: `decoder_loss_weights`, or 1 where the target is not padding."""
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        return (batch["decoder_target_tokens"] > 0).astype(jnp.float32)
    return weights.astype(jnp.float32)


def normalized_weights(batch: Batch, normalizer: str | float) -> Array:
    """Loss weights divided by the normaliser of the whole batch, [B, T].

    Computed before a batch is cut into microbatches, so that accumulated gradients are those of the batch.
    """
    weights = loss_weights(batch)
    if not isinstance(normalizer, str):
        return weights / normalizer
    if normalizer == "none":
        return weights
    if normalizer == "real_tokens":
        return weights / jnp.maximum(jnp.sum(weights), 1e-6)
    if normalizer == "all_tokens":
        return weights / math.prod(weights.shape)
    segments = batch.get("decoder_segment_ids")
    if segments is None:
        segments = jnp.ones_like(weights, jnp.int32)
    same = segments[:, :, None] == segments[:, None, :]
    totals = jnp.einsum("BTS,BS->BT", same.astype(jnp.float32), weights)
    shares = jnp.where(weights > 0, weights / jnp.maximum(totals, 1e-6), 0.0)
    return shares / jnp.maximum(jnp.sum(shares), 1e-6)


def cross_entropy(
    logits: Array, targets: Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Cross entropy and z-loss of each position.

    With confidence c = 1 - label_smoothing and l = label_smoothing / (V - 1), the label has mass c and every other id
    l; -c log c - (V - 1) l log l is subtracted.

    Args:
      logits: [..., V] float32.
      targets: [...] ids.
      label_smoothing: see `LossConfig`.
      z_loss: see `LossConfig`.

    Returns:
      (cross entropy [...], z-loss [...]), in nats.
    """
    size = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum fuses with its neighbours; a gather's gradient would be a scatter into zeros [..., V].
    label = jnp.sum(jnp.where(jnp.arange(size) == targets[..., None], logits, 0.0), axis=-1)
    if label_smoothing == 0.0:
        loss = log_z - label
    else:
        high, low = 1.0 - label_smoothing, label_smoothing / max(size - 1, 1)
        constant = -high * math.log(high) - (size - 1) * low * math.log(low)
        loss = log_z - (high - low) * label - low * jnp.sum(logits, axis=-1) - constant
    return loss, z_loss * jnp.square(log_z)


def divergence(logits: Array, teacher_logits: Array, config: DistillConfig) -> Array:
    """The configured divergence of each position, [..., V] x [..., V] -> [...], finite for finite logits."""
    log_q = jax.nn.log_softmax(logits / config.temperature, axis=-1)
    log_p = jax.nn.log_softmax(teacher_logits / config.temperature, axis=-1)
    if config.divergence == "forward_kl":
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    if config.divergence == "reverse_kl":
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)
    return divergences.total_variation(jnp.exp(log_p), jnp.exp(log_q))


def objective(
    logits: Array,
    batch: Batch,
    weights: Array,
    config: LossConfig,
    teacher_logits: Array | None = None,
    distill: DistillConfig | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The number to differentiate, and sums for the report.

    Args:
      logits: [B, T, V] float32 of the model that learns.
      batch: T5X features.
      weights: [B, T] from `normalized_weights`.
      config: the loss.
      teacher_logits: [B, T, V] float32; no gradient goes there.
      distill: how to learn from them.

    Returns:
      (loss, {"loss", "cross_entropy", "z_loss", "correct", "weight"[, "divergence"]}); all but "loss" are sums
      weighted by the loss weights alone.
    """
    targets, counted = batch["decoder_target_tokens"], loss_weights(batch)
    ce, z = cross_entropy(logits, targets, config.label_smoothing, config.z_loss)
    terms = ce
    sums = {
        "cross_entropy": jnp.sum(ce * counted),
        "z_loss": jnp.sum(z * counted),
        "correct": jnp.sum((jnp.argmax(logits, axis=-1) == targets) * counted),
        "weight": jnp.sum(counted),
    }
    if teacher_logits is not None and distill is not None:
        apart = divergence(*narrowed(logits, jax.lax.stop_gradient(teacher_logits)), distill)
        terms = (1.0 - distill.weight) * ce + distill.weight * apart
        sums["divergence"] = jnp.sum(apart * counted)
    loss = jnp.sum((terms + z) * weights)
    return loss, {"loss": loss, **sums}


def narrowed(logits: Array, teacher_logits: Array) -> tuple[Array, Array]:
    """Both, cut to the smaller vocabulary: T5 pads vocabularies, so the same vocabulary may have two widths."""
    width = min(logits.shape[-1], teacher_logits.shape[-1])
    return logits[..., :width], teacher_logits[..., :width]


def evaluation_sums(logits: Array, batch: Batch, teacher_logits: Array | None = None) -> dict[str, Array]:
    """Teacher-forced figures of a batch as sums over its counted positions; see `means`."""
    targets, counted = batch["decoder_target_tokens"], loss_weights(batch)
    nll, _ = cross_entropy(logits, targets)
    sums = {
        "nll": jnp.sum(nll * counted),
        "correct": jnp.sum((jnp.argmax(logits, axis=-1) == targets) * counted),
        "weight": jnp.sum(counted),
    }
    if teacher_logits is None:
        return sums
    q_logits, p_logits = narrowed(logits, teacher_logits)
    overlap = jnp.sum(jnp.minimum(jax.nn.softmax(p_logits), jax.nn.softmax(q_logits)), axis=-1)
    agree = jnp.argmax(q_logits, axis=-1) == jnp.argmax(p_logits, axis=-1)
    teacher_nll, _ = cross_entropy(teacher_logits, targets)
    return sums | {
        "acceptance": jnp.sum(overlap * counted),
        "greedy_agreement": jnp.sum(agree * counted),
        "teacher_nll": jnp.sum(teacher_nll * counted),
    }


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over positions as means per counted position: "nll" (nats per token), "accuracy", and with a teacher
    "acceptance" E[sum_v min(p, q)] at temperature 1, "greedy_agreement" of the two argmaxes, "teacher_nll"."""
    weight = max(float(sums["weight"]), 1e-6)
    renamed = {"correct": "accuracy"}
    return {renamed.get(name, name): float(value) / weight for name, value in sums.items() if name != "weight"}
