"""Tiny models, and a writer of native T5X checkpoints to damage."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore

from speccascade_t5x.checkpoints import architecture, flat_params
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models.t5 import T5Config

TINY = T5Config(
    vocab_size=384,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    head_dim=3,
    mlp_dim=16,
    mlp_activations=("gelu", "linear"),
)


def make_model(config=TINY, seed=0):
    """A model with random parameters."""
    source = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(source.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    return Bound(architecture.model(config), jax.tree.map(draw, architecture.shapes(config)))


def assert_same(a, b):
    """Two models are equal to the last bit."""
    assert a.model == b.model
    ours, theirs = flat_params.flatten(a.params), flat_params.flatten(b.params)
    assert list(ours) == list(theirs)
    for name in ours:
        assert isinstance(ours[name], jax.Array) and ours[name].dtype == jnp.float32
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def write_npz(folder, model, **changes):
    """An npz folder; `changes` replace fields of the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **flat_params.flatten(model.params))
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(model.model.config), **changes}))


def spec_of(name, array, **kvstore):
    """The index entry of a tensor, as T5X writes it."""
    return {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": f"target.{name.replace('/', '.')}/", **kvstore},
        "metadata": {"shape": list(array.shape), "chunks": list(array.shape)},
    }


def write_native(folder, model, *, edit=lambda specs: None, chunks=None, **kvstore):
    """A native T5X checkpoint; `edit` may change the {name: spec} index before it is written."""
    flat = flat_params.flatten(model.params)
    specs = {}
    for name, array in flat.items():
        specs[name] = spec_of(name, array, **kvstore)
        path = folder / f"target.{name.replace('/', '.')}"
        compressor = {"id": "gzip", "level": 1}
        metadata = {
            "shape": array.shape,
            "chunks": chunks or array.shape,
            "dtype": "<f4",
            "compressor": compressor,
        }
        metadata["chunks"] = [min(c, n) for c, n in zip(metadata["chunks"], array.shape, strict=False)]
        store = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "metadata": metadata,
        }
        tensorstore.open(store, create=True).result().write(np.asarray(array)).result()
    edit(specs)
    write_index(folder, flat_params.nest(specs))
    return folder


def write_index(folder, target):
    folder.mkdir(parents=True, exist_ok=True)
    index = {
        "version": 3,
        "optimizer": {"target": target, "state": {"step": 3, "param_states": {}}},
    }
    (folder / "checkpoint").write_bytes(msgpack.packb(index))
