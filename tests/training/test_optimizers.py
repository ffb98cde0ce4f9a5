"""Adafactor and schedules against numpy written from the paper, and three steps of T5X itself."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
import tensorstore

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.training import optimizers, train_loop
from speccascade_t5x.training.losses import LossConfig
from speccascade_t5x.training.train_checkpoints import TrainState

SLOTS = ("v_row", "v_col", "v")


def oracle_adafactor(params, gradients, rate, steps_before=0, factor_at=128):
    """Adafactor, algorithms 4 and 5 of the paper, in float64: one update per gradient, starting without moments."""
    moments = dict.fromkeys(params)
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    for number, gradient in enumerate(gradients):
        beta = 1.0 - (steps_before + number + 1.0) ** -0.8
        for name, x in params.items():
            g = np.array(gradient[name], np.float64)
            squared = g**2 + 1e-30
            factored = x.ndim == 2 and min(x.shape) >= factor_at
            new = (squared.sum(axis=1), squared.sum(axis=0)) if factored else squared
            old = moments[name]
            if old is None:
                old = tuple(np.zeros_like(part) for part in new) if factored else np.zeros_like(new)
            if factored:
                moments[name] = tuple(beta * o + (1 - beta) * n for o, n in zip(old, new, strict=True))
                rows, columns = moments[name]
                estimate = np.outer(rows, columns) / rows.sum()
            else:
                estimate = moments[name] = beta * old + (1 - beta) * new
            update = g / np.sqrt(estimate)
            update /= max(1.0, np.sqrt(np.mean(update**2)))
            params[name] = x - rate(steps_before + number) * max(1e-3, np.sqrt(np.mean(x**2))) * update
    return params


@pytest.mark.parametrize("schedule", [optimizers.CONSTANT, optimizers.Schedule("rsqrt", base=1.0, warmup_steps=3)])
def test_adafactor_is_that_of_the_paper(schedule):
    random = np.random.default_rng(0)
    shapes = {"factored": (130, 200), "wide": (200, 129), "square": (128, 128), "narrow": (127, 400), "vector": (300,)}
    params = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params["tiny"] = np.full((4, 4), 1e-5, np.float32)  # below the least scale
    gradients = [
        {name: random.normal(size=value.shape).astype(np.float32) * 10 ** random.uniform(-4, 2)
         for name, value in params.items()}
        for _ in range(5)
    ]  # fmt: skip
    optimizer = optimizers.Adafactor(schedule).transformation(100, params)
    found, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
    assert state[0].v_row["factored"].shape == (130,) and state[0].v["factored"].shape == (1,)
    assert state[0].v["narrow"].shape == (127, 400)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, found)
        found = optax.apply_updates(found, updates)
    expected = oracle_adafactor(params, gradients, schedule.rate(100))
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.abs(expected[name] - params[name]).max() > 1e-6  # there was something to get right


def test_three_dimensions_are_refused():
    with pytest.raises(UserError, match=r"\['stacked'\] has shape \(2, 3, 4\)"):
        optimizers.Adafactor().transformation(1, {"stacked": np.zeros((2, 3, 4))})


def t5x_slots(folder: Path) -> tuple[int, dict[str, dict]]:
    """Step and Adafactor slots of a native T5X checkpoint, as trees of arrays."""

    def extension(code, data):
        shape, dtype, buffer = msgpack.unpackb(data)
        value = np.frombuffer(buffer, dtype)
        return value.reshape(shape) if code == 1 else value[0]

    index = msgpack.unpackb((folder / "checkpoint").read_bytes(), ext_hook=extension, strict_map_key=False)
    state = index["optimizer"]["state"]

    def slot(node, name):
        if "v_row" not in node:
            return {key: slot(inner, name) for key, inner in node.items()}
        value = node[name]
        if isinstance(value, dict):
            path = folder / value["kvstore"]["path"]
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
            value = tensorstore.open(spec, open=True, read=True).result().read().result()
        return jnp.asarray(value)

    return int(state["step"]), {name: slot(state["param_states"], name) for name in SLOTS}


class Repeated:
    """One batch, at every step."""

    padding_share = 0.0
    fingerprint = "fixture"

    def __init__(self, batch):
        self.batch = batch

    def __call__(self, step):
        return self.batch


@pytest.mark.parametrize("fixture", ["t5x_native", "t5x_v1_0"])
def test_three_more_steps_of_a_t5x_run(fixtures, fixture):
    """From T5X's own train state (parameters, moments, step) to the losses and parameters T5X reached."""
    folder = fixtures / fixture
    expected = np.load(folder / "train_continue.npz")
    bound = checkpoints.load(folder / "checkpoint_3")
    step, slots = t5x_slots(folder / "checkpoint_3")
    assert step == 3
    assert all(float(jnp.max(leaf)) > 0 for leaf in jax.tree.leaves(slots["v"]))
    batch = {name.partition("/")[2]: expected[name] for name in expected.files if name.startswith("batch/")}
    rate = optimizers.Schedule("constant", base=float(expected["learning_rate"]), warmup_steps=0)
    config = train_loop.TrainConfig(
        steps=6, optimizer=optimizers.Adafactor(rate), loss=LossConfig(z_loss=1e-4), log_every=1
    )

    factored, *rest = config.optimizer.transformation(config.steps, bound.params).init(bound.params)
    assert jax.tree.map(jnp.shape, factored.v) == jax.tree.map(jnp.shape, slots["v"])
    state = TrainState(jnp.int32(step), bound.params, (factored._replace(count=jnp.int32(step), **slots), *rest))
    result = train_loop.train_loop(bound.model.config, Repeated(batch), config, start_from=state)
    assert [row["step"] for row in result.history] == [4, 5, 6]
    weight = float(batch["decoder_loss_weights"].sum())
    for name, scale in (("loss", 1.0), ("z_loss", weight), ("cross_entropy", weight)):
        found = [scale * row[name] for row in result.history]
        theirs = expected[f"losses/{name.replace('cross_entropy', 'cross_ent_loss')}"]
        np.testing.assert_allclose(found, theirs, rtol=1e-5, err_msg=name)
    flat = flat_params.flatten(result.bound.params)
    wanted = {name.partition("/")[2]: expected[name] for name in expected.files if name.startswith("params_after/")}
    assert flat.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(flat[name], value, atol=2e-5, err_msg=name)
