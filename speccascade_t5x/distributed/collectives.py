"""The collectives of a compiled program, read from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
_LINE = re.compile(rf"=\s+(?P<type>.*?)\s(?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_CONTEXT = "u32[]"
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
      kind: HLO's name for it: "all-gather", "all-reduce", "all-to-all", "collective-permute", ...
      nbytes: size of its result on one device, summed over the parts of a result in several parts.
      result: type of the result, as HLO prints it.
    """

    kind: str
    nbytes: int
    result: str


def in_program(text: str) -> list[Collective]:
    """Every collective of a program; those inside a loop or a branch are counted once.

    Args:
      text: compiled HLO (`jax.stages.Compiled.as_text`) of one device, after partitioning.
    """
    found = []
    for match in map(_LINE.search, text.splitlines()):
        if match:
            arrays = list(_ARRAY.finditer(match["type"]))
            if match["start"] and match["kind"] != "all-reduce":
                # It carries its operands before the results, and perhaps a context after them.
                arrays = [array for array in arrays if array[0] != _CONTEXT]
                arrays = arrays[len(arrays) // 2 :]
            found.append(Collective(match["kind"], sum(map(_nbytes, arrays)), match["type"]))
    return found


def _nbytes(array: re.Match) -> int:
    bits = 8 if array[1] == "pred" else int(array[2])
    return math.ceil(bits / 8) * math.prod(int(size) for size in array[3].split(",") if size)
