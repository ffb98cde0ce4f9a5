"""A tiny random T5 pair, for what table models cannot show: inputs, encoders and key/value caches."""

from __future__ import annotations

import functools

import jax
import numpy as np

from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import T5, T5Config, init_params

VOCAB = 24


@functools.cache
def pair() -> tuple[Bound, Bound]:
    """(drafter, verifier): random weights, logits scaled so that laws are neither flat nor certain."""
    bounds = []
    for seed, width, layers in ((0, 16, 1), (1, 24, 2)):
        config = T5Config(
            vocab_size=VOCAB,
            emb_dim=width,
            num_heads=2,
            num_encoder_layers=1,
            num_decoder_layers=layers,
            head_dim=8,
            mlp_dim=32,
            mlp_activations=("gelu", "linear"),
        )
        params = init_params(config, jax.random.key(seed))
        kernel = params["decoder"]["logits_dense"]["kernel"]
        # Both lean to the same tokens, so that drafts are sometimes right.
        lean = np.random.default_rng(5).normal(0, 0.3, (1, VOCAB)).astype(np.float32)
        params["decoder"]["logits_dense"]["kernel"] = 1.5 * kernel + lean
        bounds.append(Bound(T5(config), params))
    return bounds[0], bounds[1]


def sources(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Encoder inputs of ragged lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCAB, (rows, 8)).astype(np.int32)
    for row, length in enumerate(rng.integers(3, 9, rows)):
        tokens[row, length:] = 0
    return {"encoder_input_tokens": tokens}
