"""Compiles the programs of a cell with libtpu's compiler. Runs in a child process: see `child`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from speccascade_t5x.decoding import compiled
from speccascade_t5x.distributed.partitioning import AXES, Partitioning, with_batch_of
from speccascade_t5x.distributed.slices import Slice
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tpu import hardware, hlo, shapes
from speccascade_t5x.tpu.slice_cells import Cell
from speccascade_t5x.training import train_loop

_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"([\d.]+)([KMGT]?)"
_TOO_LARGE = (
    re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm", re.IGNORECASE),
    re.compile(rf"required for [^(]*\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)", re.IGNORECASE),
)
_LONGEST_MESSAGE = 300


def mesh(on: Slice, model: int) -> Mesh:
    """The mesh ('data', 'model') of a slice, which need not exist on this machine.

    Raises:
      UserError: the compiler does not know the slice, or it cannot be laid out in this way.
    """
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=on.name, **hardware.compiler_options(on))
        sizes = (hardware.groups(on, model), model)
        # A side of the torus may have to be cut to get the axis that was asked for.
        order = mesh_utils.create_device_mesh(sizes, list(found.devices), allow_split_physical_axes=True)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{on.name} with model={model} is rejected: {first_line(error)}") from error
    return Mesh(order, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def partitioning(cell: Cell) -> Partitioning:
    """The mesh of a cell with its rules."""
    wanted: Any = cell.options  # settled: none of them is None
    drafter = wanted.rules if wanted.drafter_rules is None else with_batch_of(wanted.drafter_rules, wanted.rules)
    return Partitioning(mesh(hardware.named(cell.topology), wanted.model), wanted.rules, drafter)


def first_line(error: Exception) -> str:
    """The first line of a message, cut to a sensible length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_LONGEST_MESSAGE]


def out_of_memory(message: str) -> tuple[int, int] | None:
    """(needed, available) bytes of a chip, from the compiler's message; None for any other message."""
    for pattern in _TOO_LARGE:
        found = pattern.search(message)
        if found:
            needed, available = (round(float(found[i]) * _SIZES[found[i + 1]]) for i in (1, 3))
            return needed, available
    return None


