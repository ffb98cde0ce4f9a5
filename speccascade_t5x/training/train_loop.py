"""The training loop: a plain function over batches and a config.

It needs jax, flax, optax and orbax only, so it runs on any machine that has the tokenised shards.

Batches are a pure function of the step, and so is the dropout key, so the position of a run is one number: a run that
was killed and started again is bit-identical to an uninterrupted one (same devices, float32).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from speccascade_t5x.decoding import placing
from speccascade_t5x.decoding.compiled import shapes
from speccascade_t5x.distributed import hosts
from speccascade_t5x.distributed.partitioning import Partitioning, data_mesh
from speccascade_t5x.interfaces import Array, Bound, PyTree, UserError
from speccascade_t5x.models.t5 import T5, T5Config
from speccascade_t5x.training import losses, teacher_forcing
from speccascade_t5x.training.train_checkpoints import Checkpoints, TrainState, all_finite
from speccascade_t5x.training.train_step import NEVER, TrainConfig, Update

_AHEAD = 2  # steps the host may be ahead of the device


class Batches(Protocol):
    """Training batches by step.

    Attributes:
      padding_share: share of padding among all positions.
      fingerprint: of the data, the vocabulary and the batching; kept in checkpoints and compared on resume.
    """

    padding_share: float
    fingerprint: str

    def __call__(self, step: int) -> Mapping[str, np.ndarray]:
        """T5X features of the batch of a step. A pure function of the step; shapes may differ between steps."""


class Observer:
    """Receives the events of a run; each method may be overridden. Numbers are on the host already."""

    def started(self, step: int, steps: int, output_dir: Path | None) -> None:
        """The run begins after `step` of `steps` steps (0, or those of the checkpoint it resumes)."""

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """Means since the last report, after `step` steps."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Figures on the evaluation batches after `step` steps."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is on disk."""


@dataclasses.dataclass
class TrainResult:
    """The result of a run.

    Attributes:
      bound: the trained model.
      step: total number of updates.
      resumed_from: step of the checkpoint it continued; None for a fresh run.
      history: each report, with "step".
      evaluations: each evaluation, with "step".
      tokens: encoder and decoder tokens seen by this process, without padding.
      train_s: seconds of the steps, without compiling, evaluation and checkpoints.
      compile_s: seconds of compiling.
    """

    bound: Bound
    step: int
    resumed_from: int | None
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)
    tokens: int = 0
    train_s: float = 0.0
    compile_s: float = 0.0


def train_loop(
    model: T5Config,
    batches: Batches,
    config: TrainConfig,
    *,
    output_dir: str | Path | None = None,
    start_from: PyTree | TrainState | None = None,
    eval_batches: Iterable[Mapping[str, np.ndarray]] | None = None,
    teacher: Bound | None = None,
    observer: Observer | None = None,
    mesh: Mesh | Partitioning | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains a model. Started again with the same arguments, it continues at its newest checkpoint.

    Args:
      model: the architecture; `dtype` is that of the activations, parameters are float32.
      batches: the training batches.
      config: how to train.
      output_dir: folder of the checkpoints; None writes none.
      start_from: initial parameters, or a whole state to continue at its step; None initialises the parameters.
      eval_batches: batches of the evaluation, read again each time.
      teacher: the model that evaluations compare with and, with `config.distill`, the model to learn from.
      observer: receives the events of the run.
      mesh: devices that share each batch, see `data_mesh`; a Partitioning also splits parameters and moments by its
        rules; None takes one device. On several hosts it takes all devices of all hosts, and every host makes the same
        call with the same batches, of which it reads its rows.
      stop: called after each step; once it returns True (on any host), a checkpoint is written.

    Raises:
      UserError: a loss or parameter that is not finite, a batch that does not divide, a checkpoint of another run, a
        full disk. Earlier checkpoints are kept.
      Preempted: `stop` returned True before the last step.
    """
    if config.distill is not None and teacher is None:
        raise UserError("a distillation loss needs a teacher: name its checkpoint or bundle")
    mesh = mesh or data_mesh(1)
    hosts.check_whole((mesh.mesh if isinstance(mesh, Partitioning) else mesh).size)
    run = _Run(model, batches, config, teacher, mesh, observer or Observer())
    store = None
    if output_dir is not None:
        store = Checkpoints(output_dir, run.identity(start_from), config.keep)
    try:
        stops = hosts.StopInTraining(hosts.current(), stop, ahead=2 * _AHEAD + 1)
        return run.train(store, start_from, list(eval_batches or ()), stops)
    finally:
        if store is not None:
            store.close()


