"""Optimizers and learning-rate schedules, with T5X's settings as defaults.

`optax.adafactor` computes the same as T5X's own Adafactor for every parameter of rank 2 or less, and the models here
have no higher rank. The two libraries compare as follows:

- Factoring. T5X maps logical axes to rows and columns, but falls back to "the two largest axes, both at least 128"
  for rank 2 or less, which is optax's rule for every rank. `Adafactor.transformation` rejects a higher rank.
- Scale of a parameter, root mean square at least 1e-3: an option of T5X (epsilon2), fixed in optax at T5X's default.
- Momentum (T5X beta1): none by default. Both average the scaled update, learning rate included.
- Weight decay: applied to the parameter and not multiplied by the learning rate, in both.
- Counters. T5X has one step; optax keeps one for the second moments and one for the schedule, equal as long as both
  start together.
- Clipping of the gradient by its global norm comes first, in T5X and here.

Learning rates are functions of the number of updates made so far, so the first update uses step 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import Array, PyTree, UserError

SCHEDULES = ("constant", "rsqrt", "cosine")
_LEAST_RATE = 1e-8  # T5X never returns a smaller one
_HIGHEST_RANK = 2
_ABOVE_0 = (1e-30,)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate for each step.

    Attributes:
      name: "constant"; "rsqrt", base * min(1, step / warmup) / sqrt(max(step, warmup)), T5X's default; or "cosine", a
        linear warmup to base, then half a cosine down to base * final_share.
      base: constant of the formula. For "rsqrt" the peak is base / sqrt(warmup_steps).
      warmup_steps: steps of the linear warmup; 0 for none. "rsqrt" needs 1 or more.
      linear_warmup: False holds an rsqrt schedule at its peak during the warmup, as T5's pretraining did.
      total_steps: where a cosine ends; the loop's number of steps if None.
      final_share: of base, at the end of a cosine.
    """

    name: str = "rsqrt"
    base: float = 0.5
    warmup_steps: int = 1000
    linear_warmup: bool = True
    total_steps: int | None = None
    final_share: float = 0.0

    def __post_init__(self) -> None:
        least = 1 if self.name == "rsqrt" else 0
        checks.fields(self, base=(0.0,), warmup_steps=(least,), total_steps=(1,), final_share=(0.0, 1.0))
        if self.name not in SCHEDULES:
            raise UserError(f"the schedule {self.name!r} is unknown: use {', '.join(SCHEDULES)}")
        if self.total_steps is not None:
            checks.whole("total_steps", self.total_steps, self.warmup_steps + 1)

    def rate(self, steps: int) -> Callable[[Array], Array]:
        """step -> learning rate (float32), for a run of `steps` steps.

        Raises:
          UserError: a cosine whose warmup is as long as the run.
        """
        total = self.total_steps if self.total_steps is not None else steps
        if self.name == "cosine" and total <= self.warmup_steps:
            raise UserError(f"a cosine of {total} steps has no room after {self.warmup_steps} warmup steps: lower them")

        def rate(step: Array) -> Array:
            step = jnp.asarray(step, jnp.float32)
            warm = jnp.minimum(1.0, step / max(self.warmup_steps, 1)) if self.warmup_steps else 1.0
            if self.name == "constant":
                value = self.base * warm
            elif self.name == "rsqrt":
                value = self.base / jnp.sqrt(jnp.maximum(step, self.warmup_steps))
                value = value * warm if self.linear_warmup else value
            else:
                done = jnp.clip((step - self.warmup_steps) / (total - self.warmup_steps), 0.0, 1.0)
                fall = self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
                value = self.base * warm * fall
            return jnp.maximum(value, _LEAST_RATE)

        return rate


CONSTANT = Schedule("constant", base=1e-3, warmup_steps=0)  # T5X's rate for fine-tuning


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) with T5X's defaults.

    Attributes:
      schedule: schedule of the learning rate, which is relative to the scale of each parameter.
      decay_rate: the second moments decay with 1 - (step + 1)^-decay_rate.
      step_offset: subtracted from the step in that formula; the starting step of a fine-tuning resets the moments.
      clipping_threshold: largest root mean square of a parameter's update; None for no clipping.
      min_dim_to_factor: second moments are factored where the two largest axes are at least this long.
      multiply_by_parameter_scale: False makes the learning rate absolute.
      momentum: of the update; None for none.
      weight_decay: share of each parameter subtracted per step; None for none.
      global_norm_clip: largest norm of the whole gradient; None for no clipping.
    """

    schedule: Schedule = CONSTANT
    decay_rate: float = 0.8
    step_offset: int = 0
    clipping_threshold: float | None = 1.0
    min_dim_to_factor: int = 128
    multiply_by_parameter_scale: bool = True
    momentum: float | None = None
    weight_decay: float | None = None
    global_norm_clip: float | None = None

    def __post_init__(self) -> None:
        checks.fields(
            self, decay_rate=(0.0,), step_offset=(0,), clipping_threshold=_ABOVE_0, min_dim_to_factor=(1,),
            momentum=(0.0, 1.0), weight_decay=(0.0,), global_norm_clip=_ABOVE_0,
        )  # fmt: skip

    def transformation(self, steps: int, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` steps.

        Raises:
          UserError: a parameter of rank 3 or more, whose factoring would differ from T5X's.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if len(leaf.shape) > _HIGHEST_RANK:
                name = jax.tree_util.keystr(path)
                raise UserError(f"Adafactor takes parameters of rank 2 or less, but {name} has shape {leaf.shape}")
        adafactor = optax.adafactor(
            self.schedule.rate(steps),
            min_dim_size_to_factor=self.min_dim_to_factor,
            decay_rate=self.decay_rate,
            decay_offset=self.step_offset,
            multiply_by_parameter_scale=self.multiply_by_parameter_scale,
            clipping_threshold=self.clipping_threshold,
            momentum=self.momentum,
            weight_decay_rate=self.weight_decay,
            eps=1e-30,
        )
        return _clipped(adafactor, self.global_norm_clip)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101). The loss should be normalised: see `LossConfig.normalizer`.

    Attributes:
      schedule: of the learning rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: multiplied by the learning rate; applied to matrices only, not to norm scales.
      global_norm_clip: largest norm of the whole gradient; None for no clipping.
    """

    schedule: Schedule = Schedule("cosine", base=1e-3)
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.01
    global_norm_clip: float | None = 1.0

    def __post_init__(self) -> None:
        below_1 = (0.0, 1.0 - 2.0**-24)
        checks.fields(self, b1=below_1, b2=below_1, eps=(0.0,), weight_decay=(0.0,), global_norm_clip=_ABOVE_0)

    def transformation(self, steps: int, params: PyTree) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` steps."""
        matrices = jax.tree.map(lambda leaf: len(leaf.shape) > 1, params)
        rate = self.schedule.rate(steps)
        adamw = optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=matrices)
        return _clipped(adamw, self.global_norm_clip)


def _clipped(optimizer: optax.GradientTransformation, norm: float | None) -> optax.GradientTransformation:
    return optimizer if norm is None else optax.chain(optax.clip_by_global_norm(norm), optimizer)
