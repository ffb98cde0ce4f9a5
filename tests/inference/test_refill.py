"""Refilled rows: the records of lockstep, byte for byte, with one loop compiled."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from speccascade_t5x.decoding import api
from speccascade_t5x.inference import generate, refill
from speccascade_t5x.inference.generate import LoadedPair, Runner, Settings
from speccascade_t5x.inference.infer import Preempted, infer
from speccascade_t5x.interfaces import Bound, UserError

# Outputs of very different lengths, so that rows end far apart; 23 fill no whole number of batches.
WORDS = ["ja", "grusse aus munchen", "schliessen", "nein", "uber die grosse", "offnen sie die datei", "abbrechen"]
LINES = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 2])[:31] for i in range(23)]
SHAPE = {"max_input_len": 32, "max_len": 32, "draft_len": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def pair() -> LoadedPair:
    return generate.load("restore_de_pair")


@pytest.fixture
def lines(tmp_path) -> str:
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n", "utf-8")
    return str(tmp_path / "lines.txt")


def predictions(folder: Path) -> bytes:
    return (folder / "lines-predict.jsonl-00000-of-00001").read_bytes()


def batches(pair: LoadedPair, settings: Settings):
    runner = Runner(pair, settings)
    return runner, runner.batches([runner.prompt_form.encode(i, line, "") for i, line in enumerate(LINES)])


def test_the_files_are_those_of_lockstep(pair, lines, tmp_path):
    lockstep = infer(pair, Settings(**SHAPE), tmp_path / "lockstep", input=lines, batches_per_chunk=2)
    seen = []
    refilled = infer(
        pair, Settings(**SHAPE), tmp_path / "refilled", input=lines, batches_per_chunk=2, refill=True,
        progress=lambda examples, total, rates: seen.append(examples),
    )  # fmt: skip
    assert predictions(tmp_path / "refilled") == predictions(tmp_path / "lockstep")
    assert refilled.metrics == lockstep.metrics
    assert len({len(record["tokens"]) for record in refilled.records}) > 5  # or nothing was ever refilled
    assert sum(seen) == len(LINES) and len(seen) == -(-len(LINES) // SHAPE["batch_size"])  # one turn per batch
    assert (lockstep.timing["compiled_shapes"], refilled.timing["compiled_shapes"]) == (1, 1)
    traced = [function._cache_size() for function in (api.start, api.run, api.run_queue, api.finish)]
    again = infer(pair, Settings(**SHAPE, seed=1), input=lines, refill=True)
    assert again.timing["compile_s"] == 0 and again.records != refilled.records
    assert [function._cache_size() for function in (api.start, api.run, api.run_queue, api.finish)] == traced


def test_rows_move_before_the_slowest_has_ended(pair):
    """The first records that come are not those of the first batch, but for a batch that fills no second one."""
    runner, queue = batches(pair, Settings(**SHAPE))
    first, *_ = refill.decode(runner, queue)
    assert set(first) != set(queue[0].example_ids.tolist()) and len(first) == SHAPE["batch_size"]
    alone = list(refill.decode(runner, queue[:1]))
    assert [set(records) for records in alone] == [set(queue[0].example_ids.tolist())]
    assert alone[0] == runner.decode(queue[0])


def test_patience_grows_with_what_a_pause_costs_beside_an_output(pair):
    """k = B sqrt(2 c / R) is where (k - 1) / 2 rows idle, shared pauses and the rest are least."""
    runner, batched = batches(pair, Settings(**SHAPE))
    queue = refill._Queue(runner, batched)
    assert queue._patience(64) == 8 and queue._patience(4) == 1  # nothing known yet
    for rounds in (2, 7, 37):
        queue.ended, queue.rounds = 10, 10 * rounds
        k = np.arange(1, 65)
        cost = (k - 1) / 2 + refill.PAUSE_ROUNDS * (64 / rounds) * 64 / k  # idle rows of a round, plus pauses in rows
        assert abs(queue._patience(64) - k[np.argmin(cost)]) <= 1


def test_a_refilled_run_told_to_stop_continues_to_the_same_bytes(pair, lines, tmp_path):
    def stop() -> bool:
        return len(list((tmp_path / "out").rglob("*.jsonl"))) >= 2

    job = {"input": lines, "batches_per_chunk": 1, "refill": True}
    with pytest.raises(Preempted, match=r"told to stop; \d of 6 chunks are kept: the same command continues"):
        infer(pair, Settings(**SHAPE), tmp_path / "out", stop=stop, **job)
    kept = sorted(path.name for path in (tmp_path / "out").rglob("*.jsonl"))
    assert 0 < len(kept) < 6 and not list((tmp_path / "out").rglob("*.partial"))
    assert not (tmp_path / "out" / "lines-metrics.json").exists()
    rest = infer(pair, Settings(**SHAPE), tmp_path / "out", **job)
    assert rest.timing["resumed"] and rest.timing["tokens_decoded"] < sum(len(r["tokens"]) for r in rest.records)
    whole = infer(pair, Settings(**SHAPE), tmp_path / "whole", input=lines, batches_per_chunk=1)
    assert predictions(tmp_path / "out") == predictions(whole.predictions.parent)
    with pytest.raises(Preempted, match="nothing is kept"):
        infer(pair, Settings(**SHAPE), input=lines, stop=lambda: True)


def test_nan_names_the_example(pair, lines):
    broken = generate.load("restore_de_pair")
    broken.verifier = Bound(pair.verifier.model, jax.tree.map(lambda leaf: leaf * float("nan"), pair.verifier.params))
    broken._compiled = pair._compiled
    with pytest.raises(UserError, match="NaN while decoding example"):
        infer(broken, Settings(**SHAPE), input=lines, refill=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 2},
        {"buckets": (16, 32), "max_input_len": 32},
        {"rule": "token_v3", "alpha": 0.3, "verification": "block", "trace": True},
        {"method": "token_cascade", "rule": "chow", "alpha": 0.3},
        {"method": "sequence_cascade", "alpha": -0.1},
        {"drafter": "max_gram"},
        {"drafter": "cascade", "draft_len": 5},
        {"batch_size": 16},
    ],
)
def test_every_execution_and_drafter(pair, change):
    settings = Settings(**SHAPE | change)
    runner, queue = batches(pair, settings)
    expected, found = {}, {}
    for batch in queue:
        expected.update(runner.decode(batch))
    for some in refill.decode(Runner(pair, settings), queue):
        assert not set(some) & set(found)
        found.update(some)
    assert found == expected
