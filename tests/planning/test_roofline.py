"""The roofline against figures worked out by hand, and what the planner says of them."""

from __future__ import annotations

import dataclasses

import pytest

from speccascade_t5x.models import T5Config
from speccascade_t5x.planning import roofline
from speccascade_t5x.tpu import hardware

# One decoder layer of width 8 with 2 heads of 4, an MLP of 16 (gated), 32 logits.
SMALL = T5Config(
    vocab_size=32, emb_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=4, mlp_dim=16,
    mlp_activations=("gelu", "linear"), dtype="bfloat16",
)  # fmt: skip
# 1000 bytes/s, 2000 FLOP/s, links of 100 bytes/s: seconds one can check in the head.
CHIP = hardware.Chip("toy", 10**6, 1000.0, 2000.0, 100.0, 2)
KERNELS = 4 * 64 + 2 * 64 + 3 * 128  # self-attention, query and output of cross-attention, MLP
SCALES = 3 * 8 + 8  # three norms and the last one
LOGITS, TABLE = 8 * 32, 2 * 32  # both float32 whatever the activations are


def test_what_a_step_reads():
    found = roofline.load(SMALL, roofline.Place(CHIP))
    assert found.weight_count == KERNELS + SCALES + LOGITS + TABLE
    assert found.weight_bytes == 2 * (KERNELS + SCALES) + 4 * (LOGITS + TABLE)
    assert (found.heads, found.reductions, found.gathers_laws) == (2, 0, False)
    encoder = 4 * 64 + 3 * 128 + 2 * 8 + 8 + 2 * 32
    everything = KERNELS + SCALES + LOGITS + TABLE + 2 * 64 + encoder + 32 * 8
    assert found.resident_bytes == 4 * everything + 2 * (KERNELS + SCALES)


def test_a_block_on_one_chip():
    times = roofline.block_times(SMALL, roofline.Place(CHIP), rows=3, block=2, slots=10, input_len=6)
    count = KERNELS + SCALES + LOGITS + TABLE
    # 6 tokens: arithmetic (2 x values x 6 / 2000) takes longer than reading them.
    assert times.weights == pytest.approx(2 * count * 6 / 2000)
    cached = 2 * 4 * (10 + 6)  # of keys, and of values
    # 2 bytes x keys and values x 3 rows, against two products of 2 FLOPs for each of 6 tokens.
    assert times.attention == pytest.approx(max(2 * 2 * 3 * cached / 1000, 4 * 6 * cached / 2000))
    assert times.laws == pytest.approx(6 * 4 * 6 * 32 / 1000)
    slow = roofline.Place(dataclasses.replace(CHIP, law_bandwidth=10.0))
    assert roofline.block_times(SMALL, slow, 3, 2, 10, 6).laws == pytest.approx(6 * 4 * 6 * 32 / 10)
    assert times.network == 0.0
    assert times.total == pytest.approx(times.weights + times.attention + times.laws)
    alone = roofline.block_times(SMALL, roofline.Place(CHIP), rows=1, block=1, slots=10, input_len=6)
    reading = (2 * (KERNELS + SCALES) + 4 * (LOGITS + TABLE)) / 1000
    assert alone.weights == pytest.approx(reading)  # now this takes longer
    serial = roofline.Place(dataclasses.replace(CHIP, overlaps=False))
    one = roofline.block_times(SMALL, serial, rows=1, block=1, slots=10, input_len=6)
    assert one.weights == pytest.approx(reading + 2 * count / 2000)
    assert one.attention == pytest.approx(2 * 2 * cached / 1000 + 4 * cached / 2000)
    repacking = roofline.Place(dataclasses.replace(serial.chip, block_bandwidth=500.0))
    assert roofline.block_times(SMALL, repacking, 1, 1, 10, 6) == one  # one row is read as it lies
    for rows, block in ((1, 2), (2, 1)):
        several = roofline.block_times(SMALL, repacking, rows, block, 10, 6).weights
        assert several == pytest.approx(2 * reading + 2 * count * 2 / 2000)


def test_a_block_on_a_mesh():
    place = roofline.Place(CHIP, data=2, model=2)
    found = roofline.load(SMALL, place)
    # Kernels, relative positions and logits are split over two chips; the four norms are not.
    assert found.weight_count == (KERNELS + LOGITS + 2 * 32) // 2 + 4 * 8
    assert (found.heads, found.reductions, found.gathers_laws) == (1, 3 + 1, True)
    times = roofline.block_times(SMALL, place, rows=3, block=1, slots=10, input_len=6)
    rows = 2  # of 3, on the fuller group
    hidden, laws = 2 * rows * 8, 4 * rows * 32
    gather = lambda nbytes: 0.5 * nbytes / 200 + 1e-6  # noqa: E731 half of it over two directions, and one hop
    assert times.network == pytest.approx(4 * 2 * gather(hidden) + gather(laws))
    assert times.laws == pytest.approx(6 * laws / 1000)


