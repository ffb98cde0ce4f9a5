"""Refilled rows: the records of lockstep, byte for byte, with nothing compiled but a copy of rows."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from speccascade_t5x.decoding import api
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.runtime import generate, refill
from speccascade_t5x.runtime.generate import LoadedPair, Runner, Settings
from speccascade_t5x.runtime.infer import Preempted, infer

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
    return runner, runner.batches([runner.prompt(i, line, "") for i, line in enumerate(LINES)])


def test_the_files_are_those_of_lockstep(pair, lines, tmp_path):
    lockstep = infer(pair, Settings(**SHAPE), tmp_path / "lockstep", input=lines, batches_per_chunk=2)
    (decoder,) = pair._compiled.values()
    traced = [function._cache_size() for function in (api.start, api.run, api.finish, api.move)]
    seen = []
    refilled = infer(
        pair, Settings(**SHAPE), tmp_path / "refilled", input=lines, batches_per_chunk=2, refill=True,
        progress=lambda examples, total, rates: seen.append(examples),
    )  # fmt: skip
    assert predictions(tmp_path / "refilled") == predictions(tmp_path / "lockstep")
    assert refilled.metrics == lockstep.metrics
    assert len({len(record["tokens"]) for record in refilled.records}) > 5  # or nothing was ever refilled
    assert sum(seen) == len(LINES) and len(seen) > 2 * len(LINES) / SHAPE["batch_size"]  # handed out as they end
    # The decoder of lockstep served, with one more program: the copy of rows.
    assert list(pair._compiled.values()) == [decoder] and list(decoder._move) == [1]
    assert refilled.timing["compiled_shapes"] == 0
    assert [function._cache_size() for function in (api.start, api.run, api.finish, api.move)] == traced
    again = infer(pair, Settings(**SHAPE, seed=1), input=lines, refill=True)
    assert again.timing["compile_s"] == 0 and again.records != refilled.records


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
