"""Fits heads with optax on collected columns, by a plain loop over arrays with early stopping by cross-validation.

A gap is learned from the positions where the two models choose different tokens, about one in a hundred for a good
pair. A held-out share of so few is too noisy, so the examples are split into folds. One head per fold is fitted
without it, in step with the head that is kept, which is fitted on all folds. The mean loss of each head on the fold it
has not seen determines the number of updates.

Minibatches are a pure function of (seed, step), so a killed run continues from its newest checkpoint bit-identically.
This module does not access files: a `Store` keeps states, and an `Observer` is notified of progress.
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
from speccascade_t5x.common import checks
from speccascade_t5x.core import noise
from speccascade_t5x.deferral import columns as columns_lib
from speccascade_t5x.deferral.columns import Columns
from speccascade_t5x.deferral.features import Candidates
from speccascade_t5x.deferral.head import Head, HeadConfig, fresh, network, with_statistics
from speccascade_t5x.interfaces import Array, PyTree, UserError

OBJECTIVES = ("squared", "surrogate", "co_llm", "likelihood")


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How to fit.

    Attributes:
      objective: of a prefix head "squared" (the loss gap, by least squares), "surrogate" (the realised objective with
        the step of the rule softened to a sigmoid, averaged over `alphas`) or "co_llm" (Co-LLM's marginal likelihood;
        the head then gives log-odds of deferring); of a token head "likelihood".
      alphas: of the surrogate.
      softness: of the surrogate, in units of the loss: width of the sigmoid.
      steps: most updates.
      batch_size: positions of a minibatch.
      learning_rate: of AdamW, decayed to a tenth by a cosine. It is small because on few positions the best head is
        found after some dozens of updates, and a larger rate would miss it.
      weight_decay: of AdamW.
      folds: parts of the examples; as many further heads are fitted, each without its part. Five leave each head four
        fifths of the data and cost six fits in one program.
      eval_every: updates between evaluations on the left-out folds, and between checkpoints; small for the same reason.
      patience: evaluations without a better left-out loss after which a fit stops.
      seeds: one fit is made for each; the one with the best left-out loss is kept.
      keep: number of checkpoints that are kept for each seed.
    """

    objective: str = "squared"
    alphas: tuple[float, ...] = (-0.5, -0.2, 0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    softness: float = 0.05
    steps: int = 3000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    folds: int = 5
    eval_every: int = 10
    patience: int = 30
    seeds: tuple[int, ...] = (0,)
    keep: int = 2

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "eval_every", "patience", "keep")
        checks.fields(self, folds=(2,), weight_decay=(0.0,), seeds=checks.SEED, **dict.fromkeys(counts, (1,)))
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective={self.objective!r} is unknown: use one of {', '.join(OBJECTIVES)}")
        for name in ("alphas", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give one or more")
        if not self.softness > 0 or not self.learning_rate > 0:
            raise UserError("softness and learning_rate must be above 0")


class Observer:
    """Is notified of progress; each method may be overridden."""

    def started(self, seed: int, step: int, steps: int) -> None:
        """The fit of a seed begins after `step` updates."""

    def looked(self, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        """Losses {"fit", "left_out", "best"} after `step` updates."""


@trees.register
@dataclasses.dataclass
class FitState:
    """State of a fit: current and best parameters, and its progress.

    Attributes:
      step: int32, updates made.
      params: {"now"}: of all heads, [folds + 1, ...], the last of which sees all folds; {"best"}: of that one after
        the best number of updates; {"best_loss", "best_step", "worse"}: the left-out loss there, its step, and the
        number of evaluations since.
      opt_state: of AdamW, likewise for all heads.
    """

    step: Array
    params: PyTree
    opt_state: PyTree


class Store(Protocol):
    """Keeps states of one fit; each is written atomically."""

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
      head: fitted on all folds, for as many updates as were best for the folds left out.
      seed: its seed.
      left_out: that left-out loss, a mean over positions (those where the models' choices differ, if the head speaks
        at no others).
      first: the same loss of the head the fit began with.
      kept_at: updates the kept head has seen; 0: it is the one the fit began with, see `remark`.
      steps: updates made in all.
      stopped_early: whether patience ended it.
      history: each look.
    """

    head: Head
    seed: int
    left_out: float
    first: float
    kept_at: int
    steps: int
    stopped_early: bool
    history: list[dict[str, float]]


def objective(config: HeadConfig, fit: FitConfig, variables: PyTree, batch: Mapping[str, Array]) -> Array:
    """The loss of each position of a minibatch (named columns, N on axis 0), [N]."""
    hidden = batch.get("hidden")
    if config.kind == "token":
        found = Candidates(*(batch[name] for name in columns_lib.CANDIDATES))
        logs = network(config).apply(variables, batch["features"], found, hidden)
        is_label = (found.ids == batch["tokens"][:, None]) & found.valid
        other = ~jnp.any(is_label, axis=-1, keepdims=True)
        return -jnp.sum(jnp.where(jnp.concatenate([is_label, other], axis=-1), logs, 0.0), axis=-1)
    score = network(config).apply(variables, batch["features"], hidden)
    if fit.objective == "co_llm":
        keeps = jax.nn.log_sigmoid(-score) + batch["log_q"]
        return -jnp.logaddexp(keeps, jax.nn.log_sigmoid(score) + batch["log_p"])
    if fit.objective == "squared":
        return jnp.square(score - (batch["loss_q"] - batch["loss_p"]))
    alphas = jnp.asarray(fit.alphas, jnp.float32)[:, None]
    toll = alphas * batch["distance"]
    defers = jax.nn.sigmoid((score - toll) / fit.softness)
    return jnp.mean((1.0 - defers) * batch["loss_q"] + defers * (batch["loss_p"] + toll), axis=0)


def fit_head(
    config: HeadConfig,
    fit: FitConfig,
    columns: Columns,
    classes: np.ndarray | None = None,
    store: Callable[[int], Store | None] | None = None,
    observer: Observer | None = None,
) -> list[Fit]:
    """Fits a head once per seed.

    Args:
      config: of the head; its objective is `fit`'s.
      fit: how.
      columns: of the fitting split, see `labels.Labels` and `features`: features [N, F], tokens, log_q, log_p, hit_q,
        hit_p, distance, example [N], hidden_* [N, D] where the head reads them, candidate_* [N, K, ...] for a token
        head.
      classes: [V] class of each token, which the head carries.
      store: seed -> where its states are kept; None keeps none.
      observer: is notified of progress.

    Returns:
      One Fit per seed, the best left-out loss first.

    Raises:
      UserError: nothing can be learned from the data, or the loss became NaN; earlier checkpoints are kept.
    """
    if (config.kind == "token") != (fit.objective == "likelihood"):
        able = "likelihood" if config.kind == "token" else "squared, surrogate or co_llm"
        raise UserError(f"objective={fit.objective!r} does not fit a {config.kind} head: use {able}")
    config = dataclasses.replace(config, objective=fit.objective)
    columns_lib.check(columns, config)
    said = columns_lib.heard(columns, config)
    run = _Run(config, fit, {name: values[said] for name, values in columns.items()})
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
    return sorted(found, key=lambda each: each.left_out)


class _Run:
    """Fits of one head on one set of columns: a head per fold that is left out, and the last one on all of them."""

    def __init__(self, config: HeadConfig, fit: FitConfig, columns: Columns):
        self.config, self.fit_config, self.columns = config, fit, columns
        self.data = columns_lib.on_device(columns, config)
        # Neighbours in a corpus are alike, so they go to different folds: each fold is then a sample of the whole.
        dealt = np.unique(columns["example"], return_inverse=True)[1].ravel() % fit.folds
        self.fold = jnp.asarray(dealt, jnp.int32)
        parts = [np.flatnonzero(dealt == number) for number in range(fit.folds)]
        longest = max(len(part) for part in parts)
        padded = np.stack([np.pad(part, (0, longest - len(part))) for part in parts])
        self.left_out = {name: column[padded] for name, column in self.data.items()}
        self.counts = jnp.asarray(np.arange(longest) < np.array([len(part) for part in parts])[:, None])
        rate = optax.cosine_decay_schedule(fit.learning_rate, fit.steps, alpha=0.1)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=fit.weight_decay))
        self._advance = jax.jit(self._some_steps)
        self._look = jax.jit(self._left_out)

    def fit(self, seed: int, store: Store | None, observer: Observer) -> tuple[PyTree, dict[str, Any]]:
        """Returns the variables of the kept head and the fields of Fit that follow from the run."""
        config = self.fit_config
        variables = self._begin(seed)
        statistics = variables["statistics"]
        state = self._fresh_state(variables["params"])
        first = float(self._look(state.params["now"], statistics))
        state.params["best_loss"] = jnp.float32(first)
        if store is not None and store.latest() is not None:
            state = store.restore(state)
        step, history = int(state.step), []
        observer.started(seed, step, config.steps)
        key = noise.from_seed(seed)
        while step < config.steps and int(state.params["worse"]) < config.patience:
            count = min(config.eval_every, config.steps - step)
            before = state
            now, opt_state, losses = self._advance(
                state.params["now"], state.opt_state, statistics, key, step + jnp.arange(count)
            )
            step += count
            metrics = {"fit": float(jnp.mean(losses)), "left_out": float(self._look(now, statistics))}
            self._check_finite(metrics, now, step, store)
            better = metrics["left_out"] < float(before.params["best_loss"])
            params = {
                "now": now,
                "best": jax.tree.map(lambda leaf: leaf[-1], now) if better else before.params["best"],
                "best_loss": jnp.float32(metrics["left_out"]) if better else before.params["best_loss"],
                "best_step": jnp.int32(step) if better else before.params["best_step"],
                "worse": jnp.int32(0 if better else int(before.params["worse"]) + 1),
            }
            state = FitState(jnp.int32(step), params, opt_state)
            metrics["best"] = float(params["best_loss"])
            history.append({"step": step, **metrics})
            if store is not None:
                store.save(step, state)
            observer.looked(seed, step, metrics)
        stats = {
            "left_out": float(state.params["best_loss"]),
            "first": first,
            "kept_at": int(state.params["best_step"]),
            "steps": step,
            "stopped_early": step < config.steps,
            "history": history,
        }
        return {"params": state.params["best"], "statistics": statistics}, stats

    def _begin(self, seed: int) -> PyTree:
        width = self.columns["candidate_features"].shape[-1] if self.config.kind == "token" else 0
        variables = fresh(self.config, jax.random.fold_in(noise.from_seed(seed), 1), width)
        columns = {"normalise": self.columns["features"]}
        if self.config.features.hidden:
            columns["normalise_hidden"] = columns_lib.hidden(self.columns, self.config)
        if self.config.kind == "token":
            valid = np.asarray(self.columns["candidate_valid"])
            columns["normalise_candidate"] = np.asarray(self.columns["candidate_features"])[valid]
        return with_statistics(variables, columns)

    def _fresh_state(self, params: PyTree) -> FitState:
        own = jax.tree.map(jnp.asarray, params)
        heads = self.fit_config.folds + 1
        now = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (heads, *leaf.shape)), own)
        counts = {"best_step": jnp.int32(0), "worse": jnp.int32(0)}
        all_params = {"now": now, "best": own, "best_loss": jnp.float32(math.inf), **counts}
        return FitState(jnp.int32(0), all_params, jax.vmap(self.optimizer.init)(now))

    def _some_steps(self, params: PyTree, opt_state: PyTree, statistics: PyTree, key: Array, steps: Array):
        """Updates of the given step numbers, in one program; and the last head's loss at each."""
        size, total = self.fit_config.batch_size, len(self.data["features"])
        numbers = jnp.arange(self.fit_config.folds + 1)

        def update(carry, step):
            chosen = jax.random.randint(jax.random.fold_in(key, step), (size,), 0, total)
            batch = {name: column[chosen] for name, column in self.data.items()}

            def one(number, params, opt_state):
                seen = (self.fold[chosen] != number).astype(jnp.float32)

                def loss(params):
                    each = objective(self.config, self.fit_config, {"params": params, "statistics": statistics}, batch)
                    return jnp.sum(seen * each) / jnp.maximum(jnp.sum(seen), 1.0)

                value, grads = jax.value_and_grad(loss)(params)
                updates, opt_state = self.optimizer.update(grads, opt_state, params)
                return optax.apply_updates(params, updates), opt_state, value

            params, opt_state, losses = jax.vmap(one)(numbers, *carry)
            return (params, opt_state), losses[-1]

        (params, opt_state), losses = jax.lax.scan(update, (params, opt_state), steps)
        return params, opt_state, losses

    def _left_out(self, params: PyTree, statistics: PyTree) -> Array:
        """Mean loss over all positions, each by the head that was fitted without its fold, a scalar."""
        without = jax.tree.map(lambda leaf: leaf[:-1], params)
        each = jax.vmap(
            lambda params, rows: objective(
                self.config, self.fit_config, {"params": params, "statistics": statistics}, rows
            )
        )(without, self.left_out)
        return jnp.sum(jnp.where(self.counts, each, 0.0)) / jnp.sum(self.counts)

    def _check_finite(self, metrics: Mapping[str, float], params: PyTree, step: int, store: Store | None) -> None:
        fine = all(math.isfinite(value) for value in metrics.values())
        if fine and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
            return
        kept = store.latest() if store else None
        left = f"; the checkpoint of step {kept} is kept" if kept is not None else ""
        raise UserError(
            f"the loss or a parameter of the head became NaN or infinite by step {step}{left}: lower learning_rate"
        )


def scores(head: Head, columns: Columns, chunk: int = 65_536) -> np.ndarray:
    """g_hat of a prefix head at collected positions, [N]."""
    apply = jax.jit(lambda variables, read, hidden: network(head.config).apply(variables, read, hidden))
    found = []
    for begin in range(0, len(columns["features"]), chunk):
        part = {name: values[begin : begin + chunk] for name, values in columns.items()}
        hidden = jnp.asarray(columns_lib.hidden(part, head.config)) if head.config.features.hidden else None
        found.append(np.asarray(apply(head.variables, jnp.asarray(part["features"]), hidden)))
    return np.concatenate(found) if found else np.zeros(0, np.float32)
