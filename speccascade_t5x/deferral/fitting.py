"""Fits heads with optax on collected columns: a plain loop over arrays, with early stopping on held-out examples.

Minibatches are a pure function of (seed, step), so a run that was killed continues at its newest checkpoint with the
same bits. Nothing here knows of files: a `Store` keeps states, an observer is told what happens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from speccascade_t5x import trees
from speccascade_t5x.deferral import labels
from speccascade_t5x.deferral.features import Candidates
from speccascade_t5x.deferral.head import Head, HeadConfig, fresh, network, with_statistics
from speccascade_t5x.interfaces import Array, PyTree, UserError

OBJECTIVES = ("squared", "surrogate", "co_llm", "likelihood")
_LABEL_COLUMNS = ("log_q", "log_p", "hit_q", "hit_p", "distance")
_CANDIDATE_COLUMNS = ("candidate_ids", "candidate_valid", "candidate_features", "candidate_log_p", "candidate_log_rest")

Columns = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How to fit.

    Attributes:
      objective: of a prefix head "squared" (the loss gap, by least squares), "surrogate" (the realised objective with
        the step of the rule softened to a sigmoid, averaged over `alphas`) or "co_llm" (Co-LLM's marginal likelihood;
        the head then gives log-odds of deferring); of a token head "likelihood".
      alphas: of the surrogate.
      softness: of the surrogate, in units of the loss: width of the sigmoid.
      steps: updates at most.
      batch_size: positions of a minibatch.
      learning_rate: of AdamW, falling to a tenth by a cosine.
      weight_decay: of AdamW.
      eval_every: updates between looks at the held-out split; also between checkpoints.
      patience: looks without a better held-out loss after which a fit stops.
      seeds: one fit each; the one with the best held-out loss is kept.
      keep: checkpoints of each seed that stay.
    """

    objective: str = "squared"
    alphas: tuple[float, ...] = (-0.5, -0.2, 0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    softness: float = 0.05
    steps: int = 3000
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    eval_every: int = 100
    patience: int = 8
    seeds: tuple[int, ...] = (0,)
    keep: int = 2

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective={self.objective!r} is unknown: use one of {', '.join(OBJECTIVES)}")
        for name in ("steps", "batch_size", "eval_every", "patience", "keep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value!r} must be a whole number above 0")
        for name in ("alphas", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give one or more")
        if not self.softness > 0 or not self.learning_rate > 0:
            raise UserError("softness and learning_rate must be above 0")


class Observer:
    """Told what happens; each method may be overridden."""

    def started(self, seed: int, step: int, steps: int) -> None:
        """The fit of a seed begins after `step` updates."""

    def looked(self, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        """Losses {"fit", "held_out", "best"} after `step` updates."""


@trees.register
@dataclasses.dataclass
class FitState:
    """What a fit carries: current and best parameters, and how it went.

    Attributes:
      step: int32, updates made.
      params: {"now", "best"}: of the head; {"best_loss", "worse"}: its held-out loss, and looks since.
      opt_state: of AdamW.
    """

    step: Array
    params: PyTree
    opt_state: PyTree


class Store(Protocol):
    """Keeps states of one fit, whole or not at all."""

    def latest(self) -> int | None:
        """The step of the newest one."""

    def restore(self, like: FitState) -> FitState:
        """The newest one."""

    def save(self, step: int, state: FitState) -> Any:
        """Writes one."""

    def close(self) -> None:
        """Frees what it holds."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A finished fit of one seed.

    Attributes:
      head: with the parameters of the best held-out loss.
      seed: its seed.
      held_out: that loss.
      steps: updates made in all.
      stopped_early: whether patience ended it.
      history: each look.
    """

    head: Head
    seed: int
    held_out: float
    steps: int
    stopped_early: bool
    history: list[dict[str, float]]


def check_columns(columns: Columns, held_out: Columns, config: HeadConfig) -> None:
    """Refuses data nothing can be learnt from.

    Raises:
      UserError: an empty split, columns that are not finite, or labels that are all the same.
    """
    for name, part in (("fitting", columns), ("held-out", held_out)):
        if not len(part["features"]):
            raise UserError(f"the {name} split holds no position: collect more examples, or give it a larger share")
        for column in ("features", "log_q", "log_p", "distance"):
            if not np.isfinite(part[column]).all():
                raise UserError(f"the {name} split holds NaN or infinite {column}: a model's logits were not finite")
    if config.kind == "prefix":
        gap = labels.gap(columns, config.loss)
        if gap.min() == gap.max():
            raise UserError(
                f"every label of the fitting split is the same: drafter and verifier lose {gap.flat[0]:+.3g} apart at "
                "every token, so there is nothing to learn when to defer by; use another loss, or collect more examples"
            )


def objective(config: HeadConfig, fit: FitConfig, variables: PyTree, batch: Mapping[str, Array]) -> Array:
    """Mean loss of a minibatch (named columns, N on axis 0), a scalar."""
    hidden = batch.get("hidden")
    if config.kind == "token":
        found = Candidates(*(batch[name] for name in _CANDIDATE_COLUMNS))
        logs = network(config).apply(variables, batch["features"], found, hidden)
        is_label = (found.ids == batch["tokens"][:, None]) & found.valid
        other = ~jnp.any(is_label, axis=-1, keepdims=True)
        return -jnp.mean(jnp.sum(jnp.where(jnp.concatenate([is_label, other], axis=-1), logs, 0.0), axis=-1))
    score = network(config).apply(variables, batch["features"], hidden)
    if fit.objective == "co_llm":
        keeps = jax.nn.log_sigmoid(-score) + batch["log_q"]
        return -jnp.mean(jnp.logaddexp(keeps, jax.nn.log_sigmoid(score) + batch["log_p"]))
    if fit.objective == "squared":
        return jnp.mean(jnp.square(score - (batch["loss_q"] - batch["loss_p"])))
    alphas = jnp.asarray(fit.alphas, jnp.float32)[:, None]
    toll = alphas * batch["distance"]
    defers = jax.nn.sigmoid((score - toll) / fit.softness)
    return jnp.mean((1.0 - defers) * batch["loss_q"] + defers * (batch["loss_p"] + toll))


def fit_head(
    config: HeadConfig,
    fit: FitConfig,
    columns: Columns,
    held_out: Columns,
    classes: np.ndarray | None = None,
    store: Callable[[int], Store | None] | None = None,
    observer: Observer | None = None,
) -> list[Fit]:
    """Fits a head once per seed.

    Args:
      config: of the head; its objective is `fit`'s.
      fit: how.
      columns: of the fitting split, see `labels.Labels` and `features`: features [N, F], tokens, log_q, log_p, hit_q,
        hit_p, distance [N], hidden [N, D] where the head reads it, candidate_* [N, K, ...] for a token head.
      held_out: of the examples early stopping looks at.
      classes: [V] class of each token, which the head carries.
      store: seed -> where its states are kept; None keeps none.
      observer: told what happens.

    Returns:
      One Fit per seed, the best first.

    Raises:
      UserError: data nothing can be learnt from, or a loss that became NaN; checkpoints before it stay.
    """
    if (config.kind == "token") != (fit.objective == "likelihood"):
        able = "likelihood" if config.kind == "token" else "squared, surrogate or co_llm"
        raise UserError(f"objective={fit.objective!r} does not fit a {config.kind} head: use {able}")
    config = dataclasses.replace(config, objective=fit.objective)
    check_columns(columns, held_out, config)
    run = _Run(config, fit, _device_columns(columns, config), _device_columns(held_out, config), columns)
    found = []
    for seed in fit.seeds:
        kept = store(seed) if store else None
        try:
            variables, stats = run.fit(seed, kept, observer or Observer())
        finally:
            if kept is not None:
                kept.close()
        carried = None if classes is None else jnp.asarray(classes, jnp.int32)
        found.append(Fit(Head(config, variables, carried), seed, **stats))
    return sorted(found, key=lambda each: each.held_out)


class _Run:
    """Fits of one head on one set of columns."""

    def __init__(self, config: HeadConfig, fit: FitConfig, data: dict, held_out: dict, columns: Columns):
        self.config, self.fit_config, self.data, self.held_out, self.columns = config, fit, data, held_out, columns
        rate = optax.cosine_decay_schedule(fit.learning_rate, fit.steps, alpha=0.1)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=fit.weight_decay))
        self._advance = jax.jit(self._some_steps)
        self._look = jax.jit(self._whole_loss)

    def fit(self, seed: int, store: Store | None, observer: Observer) -> tuple[PyTree, dict[str, Any]]:
        """Returns the variables of the best held-out loss and the fields of Fit that follow from the run."""
        config = self.fit_config
        variables = self._begin(seed)
        statistics = variables["statistics"]
        state = self._fresh_state(variables["params"])
        if store is not None and store.latest() is not None:
            state = store.restore(state)
        step, history = int(state.step), []
        observer.started(seed, step, config.steps)
        key = jax.random.key(seed)
        if not step:
            first = float(self._look({"params": state.params["now"], "statistics": statistics}))
            state.params["best_loss"] = jnp.float32(first)
        while step < config.steps and int(state.params["worse"]) < config.patience:
            count = min(config.eval_every, config.steps - step)
            before = state
            now, opt_state, losses = self._advance(
                state.params["now"], state.opt_state, statistics, key, step + jnp.arange(count)
            )
            step += count
            metrics = {
                "fit": float(jnp.mean(losses)),
                "held_out": float(self._look({"params": now, "statistics": statistics})),
            }
            self._check_finite(metrics, now, step, store)
            better = metrics["held_out"] < float(before.params["best_loss"])
            params = {
                "now": now,
                "best": now if better else before.params["best"],
                "best_loss": jnp.float32(metrics["held_out"]) if better else before.params["best_loss"],
                "worse": jnp.int32(0 if better else int(before.params["worse"]) + 1),
            }
            state = FitState(jnp.int32(step), params, opt_state)
            metrics["best"] = float(params["best_loss"])
            history.append({"step": step, **metrics})
            if store is not None:
                store.save(step, state)
            observer.looked(seed, step, metrics)
        stats = {
            "held_out": float(state.params["best_loss"]),
            "steps": step,
            "stopped_early": step < config.steps,
            "history": history,
        }
        return {"params": state.params["best"], "statistics": statistics}, stats

    def _begin(self, seed: int) -> PyTree:
        width = self.columns["candidate_features"].shape[-1] if self.config.kind == "token" else 0
        variables = fresh(self.config, jax.random.fold_in(jax.random.key(seed), 1), width)
        columns = {"normalise": self.columns["features"]}
        if self.config.features.hidden:
            columns["normalise_hidden"] = _hidden(self.columns, self.config)
        if self.config.kind == "token":
            valid = np.asarray(self.columns["candidate_valid"])
            columns["normalise_candidate"] = np.asarray(self.columns["candidate_features"])[valid]
        return with_statistics(variables, columns)

    def _fresh_state(self, params: PyTree) -> FitState:
        own = jax.tree.map(jnp.asarray, params)
        all_params = {"now": own, "best": own, "best_loss": jnp.float32(math.inf), "worse": jnp.int32(0)}
        return FitState(jnp.int32(0), all_params, self.optimizer.init(own))

    def _some_steps(self, params: PyTree, opt_state: PyTree, statistics: PyTree, key: Array, steps: Array):
        """Updates of the given step numbers, in one program."""
        size, total = self.fit_config.batch_size, len(self.data["features"])

        def update(carry, step):
            params, opt_state = carry
            chosen = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, total)
            batch = {name: column[chosen] for name, column in self.data.items()}
            whole = lambda params: {"params": params, "statistics": statistics}  # noqa: E731
            loss, grads = jax.value_and_grad(
                lambda params: objective(self.config, self.fit_config, whole(params), batch)
            )(params)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, opt_state), losses = jax.lax.scan(update, (params, opt_state), steps)
        return params, opt_state, losses

    def _whole_loss(self, variables: PyTree) -> Array:
        return objective(self.config, self.fit_config, variables, self.held_out)

    def _check_finite(self, metrics: Mapping[str, float], params: PyTree, step: int, store: Store | None) -> None:
        fine = all(math.isfinite(value) for value in metrics.values())
        if fine and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
            return
        kept = store.latest() if store else None
        left = f"; the checkpoint of step {kept} is kept" if kept is not None else ""
        raise UserError(
            f"the loss or a parameter of the head became NaN or infinite by step {step}{left}: lower learning_rate"
        )


