"""A tiny pair over bytes with random parameters and a trigram table, for tests that only need a pair to run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import architecture, bundle
from speccascade_t5x.drafting import build_table
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models.t5 import T5Config
from speccascade_t5x.text.vocabulary import ByteVocabulary

CONFIG = T5Config(
    vocab_size=384,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=4,
    mlp_dim=16,
    mlp_activations=("gelu", "linear"),
)
TEXTS = ["abcabcabcabc", "aaaabbbb", "xyzxyz"]


def model(seed: int, near: Bound | None = None, layers: int = 1) -> Bound:
    """Random parameters, or those of another model a little changed."""
    config = dataclasses.replace(CONFIG, num_decoder_layers=layers)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(draw, architecture.shapes(config))
    if near is not None:
        params = jax.tree.map(lambda old, new: old + 0.05 * new, near.params, params)
    return Bound(architecture.model(config), params)


def write(folder: Path, table: bool = True, drafter: bool = True) -> Path:
    """A bundle in `folder`."""
    verifier = model(0)
    checkpoints.save_bundle(
        folder,
        verifier=verifier,
        drafter=model(1, near=verifier) if drafter else None,
        vocabulary=ByteVocabulary(),
        feature_lengths={"inputs": 32, "targets": 12},
        decode={"draft_len": 3},
    )
    if table:
        ids = [[*ByteVocabulary().encode(text), 1] for text in TEXTS]
        bundle.store_table(folder, folder, build_table(ids, CONFIG.vocab_size, order=3), {"order": 3})
    return folder
