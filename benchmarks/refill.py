"""Tokens/s of refilled rows against lockstep batches, on a real task with the packaged pair.

    SPECCASCADE_L10N_DIR=FOLDER python benchmarks/refill.py [--limit 512] [--repeats 5] [--batch_sizes 16,64]
        [--methods speculative,verifier] [--output refill.json]

Decodes restore_de's test split (or its first examples) in both ways, in turn, so that drift of the machine hits both
alike; every repeat gives one ratio of tokens/s, refilled over lockstep. Compiling is done before and not counted;
reading inputs (encoders), the loop, moving rows and fetching records all are. That the records are the same is checked
in every repeat. Beside the ratio stands what bounds it: rounds a row took over rounds its batch took in lockstep (the
share of rows at work), which needs no clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax loads; name another platform to measure it

import machine
import numpy as np

from speccascade_t5x.cli import gin_flags
from speccascade_t5x.data.batching import Batch
from speccascade_t5x.inference import datasets, generate, refill
from speccascade_t5x.inference.generate import LoadedPair, Runner, Settings


class Arm:
    """One way to decode the batches; a call returns tokens/s."""

    def __init__(self, pair: LoadedPair, settings: Settings, batches: list[Batch], refilled: bool):
        self.pair, self.settings, self.batches, self.refilled = pair, settings, batches, refilled
        self.records: dict[int, dict[str, Any]] = {}

    def __call__(self) -> float:
        runner, self.records = Runner(self.pair, self.settings), {}
        begin = time.perf_counter()
        source = refill.decode(runner, self.batches) if self.refilled else map(runner.decode, self.batches)
        for found in source:
            self.records.update(found)
        seconds = time.perf_counter() - begin - runner.timing.compile_s
        return runner.totals["committed"] / seconds


def rows_at_work(batches: list[Batch], records: dict[int, dict[str, Any]]) -> float:
    """Share of rows, over all rounds of lockstep batches, that were not done yet."""
    rounds = [[records[int(i)]["counts"]["rounds"] for i in batch.example_ids[batch.valid]] for batch in batches]
    width = len(batches[0].valid)
    return sum(map(sum, rounds)) / sum(max(found) * width for found in rounds)


def measure(pair: LoadedPair, settings: Settings, limit: int | None, repeats: int) -> dict[str, Any]:
    """Both arms at one batch size."""
    runner = Runner(pair, settings)
    prompts = datasets.read(runner.prompt_form, "restore_de", "test", None, limit).prompts
    batches = runner.batches(prompts)
    arms = {name: Arm(pair, settings, batches, name == "refilled") for name in ("lockstep", "refilled")}
    speeds = machine.interleave(arms, repeats)
    if arms["lockstep"].records != arms["refilled"].records:
        raise SystemExit("the records differ")
    ratios = np.array(speeds["refilled"]) / np.array(speeds["lockstep"])
    return {
        "method": settings.method,
        "batch_size": settings.batch_size,
        "examples": len(prompts),
        "batches": len(batches),
        "rows_at_work_in_lockstep": rows_at_work(batches, arms["lockstep"].records),
        "tokens_per_s": speeds,
        "ratio": machine.spread(ratios.tolist()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch_sizes", default="16,64")
    parser.add_argument("--methods", default="speculative,verifier")
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    gin_flags.load(["runs/infer_restore_de.gin"], [])  # registers the task, with the rows the pair was trained on
    pair = generate.load("restore_de_pair")
    print(machine.name(), f"| load average {machine.load_average():.2f}")
    widths = "{:<12} {:>5} {:>12} {:>15} {:>15}   {}"
    print(widths.format("method", "batch", "rows at work", "lockstep tok/s", "refilled tok/s", "ratio (least to most)"))
    found = []
    for method, size in itertools.product(flags.methods.split(","), map(int, flags.batch_sizes.split(","))):
        result = measure(pair, Settings(method=method, batch_size=size, truncate=True), flags.limit, flags.repeats)
        found.append(result)
        speeds = [f"{machine.spread(result['tokens_per_s'][name])[0]:.1f}" for name in ("lockstep", "refilled")]
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*result["ratio"])
        print(widths.format(method, size, f"{result['rows_at_work_in_lockstep']:.3f}", *speeds, ratio), flush=True)
    if flags.output:
        flags.output.write_text(json.dumps({"machine": machine.name(), "results": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