def _hidden(columns: Columns, config: HeadConfig) -> np.ndarray:
    parts = [columns[name] for name in ("hidden_q", "hidden_p") if getattr(config.features, name)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def _device_columns(columns: Columns, config: HeadConfig) -> dict[str, Array]:
    """What the objective reads, on the device."""
    of_q, of_p = labels.losses(columns, config.loss)
    names = ["features", "tokens", *_LABEL_COLUMNS] + (list(_CANDIDATE_COLUMNS) if config.kind == "token" else [])
    found = {name: jnp.asarray(columns[name]) for name in names}
    found = {name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in found.items()}
    found |= {"loss_q": jnp.asarray(of_q, jnp.float32), "loss_p": jnp.asarray(of_p, jnp.float32)}
    if config.features.hidden:
        found["hidden"] = jnp.asarray(_hidden(columns, config))
    return found


def scores(head: Head, columns: Columns, chunk: int = 65_536) -> np.ndarray:
    """g_hat of a prefix head at collected positions, [N]."""
    apply = jax.jit(lambda variables, read, hidden: network(head.config).apply(variables, read, hidden))
    found = []
    for begin in range(0, len(columns["features"]), chunk):
        part = {name: values[begin : begin + chunk] for name, values in columns.items()}
        hidden = jnp.asarray(_hidden(part, head.config)) if head.config.features.hidden else None
        found.append(np.asarray(apply(head.variables, jnp.asarray(part["features"]), hidden)))
    return np.concatenate(found) if found else np.zeros(0, np.float32)
