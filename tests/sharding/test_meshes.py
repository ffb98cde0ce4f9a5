"""Decoding on meshes of the simulated devices: same tokens, expected shardings, and nothing large travels."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sharding import tiny
from speccascade_t5x.decoding.compiled import CompiledQueue
from speccascade_t5x.decoding.queue import NOBODY
from speccascade_t5x.distributed import collectives
from speccascade_t5x.distributed.partitioning import Partitioning, Topology, replicated_rules

pytestmark = pytest.mark.sharding
# Each costs two programs; the one that splits both ways runs by default.
MESHES = [(2, 4), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((8, 1), (4, 2), (1, 8)))]
NEAR_TIE = 1e-4  # of a log-probability: more than the rounding of sums in another order


def partitioning(data: int, model: int, **options) -> Partitioning:
    return Topology(data=data, model=model, **options).partitioning()


@functools.cache
def one_device(rule: str = "lossless", alpha: float | None = None):
    return [tiny.decode(*tiny.compiled(None, rule=rule, alpha=alpha), seed) for seed in range(2)]


def assert_same_tokens(found, expected) -> None:
    """The same tokens, but in rows where rounding decided a near-tie: these are logged, and are few."""
    parted = []
    for row in range(len(found.tokens)):
        differ = np.flatnonzero(found.tokens[row] != expected.tokens[row])
        if differ.size:
            logging.getLogger(__name__).warning("row %d parts from one device at token %d", row, differ[0])
            parted.append(row)
    assert len(parted) <= len(found.tokens) // 8, parted
    same = np.setdiff1d(np.arange(len(found.tokens)), parted)
    np.testing.assert_allclose(found.log_probs[same], expected.log_probs[same], atol=NEAR_TIE)
    np.testing.assert_array_equal(found.source[same], expected.source[same])


def assert_nothing_large_travels(text: str, mesh: Partitioning) -> list[collectives.Collective]:
    """No collective is as large as a shard of a kernel or a cache, or as the whole embedding."""
    drafter, verifier = tiny.pair()
    kernels = [leaf for bound in (drafter, verifier) for leaf in jax.tree.leaves(bound.params) if leaf.ndim == 2]
    model = mesh.mesh.shape["model"]
    embedding = tiny.VOCAB * tiny.WIDTH
    smallest = min(leaf.size // model for leaf in kernels if leaf.size > embedding)
    limit = 4 * min(smallest, embedding, tiny.ROWS * tiny.CONFIG.num_heads * tiny.DECODE.room * 32 // 8)
    assert limit > tiny.LARGEST_SENT  # or the guard would prove nothing
    found = collectives.in_program(text)
    assert [c for c in found if c.nbytes >= limit] == []
    return found


def assert_shardings(state, model: int, drafter_axis: str | None = "model") -> None:
    """Rows over 'data' everywhere, heads over 'model', and as much on each device as that says."""
    for name, axis in (("verifier_cache", "model"), ("drafter_state", drafter_axis)):
        cache = getattr(state, name)
        cache = cache.get("cache", cache)
        for leaf in jax.tree.leaves((cache["self"], cache["cross"])):
            assert leaf.sharding.spec == PartitionSpec("data", axis, None, None), name
            rows, heads = leaf.shape[0] * model // 8, leaf.shape[1] // (model if axis else 1)
            assert leaf.addressable_shards[0].data.shape[:2] == (rows, heads), name
    for leaf in (state.tokens, state.done, state.keys, state.counts.committed, state.verifier_cache["cross_bias"]):
        assert leaf.sharding.spec[0] == "data"


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_a_mesh_decodes_what_one_device_does(devices, data, model):
    mesh = partitioning(data, model)
    program, decoder = tiny.compiled(mesh)
    kernel = program.verifier.params["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "model")
    ids = jnp.arange(tiny.ROWS, dtype=jnp.int32)
    begun = decoder.start(program, tiny.inputs(), jax.random.key(0), ids)
    assert_shardings(begun, model)
    donated = begun.verifier_cache["self"][0][0]
    ended = decoder.run(program, begun)
    assert_shardings(ended, model)
    assert donated.is_deleted()  # the loop works in place
    for seed, expected in enumerate(one_device()):
        assert_same_tokens(tiny.decode(program, decoder, seed), expected)
    found = assert_nothing_large_travels(decoder._loop.as_text(), mesh)
    if model == 1:  # only whether all rows are done
        assert [(c.kind, c.nbytes) for c in found] == [("all-reduce", 1)]


@pytest.mark.parametrize(("data", "model"), MESHES)
def test_a_queue_on_a_mesh_sends_no_more_than_the_rows_it_moves(devices, data, model):
    mesh = partitioning(data, model)
    program = tiny.program(mesh)
    decoder = CompiledQueue(program, tiny.inputs(), mesh)
    ids = np.arange(tiny.ROWS, dtype=np.int32)
    begun, waiting = (decoder.start(program, tiny.inputs(i), jax.random.key(0), ids + 100 * i) for i in range(2))
    row = sum(leaf.nbytes for leaf in jax.tree.leaves((begun.verifier_cache, begun.drafter_state))) // tiny.ROWS
    state, places, ended = decoder.run(program, begun, ids, waiting, ids + 100, 2)
    assert_shardings(state, model)
    state, places, _ = decoder.run(program, state, places, waiting, np.full_like(ids, NOBODY), 2)
    assert_shardings(state, model)
    found = {}
    for output, examples in ((ended.output, ended.example_ids), (decoder.finish(state), places)):
        output, examples = jax.device_get((output, examples))
        found |= {int(example): (output, i) for i, example in enumerate(examples)}
    for seed, expected in enumerate(one_device()):
        rows = [found[example] for example in (ids + 100 * seed).tolist()]
        own = {field: [getattr(output, field)[i] for output, i in rows] for field in ("tokens", "log_probs", "source")}
        assert_same_tokens(SimpleNamespace(**{field: np.stack(values) for field, values in own.items()}), expected)
    # Beyond what a round sends: the one row that moves at a time, from the devices that hold it to those that shall.
    sent = collectives.in_program(decoder._loop.as_text())
    large = [c for c in sent if c.nbytes > tiny.LARGEST_SENT]
    assert {c.kind for c in large} == ({"all-reduce"} if data > 1 else set())
    assert sum(c.nbytes for c in large) <= 1.1 * row / model + 2**10


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "alpha"), [("lossless", None), ("token_v3", 0.3), ("chow", 0.5)])
def test_a_replicated_drafter_needs_no_collective(devices, rule, alpha):
    split, whole = (
        tiny.compiled(partitioning(2, 4, **options), rule=rule, alpha=alpha)
        for options in ({}, {"drafter_rules": replicated_rules()})
    )
    ids = jnp.arange(tiny.ROWS, dtype=jnp.int32)
    assert_shardings(whole[1].start(whole[0], tiny.inputs(), jax.random.key(0), ids), 4, drafter_axis=None)
    counts = [len(collectives.in_program(decoder._loop.as_text())) for _, decoder in (split, whole)]
    assert counts[1] < counts[0], counts
    for chosen in (split, whole):
        for seed, expected in enumerate(one_device(rule, alpha)):
            assert_same_tokens(tiny.decode(*chosen, seed), expected)


def test_the_guard_sees_a_gather(devices):
    mesh = partitioning(2, 4)
    split = NamedSharding(mesh.mesh, PartitionSpec(None, "model"))
    weight = jax.device_put(np.zeros((32, 256), np.float32), split)
    text = jax.jit(lambda w: w * 2, out_shardings=mesh.whole).lower(weight).compile().as_text()
    (found,) = collectives.in_program(text)
    assert (found.kind, found.nbytes) == ("all-gather", 32 * 256 * 4)
    with pytest.raises(AssertionError):
        assert_nothing_large_travels(text, mesh)
    text = jax.jit(lambda w: w.sum(), out_shardings=mesh.whole).lower(weight).compile().as_text()
    assert [(c.kind, c.nbytes) for c in collectives.in_program(text)] == [("all-reduce", 4)]
