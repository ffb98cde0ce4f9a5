"""TPU generations and slices: what a chip holds and does, as published, and the names libtpu's compiler knows.

Sources. Capacity, HBM bandwidth and peak bfloat16 FLOP/s of a chip: the system architecture pages of Google Cloud's TPU
documentation, cloud.google.com/tpu/docs/v4, .../v5e, .../v5p and .../v6e (tables "key specifications"). Interconnect:
v5e 400, v5p 1200 and v6e 800 GB/s in both directions per chip there, over 4, 6 and 4 ports, so 50, 100 and 100 GB/s
per link and direction; v4 six links of 50 GB/s (Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer for
Machine Learning with Hardware Support for Embeddings", ISCA 2023, table 4). Clocks, which only the compiler's cycle
counts need: v4 1050 MHz (the same table); v5e and v5p follow from peak FLOP/s and the documented matrix units (4 and
2 x 4 of 128 x 128, two operations per cell and cycle); for v6e that gives no plausible clock, so it has none.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

from speccascade_t5x.interfaces import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do; a v4 or v5p chip is one device of two cores.

    Attributes:
      name: as topology names begin.
      hbm_bytes: capacity of its memory.
      hbm_bandwidth: bytes/s.
      flops: FLOP/s of matrix products in bfloat16.
      link_bandwidth: bytes/s of one interconnect link in one direction.
      axes: of the torus: 3 for v4 and v5p, else 2.
      clock: Hz of the cores, which the compiler's cycle estimates count; None where no figure is published.
      overlaps: whether reading memory and arithmetic go on at the same time, as they do where copies run by themselves;
        a CPU's cores do both, one after the other.
      law_bandwidth: bytes/s at which passes over a vocabulary go, exponentials among them; None where that is no slower
        than memory.
      block_bandwidth: bytes/s at which a product of several rows reads its weights: a CPU's repacks them for its
        vector units first, which the product of one row has no need of; None where it reads as fast as memory.
    """

    name: str
    hbm_bytes: int
    hbm_bandwidth: float
    flops: float
    link_bandwidth: float
    axes: int
    clock: float | None = None
    overlaps: bool = True
    law_bandwidth: float | None = None
    block_bandwidth: float | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 1200e9, 275e12, 50e9, 3, 1.05e9),
        Chip("v5e", 16 * GIB, 819e9, 197e12, 50e9, 2, 197e12 / (4 * 128**2 * 2)),
        Chip("v5p", 95 * GIB, 2765e9, 459e12, 100e9, 3, 459e12 / (8 * 128**2 * 2)),
        Chip("v6e", 32 * GIB, 1638e9, 918e12, 100e9, 2),
    )
}
# Slices the clouds offer, small ones first, which libtpu 0.0.42 was seen to know.
SLICES = (
    *("v4:2x2x1", "v4:2x2x2", "v4:2x2x4", "v4:2x4x4", "v4:4x4x4"),
    *("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8"),
    *("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4"),
    *("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8"),
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one generation in a box.

    Attributes:
      chip: the generation.
      sides: of the box, in chips.
    """

    chip: Chip
    sides: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are; each is one device."""
        return math.prod(self.sides)

    @property
    def name(self) -> str:
        """As libtpu calls it: "v4:2x2x1"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def options(self) -> dict[str, str]:
        """What the compiler is told beside the name: the two cores of a v4 chip work as one device."""
        return {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}


def named(name: str) -> Slice:
    """A slice by its name, such as "v4:2x2x1".

    Raises:
      UserError: no slice has that name.
    """
    if name not in SLICES:
        near = difflib.get_close_matches(name, SLICES, n=1)
        hint = f"did you mean {near[0]!r}? Known are" if near else "known are"
        raise UserError(f"there is no TPU topology {name!r}: {hint} {', '.join(SLICES)}")
    generation, _, sides = name.partition(":")
    return Slice(CHIPS[generation], tuple(map(int, sides.split("x"))))


def groups(of: Slice, model: int) -> int:
    """Data groups of a slice whose chips share weights by `model`.

    Raises:
      UserError: `model` does not divide the chips.
    """
    if model < 1 or of.chips % model:
        fits = [str(size) for size in range(1, of.chips + 1) if of.chips % size == 0]
        raise UserError(f"model={model} does not divide the {of.chips} chips of {of.name}: use {', '.join(fits)}")
    return of.chips // model
