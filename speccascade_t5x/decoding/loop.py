"""The one decoding loop, around the round of whichever execution runs (`rounds`, `sequential`).

Everything here is jittable and sees models only through their Protocols. Callers may compose the parts:

    state = init(program, inputs, key, example_ids)
    state = run(program, state, max_rounds)  # may be called again
    state = refill(program, state, rows, inputs, key, example_ids)  # new inputs into finished rows
    state = move(state, waiting, source, target)  # or rows of a second state, begun by `init` with the same shapes
    output = harvest(program.config, state)

`decoding.start`, `run`, `refill` and `finish` are these, jitted. `queue` moves rows inside a loop on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from speccascade_t5x.core import noise, probs
from speccascade_t5x.core.accounting import Counts
from speccascade_t5x.decoding.state import OFFSET, Program, State, Trace
from speccascade_t5x.interfaces import SOURCE_PAD, Array, PyTree, UserError


def init(program: Program, inputs: PyTree, key: Array, example_ids: Array) -> State:
    """Reads the inputs and returns the state before the first round.

    Args:
      program: what will run.
      inputs: named arrays with one row per example.
      key: random key of any kind (see `core.noise`). A row's noise depends on (key, example id, sample index,
        committed tokens) alone.
      example_ids: [rows] ids that name the examples, whatever batch they travel in.
    """
    config = program.config
    first_token, first = program.verifier.model.first(inputs)
    samples = config.num_samples
    batch = first_token.shape[0] * samples
    first_token, first, ids = (jnp.repeat(x, samples) for x in (first_token, first, example_ids))
    per_sample = jnp.tile(jnp.arange(samples), batch // samples)
    key = noise.threefry(key)
    keys = jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(key, i), s))(ids, per_sample)
    width = config.max_len + config.draft_len + 1
    tokens = jnp.full((batch, OFFSET + width), config.pad_id, jnp.int32)
    drafter = program.drafter
    return State(
        tokens=tokens.at[:, :OFFSET].set(first_token[:, None]),
        source=jnp.full((batch, width), SOURCE_PAD, jnp.int32),
        committed=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        first=first,
        keys=keys,
        log_probs=jnp.zeros(batch, jnp.float32),
        counts=Counts.zeros(batch),
        verifier_cache=program.verifier.model.start(program.verifier.params, inputs, batch, config.room),
        drafter_state=drafter and drafter.model.start(drafter.params, inputs, batch, config.room),
        progress=program.execution.begin(program, first),
        trace=_empty_trace(batch, width) if config.trace else None,
    )


def _empty_trace(batch: int, width: int) -> Trace:
    nan = jnp.full((batch, width), jnp.nan, jnp.float32)
    return Trace(nan, nan, nan, nan, nan, nan, nan)


def refill(program: Program, state: State, rows: Array, inputs: PyTree, key: Array, example_ids: Array) -> State:
    """Replaces rows by fresh ones. Input shapes must be those of `init`, so that nothing recompiles.

    Args:
      program: what runs.
      state: the state to change.
      rows: [B] bool, which rows are replaced. All samples of an example must be replaced together.
      inputs: as for `init`, full batch; only the replaced rows are read.
      key: as for `init`.
      example_ids: as for `init`.
    """
    fresh = init(program, inputs, key, example_ids)
    return jax.tree.map(lambda new, old: jnp.where(probs.expand_right(rows, new.ndim), new, old), fresh, state)


def move(state: State, waiting: State, source: Array, target: Array) -> State:
    """Replaces rows by rows of another state that have just begun. No input is read, so it only costs a copy.

    Args:
      state: the state to change.
      waiting: from `init`, same shapes.
      source: [R] rows of `waiting`, all samples of an example.
      target: [R] rows of `state` they go to; B where there is nothing to move.
    """
    return jax.tree.map(lambda old, new: old.at[target].set(new[source], mode="drop"), state, waiting)


def run(
    program: Program,
    state: State,
    max_rounds: int | Array,
    loop: Literal["lax", "python"] = "lax",
) -> State:
    """Runs rounds until every row is done, or `max_rounds` of them.

    Args:
      program: what runs.
      state: from `init`, `refill`, `move` or an earlier `run`.
      max_rounds: bound for this call; traced.
      loop: "python" runs the same round eagerly, for breakpoints and tests.
    """
    program = per_row(program, state.done.shape[0])
    if loop == "python":
        for _ in range(int(max_rounds)):
            if bool(jnp.all(state.done)):
                break
            state = program.execution.round(program, state)
        return state

    def unfinished(carry: tuple[Array, State]) -> Array:
        return (carry[0] < max_rounds) & ~jnp.all(carry[1].done)

    def body(carry: tuple[Array, State]) -> tuple[Array, State]:
        return carry[0] + 1, program.execution.round(program, carry[1])

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


def _is_shared(part: PyTree) -> bool:
    """Whether a part of an option says that it is never given per input, such as the head of a learned rule."""
    return not getattr(part, "per_input", True)


def per_row(program: Program, batch: int) -> Program:
    """Repeats options that are given per input (alpha, temperature, thresholds) for every sample of the input.

    Raises:
      UserError: one has another number of rows than the inputs.
    """
    samples = program.config.num_samples

    def repeat(path: tuple, leaf: Array) -> Array:
        if _is_shared(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] == batch:
            return leaf
        if leaf.shape[0] * samples != batch:
            raise UserError(f"{path[-1].name} has {leaf.shape[0]} rows, but there are {batch // samples} inputs")
        return jnp.repeat(leaf, samples, axis=0)

    spread = functools.partial(jax.tree_util.tree_map_with_path, repeat, is_leaf=_is_shared)
    drafter = program.drafter
    if drafter is not None:
        drafter = dataclasses.replace(drafter, model=spread(drafter.model))
    parts = {name: spread(getattr(program, name)) for name in ("rule", "sampling", "execution")}
    return dataclasses.replace(program, drafter=drafter, **parts)
