"""Compiles decodes ahead of their first batch, so that compile time and decode time are measured apart."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.core import noise
from speccascade_t5x.decoding import api, loop, placing, queue
from speccascade_t5x.decoding.state import Output, Program, State
from speccascade_t5x.interfaces import Array, PyTree

# One in so many of the inputs of a batch moves into the places of a queue at a time. The cost of a move does not depend
# on how many inputs are waiting, and several moves may follow one another.
MOVED_AT_ONCE = 8


def shape_key(program: Program, inputs: PyTree) -> tuple:
    """What a compiled decode depends on: two equal keys can share one CompiledDecoder.

    It does not depend on the values of alpha, temperature, other traced options and parameters.
    """
    leaves, structure = jax.tree.flatten((program, inputs))
    return structure, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)


class Layout(Protocol):
    """Where the arrays of a decode live on a mesh; see `distributed.partitioning.Partitioning`."""

    @property
    def rows(self) -> jax.sharding.Sharding:
        """Of inputs and example ids, rows on axis 0."""

    @property
    def whole(self) -> jax.sharding.Sharding:
        """Of what every device needs."""

    def program(self, program: Program) -> Program:
        """The program with every leaf on the mesh."""

    def state(self, state: State) -> State:
        """The sharding of every leaf of a state, given as arrays or shapes."""


def shapes(arrays: PyTree, where: jax.sharding.Sharding | PyTree) -> PyTree:
    """Shapes of arrays (or of shapes) that live in a sharding, or in a tree of them."""
    spread = jax.tree.map(lambda _: where, arrays) if isinstance(where, jax.sharding.Sharding) else where
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), arrays, spread)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The two large programs of a decode, not compiled yet.

    Attributes:
      state: shapes of what travels between them, with shardings where there is a layout.
      start: reads the inputs.
      run: the loop, that of `loop.run` or `queue.run_queue`; its state is donated.
    """

    state: State
    start: jax.stages.Lowered
    run: jax.stages.Lowered


def lower(
    program: Program,
    inputs: PyTree,
    key: Array,
    example_ids: Array,
    layout: Layout | None = None,
    queued: bool = False,
) -> Lowered:
    """Lowers a decode. Only the shapes and shardings of arguments are read.

    Args:
      program: what will run, with arrays or with jax.ShapeDtypeStruct leaves, which may name devices that are not here.
      inputs: as for `decoding.start`.
      key: likewise.
      example_ids: likewise.
      layout: of the mesh all of them live on; None for one device.
      queued: the loop of a queue and not that of a batch.
    """
    state = jax.eval_shape(api.start, program, inputs, key, example_ids)
    start, run, run_queue = api.start, api.run, api.run_queue
    ids = jax.ShapeDtypeStruct(example_ids.shape, jnp.int32)
    if layout is not None:
        where = layout.state(state)
        state, ids = shapes(state, where), shapes(ids, layout.whole)
        start = jax.jit(loop.init, out_shardings=where)
        run = jax.jit(functools.partial(loop.run, loop="lax"), donate_argnums=1, out_shardings=where)
        whole = (where, layout.whole, layout.whole)
        run_queue = jax.jit(queue.run_queue, donate_argnums=1, static_argnames="width", out_shardings=whole)
    begun = start.lower(program, inputs, key, example_ids)
    if queued:
        width = max(1, ids.shape[0] // MOVED_AT_ONCE)
        return Lowered(state, begun, run_queue.lower(program, state, ids, state, ids, 1, width=width))
    return Lowered(state, begun, run.lower(program, state, program.max_rounds))


class _Compiled:
    """The start, the loop and the end of a decode, compiled for one shape, one static config and one layout.

    Attributes:
      seconds: what lowering and compiling took.
    """

    _queued: ClassVar[bool]

    def __init__(self, program: Program, inputs: PyTree, layout: Layout | None = None):
        """Compiles.

        Args:
          program: what will run; its parameters are already placed.
          inputs: as for `decoding.start`; only their shapes are read.
          layout: of the mesh the parameters live on; None for one device.
        """
        begin = time.perf_counter()
        self._layout = layout
        key, ids = noise.from_seed(0), jnp.zeros(jax.tree.leaves(inputs)[0].shape[0], jnp.int32)
        if layout is not None:
            program, key = layout.program(program), shapes(key, layout.whole)
            inputs, ids = shapes(inputs, layout.rows), shapes(ids, layout.rows)
        lowered = lower(program, inputs, key, ids, layout, self._queued)
        self._state = lowered.state
        self._start = lowered.start.compile()
        self._loop = lowered.run.compile()
        self._finish = api.finish.lower(program.config, self._state).compile()
        self.seconds = time.perf_counter() - begin

    @property
    def rows(self) -> int:
        """B, all samples counted."""
        return self._state.done.shape[0]

    def _rows(self, arrays: PyTree) -> PyTree:
        return arrays if self._layout is None else placing.put(arrays, self._layout.rows)

    def _whole(self, arrays: PyTree) -> PyTree:
        return arrays if self._layout is None else placing.put(arrays, self._layout.whole)

    def start(self, program: Program, inputs: PyTree, key: Array, example_ids: Array) -> State:
        """Reads the inputs: encoders and caches."""
        return self._start(program, self._rows(inputs), self._whole(noise.threefry(key)), self._rows(example_ids))

    def finish(self, state: State) -> Output:
        """Cuts every row at its end."""
        return self._finish(state)

    def temporary_bytes(self) -> int:
        """Temporary memory of the loop beside its arguments, as the compiler plans it; 0 where it does not say."""
        analysis = self._loop.memory_analysis()
        return analysis.temp_size_in_bytes if analysis else 0


class CompiledDecoder(_Compiled):
    """The programs of a decode that go through a batch: read inputs, loop, cut."""

    _queued = False

    def __call__(self, program: Program, inputs: PyTree, key: Array, example_ids: Array) -> Output:
        """Decodes one batch. Arguments must have the shapes compiled for."""
        return self.finish(self.run(program, self.start(program, inputs, key, example_ids)))

    def run(self, program: Program, state: State, max_rounds: int | None = None) -> State:
        """The loop, to the end of every row or for so many rounds. Consumes `state`."""
        return self._loop(program, state, program.max_rounds if max_rounds is None else max_rounds)


class CompiledQueue(_Compiled):
    """The programs of a decode that go through a queue: read inputs, loop with refilled rows, cut."""

    _queued = True

    def run(
        self,
        program: Program,
        state: State,
        ids: Array | np.ndarray,
        waiting: State,
        coming: np.ndarray,
        patience: int,
    ) -> tuple[State, Array, queue.Ended]:
        """The loop until every waiting input has found a place, see `queue.run_queue`. Consumes `state`."""
        return self._loop(program, state, self._whole(ids), waiting, self._whole(coming), patience)
