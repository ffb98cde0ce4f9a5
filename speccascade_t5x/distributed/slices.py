"""The table of TPU slices by name. `v4-8`, `v4_8` and `v4:2x2x1` are the same slice.

Google Cloud names a slice by its generation and a size, libtpu by its generation and the sides of its box of chips. The
size counts cores, two per chip, for v2, v3, v4 and v5p, and chips for v5e (called v5litepod there) and v6e. Source:
Google Cloud's TPU documentation, the page "TPU configurations" of each generation.
"""

from __future__ import annotations

import dataclasses
import math
import re

from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import UserError


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one generation in a box.

    Attributes:
      generation: name of the generation, such as "v4" or "v5e".
      sides: sides of the box, in chips.
    """

    generation: str
    sides: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.sides)

    @property
    def devices(self) -> int:
        """Number of devices that JAX sees: one per chip, except on v2 and v3, where each of the two cores is one."""
        return self.chips * (2 if self.generation in ("v2", "v3") else 1)

    @property
    def hosts(self) -> int:
        """Number of hosts: one per four chips, except on v5e and v6e, where up to eight chips share one."""
        return 1 if self._by_chips and self.chips <= 8 else max(1, self.chips // 4)

    @property
    def name(self) -> str:
        """The name in libtpu: "v4:2x2x1"."""
        return f"{self.generation}:{'x'.join(map(str, self.sides))}"

    @property
    def short_name(self) -> str:
        """Generation and size: "v4-8", "v5e-16"."""
        return f"{self.generation}-{self.chips if self._by_chips else 2 * self.chips}"

    @property
    def accelerator_type(self) -> str:
        """The name in Google Cloud: "v4-8", "v5litepod-16"."""
        return self.short_name.replace("v5e", "v5litepod")

    @property
    def _by_chips(self) -> bool:
        return self.generation in ("v5e", "v6e")


_SQUARES = ("2x2", "4x4", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Every slice that can be named, small ones of a generation first.
SLICES = tuple(
    Slice(generation, tuple(map(int, sides.split("x"))))
    for generation, shapes in (
        *(("v2", _SQUARES), ("v3", (*_SQUARES, "16x32", "32x32")), ("v4", _CUBES)),
        *(("v5e", _PLANES), ("v5p", _CUBES), ("v6e", _PLANES)),
    )
    for sides in shapes
)
_NAMES = {name: each for each in SLICES for name in (each.short_name, each.name, each.accelerator_type)}


def named(name: str) -> Slice:
    """A slice by any of its names: "v4-8", "v4_8" or "v4:2x2x1".

    Raises:
      UserError: no slice has that name.
    """
    plain = re.sub(r"_(?=\d+$)", "-", name)
    if plain not in _NAMES:
        known = [each.name if ":" in name else each.short_name for each in SLICES]
        raise UserError(f"there is no TPU slice {name!r}: {checks.suggestion(plain, known)}")
    return _NAMES[plain]
