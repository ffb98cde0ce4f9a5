"""Training with parameters and moments split over 'model': same losses, expected shardings, a resume into them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from speccascade_t5x.distributed.partitioning import Topology
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models.t5 import T5, param_shapes
from speccascade_t5x.training import optimizers, train_loop
from speccascade_t5x.training.train_loop import TrainConfig
from training.training import FAST, MODEL, Copying, quick_compiles

pytestmark = pytest.mark.sharding


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("programs")):
        yield


def config(steps: int, **changes) -> TrainConfig:
    return TrainConfig(**{"steps": steps, "optimizer": FAST, "log_every": 1, "checkpoint_every": 2} | changes)


def test_a_mesh_trains_as_one_device_and_resumes(devices, tmp_path):
    mesh = Topology(data=4, model=2).partitioning()
    whole = train_loop.train_loop(MODEL, Copying(16), config(4))
    first = train_loop.train_loop(MODEL, Copying(16), config(2), mesh=mesh, output_dir=tmp_path)
    rest = train_loop.train_loop(MODEL, Copying(16), config(4), mesh=mesh, output_dir=tmp_path)
    assert rest.resumed_from == 2
    losses = [row["loss"] for row in [*first.history, *rest.history]]
    np.testing.assert_allclose(losses, [row["loss"] for row in whole.history], rtol=1e-4)
    for found in (first, rest):
        kernel = found.bound.params["decoder"]["layers_0"]["mlp"]["wo"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec("model", None)
        assert kernel.addressable_shards[0].data.shape == (16, 16)


def test_moments_lie_where_their_parameters_do(devices):
    mesh = Topology(data=4, model=2).partitioning()
    model, shapes = T5(MODEL), param_shapes(MODEL)
    adam = optimizers.AdamW(optimizers.Schedule("constant", base=1e-3, warmup_steps=0))
    moments = jax.eval_shape(adam.transformation(4, shapes).init, shapes)
    placed = jax.tree.leaves(mesh.like_params(model, moments))
    where = {id(leaf): at for leaf, at in zip(jax.tree.leaves(moments), placed, strict=True)}
    split = [leaf.shape for leaf in jax.tree.leaves(moments) if "model" in where[id(leaf)].spec]
    params = mesh.params(model)
    expected = [
        leaf.shape
        for leaf, at in zip(jax.tree.leaves(shapes), jax.tree.leaves(params), strict=True)
        if "model" in at.spec
    ]
    assert sorted(split) == sorted(2 * expected)  # both moments


def test_a_batch_that_does_not_divide_is_refused(devices):
    with pytest.raises(UserError, match="a batch of 6 rows cannot be shared by 4 devices"):
        train_loop.train_loop(MODEL, Copying(6), config(2), mesh=Topology(data=4, model=2).partitioning())
