"""Tensors that are still in their files, and the way from there to devices.

Every reader describes what it found as `Tensor`s: shape and dtype are known, the values are not yet read. They are
read block by block into one host buffer, which goes to the devices before the next tensor is begun, the largest first.
So reading needs the resident arrays, one tensor and one block, whatever the file's dtype and layout.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.interfaces import Array, UserError

BLOCK_BYTES = 4 * 2**20
ROOM, RATIO = 64 * 2**20, 64  # see `require_plausible`
_LONGEST_REASON = 300
_ALIGNMENT = 64

# Where a block belongs in its tensor, and its values.
Block = tuple[tuple[slice, ...], np.ndarray]
# (flat name, shape) -> where the array shall live; None means the default device.
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in a file.

    Attributes:
      shape: of the tensor as it shall be read.
      dtype: in the file.
      blocks: reads the values; the blocks cover the stored tensor once.
      transposed: the file holds the transpose of what shall be read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[Block]]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file, before compression."""
        return count(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A tensor that is made of a stored one, such as one layer of a stack.

    Attributes:
      whole: the stored tensor; parts of the same one are made from one reading.
      shape: of the part.
      cut: makes it from the values of the whole.
    """

    whole: Tensor
    shape: tuple[int, ...]
    cut: Callable[[np.ndarray], np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype


Leaf = Tensor | Part


def count(shape: tuple[int, ...]) -> int:
    """Number of elements, exact however large a file claims to be."""
    total = 1
    for size in shape:
        total *= size
    return total


def in_memory(array: np.ndarray) -> Tensor:
    """An array that is here already."""
    return Tensor(array.shape, array.dtype, lambda: iter([(tuple(slice(n) for n in array.shape), array)]))


def row_bands(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive rows of axis 0 that make up about one block each."""
    rows = shape[0] if shape else 1
    row_bytes = max(1, count(shape[1:]) * itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    yield from ((first, min(first + step, rows)) for first in range(0, rows, step))


def require_plausible(leaves: Mapping[str, Leaf], on_disk: int, source: str) -> None:
    """Rejects files that claim to hold far more than their bytes could: zeros that were packed, or never written.

    Parameters hardly compress. What is allowed beyond is for tables and small models that are mostly zeros.

    Args:
      leaves: what is claimed.
      on_disk: bytes of the files.
      source: what they are, for messages.

    Raises:
      UserError: more than ROOM + RATIO * on_disk bytes are claimed.
    """
    wholes = {id(whole): whole for whole in (x.whole if isinstance(x, Part) else x for x in leaves.values())}
    claimed = sum(whole.nbytes for whole in wholes.values())
    if claimed > ROOM + RATIO * on_disk:
        raise UserError(
            f"{source} claims {claimed:,} bytes of arrays but has {on_disk:,} on disk, so most of it is not there; "
            "copy it again, or do not trust it"
        )


def to_host(name: str, tensor: Tensor, source: str, dtype: Any = np.float32) -> np.ndarray:
    """Reads a tensor.

    Raises:
      UserError: it cannot be read, is not whole, or holds a NaN or an infinity.
    """
    try:
        found = _empty(tensor.shape, np.dtype(dtype))
        stored = found.T if tensor.transposed else found
        filled = 0
        for where, block in tensor.blocks():
            if jnp.issubdtype(block.dtype, jnp.floating):
                flat_params.require_finite(name, block, source)
            stored[where] = block
            filled += block.size
    except UserError:
        raise
    except MemoryError as error:
        size = f"{count(tensor.shape) * np.dtype(dtype).itemsize} bytes"
        raise UserError(f"{source}: not enough memory for tensor {name!r} ({size})") from error
    except (OSError, ValueError, EOFError, zlib.error, ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{source}: tensor {name!r} cannot be read: {reason(error)}; copy the checkpoint again"
        ) from error
    if filled != found.size:
        raise UserError(f"{source}: {filled} of {found.size} values of tensor {name!r} are there; copy it again")
    return found


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A buffer aligned as JAX on CPU wants it, which then takes it over instead of copying it."""
    room = np.empty(count(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    return room[begin : begin + count(shape) * dtype.itemsize].view(dtype).reshape(shape)


def to_devices(leaves: Mapping[str, Leaf], source: str, placement: Placement | None = None) -> dict[str, Array]:
    """Reads tensors as float32 arrays, the largest first and never two at once.

    Args:
      leaves: flat names to tensors.
      source: the checkpoint, for messages.
      placement: where each array shall live.

    Raises:
      UserError: see `to_host`.
    """
    wholes: dict[int, tuple[Tensor, list[str]]] = {}
    for name, leaf in leaves.items():
        whole = leaf.whole if isinstance(leaf, Part) else leaf
        wholes.setdefault(id(whole), (whole, []))[1].append(name)
    flat = {}
    for whole, names in sorted(wholes.values(), key=lambda entry: -entry[0].nbytes):
        host = to_host(names[0], whole, source)
        for name in names:
            leaf = leaves[name]
            value = leaf.cut(host) if isinstance(leaf, Part) else host
            flat[name] = _place(
                np.ascontiguousarray(value) if value.ndim else value, placement and placement(name, value.shape)
            )
        del host, value
    return flat


def _place(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> Array:
    """One array on its devices, and nothing of it left in flight."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(value))  # jnp.asarray makes one copy more
    return jax.block_until_ready(jax.make_array_from_callback(value.shape, sharding, lambda index: value[index]))


def reason(error: BaseException) -> str:
    """The first line of a message; tensorstore's go on for pages."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.split("\n")[0][:_LONGEST_REASON]
