"""A queue of inputs that does not wait for the slowest row: on device, fresh inputs take the places of ended ones.

A batch in lockstep lasts as long as its longest output, and rows that end early only wait. Here a second state waits,
whose inputs have been read and which has run no round. Whenever a few rows have ended, their outputs are put aside, and
as many waiting rows move into their places:

    running   [ a  b  c  d ]        [ a  e  c  f ]
    waiting   [ e  f  g  h ]   ->   [ .  .  g  h ]
    ended     [ .  .  .  . ]        [ b  d  .  . ]   in the order of the inputs that replaced them

One call goes on until nothing waits, so there is one host round trip per batch, not per ended row. The rounds are those
of `loop.run`; an input's noise depends on its example alone, and nothing is computed across rows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from speccascade_t5x import trees
from speccascade_t5x.decoding import loop
from speccascade_t5x.decoding.state import Output, Program, State, harvest
from speccascade_t5x.interfaces import Array

NOBODY = -1  # in place of an example id: the place is empty


@dataclasses.dataclass(frozen=True)
class Ended:
    """Outputs that ended while a queue ran. Entry i is that of the input whose place waiting input i took.

    Attributes:
      example_ids: [inputs] its example; NOBODY where no waiting input moved, or it moved into an empty place.
      output: [B] rows; those of entry i begin at i * num_samples.
    """

    example_ids: Array
    output: Output


trees.register(Ended)


def run_queue(
    program: Program, state: State, ids: Array, waiting: State, coming: Array, patience: int | Array, width: int
) -> tuple[State, Array, Ended]:
    """Runs rounds until every waiting input has found a place; with none waiting, until every row is done.

    Args:
      program: what runs. Options given per input belong to places here, whatever example is in them.
      state: from `loop.init` or an earlier call.
      ids: [inputs] int32, the example in each place of `state`, or NOBODY.
      waiting: from `loop.init`, same shapes as `state`.
      coming: [inputs] int32, the example in each place of `waiting`; then NOBODY to the end.
      patience: inputs that must have ended before the loop pauses to move others in, 1 to inputs; traced.
      width: how many inputs are moved at a time; static. A further move follows at once where `patience` says so.

    Returns:
      (state, the example in each of its places, the outputs that made room).
    """
    samples, inputs = program.config.num_samples, ids.shape[0]
    program = loop.per_row(program, state.done.shape[0])
    ready = jnp.sum(coming != NOBODY)

    def free(state: State, ids: Array) -> Array:
        return jnp.all(state.done.reshape(inputs, samples), axis=1) | (ids == NOBODY)

    def rows(places: Array) -> Array:
        return (places[:, None] * samples + jnp.arange(samples)).reshape(-1)

    def unfinished(carry: tuple[State, Array, Ended, Array]) -> Array:
        state, ids, _, taken = carry
        return (taken < ready) | ((ready == 0) & ~jnp.all(free(state, ids)))

    def segment(carry: tuple[State, Array, Ended, Array]) -> tuple[State, Array, Ended, Array]:
        state, ids, ended, taken = carry
        until = jnp.where(taken < ready, jnp.minimum(patience, inputs), inputs)
        waits = lambda state: jnp.sum(free(state, ids)) < until  # noqa: E731
        state = jax.lax.while_loop(waits, functools.partial(program.execution.round, program), state)
        is_free, slots = free(state, ids), taken + jnp.arange(width)
        places = jnp.argsort(~is_free, stable=True)[:width]
        moving = (jnp.arange(width) < jnp.sum(is_free)) & (slots < ready)
        only = lambda these: jnp.where(moving, these, inputs)  # noqa: E731  beyond the end nothing is written
        put = lambda old, new: old.at[rows(only(slots))].set(new[rows(places)], mode="drop")  # noqa: E731
        ended = Ended(
            ended.example_ids.at[only(slots)].set(ids[places], mode="drop"),
            jax.tree.map(put, ended.output, harvest(program.config, state)),
        )
        slots_read = jnp.minimum(slots, inputs - 1)
        state = loop.move(state, waiting, rows(slots_read), rows(only(places)))
        ids = ids.at[only(places)].set(coming[slots_read], mode="drop")
        return state, ids, ended, taken + jnp.sum(moving)

    ended = Ended(jnp.full_like(ids, NOBODY), jax.tree.map(jnp.zeros_like, harvest(program.config, state)))
    return jax.lax.while_loop(unfinished, segment, (state, ids, ended, jnp.zeros_like(ready)))[:3]
