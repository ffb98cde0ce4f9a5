"""The computation of one training step: loss, gradients and the optimizer's update, from a config alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from speccascade_t5x.common import checks
from speccascade_t5x.core import noise
from speccascade_t5x.interfaces import Array, PyTree
from speccascade_t5x.models.t5 import T5Config, init_params
from speccascade_t5x.training import losses, optimizers, teacher_forcing
from speccascade_t5x.training.train_checkpoints import TrainState

NEVER = np.int32(2**31 - 1)  # the "bad_step" of steps whose loss and gradients were all finite


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      steps: total number of updates; a resumed run may raise it.
      seed: seed of initialisation and dropout.
      optimizer: the optimizer with its schedule.
      loss: the loss to minimise.
      distill: how to learn from a teacher; needs one.
      microbatches: number of pieces of a batch, whose gradients are added up: less memory, the same update.
      log_every: steps between reports; only then does the host wait for numbers.
      eval_every: steps between evaluations; 0 evaluates at the beginning and at the end only.
      checkpoint_every: steps between checkpoints; one is also written at the end.
      keep: how many checkpoints to keep.
    """

    steps: int
    seed: int = 0
    optimizer: optimizers.Adafactor | optimizers.AdamW = dataclasses.field(default_factory=optimizers.Adafactor)
    loss: losses.LossConfig = dataclasses.field(default_factory=losses.LossConfig)
    distill: losses.DistillConfig | None = None
    microbatches: int = 1
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        counts = ("steps", "microbatches", "log_every", "checkpoint_every", "keep")
        checks.fields(self, seed=checks.SEED, eval_every=(0,), **dict.fromkeys(counts, (1,)))


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of a model.

    Attributes:
      model: the architecture.
      config: how to train it.
      teacher: the architecture to learn from with `config.distill`, and of the evaluation; or None.
    """

    model: T5Config
    config: TrainConfig
    teacher: T5Config | None = None

    def fresh(self, params: PyTree) -> TrainState:
        """The state before the first step."""
        return TrainState(jnp.int32(0), params, self.optimizer(params).init(params))

    def draw(self) -> TrainState:
        """The state before the first step, with parameters of the config's seed."""
        return self.fresh(init_params(self.model, noise.from_seed(self.config.seed)))

    def optimizer(self, params: PyTree) -> optax.GradientTransformation:
        """The optimizer for parameters, or for their shapes."""
        return self.config.optimizer.transformation(self.config.steps, params)

    def no_sums(self) -> dict[str, np.generic]:
        """Sums over no step, on the host."""
        names = ["loss", "cross_entropy", "z_loss", "correct", "weight", "tokens", "grad_norm", "steps"]
        if self.config.distill is not None:
            names.append("divergence")
        return {name: np.float32(0) for name in names} | {"bad_step": NEVER, "learning_rate": np.float32(0)}

    def step(
        self, state: TrainState, sums: dict[str, Array], batch: losses.Batch, teacher_params: PyTree
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update.

        Args:
          state: to be donated.
          sums: of the steps since the last report.
          batch: T5X features.
          teacher_params: of the teacher; None without one.

        Returns:
          (the next state, the sums with this step's figures).
        """
        config = self.config
        key = jax.random.fold_in(noise.from_seed(config.seed), state.step)
        weighted = {**batch, "weights": losses.normalized_weights(batch, config.loss.normalizer)}
        grads, found = self._gradients(state.params, weighted, key, teacher_params)
        updates, opt_state = self.optimizer(state.params).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)))
        tokens = jnp.sum(batch["encoder_input_tokens"] > 0) + jnp.sum(batch["decoder_target_tokens"] > 0)
        found |= {"tokens": tokens.astype(jnp.float32), "grad_norm": norm, "steps": jnp.float32(1)}
        new = {name: sums[name] + value for name, value in found.items()}
        fine = jnp.isfinite(found["loss"]) & jnp.isfinite(norm)
        new["bad_step"] = jnp.minimum(sums["bad_step"], jnp.where(fine, NEVER, state.step))
        new["learning_rate"] = config.optimizer.schedule.rate(config.steps)(state.step)
        return TrainState(state.step + 1, params, opt_state), new

    def _gradients(
        self, params: PyTree, batch: losses.Batch, key: Array, teacher_params: PyTree
    ) -> tuple[PyTree, dict[str, Array]]:
        """Gradients and sums of a batch, microbatch by microbatch."""
        pieces = self.config.microbatches
        gradient = jax.grad(self._loss, has_aux=True)
        if pieces == 1:
            return gradient(params, batch, key, teacher_params)
        # Row r goes to piece r mod `pieces`, so that every device keeps its rows.
        keys = jax.random.split(key, pieces)

        def cut(x: Array) -> Array:
            return x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)

        def add(total: PyTree, piece: tuple) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *piece, teacher_params)), None

        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: cut(x)[0], batch), key, teacher_params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, (jax.tree.map(cut, batch), keys))[0]

    def _loss(
        self, params: PyTree, batch: losses.Batch, key: Array, teacher_params: PyTree
    ) -> tuple[Array, dict[str, Array]]:
        dropout_key = key if self.model.dropout_rate else None
        logits = teacher_forcing.logits(self.model, params, batch, dropout_key)
        others = None
        if self.config.distill is not None and self.teacher is not None:
            others = teacher_forcing.logits(self.teacher, teacher_params, batch)
        return losses.objective(logits, batch, batch["weights"], self.config.loss, others, self.config.distill)
