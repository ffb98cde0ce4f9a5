"""TPU generations: what a chip holds and does, as published, and the slices libtpu's compiler knows.

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

from speccascade_t5x.distributed import slices
from speccascade_t5x.distributed.slices import Slice
from speccascade_t5x.interfaces import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The capabilities of a chip; a v4 or v5p chip is one device of two cores.

    Attributes:
      name: the beginning of topology names.
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
# The slices that libtpu 0.0.42 was seen to know.
SLICES = tuple(each.name for each in slices.SLICES if each.generation in CHIPS and 4 <= each.chips <= 64)


def named(name: str) -> Slice:
    """A slice of a generation whose figures are known, by any of its names; see `distributed.slices`.

    Raises:
      UserError: no slice has that name, or it is of another generation.
    """
    found = slices.named(name)
    if found.generation not in CHIPS:
        raise UserError(
            f"nothing can be compiled or predicted for {found.short_name}: name a slice of {', '.join(CHIPS)}"
        )
    return found


def chip(of: Slice) -> Chip:
    """What each chip of a slice can do."""
    return CHIPS[of.generation]


def compiler_options(of: Slice) -> dict[str, str]:
    """What the compiler is told beside a slice's name: the two cores of a v4 chip work as one device."""
    return {"chip_config_name": "megacore"} if of.generation == "v4" else {}


def groups(of: Slice, model: int) -> int:
    """Data groups of a slice whose chips share weights by `model`.

    Raises:
      UserError: `model` does not divide the chips.
    """
    if model < 1 or of.chips % model:
        fits = [str(size) for size in range(1, of.chips + 1) if of.chips % size == 0]
        raise UserError(f"model={model} does not divide the {of.chips} chips of {of.name}: use {', '.join(fits)}")
    return of.chips // model
