"""Checkpoints with scanned layers, stacked here by hand after T5X's scalable_t5."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import architecture, flat_params, t5x_native, tensors
from speccascade_t5x.checkpoints.export import export
from speccascade_t5x.interfaces import Bound, UserError

from .tiny import TINY, assert_same, make_model, write_native

PER_LAYER = dataclasses.replace(TINY, relative_position_tables="per_layer")
HEADS, HEAD_DIM = TINY.num_heads, TINY.head_dim


def scalable(model, axis=1, scanned=True, tables=lambda i, table: table):
    """The tensors of a scalable_t5: heads apart, a position table per layer, and layers stacked along `axis`."""
    flat = {name: np.asarray(leaf) for name, leaf in flat_params.flatten(model.params).items()}
    layers = {"encoder": TINY.num_encoder_layers, "decoder": TINY.num_decoder_layers}
    for stack, count in layers.items():
        table = flat.pop(f"{stack}/relpos_bias/rel_embedding")
        flat |= {f"{stack}/layers_{i}/relpos_bias/rel_embedding": tables(i, table) for i in range(count)}
    for name, value in flat.items():
        if re.search(r"(query|key|value)/kernel$", name):
            flat[name] = value.reshape(-1, HEADS, HEAD_DIM)
        elif name.endswith("out/kernel"):
            flat[name] = value.reshape(HEADS, HEAD_DIM, -1)
    if scanned:
        for stack, count in layers.items():
            rests = [name.split("/", 2)[2] for name in flat if name.startswith(f"{stack}/layers_0/")]
            for rest in rests:
                parts = [flat.pop(f"{stack}/layers_{i}/{rest}") for i in range(count)]
                flat[f"{stack}/{stack}/{rest}"] = np.stack(parts, axis)
    return flat_params.nest({name: jnp.asarray(value) for name, value in flat.items()})


def save(folder, params):
    return write_native(folder / "checkpoint_1", Bound(None, params))


@pytest.mark.parametrize("scanned", [True, False])
def test_it_is_taken_apart(tmp_path, scanned):
    folder = save(tmp_path, scalable(make_model(), scanned=scanned))
    assert checkpoints.open_model(folder).scanned
    assert_same(checkpoints.load(folder), make_model())


def test_another_scan_axis_is_read_from_the_configuration(tmp_path):
    folder = save(tmp_path, scalable(make_model(), axis=0))
    with pytest.raises(UserError):
        checkpoints.load(folder)
    (tmp_path / "config.gin").write_text("network.T5Config:\n  scan_layers = True\n  param_scan_axis = 0\n")
    assert_same(checkpoints.load(folder), make_model())
    (tmp_path / "config.gin").write_text("network.T5Config.param_scan_axis = -1\n")
    with pytest.raises(UserError, match="param_scan_axis = -1 is not an axis"):
        checkpoints.load(folder)


def per_layer(model=None, scanned=True):
    """(tensors of a trained scalable_t5, the same model under our names): every layer has a table of its own."""
    model = model or make_model()
    grown = lambda i, table: table + i  # noqa: E731
    flat = {name: np.asarray(leaf) for name, leaf in flat_params.flatten(model.params).items()}
    for stack, count in (("encoder", TINY.num_encoder_layers), ("decoder", TINY.num_decoder_layers)):
        table = flat.pop(f"{stack}/relpos_bias/rel_embedding")
        flat |= {f"{stack}/layers_{i}/relpos_bias/rel_embedding": grown(i, table) for i in range(count)}
    ours = flat_params.nest({name: jnp.asarray(flat[name]) for name in sorted(flat)})
    return scalable(model, scanned=scanned, tables=grown), Bound(architecture.model(PER_LAYER), ours)


@pytest.mark.parametrize("scanned", [True, False])
def test_different_position_tables_are_kept(tmp_path, scanned):
    params, wanted = per_layer(scanned=scanned)
    folder = save(tmp_path, params)
    opened = checkpoints.open_model(folder)
    assert opened.scanned and opened.model.config == PER_LAYER
    assert_same(checkpoints.load(folder), wanted)


def test_a_configuration_decides_how_many_tables(tmp_path):
    folder = save(tmp_path, scalable(make_model()))  # all tables are the same
    (tmp_path / "config.gin").write_text("network.T5Config.relative_position_tables = 'per_layer'\n")
    assert checkpoints.load(folder).model.config == PER_LAYER
    folder = save(tmp_path / "trained", per_layer()[0])
    (folder / "config.gin").write_text("network.T5Config.relative_position_tables = 'shared'\n")
    with pytest.raises(UserError, match="different relative position tables .* 'shared'; correct or remove"):
        checkpoints.load(folder)


@pytest.mark.parametrize("form", ["bundle", "orbax", "t5x"])
def test_what_has_a_table_per_layer_is_written_and_read(tmp_path, form):
    params, wanted = per_layer()
    report = export(save(tmp_path, params), tmp_path / "made", form, vocabulary="bytes" if form == "bundle" else None)
    assert report.parameters == flat_params.count(wanted.params)
    again = checkpoints.open_model(tmp_path / "made")
    assert again.model.config == PER_LAYER
    assert_same(again.load(), wanted)


def test_the_native_export_is_the_scanned_original(tmp_path):
    params, _ = per_layer()
    export(save(tmp_path, params), tmp_path / "made", "t5x", verify=True)
    original, made = (t5x_native.read_tensors(f) for f in (tmp_path / "checkpoint_1", tmp_path / "made"))
    assert set(made) == set(original)
    for name, tensor in original.items():
        wanted = tensors.to_host(name, tensor, "original")
        np.testing.assert_array_equal(tensors.to_host(name, made[name], "made"), wanted, err_msg=name)


def test_hugging_face_has_no_table_per_layer(tmp_path):
    folder = save(tmp_path, per_layer()[0])
    with pytest.raises(UserError, match="one relative position table per stack"):
        export(folder, tmp_path / "made", "huggingface")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["checkpoint_1"]


@pytest.mark.parametrize("missing", ["encoder/layers_0", "decoder/layers_1"])
def test_a_missing_table_is_named(tmp_path, missing):
    params, _ = per_layer(scanned=False)
    stack, layer = missing.split("/")
    del params[stack][layer]["relpos_bias"]
    with pytest.raises(UserError, match=f"{missing}/relpos_bias/rel_embedding"):
        checkpoints.load(save(tmp_path, params))


def test_stacks_of_different_heights(tmp_path):
    params = scalable(make_model())
    kernel = params["decoder"]["decoder"]["mlp"]["wo"]["kernel"]
    params["decoder"]["decoder"]["mlp"]["wo"]["kernel"] = jnp.repeat(kernel, 2, axis=1)
    with pytest.raises(UserError, match="'decoder/decoder/mlp/wo/kernel' holds 4 layers but .* 2"):
        checkpoints.load(save(tmp_path, params))
