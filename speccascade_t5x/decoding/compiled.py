"""A decode compiled ahead of its first batch, so that compile time and decode time are told apart."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from speccascade_t5x.decoding import api
from speccascade_t5x.decoding.state import Output, Program, State
from speccascade_t5x.interfaces import Array, PyTree


def shape_key(program: Program, inputs: PyTree) -> tuple:
    """What a compiled decode depends on: two equal keys can share one CompiledDecoder.

    Values of alpha, temperature and the other traced options, and of parameters, do not enter.
    """
    leaves, structure = jax.tree.flatten((program, inputs))
    return structure, _classes(structure), tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _classes(structure: jax.tree_util.PyTreeDef) -> tuple[type, ...]:
    """The class of every inner node. JAX 0.10 finds structures equal where only registered dataclasses differ."""
    node = structure.node_data()
    below = (found for child in structure.children() for found in _classes(child))
    return (() if node is None else (node[0],)) + tuple(below)


class CompiledDecoder:
    """The three programs of a decode (read inputs, loop, cut), for one shape and one static config.

    Attributes:
      seconds: what lowering and compiling took.
    """

    def __init__(self, program: Program, inputs: PyTree):
        begin = time.perf_counter()
        key, ids = jax.random.key(0), jnp.zeros(jax.tree.leaves(inputs)[0].shape[0], jnp.int32)
        self._start = api.start.lower(program, inputs, key, ids).compile()
        state = jax.eval_shape(api.start, program, inputs, key, ids)
        self._run = api.run.lower(program, state, program.max_rounds).compile()
        self._finish = api.finish.lower(program.config, state).compile()
        self.seconds = time.perf_counter() - begin

    def __call__(self, program: Program, inputs: PyTree, key: Array, example_ids: Array) -> Output:
        """Decodes one batch. Arguments must have the shapes compiled for."""
        return self.finish(self.run(program, self.start(program, inputs, key, example_ids)))

    def start(self, program: Program, inputs: PyTree, key: Array, example_ids: Array) -> State:
        """Reads the inputs: encoders and caches."""
        return self._start(program, inputs, key, example_ids)

    def run(self, program: Program, state: State, max_rounds: int | None = None) -> State:
        """The loop, to the end of every row or for so many rounds. Consumes `state`."""
        return self._run(program, state, program.max_rounds if max_rounds is None else max_rounds)

    def finish(self, state: State) -> Output:
        """Cuts every row at its end."""
        return self._finish(state)

    def temporary_bytes(self) -> int:
        """Temporary memory of the loop beside its arguments, as the compiler plans it; 0 where it does not say."""
        analysis = self._run.memory_analysis()
        return analysis.temp_size_in_bytes if analysis else 0
