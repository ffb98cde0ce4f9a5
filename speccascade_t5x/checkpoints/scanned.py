"""Checkpoints with scanned layers (T5X's `scalable_t5`), taken apart into one tensor per layer and put together again.

Facts after the T5X source: below `encoder/encoder` and `decoder/decoder` each tensor holds all layers of its stack,
along the axis `param_scan_axis` (1 unless a config file says otherwise). Attention kernels keep heads and head width
as axes of their own, where T5's are joined. Every layer carries a relative position table of its own, where T5 has one
per stack. Trained tables differ and are kept (`T5Config.relative_position_tables`); where those of each stack are all
the same, as in checkpoints converted from a T5, the model is that T5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from speccascade_t5x.checkpoints import tensors
from speccascade_t5x.checkpoints.tensors import Leaf, Part, Tensor
from speccascade_t5x.interfaces import UserError

_STACKED = re.compile(r"(encoder|decoder)/\1/(.+)")
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_TABLE = "relpos_bias/rel_embedding"
_PROJECTIONS = ("query/kernel", "key/kernel", "value/kernel")


def is_scalable(found: Mapping[str, Leaf]) -> bool:
    """Whether these are the tensors of a `scalable_t5`, scanned or not."""
    return any(_STACKED.fullmatch(name) or _is_own_table(name) for name in found)


def unstack(found: Mapping[str, Tensor], source: str, axis: int = 1, tables: str | None = None) -> dict[str, Leaf]:
    """The same model under T5's names and shapes.

    Args:
      found: flat names to stored tensors.
      source: the checkpoint, for messages.
      axis: of the layers in a stacked tensor.
      tables: `relative_position_tables` where it is known; None keeps one table per stack if that is the same model.

    Raises:
      UserError: the stacks do not fit together, or `tables` says "shared" and they are not.
    """
    _require_equal_heights(found, source, axis)
    shared = tables != "per_layer" and _tables_are_shared(found, source, axis, tables == "shared")
    flat: dict[str, Leaf] = {}
    for name, tensor in found.items():
        if match := _STACKED.fullmatch(name):
            stack, rest = match.groups()
            if rest == _TABLE and shared:
                flat[f"{stack}/{_TABLE}"] = _part(tensor, rest, axis, 0)
            else:
                layers = range(tensor.shape[axis])
                flat |= {f"{stack}/layers_{i}/{rest}": _part(tensor, rest, axis, i) for i in layers}
        elif match := _LAYER.fullmatch(name):
            stack, layer, rest = match.groups()
            if rest == _TABLE and shared:
                flat |= {f"{stack}/{_TABLE}": tensor} if int(layer) == 0 else {}
            else:
                flat[name] = _part(tensor, rest, None, 0)
        else:
            flat[name] = tensor
    return flat


def stack(flat: Mapping[str, np.ndarray], heads: int, axis: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """A T5 with a table per layer under the names and shapes of a scanned `scalable_t5`: the inverse of `unstack`.

    Args:
      flat: flat names to values.
      heads: of every attention.
      axis: where the layers go, `param_scan_axis`.

    Yields:
      Flat name and values, one tensor at a time.
    """
    layers: dict[str, dict[int, str]] = {}
    for name in flat:
        if match := _LAYER.fullmatch(name):
            part, layer, rest = match.groups()
            layers.setdefault(f"{part}/{part}/{rest}", {})[int(layer)] = name
        else:
            yield name, np.asarray(flat[name])
    for stacked, names in layers.items():
        yield stacked, np.stack([_split(stacked, np.asarray(flat[names[i]]), heads) for i in range(len(names))], axis)


def _split(name: str, values: np.ndarray, heads: int) -> np.ndarray:
    """One layer of a tensor, with heads and head width as axes of their own."""
    if name.endswith(_PROJECTIONS):
        return values.reshape(values.shape[0], heads, -1)
    if name.endswith("out/kernel"):
        return values.reshape(heads, -1, values.shape[1])
    return values


def _require_equal_heights(found: Mapping[str, Tensor], source: str, axis: int) -> None:
    lengths: dict[str, tuple[int, str]] = {}
    for name, tensor in found.items():
        if match := _STACKED.fullmatch(name):
            if len(tensor.shape) <= axis:
                raise UserError(f"{source}: tensor {name!r} of shape {tensor.shape} has no axis {axis} of layers")
            length, first = lengths.setdefault(match[1], (tensor.shape[axis], name))
            if tensor.shape[axis] != length:
                raise UserError(f"{source}: tensor {name!r} holds {tensor.shape[axis]} layers but {first!r} {length}")


def _is_own_table(name: str) -> bool:
    match = _LAYER.fullmatch(name)
    return match is not None and match[3] == _TABLE


def _part(tensor: Tensor, rest: str, axis: int | None, layer: int) -> Leaf:
    """One layer of a tensor, with joined heads."""
    shape = tensor.shape if axis is None else tensor.shape[:axis] + tensor.shape[axis + 1 :]
    joined = shape
    if len(shape) == 3 and rest.endswith(_PROJECTIONS):
        joined = (shape[0], shape[1] * shape[2])
    elif len(shape) == 3 and rest.endswith("out/kernel"):
        joined = (shape[0] * shape[1], shape[2])
    if axis is None and joined == shape:
        return tensor

    def cut(values: np.ndarray) -> np.ndarray:
        return (values if axis is None else np.take(values, layer, axis)).reshape(joined)

    return Part(tensor, joined, cut)


def _tables_are_shared(found: Mapping[str, Tensor], source: str, axis: int, must: bool) -> bool:
    """Whether the layers of each stack have the same table.

    Raises:
      UserError: they have not, although they must.
    """
    layers = [match for name in found if (match := _LAYER.fullmatch(name))]
    bearing = {match[1] for match in layers if match[3] == _TABLE}
    if any(f"{m[1]}/layers_{m[2]}/{_TABLE}" not in found for m in layers if m[1] in bearing):
        return False  # one is missing, which will be said when the names are compared
    for name, tensor in found.items():
        if _is_own_table(name):
            first = re.sub(r"layers_\d+", "layers_0", name)
            same = first in found and np.array_equal(
                tensors.to_host(first, found[first], source), tensors.to_host(name, tensor, source)
            )
        elif name.endswith(_TABLE) and _STACKED.fullmatch(name):
            tables = np.moveaxis(tensors.to_host(name, tensor, source), axis, 0)
            same = not (tables != tables[:1]).any()
        else:
            continue
        if not same and must:
            raise UserError(
                f"{source}: the layers have different relative position tables ({name!r}), but its configuration says "
                "relative_position_tables = 'shared'; correct or remove the configuration"
            )
        if not same:
            return False
    return True
