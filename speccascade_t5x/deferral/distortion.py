"""Known distortions of a model's logits, for experiments on what miscalibration alone does to rules.

A `Distorted` model is distorted throughout: both what is sampled and what rules read change. To change only what a
rule reads, calibrate its input instead (`calibration`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from speccascade_t5x.core import noise
from speccascade_t5x.interfaces import Array, Bound, PyTree, UserError

KINDS = ("temperature", "by_class", "slice")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Distortion:
    """A function of logits.

    Attributes:
      kind: "temperature": logits / values[0]. "by_class": positions whose most likely token is of class c are divided
        by values[c]. "slice": logits do not change in rows whose input holds a token of `members`; elsewhere each
        token gets a fixed bias, drawn once with deviation values[1], and the sum is divided by values[0].
      values: temperatures; of a slice, temperature and deviation.
      classes: class of each token, for "by_class".
      members: token ids, for "slice".
    """

    kind: str
    values: tuple[float, ...]
    classes: tuple[int, ...] = ()
    members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"the distortion {self.kind!r} is unknown: use one of {', '.join(KINDS)}")
        if len(self.values) < 1 + (self.kind == "slice") or min(self.values) <= 0:
            raise UserError(f"a distortion has values={self.values}: give values above 0 (two for a slice)")

    def apply(self, logits: Array, inside: Array | None = None) -> Array:
        """[B, T, V] -> [B, T, V].

        Args:
          logits: of the model.
          inside: [B] bool, for "slice": rows that do not change.
        """
        logits = logits.astype(jnp.float32)
        if self.kind == "temperature":
            return logits / self.values[0]
        if self.kind == "slice":
            bias = self.values[1] * jax.random.normal(noise.from_seed(0), logits.shape[-1:])
            return jnp.where(inside[:, None, None], logits, (logits + bias) / self.values[0])
        kind = jnp.take(jnp.asarray(self.classes), jnp.argmax(logits, axis=-1))
        return logits / jnp.take(jnp.asarray(self.values, jnp.float32), kind)[..., None]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Distorted:
    """A LanguageModel with distorted logits; see `interfaces.LanguageModel`.

    Attributes:
      model: the undistorted one.
      distortion: what is done to its logits.
    """

    model: Any
    distortion: Distortion

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.model.vocab_size

    @property
    def input_name(self) -> str | None:
        """Which input holds the prompt."""
        return getattr(self.model, "input_name", None)

    @property
    def start_id(self) -> int:
        """The first token."""
        return self.model.start_id

    @property
    def config(self) -> Any:
        """The architecture of the undistorted model."""
        return self.model.config

    def inputs(self, tokens: Array) -> PyTree:
        """What `start` reads."""
        return self.model.inputs(tokens)

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Starts the model's cache, and notes which rows lie inside the slice."""
        cache = {"model": self.model.start(params, inputs, batch_size, room)}
        if self.distortion.kind == "slice":
            prompt = inputs[self.model.input_name]
            inside = jnp.any(jnp.isin(prompt, jnp.asarray(self.distortion.members)), axis=-1)
            cache["inside"] = jnp.repeat(inside, batch_size // prompt.shape[0])
        return cache

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        """The first token and position of the undistorted model."""
        return self.model.first(inputs)

    def extend(
        self, params: PyTree, cache: PyTree, tokens: Array, positions: Array, capture: tuple[str, ...] = ()
    ) -> tuple[Any, PyTree]:
        """Scores a block and distorts its logits."""
        found, own = self.model.extend(params, cache["model"], tokens, positions, capture)
        logits, captured = found if capture else (found, None)
        logits = self.distortion.apply(logits, cache.get("inside"))
        return ((logits, captured) if capture else logits), {**cache, "model": own}


def distorted(bound: Bound, distortion: Distortion | None) -> Bound:
    """A bound model under a distortion; the model itself where there is none."""
    return bound if distortion is None else Bound(Distorted(bound.model, distortion), bound.params)
