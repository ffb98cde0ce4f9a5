"""A model's logits and figures on given targets: the forward pass of training and of its evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from speccascade_t5x.interfaces import Array, Bound, PyTree, UserError
from speccascade_t5x.models.t5 import T5Config, T5Module
from speccascade_t5x.training import losses

# Positions are left out: T5 knows distances only, which packing keeps.
_FEATURES = (
    *("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"),
    *("encoder_segment_ids", "decoder_segment_ids"),
)


def logits(config: T5Config, params: PyTree, batch: losses.Batch, dropout_key: Array | None = None) -> Array:
    """Logits [B, T, V] of a batch of T5X features; with dropout if a key is given."""
    return T5Module(config).apply(
        {"params": params},
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        batch.get("encoder_segment_ids"),
        batch.get("decoder_segment_ids"),
        dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )


def evaluate(bound: Bound, batches: Iterable[Mapping[str, np.ndarray]], teacher: Bound | None = None) -> dict:
    """Teacher-forced figures over batches, see `losses.means`: {"nll", "accuracy", ...} per counted token."""
    config, params = (None, None) if teacher is None else (teacher.model.config, teacher.params)
    program = jax.jit(functools.partial(step, bound.model.config, config))
    return run(program, bound.params, params, map(features, batches))


def run(program: Callable, params: PyTree, teacher_params: PyTree, batches: Iterable[losses.Batch]) -> dict:
    """Means over placed batches, from a jitted `step`; fetched once.

    Raises:
      UserError: there is no batch.
    """
    total: dict[str, Any] = {}
    for batch in batches:
        sums = program(params, teacher_params, batch)
        total = {name: total[name] + value for name, value in sums.items()} if total else sums
    if not total:
        raise UserError("there is no batch to evaluate on: check the split and its length limits")
    return losses.means(jax.device_get(total))


def step(
    model: T5Config, teacher: T5Config | None, params: PyTree, teacher_params: PyTree, batch: losses.Batch
) -> dict[str, Array]:
    """Sums of a batch, see `losses.evaluation_sums`."""
    others = None if teacher is None else logits(teacher, teacher_params, batch)
    return losses.evaluation_sums(logits(model, params, batch), batch, others)


def features(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The features that a step reads; the rest of a batch stays on the host."""
    return {name: batch[name] for name in _FEATURES if name in batch}
