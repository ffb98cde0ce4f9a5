"""Checkpoints of a training run, in the layout of T5X, so that `checkpoints.load` reads them as models.

    <folder>/config.json              the architecture, which the loader needs
    <folder>/checkpoint_<step>/state  Orbax: parameters below "target", step and optimizer below "state"
    <folder>/checkpoint_<step>/run    JSON: the inputs of the run, which a resume compares

A checkpoint gets its name when it is complete, and older ones are deleted only after that.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from speccascade_t5x import trees
from speccascade_t5x.common import storage
from speccascade_t5x.interfaces import PyTree, UserError

CONFIG_FILE = "config.json"
_PREFIX = "checkpoint"
_STATE, _RUN = "state", "run"
_FILE_BYTES = 12 * 2**20  # small files are easier to copy
_MOST_DIFFERENCES = 3
_LONGEST_REASON = 200
_NO_SPACE = ("no space left", "enospc", "disk quota", "file too large")


@trees.register
@dataclasses.dataclass
class TrainState:
    """The state that a step updates.

    Attributes:
      step: int32, number of updates made so far.
      params: float32 parameters.
      opt_state: state of the optax transformation.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree


class Checkpoints:
    """The checkpoints of one run in one folder."""

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], keep: int):
        """Opens the folder.

        Args:
          folder: created if missing.
          identity: the inputs of the run, as JSON types; a checkpoint of another run is rejected.
          keep: how many of the newest checkpoints to keep.

        Raises:
          UserError: the folder cannot be made, or holds checkpoints of another run.
        """
        self.folder, self.identity = Path(folder).absolute(), _flat(identity)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, step_prefix=_PREFIX, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=(_STATE, _RUN))
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be used for checkpoints: {error.strerror}") from error
        self._compare()

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def describe(self, architecture: Mapping[str, Any]) -> None:
        """Writes config.json, from which `checkpoints.load` reads the architecture."""
        if jax.process_index() == 0:
            storage.write_json(self.folder / CONFIG_FILE, dict(architecture))

    def save(self, step: int, state: TrainState) -> Path:
        """Writes the checkpoint of a step.

        Raises:
          UserError: the disk is full, or the place cannot be written. Earlier checkpoints are untouched.
        """
        item = _stored(state)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(item, ocdbt_target_data_file_size=_FILE_BYTES),
            run=ocp.args.JsonSave(self.identity),
        )
        try:
            self._manager.save(step, args=arguments, force=True)
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and tensorstore report a full disk in several ways
            for partial in self.folder.glob(f"{_PREFIX}_{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(self._not_saved(step, error)) from error
        return self.folder / f"{_PREFIX}_{step}"

    def restore(self, like: TrainState, sharding: jax.sharding.Sharding | TrainState) -> TrainState:
        """Reads the newest checkpoint.

        Args:
          like: a state (or its shapes) of the same structure.
          sharding: sharding of the arrays, one for all or a state of shardings.

        Raises:
          UserError: the checkpoint is damaged.
        """
        step = self.latest()
        item = _stored(like)
        places = _stored(sharding) if isinstance(sharding, TrainState) else jax.tree.map(lambda _: sharding, item)
        abstract = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)  # noqa: E731
        item = jax.tree.map(abstract, item, places)
        arguments = ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(state=arguments))[_STATE]
        except Exception as error:  # Orbax wraps what goes wrong in a plain Exception
            raise UserError(
                f"{self.folder}/{_PREFIX}_{step} cannot be restored ({_reason(error)}): remove that folder to continue "
                "from the checkpoint before it"
            ) from error
        names, structure = _named(like.opt_state)
        kept = found["state"]["optimizer"]
        opt_state = jax.tree_util.tree_unflatten(structure, [kept[name] for name in names])
        return TrainState(found["state"]["step"], found["target"], opt_state)

    def close(self) -> None:
        """Releases the resources of Orbax."""
        self._manager.close()

    def _compare(self) -> None:
        """Rejects the checkpoints of another run."""
        step = self.latest()
        if step is None:
            return
        where = f"{self.folder}/{_PREFIX}_{step}"
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[_RUN]
        except Exception as error:  # no "run": written by T5X, or by hand
            raise UserError(f"{where} was not written by `speccascade train`: choose another folder") from error
        names = sorted(found.keys() | self.identity.keys())
        differ = [name for name in names if found.get(name) != self.identity.get(name)]
        if differ:
            shown = "; ".join(f"{n} is {found.get(n)!r} there and {self.identity.get(n)!r} here" for n in differ[:3])
            more = f" (and {len(differ) - _MOST_DIFFERENCES} more)" if len(differ) > _MOST_DIFFERENCES else ""
            raise UserError(
                f"{where} belongs to another run: {shown}{more}; choose another folder, or repeat that run's settings"
            )

    def _not_saved(self, step: int, error: Exception) -> str:
        kept = self.latest()
        left = f"the checkpoint of step {kept} is kept" if kept is not None else "there is no earlier checkpoint"
        full = any(sign in str(error).lower() for sign in _NO_SPACE)
        what = "the disk is full" if full else _reason(error)
        advice = "make room and start the same command again" if full else "solve that and start the same command again"
        return f"the checkpoint of step {step} cannot be written to {self.folder} ({what}); {left}: {advice}"


def _stored(state: TrainState) -> dict[str, Any]:
    """The tree that is written to disk: T5X's names for the parameters, plain names for the optimizer's leaves."""
    names, _ = _named(state.opt_state)
    optimizer = dict(zip(names, jax.tree.leaves(state.opt_state), strict=True))
    return {"target": state.params, "state": {"step": state.step, "optimizer": optimizer}}


def _named(tree: PyTree) -> tuple[list[str], Any]:
    """A name for each leaf, free of separators, and the structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [re.sub(r"[^\w.]+", "_", jax.tree_util.keystr(path, simple=True, separator=".")) for path, _ in leaves]
    return names, structure


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, as JSON would give it back."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            flat.update(_flat(inner, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = list(inner) if isinstance(inner, tuple) else inner
    return flat


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:_LONGEST_REASON] or type(error).__name__


def all_finite(params: PyTree) -> bool:
    """Whether no parameter is NaN or infinite. If other hosts hold a part, all hosts must call it."""
    leaves = jax.tree.leaves(params)
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in leaves)
    return bool(_all_finite(leaves))


@jax.jit
def _all_finite(leaves: Sequence[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))
