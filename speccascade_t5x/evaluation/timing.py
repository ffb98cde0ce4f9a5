"""Wall times: all timed points take turns on the same few examples, so that drift of the machine affects all alike.

A block is as many examples of one padded length as a batch holds. In each of its rounds every point decodes every
example by itself (batch 1) and then all of them at once (batch B); which point begins moves on with every example, and
the seed with every round. Programs are compiled, and every point is run once in every shape, before anything is
measured. A block is stored whole.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from speccascade_t5x.core import accounting
from speccascade_t5x.data import batching
from speccascade_t5x.data.examples import Example
from speccascade_t5x.evaluation.cells import CellStore
from speccascade_t5x.inference import measuring
from speccascade_t5x.inference.generate import LoadedPair, Runner, program_config
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import Bound


def timed_items(halves: Mapping[str, Sequence[int]], count: int, seed: int = 0) -> list[int]:
    """The timed subset: items drawn at random, from both halves by turns, so that each half has its own."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.asarray(places)).tolist() for places in halves.values()]
    turns = [place for pair in zip(*drawn, strict=False) for place in pair]
    return turns[:count]


class Stopwatch:
    """Times points of a sweep.

    Args:
      pair: what decodes.
      points: {name: settings}.
      prompts: of all items, by index.
      items: the timed subset.
      repeats: rounds per block.
      seeds: of the random keys, one per round and in turn; None keeps each point's own.
    """

    def __init__(
        self,
        pair: LoadedPair,
        points: Mapping[str, Settings],
        prompts: Mapping[int, Example],
        items: Sequence[int],
        repeats: int,
        seeds: Sequence[int] | None = None,
    ):
        self.pair, self.repeats, self.items, self.seeds = pair, repeats, list(items), seeds
        self.points = dict(points)
        self._prompts = prompts
        any_of_them = next(iter(self.points.values()))  # all share batch size and padded lengths
        batches = Runner(pair, any_of_them).batches([prompts[i] for i in self.items])
        # A batch of several padded lengths would be decoded as several, none of them full.
        self.blocks = [batch.example_ids[batch.valid].tolist() for batch in batches]
        self._shapes = {batch.bucket: int(batch.example_ids[0]) for batch in batches}

    def measure(self, store: CellStore, tell: Callable[[int, int], None]) -> None:
        """Measures the blocks that are not on disk yet.

        Args:
          store: where they go.
          tell: called with (blocks done, blocks in all) before the first block and after each.
        """
        missing = [i for i in range(len(self.blocks)) if not self._whole(store.block(i), self.blocks[i])]
        tell(len(self.blocks) - len(missing), len(self.blocks))
        if not missing:
            return
        compile_s, warm_up_s = self._warm_up()
        for done, index in enumerate(missing, len(self.blocks) - len(missing) + 1):
            block = self._block(self.blocks[index], index)
            store.write_block(index, block | {"compile_s": compile_s, "warm_up_s": warm_up_s, "measured": time.time()})
            compile_s = warm_up_s = 0.0
            tell(done, len(self.blocks))

    def _whole(self, block: Mapping[str, Any] | None, items: Sequence[int]) -> bool:
        return block is not None and set(self.points) <= set(block["points"]) and block["items"] == items

    def _warm_up(self) -> tuple[float, float]:
        """Compiles everything and runs every point once. Returns (compile seconds, the other seconds)."""
        begin, compile_s = time.perf_counter(), 0.0
        for settings in self.points.values():
            for item in self._shapes.values():
                for size in {1, settings.batch_size}:
                    compile_s += self._run(settings, [item], size).timing.compile_s
        return round(compile_s, 3), round(time.perf_counter() - begin - compile_s, 3)

    def _run(self, settings: Settings, items: Sequence[int], size: int) -> Runner:
        """Decodes items in batches of `size` and returns the runner, which knows the time and the counters."""
        runner = Runner(self.pair, dataclasses.replace(settings, batch_size=size))
        for batch in runner.batches([self._prompts[i] for i in items]):
            runner.decode(batch)
        return runner

    def _block(self, items: Sequence[int], index: int) -> dict[str, Any]:
        names = list(self.points)
        found: dict[str, dict[str, list]] = {
            name: {"one_s": [], "one_tokens": [], "batch_s": [], "batch_tokens": []} for name in names
        }
        turn = index * len(items) * self.repeats
        for repeat in range(self.repeats):
            points = self._round(repeat)
            for row in found.values():
                row["one_s"].append([])
                row["one_tokens"].append([])
            for item in items:
                turn += 1
                for name in _from(names, turn):
                    runner = self._run(points[name], [item], 1)
                    found[name]["one_s"][-1].append(round(runner.timing.decode_s, 6))
                    found[name]["one_tokens"][-1].append(runner.totals["committed"])
            for name in _from(names, turn):
                runner = self._run(points[name], items, points[name].batch_size)
                found[name]["batch_s"].append(round(runner.timing.decode_s, 6))
                found[name]["batch_tokens"].append(runner.totals["committed"])
        return {"items": list(items), "repeats": self.repeats, "seeds": self.seeds, "points": found}

    def _round(self, repeat: int) -> dict[str, Settings]:
        """The points with the seed of a round."""
        if not self.seeds:
            return self.points
        seed = self.seeds[repeat % len(self.seeds)]
        return {name: dataclasses.replace(settings, seed=seed) for name, settings in self.points.items()}


