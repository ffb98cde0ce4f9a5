"""Costs of a compiled TPU program, read from its text: cycles and collectives, with loops multiplied out.

libtpu's compiler attaches an `estimated_cycles` to most operations it emits. A loop's body occurs in the text once, so
its cost is multiplied by the iterations of the loop, given by its condition (`counter < constant`). A loop without
a constant bound runs an unknown number of times: its body is one *round*, and is reported by itself. Of a conditional's
branches one runs; all figures are therefore pairs, with the cheapest and with the dearest branch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

from speccascade_t5x.distributed import collectives

_BEGIN = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%(?P<name>\S+) = ")
_OPERATION = re.compile(r"[\s)](?P<kind>while|conditional|call|async-start)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"\b(?P<role>condition|body|calls|to_apply)=%(?P<name>[^\s,}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"(?:true|false)_computation=%([^\s,}]+)")
_CONSTANT = re.compile(r"%(?P<name>\S+) = s32\[\](?:\{[^}]*\})? constant\((?P<value>\d+)\)")
_BOUND = re.compile(r"ROOT %\S+ = pred\[\](?:\{[^}]*\})? compare\(%\S+, %(?P<limit>[^\s)]+)\), direction=LT")
# Attributes of a line end where these begin; names inside them are no references.
_TAIL = re.compile(r", (?:metadata=\{|backend_config=)")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a piece of a program costs.

    Attributes:
      least: estimated cycles with the cheapest branch of each conditional.
      most: with the dearest.
      collectives: kind -> (how many, bytes of their results on one chip), with the branch that sends most.
      looped: of `most`, cycles inside loops of a known number of trips.
      unknown: loops that were counted once because their bound is not in the text.
    """

    least: int = 0
    most: int = 0
    collectives: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    looped: int = 0
    unknown: int = 0

    def __add__(self, other: Cost) -> Cost:
        sent = dict(self.collectives)
        for kind, (count, nbytes) in other.collectives.items():
            before = sent.get(kind, (0, 0))
            sent[kind] = (before[0] + count, before[1] + nbytes)
        looped, unknown = self.looped + other.looped, self.unknown + other.unknown
        return Cost(self.least + other.least, self.most + other.most, sent, looped, unknown)

    def times(self, trips: int) -> Cost:
        """So many of it, one after another, in a loop."""
        sent = {kind: (trips * count, trips * nbytes) for kind, (count, nbytes) in self.collectives.items()}
        return Cost(trips * self.least, trips * self.most, sent, trips * self.most, self.unknown)

    @property
    def sent(self) -> int:
        """Bytes of all collectives."""
        return sum(nbytes for _, nbytes in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Program:
    """Costs of a compiled program.

    Attributes:
      once: everything outside the loop of rounds.
      round: one trip of the loop whose bound is a value; None where there is none.
    """

    once: Cost
    round: Cost | None


def costs(text: str) -> Program:
    """Costs of a program.

    Args:
      text: what `jax.stages.Compiled.as_text` prints.
    """
    return _Reader(text).program()


class _Reader:
    """Follows a program from its entry down."""

    def __init__(self, text: str):
        self.computations: dict[str, list[str]] = {}
        self.entry, current = "", []
        for line in text.splitlines():
            begin = _BEGIN.match(line)
            if begin:
                current = self.computations[begin["name"]] = []
                self.entry = begin["name"] if begin["entry"] else self.entry
            elif _LINE.match(line):
                current.append(line)
        self.cost = functools.cache(lambda name: self._sum(self.computations.get(name, [])))

    def program(self) -> Program:
        """The entry, apart from its one loop of rounds."""
        rounds = [line for line in self.computations[self.entry] if self._is_open_loop(line)]
        if len(rounds) != 1:
            return Program(self.cost(self.entry), None)
        inside = self.cost(self._called(rounds[0])["body"]) + self.cost(self._called(rounds[0])["condition"])
        others = [line for line in self.computations[self.entry] if line is not rounds[0]]
        return Program(self._sum(others), inside)

    def _sum(self, lines: list[str]) -> Cost:
        total = Cost()
        for line in lines:
            total += self._line(line)
        return total

    def _line(self, line: str) -> Cost:
        found = _CYCLES.search(line)
        own = int(found[1]) if found else 0
        sent = {each.kind: (1, each.nbytes) for each in collectives.in_program(line)}
        cost = Cost(own, own, sent)
        operation = _OPERATION.search(_TAIL.split(line, maxsplit=1)[0])
        if operation is None or sent:
            return cost
        called = self._called(line)
        if operation["kind"] == "conditional":
            return cost + self._one_of([self.cost(name) for name in _branches(line)])
        if operation["kind"] != "while":
            inner = called.get("calls", called.get("to_apply"))
            return cost if inner is None or own else cost + self.cost(inner)
        trip = self.cost(called["body"]) + self.cost(called["condition"])
        trips = self._trips(called["condition"])
        return cost + (dataclasses.replace(trip, unknown=trip.unknown + 1) if trips is None else trip.times(trips))

    def _is_open_loop(self, line: str) -> bool:
        operation = _OPERATION.search(_TAIL.split(line, maxsplit=1)[0])
        is_loop = operation is not None and operation["kind"] == "while"
        return is_loop and self._trips(self._called(line)["condition"]) is None

    def _trips(self, condition: str) -> int | None:
        """Trips of a loop that counts from 0 to a constant; None for any other."""
        lines = self.computations.get(condition, [])
        constants = {found["name"]: int(found["value"]) for found in map(_CONSTANT.search, lines) if found}
        bounds = [found["limit"] for found in map(_BOUND.search, lines) if found]
        return constants.get(bounds[0]) if bounds else None

    def _called(self, line: str) -> dict[str, str]:
        return {found["role"]: found["name"] for found in _CALLED.finditer(_TAIL.split(line, maxsplit=1)[0])}

    @staticmethod
    def _one_of(branches: list[Cost]) -> Cost:
        if not branches:
            return Cost()
        dearest = max(branches, key=lambda cost: cost.most)
        sends = max(branches, key=lambda cost: cost.sent)
        unknown = max(cost.unknown for cost in branches)
        least = min(cost.least for cost in branches)
        return Cost(least, dearest.most, sends.collectives, dearest.looped, unknown)


def _branches(line: str) -> list[str]:
    listed = _BRANCHES.search(line)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return _TWO_BRANCHES.findall(line)