def lower_step(model: T5Config, batch: losses.Batch, config: TrainConfig, mesh: Partitioning) -> jax.stages.Lowered:
    """Lowers the update of `train_loop` from shapes alone: nothing is initialised, read or moved.

    Args:
      model: as for `train_loop`.
      batch: T5X features, as arrays or shapes; its rows must divide by the data groups x the microbatches.
      config: as for `train_loop`, without distillation.
      mesh: the mesh; its devices need not exist on this machine.
    """
    unread: Any = None
    return _Run(model, unread, config, None, mesh, Observer()).lower(batch)


class _Run:
    """One call of `train_loop`."""

    def __init__(
        self,
        model: T5Config,
        batches: Batches,
        config: TrainConfig,
        teacher: Bound | None,
        mesh: Mesh | Partitioning,
        observer: Observer,
    ):
        self.model, self.batches, self.config, self.teacher = model, batches, config, teacher
        self.rules = mesh if isinstance(mesh, Partitioning) else None
        devices = mesh.mesh if isinstance(mesh, Partitioning) else mesh
        self.update = Update(model, config, None if teacher is None else teacher.model.config)
        self.share, self.observer = devices.shape["data"], observer
        self.whole = NamedSharding(devices, PartitionSpec())
        self.split = NamedSharding(devices, PartitionSpec("data"))
        self.teacher_params = None
        if teacher is not None:
            self.teacher_params = placing.put(teacher.params, self._where(teacher.params, teacher.model))
        self.compiled: dict[tuple, Any] = {}

    def identity(self, start_from: PyTree | TrainState | None) -> dict[str, Any]:
        """The values that must be equal for a resume to continue this run."""
        config = dataclasses.asdict(self.config)
        for name in ("steps", "log_every", "eval_every", "checkpoint_every", "keep"):
            del config[name]
        schedule = self.config.optimizer.schedule
        if schedule.name == "cosine" and schedule.total_steps is None:
            config["steps"] = self.config.steps  # the schedule depends on it
        teaches = self.config.distill is not None
        return {
            "model": dataclasses.asdict(self.model),
            "train": config | {"optimizer_name": type(self.config.optimizer).__name__},
            "data": self.batches.fingerprint,
            "teacher": fingerprint(self.teacher) if teaches else None,
            "start": None if start_from is None else fingerprint(start_from),
        }

    def train(
        self,
        store: Checkpoints | None,
        start_from: PyTree | TrainState | None,
        eval_batches: list,
        stops: Callable[[int], bool],
    ) -> TrainResult:
        config, state = self.config, self._begin(store, start_from)
        resumed_from = store.latest() if store else None
        step = int(state.step)
        result = TrainResult(Bound(T5(self.model), None), step, resumed_from)
        self.observer.started(step, config.steps, store.folder if store else None)
        advance, sums = self._advance(state), self._zeros()
        if eval_batches and resumed_from is None:
            self._evaluate(state.params, eval_batches, result)
        waiting: collections.deque = collections.deque()
        jax.block_until_ready(state)
        clock, pause = time.perf_counter(), 0.0
        while step < config.steps:
            batch = self._put(self.batches(step), step)
            program, spent = self._program(advance, state, sums, batch)
            result.compile_s, pause = result.compile_s + spent, pause + spent
            state, sums = program(state, sums, batch, self.teacher_params)
            step += 1
            waiting.append(sums["weight"])
            if len(waiting) > _AHEAD:
                waiting.popleft().block_until_ready()
            last = step == config.steps
            told = not last and stops(step)
            saves = store is not None and (last or told or step % config.checkpoint_every == 0)
            evaluates = bool(eval_batches) and (last or (config.eval_every and step % config.eval_every == 0))
            if last or saves or evaluates or step % config.log_every == 0:
                jax.block_until_ready((state, sums))  # a call returns long before its step is finished
                seconds = time.perf_counter() - clock - pause
                self._report(jax.device_get(sums), step, seconds, store, result)
                if evaluates:
                    self._evaluate(state.params, eval_batches, result)
                if store is not None and saves:
                    self._save(store, state, step)
                sums, clock, pause = self._zeros(), time.perf_counter(), 0.0
            if told:
                kept = "its checkpoint is kept: the same command continues" if store else "nothing is kept"
                raise hosts.Preempted(f"told to stop after step {step} of {config.steps}; {kept}")
        if step == resumed_from and eval_batches:  # nothing was left to do
            self._evaluate(state.params, eval_batches, result)
        result.bound, result.step = Bound(T5(self.model), state.params), step
        return result

    def lower(self, batch: losses.Batch) -> jax.stages.Lowered:
        """See `lower_step`."""
        state = jax.eval_shape(self.update.draw)
        state = shapes(state, self._where(state))
        sums = shapes(self.update.no_sums(), self.whole)
        return self._advance(state).lower(state, sums, shapes(batch, self.split), None)

    def _advance(self, state: TrainState) -> Any:
        """The jitted step."""
        places: dict[str, Any] = {} if self.rules is None else {"out_shardings": (self._where(state), self.whole)}
        return jax.jit(self.update.step, donate_argnums=0, **places)

    def _begin(self, store: Checkpoints | None, start_from: PyTree | TrainState | None) -> TrainState:
        """The state of the newest checkpoint, or a fresh one."""
        if store is not None and store.latest() is not None:
            shape = jax.eval_shape(self.update.draw)
            return store.restore(shape, self._where(shape))
        if store is not None:
            store.describe(dataclasses.asdict(self.model))
        if start_from is None:
            return jax.jit(self.update.draw, out_shardings=self._where(jax.eval_shape(self.update.draw)))()
        state = start_from if isinstance(start_from, TrainState) else self.update.fresh(start_from)
        # Copied, because the state is donated and the caller's arrays must stay.
        return placing.put(state, self._where(state), may_alias=False)

    def _where(self, state: PyTree, model: T5 | None = None) -> Any:
        """The sharding of a training state or of another model's parameters: a single one, or that of the rules."""
        return self.whole if self.rules is None else self.rules.like_params(model or T5(self.model), state)

    def _zeros(self) -> dict[str, Array]:
        return placing.put(self.update.no_sums(), self.whole)

    def _put(self, batch: Mapping[str, np.ndarray], step: int | None = None) -> losses.Batch:
        """Moves a batch to the devices, row by row.

        Raises:
          UserError: its rows cannot be divided evenly.
        """
        pieces = self.share * (self.config.microbatches if step is not None else 1)
        rows = len(batch["decoder_target_tokens"])
        if rows % pieces:
            cut = pieces // self.share
            shares = f"{self.share} device{'s' * (self.share > 1)}" + f" x {cut} microbatches" * (cut > 1)
            raise UserError(
                f"a batch of {rows} rows cannot be shared by {shares}: choose a batch size that {pieces} divides"
            )
        return placing.put(teacher_forcing.features(batch), self.split)

    def _program(self, advance: Any, state: TrainState, sums: PyTree, batch: losses.Batch) -> tuple[Callable, float]:
        """The compiled step for the batch's shape, and the seconds of compiling it if it is new."""
        shape = tuple((name, value.shape) for name, value in batch.items())
        if shape in self.compiled:
            return self.compiled[shape], 0.0
        jax.block_until_ready(sums)  # so that no step overlaps with compiling
        start = time.perf_counter()
        self.compiled[shape] = advance.lower(state, sums, batch, self.teacher_params).compile()
        return self.compiled[shape], time.perf_counter() - start

    def _report(
        self, sums: Mapping[str, Any], step: int, seconds: float, store: Checkpoints | None, result: TrainResult
    ) -> None:
        """Passes the means since the last report to the observer.

        Raises:
          UserError: the loss or the gradient was not finite.
        """
        if sums["bad_step"] != NEVER:
            raise UserError(_diverged(int(sums["bad_step"]) + 1, store))
        steps, rest = float(sums["steps"]), ("bad_step", "steps", "loss", "tokens", "grad_norm", "learning_rate")
        metrics = {
            "loss": float(sums["loss"]) / steps,
            **losses.means({name: value for name, value in sums.items() if name not in rest}),
            "grad_norm": float(sums["grad_norm"]) / steps,
            "learning_rate": float(sums["learning_rate"]),
            "tokens_per_s": float(sums["tokens"]) / seconds,
            "steps_per_s": steps / seconds,
        }
        result.tokens += int(sums["tokens"])
        result.train_s += seconds
        result.step = step
        result.history.append({"step": step, **metrics})
        self.observer.logged(step, metrics)

    def _evaluate(self, params: PyTree, batches: list, result: TrainResult) -> None:
        if not hasattr(self, "_eval"):
            self._eval = jax.jit(functools.partial(teacher_forcing.step, self.model, self.update.teacher))
        metrics = teacher_forcing.run(self._eval, params, self.teacher_params, map(self._put, batches))
        result.evaluations.append({"step": result.step, **metrics})
        self.observer.evaluated(result.step, metrics)

    def _save(self, store: Checkpoints, state: TrainState, step: int) -> None:
        if not all_finite(state.params):
            raise UserError(_diverged(step, store))
        self.observer.saved(step, store.save(step, state))


def _diverged(step: int, store: Checkpoints | None) -> str:
    kept = store.latest() if store else None
    left = f"; the checkpoint of step {kept} is kept" if kept is not None else ""
    return (
        f"the loss or a parameter became NaN or infinite in step {step}{left}: lower the learning rate, or clip the "
        "gradient with global_norm_clip"
    )


def fingerprint(tree: Any) -> str:
    """A short text that differs if a model or its parameters differ."""
    digest = hashlib.sha256(repr(tree.model).encode() if isinstance(tree, Bound) else b"")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]