def _from(names: Sequence[str], turn: int) -> list[str]:
    """The names in order, begun with another one at every turn."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def read(blocks: Sequence[Mapping[str, Any]], point: str) -> dict[str, Any] | None:
    """A point's times over all blocks; None where it was not timed.

    Returns:
      "items" [n] and "seconds" [n] (the median over rounds) at batch 1, "batch_seconds" [blocks] of whole batches;
      "tokens_per_s", over all rounds, at batch 1 and in whole batches.
    """
    known = [block for block in blocks if point in block["points"]]
    if not known:
        return None
    mine = [block["points"][point] for block in known]
    return {
        "items": [item for block in known for item in block["items"]],
        "seconds": np.concatenate([np.median(one["one_s"], axis=0) for one in mine]),
        "batch_seconds": np.array([np.median(one["batch_s"]) for one in mine]),
        "tokens_per_s": (_rate(mine, "one_tokens", "one_s"), _rate(mine, "batch_tokens", "batch_s")),
    }


def _rate(blocks: Sequence[Mapping[str, Any]], tokens: str, seconds: str) -> float:
    """Tokens over seconds of all rounds. Blocks of the first release hold the tokens of one round for all."""
    made = sum(np.broadcast_to(one[tokens], np.shape(one[seconds])).sum() for one in blocks)
    return float(made / sum(np.sum(one[seconds]) for one in blocks))


def step_costs(pair: LoadedPair, settings: Settings, batch: batching.Batch, widths: Sequence[int]) -> dict[str, Any]:
    """What the cost model needs: seconds of a drafter's step and of the verifier's blocks, at batch 1.

    Args:
      widths: tokens of the verifier's blocks; 1 is added.
    """
    one = batching.Batch(batch.encoder_input_tokens[:1], batch.example_ids[:1], batch.valid[:1], batch.bucket)
    room = program_config(pair, settings).room + max(widths)

    def seconds(bound: Bound, blocks: Sequence[int]) -> dict[str, float]:
        return {str(n): s for n, s in measuring.block_times(bound, one, 1, room, blocks).items()}

    found = {"verifier_s": seconds(pair.verifier, sorted({1, *widths}))}
    if pair.drafter is not None:
        found["drafter_s"] = seconds(pair.drafter, (1,))
    return found


def theory(costs: Mapping[str, Any], rates: Mapping[str, Any], draft_len: int, reads_drafter: bool) -> float | None:
    """Predicted gain over the verifier alone: tokens per round / (n_d c + v), with measured c, v and tokens per round.

    Source: the cost model of speculative decoding (Leviathan et al. 2023), n_d = draft_len + 1 where pi reads q.
    """
    verifier = {int(n): s for n, s in costs["verifier_s"].items()}
    if "drafter_s" not in costs or draft_len + 1 not in verifier:
        return None
    c = costs["drafter_s"]["1"] / verifier[1]
    v = verifier[draft_len + 1] / verifier[1]
    return rates["block_efficiency"] / ((draft_len + reads_drafter) * c + v)


def rates_of(found: Sequence[Mapping[str, Any]], places: Sequence[int] | None = None) -> dict[str, Any]:
    """Rates of some records, see `accounting.rates`, with acceptance by position."""
    chosen = found if places is None else [found[i] for i in places]
    totals = accounting.total(record["counts"] for record in chosen)
    positions = accounting.acceptance_by_position(record["source"] for record in chosen)
    return accounting.rates(totals) | {"acceptance_by_position": positions}