class Compiler:
    """The programs of one cell.

    Args:
      cell: the cell to compile.
      place: placement of its arrays; None takes the cell's own mesh.
    """

    def __init__(self, cell: Cell, place: Partitioning | None = None):
        self.cell, self.place = cell, place or partitioning(cell)
        self._lowered: dict[bool, compiled.Lowered] = {}

    def report(self, name: str) -> dict[str, Any]:
        """Compiles one program. Returns its figures as JSON types; see docs/precompile.md.

        Args:
          name: of `slice_cells.PROGRAMS`.
        """
        begin = time.perf_counter()
        lowered, held = self._train(name) if name.startswith("train_") else getattr(self, f"_{name}")()
        found: dict[str, Any] = {"program": name, "lower_s": round(time.perf_counter() - begin, 2)}
        begin, worked = time.perf_counter(), time.process_time()
        try:
            done = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found |= self._failed(error, held)
        else:
            found |= self._memory(done, held) | self._costs(done.as_text() or "")
        spent = {"compile_s": time.perf_counter() - begin, "cpu_s": time.process_time() - worked}
        return found | {name: round(seconds, 2) for name, seconds in spent.items()}

    def _decoding(self, queued: bool = False) -> compiled.Lowered:
        if queued not in self._lowered:
            cell, wanted = self.cell, self.cell.options
            rows: Any = wanted.batch_size  # settled
            program = shapes.program(cell.drafter, cell.verifier, wanted, self.place)
            inputs = shapes.decode_inputs(rows, wanted.input_len, self.place)
            self._lowered[queued] = compiled.lower(program, *inputs, self.place, queued=queued)
        return self._lowered[queued]

    def _parameters(self) -> int:
        """Bytes per chip of both models' parameters, which stay there between programs."""
        pair = (self.cell.drafter, True), (self.cell.verifier, False)
        return sum(shapes.bytes_per_chip(shapes.bound(config, self.place, role).params) for config, role in pair)

    def _encoder(self) -> tuple[jax.stages.Lowered, dict[str, int]]:
        made = self._decoding()
        return made.start, {"parameters": self._parameters(), "caches": shapes.cache_bytes_per_chip(made.state)}

    def _loop(self, queued: bool = False) -> tuple[jax.stages.Lowered, dict[str, int]]:
        made = self._decoding(queued)
        states = 1 + queued  # that of the batch that waits
        held = {"caches": shapes.cache_bytes_per_chip(made.state), "state": shapes.bytes_per_chip(made.state)}
        return made.run, {"parameters": self._parameters(), **{name: states * size for name, size in held.items()}}

    def _refill(self) -> tuple[jax.stages.Lowered, dict[str, int]]:
        return self._loop(queued=True)

    def _train(self, name: str) -> tuple[jax.stages.Lowered, dict[str, int]]:
        wanted, config = self.cell.options, getattr(self.cell, name.removeprefix("train_"))
        batch = shapes.training_batch(wanted.train_batch_size, wanted.input_len, wanted.targets_len)
        how = train_loop.TrainConfig(steps=1000, microbatches=wanted.microbatches)
        parameters = shapes.bytes_per_chip(shapes.bound(config, self.place).params)
        return train_loop.lower_step(config, batch, how, self.place), {"parameters": parameters, "caches": 0}

    def _memory(self, done: jax.stages.Compiled, held: dict[str, int]) -> dict[str, Any]:
        """Bytes per chip. `idle` are parameters that this program does not read and that stay all the same."""
        stats: Any = done.memory_analysis()
        arguments, aliased = stats.argument_size_in_bytes, stats.alias_size_in_bytes
        resident = held["parameters"] + held.get("state", 0)
        memory = {
            "arguments": arguments,
            "outputs": stats.output_size_in_bytes,
            "aliased": aliased,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
            "idle": max(resident - arguments, 0),
        }
        total = sum(memory.values()) - 2 * aliased
        return self._fit(total, memory | {name: held[name] for name in ("parameters", "caches")})

    def _fit(self, needed: int, memory: dict[str, int]) -> dict[str, Any]:
        capacity = hardware.chip(hardware.named(self.cell.topology)).hbm_bytes
        over = max(needed - capacity, 0)
        status = "too large" if over else "fits"
        return {"status": status, "needed": needed, "capacity": capacity, "over": over, "memory": memory}

    def _failed(self, error: Exception, held: dict[str, int]) -> dict[str, Any]:
        """The figures of a program that the compiler rejected."""
        sizes = out_of_memory(str(error))
        if sizes is None:
            return {"status": "failed", "message": first_line(error), "memory": held}
        needed, available = sizes
        found = {"status": "too large", "needed": needed, "capacity": available, "over": max(needed - available, 0)}
        return found | {"memory": held, "message": first_line(error)}

    def _costs(self, text: str) -> dict[str, Any]:
        """Cycles and collectives: of a round and of the rest where the program loops, of one run else."""
        found = hlo.costs(text)
        clock = hardware.chip(hardware.named(self.cell.topology)).clock
        parts: dict[str, hlo.Cost] = {"run": found.once}
        if found.round is not None:
            parts = {"round": found.round, "before": found.once}
        return {"costs": {name: _as_json(cost, clock) for name, cost in parts.items()}}


def _as_json(cost: hlo.Cost, clock: float | None) -> dict[str, Any]:
    seconds = None if clock is None else [cost.least / clock, cost.most / clock]
    sent = {kind: {"count": count, "bytes": nbytes} for kind, (count, nbytes) in sorted(cost.collectives.items())}
    return {"cycles": [cost.least, cost.most], "seconds": seconds, "collectives": sent, "unknown": cost.unknown}


def compile_all(cell: Cell, names: list[str], done: Callable[[dict[str, Any]], None]) -> None:
    """Compiles programs one after another, and reports each result at once."""
    compiler = Compiler(cell)
    for name in names:
        done(compiler.report(name))
