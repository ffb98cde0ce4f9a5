"""A checkpoint that has been found, understood and checked, but not yet read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.checkpoints import architecture, flat_params, scanned, tensors
from speccascade_t5x.checkpoints.architecture import Model
from speccascade_t5x.checkpoints.tensors import Leaf, Placement, Tensor
from speccascade_t5x.interfaces import Bound, UserError

# A model -> where its arrays shall live; None means the default device.
Placing = Callable[[Model], Placement | None]


@dataclasses.dataclass(frozen=True)
class Opened:
    """One model in its files.

    Attributes:
      kind: as `checkpoints.detect` names it.
      path: the folder.
      model: its architecture.
      leaves: flat parameter names to tensors; exactly those of the architecture.
      step: training steps, None where the kind does not say.
      state: flat names of the optimizer state below `param_states` to tensors; {} where there is none.
      state_others: names in the optimizer state that hold no array.
      scanned: the tensors are those of a `scalable_t5`, and not under our names and shapes.
      vocabulary_file: a vocabulary beside the parameters.
      ends: ids that end an output, () where no file says.
      pad_id: what fills an output up, None where no file says.
    """

    kind: str
    path: Path
    model: Model
    leaves: Mapping[str, Leaf]
    step: int | None = None
    state: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    state_others: tuple[str, ...] = ()
    scanned: bool = False
    vocabulary_file: Path | None = None
    ends: tuple[int, ...] = ()
    pad_id: int | None = None

    def load(self, placement: Placement | None = None) -> Bound:
        """Reads the parameters as float32 arrays, tensor by tensor; see `tensors.to_devices`."""
        return Bound(self.model, flat_params.nest(tensors.to_devices(self.leaves, str(self.path), placement)))


def from_t5x(kind: str, folder: Path, found: Mapping[str, Tensor], **more: Any) -> Opened:
    """A T5 under T5X's names, scanned or not, with what a config file beside it says.

    Raises:
      UserError: it is not a supported T5; the message names the first tensors that do not fit.
    """
    source = str(folder)
    beside = architecture.beside(folder)
    is_scanned = scanned.is_scalable(found)
    axis = beside.pop(architecture.SCAN_AXIS, 1)
    leaves: Mapping[str, Leaf] = found
    if is_scanned:
        if type(axis) is not int or axis < 0:
            raise UserError(f"{source}: {architecture.SCAN_AXIS} = {axis!r} is not an axis; it must be 0 or more")
        leaves = scanned.unstack(found, source, axis, beside.get("relative_position_tables"))
        is_scanned = any(leaves.get(name) is not tensor for name, tensor in found.items())
    config = architecture.from_shapes(leaves, beside, source)
    flat_params.require_match(architecture.shapes(config), leaves, source)
    return Opened(kind, folder, architecture.model(config), leaves, scanned=is_scanned, **more)
