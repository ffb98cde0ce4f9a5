"""Whether the planner for a slice predicts this machine: the same roofline, with its bandwidth and FLOP/s measured.

    python benchmarks/roofline.py [--repeats 5] [--output roofline.json]

Three figures are measured with programs of one operation each, and nothing else: bytes/s of reading a matrix far larger
than the caches (a matrix-vector product), FLOP/s of a matrix product that fits them, and bytes/s of a softmax over the
vocabulary. `tpu.roofline` then predicts, for a random model of T5-small's size in float32,

1. blocks of 1 to 16 tokens at batch 1 to 16, against `extend` in a loop on the device, and
2. rounds of speculation, in the decoding loop the runtime compiles, against rounds after the first: with a tiny random
   drafter, whose drafts are rejected, and with the verifier as its own drafter, whose drafts stand.

Arms and the three rates take turns, so that drift of the machine hits all alike; printed are medians and predicted /
measured. The accuracy asked for is 25 %. On a busy machine the figures say little: the load average stands beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax loads

import decode
import jax
import jax.numpy as jnp
import machine

from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import T5, init_params
from speccascade_t5x.tpu import roofline
from speccascade_t5x.tpu.hardware import Chip

SLOTS = decode.MAX_LEN + 16  # what decode.step_seconds makes room for
TINY = dataclasses.replace(
    decode.T5_SMALL, emb_dim=64, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=128
)
ACCURACY = 0.25


def reading() -> Callable[[], float]:
    """Bytes/s of a matrix-vector product over 256 MB."""
    matrix, vector = jnp.ones((8192, 8192), jnp.float32), jnp.ones((1, 8192), jnp.float32)
    product = jax.jit(jnp.dot)

    def measure() -> float:
        jax.block_until_ready(product(vector, matrix))
        begin = time.perf_counter()
        for _ in range(3):
            jax.block_until_ready(product(vector, matrix))
        return 3 * matrix.nbytes / (time.perf_counter() - begin)

    return measure


def multiplying() -> Callable[[], float]:
    """FLOP/s of a matrix product [64, 512] x [512, 1024]: as many rows as a block has tokens, kernels of the model."""
    left, right = jnp.ones((64, 512), jnp.float32), jnp.ones((512, 1024), jnp.float32)
    product = jax.jit(jnp.dot)

    def measure() -> float:
        jax.block_until_ready(product(left, right))
        begin = time.perf_counter()
        for _ in range(50):
            jax.block_until_ready(product(left, right))
        return 50 * 2 * left.size * right.shape[1] / (time.perf_counter() - begin)

    return measure


def normalising() -> Callable[[], float]:
    """Bytes/s of the passes of a softmax over a vocabulary: three reads and a write."""
    logits = jnp.ones((32, decode.T5_SMALL.vocab_size), jnp.float32)
    softmax = jax.jit(jax.nn.softmax)

    def measure() -> float:
        jax.block_until_ready(softmax(logits))
        begin = time.perf_counter()
        for _ in range(10):
            jax.block_until_ready(softmax(logits))
        return 10 * 4 * logits.nbytes / (time.perf_counter() - begin)

    return measure


def beside(timers: dict[str, Callable[[], float]], repeats: int) -> tuple[Chip, dict[str, float]]:
    """(the machine as a chip, medians of the timers), measured in turn: what the machine does changes with its load."""
    parts = {"reading": reading(), "multiplying": multiplying(), "normalising": normalising()}
    found = machine.interleave({**parts, **timers}, repeats)
    middle = {name: statistics.median(values) for name, values in found.items()}
    rates = {"overlaps": False, "law_bandwidth": middle["normalising"]}
    return Chip("cpu", 2**62, middle["reading"], middle["multiplying"], float("inf"), 1, **rates), middle


def blocks(model: Bound, repeats: int) -> tuple[Chip, list[dict[str, Any]]]:
    """Part 1: the machine as a chip, and each block measured and predicted."""
    sizes = [(batch, block) for batch in (1, 4, 16) for block in (1, 4, 16)]
    timers = {f"{batch}x{block}": decode.step_seconds(model, batch, block, steps=8) for batch, block in sizes}
    chip, middle = beside(timers, repeats)
    rows = []
    for batch, block in sizes:
        place = roofline.Place(chip)
        predicted = roofline.block_times(model.model.config, place, batch, block, SLOTS, decode.PROMPT_LEN).total
        measured = middle[f"{batch}x{block}"]
        rows.append({"batch": batch, "block": block, "measured_s": measured, "predicted_s": predicted})
    return chip, rows


def rounds(drafter: Bound, verifier: Bound, batch: int, draft_len: int, repeats: int) -> dict[str, Any]:
    """Part 2 for one pair: tokens/s of rounds after the first, measured and predicted."""
    config = decoding.DecodeConfig(max_len=decode.MAX_LEN, draft_len=draft_len)
    plain = decoding.Sampling(jnp.float32(1.0), jnp.int32(0), jnp.float32(1.0), jnp.float32(0.0))
    program = decoding.speculative_program(drafter, verifier, rules.Lossless(), config, plain)
    inputs = {"encoder_input_tokens": jnp.full((batch, decode.PROMPT_LEN), 5, jnp.int32)}
    arm = decode.Arm(program, [inputs])
    chip, _ = beside({"decode": arm.seconds}, repeats)
    seconds = statistics.median(arm.steady_round())
    tokens = arm.committed / arm.row_rounds
    decoded = roofline.Decode(drafter.model.config, verifier.model.config, decode.PROMPT_LEN, decode.MAX_LEN)
    predicted = roofline.round_seconds(decoded, roofline.Place(chip), batch, draft_len)
    return {
        "batch": batch,
        "draft_len": draft_len,
        "tokens_per_round": tokens,
        "measured_tokens_per_s": batch * tokens / seconds,
        "predicted_tokens_per_s": batch * tokens / predicted,
        "measured_s": seconds,
        "predicted_s": predicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds per arm")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    print(f"{machine.name()}; load average {machine.load_average():.2f}")
    verifier, tiny = (Bound(T5(c), init_params(c, jax.random.key(i))) for i, c in enumerate((decode.T5_SMALL, TINY)))
    chip, found = blocks(verifier, options.repeats)
    print(f"reads {chip.hbm_bandwidth / 1e9:.1f} GB/s, multiplies {chip.flops / 1e9:.1f} GFLOP/s, "
          f"normalises {chip.law_bandwidth / 1e9:.1f} GB/s\n")
    print("batch  block  measured ms  predicted ms  predicted / measured")
    for row in found:
        print(f"{row['batch']:>5}  {row['block']:>5}  {1e3 * row['measured_s']:>11.2f}  " + compared(row))
    head = "drafter  batch  draft_len  tokens/round  tokens/s (predicted)  round ms  predicted ms  predicted / measured"
    print(f"\n{head}")
    speculated = []
    for name, drafter in (("tiny", tiny), ("itself", verifier)):
        for batch, draft_len in ((1, 5), (8, 3)):
            row = {"drafter": name, **rounds(drafter, verifier, batch, draft_len, options.repeats)}
            speculated.append(row)
            rates = f"{row['measured_tokens_per_s']:>8.1f} ({row['predicted_tokens_per_s']:.1f})"
            print(
                f"{name:>7}  {batch:>5}  {draft_len:>9}  {row['tokens_per_round']:>12.2f}  {rates:>20}  "
                f"{1e3 * row['measured_s']:>8.2f}  " + compared(row)
            )
    ratios = [row["predicted_s"] / row["measured_s"] for row in (*found, *speculated)]
    inside = sum(abs(ratio - 1) <= ACCURACY for ratio in ratios)
    print(f"\nwithin {ACCURACY:.0%}: {inside} of {len(ratios)}; load average now {machine.load_average():.2f}")
    if options.output:
        content = {"machine": machine.name(), "chip": dataclasses.asdict(chip), "blocks": found, "rounds": speculated}
        options.output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def compared(row: dict[str, Any]) -> str:
    """The predicted time, and its ratio to the measured one."""
    return f"{1e3 * row['predicted_s']:>12.2f}  {row['predicted_s'] / row['measured_s']:>20.2f}"


if __name__ == "__main__":
    main()
