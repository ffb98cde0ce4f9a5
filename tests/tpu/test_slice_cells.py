"""What is asked of the compiler: checked beforehand, shared out, and carried to another process unchanged."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import pytest

from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.decoding.compiled import CompiledDecoder
from speccascade_t5x.distributed.partitioning import Topology, replicated_rules
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models import T5, T5Config, init_params, param_shapes
from speccascade_t5x.tpu import hardware, shapes, slice_cells

TINY = T5Config(
    vocab_size=32, emb_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=4, mlp_dim=16,
    mlp_activations=("gelu", "linear"),
)  # fmt: skip


def make(topology: str = "v4:2x2x1", verifier: T5Config = TINY, **options) -> slice_cells.Cell:
    return slice_cells.make("a:b", TINY, verifier, topology, slice_cells.Options(**options))


def test_a_cell_survives_the_way_to_a_child():
    cell = make(model=2, alpha=0.5, rule="chow", drafter_rules=replicated_rules(), programs=("loop",))
    there = slice_cells.Cell.from_json(json.loads(json.dumps(cell.to_json())))
    assert there == cell and there.options.drafter_rules == replicated_rules()
    assert there.key == cell.key


def test_files_differ_where_cells_do():
    cell = make(model=2)
    others = [make(model=1), make("v4:2x2x2", model=2), make(model=2, max_len=64)]
    assert len({each.key for each in (cell, *others)}) == 4
    assert make(model=2, programs=("loop",)).key == cell.key  # what is compiled later joins what is there
    assert "/" not in cell.key and ":" not in cell.key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": "v4:2x2x3"}, r"no TPU slice 'v4:2x2x3': did you mean 'v4:2x2x\d'\?"),
        ({"topology": "moon"}, r"there is no TPU slice 'moon': known are v2-128, "),
        ({"topology": "v3-8"}, r"for v3-8: name a slice of v4, v5e, v5p, v6e"),
        ({"model": 3}, "model=3 does not divide the 4 chips of v4:2x2x1: use 1, 2, 4"),
        ({"model": 0}, "model=0 is outside its range"),
        ({"batch_size": 6, "model": 1}, "batch_size=6 cannot be shared by the 4 parts that v4:2x2x1 with model=1"),
        ({"microbatches": 5, "model": 1}, "train_batch_size=64 cannot be shared by the 20 parts"),
        ({"programs": ("sing",)}, "there is no program 'sing' to compile: known are encoder, loop, refill"),
        ({"rule": "chow", "alpha": 7.0}, "alpha"),
        ({"verifier": dataclasses.replace(TINY, vocab_size=64)}, "has 32 logits and the verifier 64"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**arguments)
    assert "\n" not in str(caught.value)


def test_the_fewest_chips_that_hold_the_weights():
    assert make().options.model == 1
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(TINY)))
    assert shapes.parameter_bytes(TINY) == 4 * parameters
    for share in (1, 2, 4):  # 1.5 x float32 weights of both, on 0.8 of the memory
        enough = math.ceil(2 * 1.5 * 4 * parameters / share / 0.8)
        for size, expected in ((enough, share), (enough - 1, min(2 * share, 4))):
            assert slice_cells.fewest_sharing(4, size, [TINY, TINY]) == expected


def test_a_batch_nobody_named_fits_every_slice():
    for name in hardware.SLICES:
        chips = hardware.named(name).chips
        for model in (size for size in (1, 2, 4) if chips % size == 0):
            found = make(name, model=model).options
            assert found.batch_size == max(16, chips // model)
    assert make("v4:4x4x4", model=1).key == make("v4:4x4x4", model=1, batch_size=64).key  # settled in what is kept
    with pytest.raises(UserError, match="batch_size=16 cannot be shared by the 64 parts"):
        make("v4:4x4x4", model=1, batch_size=16)


@pytest.mark.sharding
def test_shapes_lower_to_the_program_the_runtime_compiles(devices):
    """The abstract program has the structure, the shapes and the shardings of the real one."""
    place = Topology(data=2, model=2).partitioning()
    wanted = slice_cells.Options(batch_size=4, input_len=6, max_len=5, draft_len=2)
    abstract = shapes.program(TINY, TINY, wanted, place)
    models = [Bound(T5(TINY), init_params(TINY, jax.random.key(i))) for i in range(2)]
    drafter, verifier = place.put(models[0], drafter=True), place.put(models[1])
    sampling = decoding.Sampling(*(jax.numpy.asarray(x) for x in map(_typed, (1.0, 0, 1.0, 0.0))))
    real = place.program(
        decoding.speculative_program(
            drafter, verifier, rules.Lossless(), decoding.DecodeConfig(max_len=5, draft_len=2), sampling
        )
    )
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(real), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)
    inputs, _, _ = shapes.decode_inputs(4, 6, place)
    decoder = CompiledDecoder(real, {"encoder_input_tokens": jax.numpy.ones((4, 6), jax.numpy.int32)}, place)
    assert inputs["encoder_input_tokens"].shape == (4, 6)
    state = decoder._state
    heads, width, layers, slots = 2 // 2, 4, 1, 5 + 2 + 2
    caches = 2 * 2 * layers * (4 // 2) * heads * width * (slots + 6) * 4  # two models, keys and values, on one device
    assert shapes.cache_bytes_per_chip(state) == caches
    assert shapes.bytes_per_chip(state) > caches


def _typed(value: float | int):
    return jax.numpy.float32(value) if isinstance(value, float) else jax.numpy.int32(value)
