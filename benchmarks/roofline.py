"""Whether the planner for a slice predicts this machine: the same roofline, with the machine's own rates measured.

    python benchmarks/roofline.py [--repeats 5] [--processor_time] [--output roofline.json]

The rates are measured with programs of one kind of operation each, and nothing else: products of one row, of two and of
many with weights that together are larger than the caches give bytes/s as they lie, bytes/s where a product repacks
them, and FLOP/s; a softmax over the vocabulary gives the bytes/s of laws. `tpu.roofline` then predicts, for a random
model of T5-small's size in float32,

1. blocks of 1 to 16 tokens at batch 1 to 16, against `extend` in a loop on the device, and
2. rounds of speculation, in the decoding loop the runtime compiles, against rounds after the first: with a tiny random
   drafter, whose drafts are rejected, and with the verifier as its own drafter, whose drafts stand.

Arms and rates take turns, so that drift of the machine hits all alike; printed are medians and predicted / measured.
The accuracy asked for is 25 %. On a busy machine wall times say little, and the load average stands beside them: there
--processor_time runs every program on one core and counts the time that core gave it, rates and arms alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Both before jax loads.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--processor_time" in sys.argv:
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import decode
import jax
import jax.numpy as jnp
import machine
import numpy as np

from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import T5, init_params
from speccascade_t5x.planning import roofline
from speccascade_t5x.tpu.hardware import Chip

SLOTS = decode.MAX_LEN + 16  # what decode.step_seconds makes room for
ROUNDS_LEN = 48  # tokens of an output of part 2
TINY = dataclasses.replace(
    decode.T5_SMALL, emb_dim=64, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=128
)
BATCHES, BLOCKS = (1, 8, 16), (1, 4, 16)
MANY = 256  # rows of a product that arithmetic bounds
ACCURACY = 0.25

Timers = dict[str, Callable[[], float]]


class Rates:
    """What this machine can do, from timers that take turns with the arms."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0).standard_normal
        kernel = lambda *shape: jnp.asarray(draw(shape) / shape[0] ** 0.5, jnp.float32)  # noqa: E731
        # The sizes of an MLP, over and over: what one layer has left in the caches is gone when its turn comes again.
        self._kernels = [(kernel(512, 1024), kernel(1024, 512)) for _ in range(24)]
        self._values = sum(x.size for x in jax.tree.leaves(self._kernels))
        self._logits = kernel(32, decode.T5_SMALL.vocab_size)
        rows = {"one row": 1, "two rows": 2, "many rows": MANY}
        self.timers: Timers = {name: self._products(kernel(count, 512)) for name, count in rows.items()}
        self.timers["softmax"] = _timed(jax.jit(jax.nn.softmax), self._logits)

    def _products(self, x: jax.Array) -> Callable[[], float]:
        def chain(x: jax.Array, kernels: Any) -> jax.Array:
            for wide, narrow in kernels:
                x = (x @ wide) @ narrow
            return x

        return _timed(jax.jit(chain), x, self._kernels)

    def chip(self, seconds: dict[str, float]) -> Chip:
        """The machine as a chip, from the timers' seconds.

        Products of two rows and of many read, and repack, the same weights; what lies between them is arithmetic. A
        softmax is three reads and a write.
        """
        flops = 2 * self._values * (MANY - 2) / (seconds["many rows"] - seconds["two rows"])
        reading = {name: seconds[name] - 2 * self._values * rows / flops for name, rows in _FEW.items()}
        found = {name: 4 * self._values / left for name, left in reading.items()}
        laws = 4 * self._logits.nbytes / seconds["softmax"]
        rates = {"overlaps": False, "law_bandwidth": laws, "block_bandwidth": found["two rows"]}
        return Chip("cpu", 2**62, found["one row"], flops, float("inf"), 1, **rates)

    def beside(self, timers: Timers, repeats: int) -> tuple[Chip, dict[str, float]]:
        """(the machine as a chip, medians of the timers), measured in turn: what it does changes with its load."""
        found = machine.interleave({**self.timers, **timers}, repeats)
        middle = {name: statistics.median(values) for name, values in found.items()}
        return self.chip(middle), middle


_FEW = {"one row": 1, "two rows": 2}