def test_heads_that_do_not_divide_stay_whole():
    place = roofline.Place(CHIP, data=1, model=4)
    found = roofline.load(SMALL, place)
    assert found.heads == 2 and found.reductions == 1 + 1  # the MLP, and the embedding
    replicated = tuple((name, None) for name, _ in place.rules)
    whole = roofline.load(SMALL, dataclasses.replace(place, drafter_rules=replicated), drafter=True)
    assert (whole.reductions, whole.gathers_laws) == (0, False)
    assert whole.weight_count == KERNELS + SCALES + LOGITS + TABLE


def test_a_round_counts_every_step_of_the_draft():
    decode = roofline.Decode(SMALL, SMALL, input_len=6, max_len=8)
    place, slots = roofline.Place(CHIP), 8 + 3 + 2
    step = lambda block: roofline.block_times(SMALL, place, 2, block, slots, 6).total  # noqa: E731
    assert roofline.round_seconds(decode, place, 2, 3) == pytest.approx(step(4) + step(2) + 2 * step(1))
    reads = dataclasses.replace(decode, reads=True, overhead_s=5.0)
    assert roofline.round_seconds(reads, place, 2, 3) == pytest.approx(step(4) + 4 * step(1) + 5.0)


def test_tokens_and_what_has_to_stand():
    tokens = roofline.expected_tokens([0.5], [1, 2])
    assert tokens == pytest.approx({1: 1.5, 2: 1.75})
    assert roofline.expected_tokens([0.5, 0.0], [2])[2] == pytest.approx(1.5)
    assert roofline.break_even(1.5, 1) == pytest.approx(0.5)
    assert roofline.break_even(1.75, 2) == pytest.approx(0.5)
    assert roofline.break_even(2.01, 1) is None
    assert roofline.break_even(0.9, 1) == 0.0


def test_predictions_add_up_and_say_where_it_stops():
    tiny = dataclasses.replace(SMALL, num_heads=1, head_dim=2, mlp_dim=2, num_decoder_layers=1)
    decode = roofline.Decode(tiny, dataclasses.replace(SMALL, num_decoder_layers=12), input_len=6, max_len=8)
    batches = (1, 4, 64)
    found = roofline.predict(decode, roofline.Place(CHIP), roofline.expected_tokens([0.8], [4]), batches)
    assert [(each.batch, each.draft_len) for each in found] == [(b, g) for b in batches for g in (0, 4)]
    for alone, drafted in zip(found[::2], found[1::2], strict=True):
        assert alone.gain == 1.0 and alone.tokens_per_s == pytest.approx(alone.batch / alone.seconds)
        assert drafted.gain == pytest.approx(drafted.tokens_per_s / alone.tokens_per_s)
        assert (drafted.gain > 1.0) == (drafted.break_even < 0.8)
    # One token of one row is read-bound; 5 tokens of 64 rows are arithmetic alone, and drafting only adds to it.
    assert found[1].gain > 1.0 > found[5].gain and found[5].bound == "arithmetic"
    stop = roofline.stops_paying(found)
    assert stop == next(each.batch for each in found if each.draft_len and each.gain <= 1.0)
    assert roofline.stops_paying(found[:2]) is None
    small = dataclasses.replace(CHIP, hbm_bytes=found[2].memory_bytes)
    fits = roofline.predict(decode, roofline.Place(small), {4: 3.0}, batches)
    assert [each.fits for each in fits[::2]] == [True, True, False]


def test_published_figures_of_the_chips():
    """Typed in again from the same tables, so that a slip of the finger shows."""
    gib = {name: chip.hbm_bytes / 2**30 for name, chip in hardware.CHIPS.items()}
    assert gib == {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
    tera = {name: (chip.flops / 1e12, chip.hbm_bandwidth / 1e9) for name, chip in hardware.CHIPS.items()}
    assert tera == {"v4": (275, 1200), "v5e": (197, 819), "v5p": (459, 2765), "v6e": (918, 1638)}
    per_chip = {name: chip.link_bandwidth * 2 * chip.axes * 2 / 1e9 for name, chip in hardware.CHIPS.items()}
    assert per_chip == {"v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800}  # all links, both directions
