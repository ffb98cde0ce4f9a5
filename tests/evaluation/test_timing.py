"""Wall times: what is timed together, that nothing is compiled while it is, and what is made of the blocks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from evaluation.synthetic import MAIN, point
from inference import small_pair
from speccascade_t5x.evaluation import timing
from speccascade_t5x.evaluation.analysis import Analyst
from speccascade_t5x.evaluation.cells import CellStore
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.settings import Settings

TEXTS = ["ab", "abc", "abcd", "a text of more than sixteen"]
ALONE = Settings(method="drafter", batch_size=2, buckets=(16, 32), max_len=6)
COSTS = {"verifier_s": {"1": 0.01, "6": 0.02}, "drafter_s": {"1": 0.001}}


@pytest.fixture(scope="module")
def watch(tmp_path_factory) -> timing.Stopwatch:
    pair = generate.load(small_pair.write(tmp_path_factory.mktemp("timing") / "pair", table=False))
    runner = generate.Runner(pair, ALONE)
    prompts = {i: runner.prompt_form.encode(i, text, "text") for i, text in enumerate(TEXTS)}
    return timing.Stopwatch(pair, {"alone": ALONE}, prompts, [0, 3, 1, 2], repeats=1)


def test_timed_items_are_drawn_and_not_the_first_ones():
    halves = {"choose": list(range(0, 100, 2)), "report": list(range(1, 100, 2))}
    drawn = timing.timed_items(halves, 16)
    assert drawn == timing.timed_items(halves, 16) != timing.timed_items(halves, 16, seed=1)
    assert len(set(drawn)) == 16 and all(sum(i in set(half) for i in drawn) == 8 for half in halves.values())
    assert max(drawn) > 50  # the lowest-numbered ones would be those below 16
    often = np.bincount(np.ravel([timing.timed_items(halves, 16, seed=seed) for seed in range(400)]), minlength=100)
    assert often.min() > 30 and often.max() < 110  # 64 expected of each, four standard deviations of 7.4 and more


def test_rounds_take_the_seeds_in_turn(watch):
    timed = timing.Stopwatch(
        watch.pair,
        {"alone": dataclasses.replace(ALONE, temperature=1.0)},
        watch._prompts,
        [0, 1],
        repeats=3,
        seeds=(7, 9),
    )
    made = []
    timed._run = lambda settings, items, size: made.append(settings.seed) or watch._run(settings, items, size)
    block = timed._block([0, 1], 0)
    assert made == [7] * 3 + [9] * 3 + [7] * 3 and block["seeds"] == (7, 9)
    tokens = block["points"]["alone"]["one_tokens"]
    assert np.shape(tokens) == (3, 2) and tokens[0] == tokens[2]


def test_a_block_has_one_padded_length_and_no_more_than_a_batch(watch):
    assert watch.blocks == [[0, 1], [2], [3]]


def test_whole_batches_keep_their_size_and_nothing_is_compiled_while_times_are_taken(watch, tmp_path):
    store, told = CellStore(tmp_path, {}), []
    watch.measure(store, lambda *done: told.append(done))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [store.block(i)["items"] for i in range(3)] == watch.blocks
    assert store.block(0)["compile_s"] > 0 and store.block(1)["compile_s"] == store.block(2)["compile_s"] == 0
    for item in (0, 3):  # each padded length was compiled by warming up, alone and in batches, though 3 is alone
        for size in (1, 2):
            assert watch._run(ALONE, [item], size).timing.compiled_shapes == 0
    watch.measure(store, lambda *done: told.append(done))
    assert told[-1] == (3, 3) and len(told) == 5  # all was there


def block(items: list[int], **seconds: float) -> dict:
    times = {"one_tokens": [10] * len(items), "batch_tokens": 10 * len(items)}
    points = {
        name: times | {"one_s": [[value] * len(items)], "batch_s": [value * len(items)]}
        for name, value in seconds.items()
    }
    return {"items": items, "repeats": 1, "points": points}


def test_a_point_added_later_is_compared_where_it_was_timed():
    """Killed while it times anew with one more point, a sweep has blocks of either kind."""
    halves = {"choose": [0, 2], "report": [1, 3]}
    blocks = [block([0, 1], verifier=0.4, opt_a1=0.1), block([2, 3], verifier=0.8)]
    analyst, verifier = Analyst(None, None, halves, "nll"), point("verifier", None, (80, 80), None)
    found = analyst._timed(point("opt", 1, (80, 80), None), verifier, blocks, None)
    assert found.speed_up["report"].value == pytest.approx(4) and found.batch_speed_up.value == pytest.approx(4)
    assert analyst._timed(point("opt", 2, (80, 80), None), verifier, blocks, None).speed_up == {}
    alone = analyst._timed(verifier, verifier, blocks, None)
    assert alone.seconds["report"].value == pytest.approx(0.6) and alone.batch_speed_up.value == 1.0


@pytest.mark.parametrize(
    ("settings", "gain"),
    [
        ({"rule": "lossless", "draft_len": 5}, 3.0 / (5 * 0.1 + 2)),
        ({"rule": "lossless", "draft_len": 9}, None),  # a length of its own, of which no step cost is known
        ({"rule": "lossless", "draft_len": 5, "draft_stop": "confidence"}, None),  # drafts end earlier
        ({"rule": "lossless", "draft_len": 5, "drafter": "max_gram"}, None),
    ],
)
def test_theory_is_told_of_plain_drafts_alone(settings, gain):
    blocks = [block([0, 1], verifier=0.4, lossless=0.1)]
    analyst = Analyst(None, None, {"choose": [0], "report": [1]}, "nll")
    verifier = point("verifier", None, (1, 1), None)
    row = {"settings": settings, "draft_len": MAIN.draft_len}
    found = analyst._timed(point("lossless", None, (1, 1), None, **row), verifier, blocks, COSTS)
    assert found.predicted == (None if gain is None else pytest.approx(gain))