def _timed(program: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """Seconds of a program, the better of two calls: the first finds the caches as the last arm has left them."""

    def measure() -> float:
        spent = []
        for _ in range(2):
            begin = decode.clock()
            jax.block_until_ready(program(*arguments))
            spent.append(decode.clock() - begin)
        return min(spent)

    return measure


def blocks(rates: Rates, model: Bound, repeats: int) -> tuple[Chip, list[dict[str, Any]]]:
    """Part 1: the machine as a chip, and each block measured and predicted."""
    sizes = [(batch, block) for batch in BATCHES for block in BLOCKS]
    timers = {f"{batch}x{block}": decode.step_seconds(model, batch, block, steps=4) for batch, block in sizes}
    chip, middle = rates.beside(timers, repeats)
    rows = []
    for batch, block in sizes:
        place = roofline.Place(chip)
        predicted = roofline.block_times(model.model.config, place, batch, block, SLOTS, decode.PROMPT_LEN)
        measured = middle[f"{batch}x{block}"]
        parts = {name: getattr(predicted, name) for name in ("weights", "attention", "laws")}
        row = {"batch": batch, "block": block, "measured_s": measured, "predicted_s": predicted.total}
        rows.append({**row, "parts_s": parts})
    return chip, rows


def rounds(rates: Rates, drafter: Bound, verifier: Bound, batch: int, draft_len: int, repeats: int) -> dict[str, Any]:
    """Part 2 for one pair: tokens/s of rounds after the first, measured and predicted."""
    config = decoding.DecodeConfig(max_len=ROUNDS_LEN, draft_len=draft_len)
    plain = decoding.Sampling(jnp.float32(1.0), jnp.int32(0), jnp.float32(1.0), jnp.float32(0.0))
    program = decoding.speculative_program(drafter, verifier, rules.Lossless(), config, plain)
    inputs = {"encoder_input_tokens": jnp.full((batch, decode.PROMPT_LEN), 5, jnp.int32)}
    arm = decode.Arm(program, [inputs])
    chip, _ = rates.beside({"decode": arm.seconds}, repeats)
    seconds = statistics.median(arm.steady_round())
    tokens = arm.committed / arm.row_rounds
    decoded = roofline.Decode(drafter.model.config, verifier.model.config, decode.PROMPT_LEN, ROUNDS_LEN)
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
    parser.add_argument("--processor_time", action="store_true", help="one core, and the time it gave us")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.processor_time:
        decode.clock = time.process_time
    how = ", processor time of one core" if options.processor_time else ""
    print(f"{machine.name()}{how}; load average {machine.load_average():.2f}", flush=True)
    verifier, tiny = (Bound(T5(c), init_params(c, jax.random.key(i))) for i, c in enumerate((decode.T5_SMALL, TINY)))
    rates = Rates()
    chip, found = blocks(rates, verifier, options.repeats)
    print(
        f"reads {chip.hbm_bandwidth / 1e9:.1f} GB/s, repacking {chip.block_bandwidth / 1e9:.1f} GB/s, "
        f"multiplies {chip.flops / 1e9:.1f} GFLOP/s, normalises {chip.law_bandwidth / 1e9:.1f} GB/s\n"
    )
    print("batch  block  measured ms  predicted ms  predicted / measured")
    for row in found:
        print(f"{row['batch']:>5}  {row['block']:>5}  {1e3 * row['measured_s']:>11.2f}  " + compared(row))
    head = "drafter  batch  draft_len  tokens/round  tokens/s (predicted)  round ms  predicted ms  predicted / measured"
    print(f"\n{head}", flush=True)
    speculated = []
    for name, drafter in (("tiny", tiny), ("itself", verifier)):
        for batch, draft_len in ((1, 5), (8, 3)):
            row = {"drafter": name, **rounds(rates, drafter, verifier, batch, draft_len, options.repeats)}
            speculated.append(row)
            speeds = f"{row['measured_tokens_per_s']:>8.1f} ({row['predicted_tokens_per_s']:.1f})"
            print(
                f"{name:>7}  {batch:>5}  {draft_len:>9}  {row['tokens_per_round']:>12.2f}  {speeds:>20}  "
                f"{1e3 * row['measured_s']:>8.2f}  " + compared(row),
                flush=True,
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
