"""A T5 pair whose weights and caches are larger, shard by shard, than anything a decode step may send.

With B rows, T positions of a block, M devices of a group and H x K = 256, what may travel is [B, T, D] or [B, T, V],
and a shard of a kernel has D * 256 / M elements; so B * T < 256 / M tells the two apart. A cumulative sum over a split
vocabulary travels padded to 128 entries, [B, 128]: the embedding, V * D, is larger than that too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.decoding.compiled import CompiledDecoder
from speccascade_t5x.distributed.partitioning import Partitioning
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import T5, T5Config, init_params

VOCAB, WIDTH, ROWS, DRAFT_LEN = 32, 64, 8, 2
LARGEST_SENT = 4 * ROWS * (DRAFT_LEN + 1) * WIDTH  # bytes
CONFIG = T5Config(
    vocab_size=VOCAB,
    emb_dim=WIDTH,
    num_heads=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=32,
    mlp_dim=256,
    mlp_activations=("gelu", "linear"),
)
DECODE = decoding.DecodeConfig(max_len=12, draft_len=DRAFT_LEN)


@functools.cache
def pair() -> tuple[Bound, Bound]:
    """(drafter, verifier), random, the drafter a little off the verifier; laws neither flat nor certain."""
    params = init_params(CONFIG, jax.random.key(0))
    params["decoder"]["logits_dense"]["kernel"] *= 1.5
    noise = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.03 * noise.standard_normal(x.shape).astype(np.float32), params)
    return Bound(T5(CONFIG), moved), Bound(T5(CONFIG), params)


def inputs(seed: int = 0) -> dict[str, jax.Array]:
    """[ROWS, 16] encoder inputs of ragged lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCAB, (ROWS, 16)).astype(np.int32)
    for row, length in enumerate(rng.integers(4, 17, ROWS)):
        tokens[row, length:] = 0
    return {"encoder_input_tokens": jnp.asarray(tokens)}


def program(partitioning: Partitioning | None, rule: str = "lossless", alpha: float | None = None) -> decoding.Program:
    """The pair under a rule, on one device or on a mesh."""
    drafter, verifier = pair()
    if partitioning is not None:
        drafter, verifier = partitioning.put(drafter, drafter=True), partitioning.put(verifier)
    sampling = decoding.Sampling(jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.float32(0))
    return decoding.speculative_program(drafter, verifier, rules.by_name(rule, alpha), DECODE, sampling)


def compiled(partitioning: Partitioning | None, **options) -> tuple[decoding.Program, CompiledDecoder]:
    """The program and its decoder."""
    chosen = program(partitioning, **options)
    return chosen, CompiledDecoder(chosen, inputs(), partitioning)


def decode(chosen: decoding.Program, decoder: CompiledDecoder, seed: int = 0) -> decoding.Output:
    """The output of one batch, on the host."""
    ids = jnp.arange(ROWS, dtype=jnp.int32) + 100 * seed
    return jax.device_get(decoder(chosen, inputs(seed), jax.random.key(0), ids))
