"""Meshes and rules: which dimension goes where, what falls back, and what is refused. Nothing here is decoded."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from inference import small_pair
from sharding import tiny
from speccascade_t5x import checkpoints, decoding
from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.common import fingerprints
from speccascade_t5x.distributed import partitioning
from speccascade_t5x.distributed.partitioning import STANDARD_RULES, Topology, replicated_rules, tile
from speccascade_t5x.inference import generate
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import T5, DecoderOnly, logical_axes
from speccascade_t5x.models.decoder_only import DecoderOnlyConfig

pytestmark = pytest.mark.sharding


def specs(topology: Topology, config=tiny.CONFIG, drafter: bool = False) -> dict[str, tuple]:
    found = topology.partitioning().params(T5(config), drafter)
    return {name: tuple(sharding.spec) for name, sharding in flat_params.flatten(found).items()}


def test_t5x_rules_on_a_t5(devices):
    found = specs(Topology(data=2, model=4))
    expected = {
        "token_embedder/embedding": ("model", None),
        "encoder/relpos_bias/rel_embedding": ("model", None),
        "encoder/layers_0/attention/query/kernel": (None, "model"),
        "decoder/layers_0/self_attention/out/kernel": ("model", None),
        "decoder/layers_0/encoder_decoder_attention/value/kernel": (None, "model"),
        "decoder/layers_0/mlp/wi_0/kernel": (None, "model"),
        "decoder/layers_0/mlp/wo/kernel": ("model", None),
        "decoder/layers_0/pre_mlp_layer_norm/scale": (None,),
        "decoder/logits_dense/kernel": (None, "model"),
    }
    assert {name: found[name] for name in expected} == expected
    assert set().union(*specs(Topology(data=8), drafter=True).values()) == {"model", None}


@pytest.mark.parametrize(
    "rules",
    [
        STANDARD_RULES,
        replicated_rules(),
        (*(rule for rule in STANDARD_RULES if rule[0] != "embed"), ("embed", "model"), ("embed", "data")),
        (("embed", "model"), *(rule for rule in STANDARD_RULES if rule[0] != "embed")),
        (("embed", "data"), *(rule for rule in STANDARD_RULES if rule[0] != "embed")),
    ],
)
def test_rules_mean_what_they_mean_in_flax(devices, rules):
    topology = Topology(data=2, model=4, rules=rules)
    names = flat_params.flatten(logical_axes(tiny.CONFIG))
    expected = {name: tuple(nn.logical_to_mesh_axes(axes, rules)) for name, axes in names.items()}
    assert specs(topology) == expected


def test_heads_that_do_not_divide_stay_whole_and_the_rest_is_split(devices, caplog):
    config = dataclasses.replace(tiny.CONFIG, num_heads=6)  # 6 x 32 divides by 4, but not by whole heads
    partitioning._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = specs(Topology(data=2, model=4), config)
    assert found["decoder/layers_0/self_attention/query/kernel"] == (None, None)
    assert found["decoder/relpos_bias/rel_embedding"] == (None, None)
    assert found["decoder/layers_0/mlp/wo/kernel"] == ("model", None)
    assert [record.getMessage() for record in caplog.records] == [
        "the verifier has 6 heads, which model=4 does not divide: kept whole on every device"
    ]
    with pytest.raises(UserError, match=r"the drafter has 6 heads, which model=4 does not divide: .*strict=False"):
        specs(Topology(data=2, model=4, strict=True), config, drafter=True)


def test_state_of_a_decoder_only_pair_and_of_samples(devices):
    config = DecoderOnlyConfig(vocab_size=32, emb_dim=8, num_heads=4, num_layers=1, head_dim=4, mlp_dim=8)
    bound = generate.Bound(DecoderOnly(config), checkpoints.architecture.shapes(config))
    program = decoding.autoregressive_program(bound, decoding.DecodeConfig(max_len=6, num_samples=2))
    inputs = {"decoder_input_tokens": jax.ShapeDtypeStruct((4, 5), np.int32)}
    ids = jax.ShapeDtypeStruct((4,), np.int32)
    state = jax.eval_shape(decoding.start, program, inputs, jax.random.key(0), ids)
    mesh = Topology(data=4, model=2).partitioning()
    placed = mesh.state(state)
    for sharding in jax.tree.leaves(placed.verifier_cache["self"]):
        assert sharding.spec == PartitionSpec("data", "model", None, None)
    assert placed.tokens.spec == placed.keys.spec == PartitionSpec("data")
    with pytest.raises(UserError, match=r"a batch of 8 rows cannot be shared by data=\d.* choose a batch size that \d"):
        Topology(data=3, model=2).partitioning().state(state)


def test_a_bundle_is_restored_into_its_shardings(devices, tmp_path):
    topology = Topology(data=4, model=2, drafter_rules=replicated_rules())
    pair = generate.load(small_pair.write(tmp_path / "pair"), topology)
    embedding = pair.verifier.params["token_embedder"]["embedding"]
    assert embedding.sharding.spec == PartitionSpec("model", None)
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(192, 8)}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(pair.drafter.params))
    plain = generate.load(tmp_path / "pair")
    assert fingerprints.of_tree(pair.verifier) == fingerprints.of_tree(plain.verifier)
    with pytest.raises(UserError, match="a batch of 6 rows cannot be shared by data=4: choose a batch size that 4"):
        generate.Runner(pair, generate.Settings(batch_size=3, num_samples=2))


def test_fingerprints_need_no_copy_on_the_host_and_see_every_change(devices):
    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    mesh = Topology(data=2, model=4).partitioning().mesh
    split = jax.sharding.NamedSharding(mesh, PartitionSpec("data", "model"))
    for dtype in (np.float32, "bfloat16", np.int8, bool):
        array = jax.numpy.asarray(values).astype(dtype)
        assert fingerprints.of_array(jax.device_put(array, split)) == fingerprints.of_array(np.asarray(array)), dtype
    swapped, nudged = values.copy(), values.copy()
    swapped[3, 4], swapped[5, 6] = values[5, 6], values[3, 4]
    nudged[0, 0] = np.nextafter(values[0, 0], 9, dtype=np.float32)
    found = {fingerprints.of_tree({"a": x}) for x in (values, swapped, nudged, values.T, values.reshape(24, 16))}
    assert len(found | {fingerprints.of_tree({"b": values})}) == 6


def test_blocks_of_a_torus():
    places = [(x, y, z, 0) for z, y, x in itertools.product(range(4), range(2), range(2))]  # TPU v4-32
    groups = tile(places, (2, 2, 1))
    assert groups.shape == (4, 4) and sorted(groups.ravel()) == list(range(16))
    for group in groups:
        assert len({places[i][2] for i in group}) == 1  # one plane each
    line = tile(places, (1, 1, 4))
    assert all(len({places[i][:2] for i in group}) == 1 for group in line)
    with pytest.raises(UserError, match="blocks of 1 x 3 x 1 x 1 devices do not fill 2 x 2 x 4 x 1"):
        tile(places, (1, 3))
    with pytest.raises(UserError, match="15 devices do not fill 2 x 2 x 4 x 1: leave out submesh"):
        tile(places[:-1], (1, 1, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 4, "model": 4}, r"data=4 x model=4 needs 16 devices, and this machine has 8 \(on CPU, XLA_FLAGS="),
        ({"devices": 16}, r"data=16 x model=1 needs 16 devices"),
        ({"model": 3}, "model=3 does not divide the 8 devices"),
        ({"devices": 8, "data": 2, "model": 2}, "has 4 devices, but the topology has 8"),
        ({"model": 0}, "model=0 is outside its range"),
        ({"data": "2"}, "data='2' is outside its range"),
        ({"model": 4, "submesh": (2, 1)}, r"submesh=\(2, 1\) is not a block of model=4 devices"),
        ({"rules": [("batch", "rows")]}, r"rules holds \('batch', 'rows'\): a rule is"),
        ({"rules": STANDARD_RULES[:3]}, r"no rule names the logical axis 'joined_kv': add \('joined_kv', None\)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(devices, options, message):
    with pytest.raises(UserError, match=message) as caught:
        specs(Topology(**options))
    assert "\n" not in str(caught.value)


def test_both_roles_split_batches_alike(devices):
    own = tuple((name, None) for name, _ in STANDARD_RULES)
    mesh = Topology(data=2, model=4, drafter_rules=own).partitioning()
    assert ("batch", "data") in mesh.drafter_rules and mesh.rows.spec == PartitionSpec("data")
    assert mesh.described().startswith("data=2 x model=4, drafter_rules ((")
    assert Topology(data=2, model=4).partitioning().described() == "data=2 x model=4"
