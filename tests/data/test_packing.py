"""Packed and bucketed batches, taken apart again by plain loops."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from speccascade_t5x.data import length_buckets, packing, shards
from speccascade_t5x.data.mixing import Mixed
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary

ROOT = Path(__file__).resolve().parents[2]
BYTES = ByteVocabulary(125)
ONE_TO_A_ROW = {"encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"}
SEGMENTED = {f"{side}_{what}" for side in ("encoder", "decoder") for what in ("segment_ids", "positions")}


def corpus(count: int = 200, seed: int = 0, longest: int = 12, first: int = 3) -> shards.Corpus:
    rng = np.random.default_rng(seed)
    ids = lambda: np.append(rng.integers(first, first + 50, rng.integers(1, longest)), 1)  # noqa: E731
    return shards.from_examples([(ids(), ids()) for _ in range(count)], BYTES)


def held(source: shards.Corpus) -> Counter:
    return Counter((tuple(source.inputs(i).tolist()), tuple(source.targets(i).tolist())) for i in range(len(source)))


def unpacked(batch: packing.Batch) -> Counter:
    """The examples of a packed batch, by segment ids, with every convention of the features checked on the way."""
    assert set(batch) == ONE_TO_A_ROW | SEGMENTED
    found: Counter = Counter()
    for row in range(len(batch["encoder_input_tokens"])):
        last = batch["encoder_segment_ids"][row].max()
        assert last == batch["decoder_segment_ids"][row].max()
        for side, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
            segments = batch[f"{side}_segment_ids"][row].tolist()
            used = [segment for segment in segments if segment]
            assert used == sorted(used) and segments == used + [0] * (len(segments) - len(used))
            assert set(used) == set(range(1, last + 1))
            assert not batch[tokens][row, len(used) :].any() and not batch[f"{side}_positions"][row, len(used) :].any()
        np.testing.assert_array_equal(batch["decoder_loss_weights"][row], batch["decoder_segment_ids"][row] > 0)
        for segment in range(1, last + 1):
            read = batch["encoder_segment_ids"][row] == segment
            written = batch["decoder_segment_ids"][row] == segment
            inputs, targets = batch["encoder_input_tokens"][row, read], batch["decoder_target_tokens"][row, written]
            assert batch["encoder_positions"][row, read].tolist() == list(range(len(inputs)))
            assert batch["decoder_positions"][row, written].tolist() == list(range(len(targets)))
            assert batch["decoder_input_tokens"][row, written].tolist() == [0, *targets[:-1].tolist()]
            found[tuple(inputs.tolist()), tuple(targets.tolist())] += 1
    return found


def unbatched(batch: packing.Batch) -> Counter:
    """The examples of a batch with one to a row; EOS ends each."""
    assert set(batch) == ONE_TO_A_ROW
    found: Counter = Counter()
    for row, inputs in enumerate(batch["encoder_input_tokens"].tolist()):
        count = int(batch["decoder_loss_weights"][row].sum())
        targets = batch["decoder_target_tokens"][row].tolist()
        assert batch["decoder_loss_weights"][row].tolist() == [1.0] * count + [0.0] * (len(targets) - count)
        if not count:
            assert not any(inputs) and not any(targets)
            continue
        assert not any(inputs[inputs.index(1) + 1 :]) and not any(targets[count:])
        assert batch["decoder_input_tokens"][row, :count].tolist() == [0, *targets[: count - 1]]
        found[tuple(inputs[: inputs.index(1) + 1]), tuple(targets[:count])] += 1
    return found


def epoch_of(batches, number: int = 0) -> list[packing.Batch]:
    start = number * batches.steps_per_epoch
    return [batches(step) for step in range(start, start + batches.steps_per_epoch)]


def assert_same(a: packing.Batch, b: packing.Batch) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype == (np.float32 if name.endswith("weights") else np.int32)
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("window", [16, 4096])
def test_packed_rows_hold_every_example_once(window):
    source = corpus()
    batches = packing.Packed(source, batch_size=4, inputs_len=32, targets_len=24, window=window)
    epoch = epoch_of(batches)
    assert sum((unpacked(batch) for batch in epoch), Counter()) == held(source)
    assert {batch["encoder_input_tokens"].shape for batch in epoch} == {(4, 32)}
    assert {batch["decoder_positions"].shape for batch in epoch} == {(4, 24)}
    slots = sum(batch["encoder_input_tokens"].size + batch["decoder_target_tokens"].size for batch in epoch)
    empty = sum((batch[f"{side}_segment_ids"] == 0).sum() for batch in epoch for side in ("encoder", "decoder"))
    assert batches.padding_share == pytest.approx(empty / slots)
    assert batches.tokens_per_epoch == slots - empty == source.input_lengths.sum() + source.target_lengths.sum()


def test_packing_is_near_the_best_any_packing_can_do():
    source = corpus(3000)

    def rows(batches) -> int:
        return sum(int(batch["encoder_segment_ids"].any(axis=1).sum()) for batch in epoch_of(batches))

    least = max(source.input_lengths.sum(), source.target_lengths.sum()) / 64
    close = packing.Packed(source, 8, 64, 64)
    assert least <= rows(close) < 1.05 * least
    assert rows(packing.Packed(source, 8, 64, 64, window=8)) > 1.3 * least


@pytest.mark.parametrize(
    ("buckets", "shapes"),
    [
        (1, [(8, 12, 12)]),
        ([(6, 8)], [(14, 6, 8), (8, 12, 12)]),
        ([(6, 6), (9, 9), (99, 99)], [(16, 6, 6), (11, 9, 9), (8, 12, 12)]),
    ],
)
def test_bucketed_batches_hold_every_example_once(buckets, shapes):
    source = corpus()
    batches = packing.Bucketed(source, 200, 12, 12, buckets)
    assert batches.shapes == shapes
    epoch = epoch_of(batches)
    assert sum((unbatched(batch) for batch in epoch), Counter()) == held(source)
    found = {(*batch["encoder_input_tokens"].shape, batch["decoder_target_tokens"].shape[1]) for batch in epoch}
    assert found == set(shapes)
    slots = sum(batch["encoder_input_tokens"].size + batch["decoder_target_tokens"].size for batch in epoch)
    assert batches.padding_share == pytest.approx(1 - batches.tokens_per_epoch / slots)
    assert batches.tokens_per_epoch == source.input_lengths.sum() + source.target_lengths.sum()


def test_an_example_goes_to_the_narrowest_bucket_that_holds_it():
    batches = packing.Bucketed(corpus(), 200, 12, 12, [(6, 6), (9, 9)])
    for batch in epoch_of(batches):
        width = batch["encoder_input_tokens"].shape[1]
        for inputs, targets in unbatched(batch):
            longest = max(len(inputs), len(targets))
            assert longest <= width and longest > {6: 0, 9: 6, 12: 9}[width]


def test_chosen_buckets_are_the_best_there_are():
    """Against all choices of two cuts, where targets are as long as inputs."""
    rng = np.random.default_rng(1)
    lengths = np.repeat(rng.geometric(0.15, 60)[:, None], 2, axis=1)

    def slots(shapes):
        fitting_shape = [min(s for s in shapes if s >= length) for length in lengths[:, 0].tolist()]
        return sum(fitting_shape)

    sizes = sorted(set(lengths[:, 0].tolist()))
    best = min(slots({a, b, sizes[-1]}) for a in sizes for b in sizes)
    found = length_buckets.best_buckets(lengths, 3)
    assert slots({a for a, _ in found}) == best
    assert len(found) == 3 and all(a == b for a, b in found)
    assert length_buckets.best_buckets(lengths, 100)[-1] == (sizes[-1], sizes[-1])  # more than there are lengths
    assert length_buckets.best_buckets(np.array([[3, 4]]), 2) == [(3, 4)]


def test_rows_are_a_multiple_of_the_devices():
    batches = packing.Bucketed(corpus(), 200, 12, 12, [(6, 6)], multiple_of=4)
    assert batches.shapes == [(16, 6, 6), (8, 12, 12)]
    with pytest.raises(UserError, match="no room for 16 rows of 12 \\+ 12 ids: raise it to 384"):
        packing.Bucketed(corpus(), 200, 12, 12, [(6, 6)], multiple_of=16)


def kinds(source) -> list:
    return [
        packing.Packed(source, 4, 32, 24, seed=5, window=64),
        packing.Bucketed(source, 200, 12, 12, 3, seed=5),
    ]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_batch_follows_from_its_step_alone(kind):
    batches, fresh = kinds(corpus())[kind], kinds(corpus())[kind]
    steps = [0, 7, 2 * batches.steps_per_epoch + 1, 1, 5 * batches.steps_per_epoch, 7, 0]
    kept = {step: batches(step) for step in steps}
    for step in sorted(kept, reverse=True):
        assert_same(fresh(step), kept[step])
    assert batches.fingerprint == fresh.fingerprint
    with pytest.raises(UserError, match="step=-1"):
        batches(-1)


PROCESS = """
import sys; sys.path.insert(0, "tests"); sys.path.insert(0, "tests/data")
import hashlib, test_packing
for batches in test_packing.kinds(test_packing.corpus()):
    digest = hashlib.sha256(batches.fingerprint.encode())
    for step in (0, 3, 100):
        for name, array in sorted(batches(step).items()):
            digest.update(name.encode() + array.tobytes())
    print(digest.hexdigest())
"""


def test_two_processes_make_the_same_batches():
    def run() -> str:
        command = [sys.executable, "-c", PROCESS]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout

    first = run()
    assert len(first.split()) == 2 and first == run()


@pytest.mark.parametrize("kind", [0, 1])
def test_epochs_differ_and_each_holds_nearly_all(kind):
    source = corpus()
    batches = kinds(source)[kind]
    undo = (unpacked, unbatched)[kind]
    epochs = [epoch_of(batches, number) for number in range(4)]
    firsts = [batch["encoder_input_tokens"].tobytes() for epoch in epochs for batch in epoch[:1]]
    assert len(set(firsts)) == 4
    for epoch in epochs:
        seen = sum((undo(batch) for batch in epoch), Counter())
        assert (seen & held(source)).total() > 0.9 * len(source)


def test_seed_and_options_are_in_the_fingerprint():
    source = corpus()
    made = [
        packing.Packed(source, 4, 32, 24),
        packing.Packed(source, 4, 32, 24, seed=1),
        packing.Packed(source, 4, 32, 32),
        packing.Packed(source, 5, 32, 24),
        packing.Packed(corpus(seed=1), 4, 32, 24),
        packing.Bucketed(source, 200, 12, 12),
        packing.Bucketed(source, 200, 12, 12, 2),
    ]
    assert len({batches.fingerprint for batches in made}) == len(made)
    assert not np.array_equal(made[0](0)["encoder_input_tokens"], made[1](0)["encoder_input_tokens"])


@pytest.mark.parametrize("kind", [packing.Packed, packing.Bucketed])
def test_long_examples_are_cut_and_keep_their_eos(kind):
    source = corpus(50)
    batches = kind(source, 30 if kind is packing.Bucketed else 3, 6, 5)
    over = [len(source.inputs(i)) > 6 or len(source.targets(i)) > 5 for i in range(len(source))]
    assert batches.cut_examples == sum(over) > 0 and batches.cut_share == pytest.approx(np.mean(over))
    wanted: Counter = Counter()
    for i in range(len(source)):
        inputs, targets = source.inputs(i).tolist(), source.targets(i).tolist()
        inputs = inputs if len(inputs) <= 6 else [*inputs[:5], 1]
        wanted[tuple(inputs), tuple(targets if len(targets) <= 5 else [*targets[:4], 1])] += 1
    undo = unpacked if kind is packing.Packed else unbatched
    assert sum((undo(batch) for batch in epoch_of(batches)), Counter()) == wanted


def test_another_start_id():
    batch = packing.Packed(corpus(20), 2, 16, 16, start_id=7)(0)
    assert (batch["decoder_input_tokens"][batch["decoder_positions"] == 0] == np.where(
        batch["decoder_segment_ids"][batch["decoder_positions"] == 0], 7, 0)).all()  # fmt: skip
    assert (batch["encoder_input_tokens"][batch["encoder_segment_ids"] == 0] == 0).all()


def test_a_mixture_keeps_its_rates_and_leaves_nothing_out():
    small, large = corpus(30, seed=1), corpus(170, seed=2, first=100)
    mixed = Mixed([(small, 1.0), (large, 3.0)], examples_per_epoch=100)
    seen = [mixed.epoch(0, epoch) for epoch in range(12)]
    for epoch in seen:
        assert (epoch < 30).sum() == 25 and len(epoch) == 100
    counts = np.bincount(np.concatenate(seen), minlength=200)
    # 300 of 30: ten each. 900 of 170: five each and 50 a sixth time.
    assert set(counts[:30].tolist()) == {10} and Counter(counts[30:].tolist()) == {5: 120, 6: 50}
    for index in (0, 29, 30, 199):
        source, at = (small, index) if index < 30 else (large, index - 30)
        np.testing.assert_array_equal(mixed.inputs(index), source.inputs(at))
        np.testing.assert_array_equal(mixed.targets(index), source.targets(at))
    np.testing.assert_array_equal(mixed.input_lengths[30:], large.input_lengths)
    np.testing.assert_array_equal(Mixed([(small, 1.0), (large, 3.0)], 100).epoch(0, 7), seen[7])
    assert not np.array_equal(mixed.epoch(1, 7), seen[7])


@pytest.mark.parametrize("kind", [0, 1])
def test_batches_of_a_mixture(kind):
    parts = [corpus(30, seed=1), corpus(170, seed=2, first=100)]
    batches = kinds(Mixed([(parts[0], 1.0), (parts[1], 3.0)]))[kind]
    undo = (unpacked, unbatched)[kind]
    seen = sum((undo(batch) for batch in epoch_of(batches)), Counter())
    from_small = sum(count for example, count in seen.items() if example in held(parts[0]))
    assert seen.total() == 200 and from_small == 50
    assert set(seen) <= set(held(parts[0])) | set(held(parts[1]))
    assert_same(batches(3 * batches.steps_per_epoch), kinds(
        Mixed([(parts[0], 1.0), (parts[1], 3.0)]))[kind](3 * batches.steps_per_epoch))  # fmt: skip


def test_mixtures_that_make_no_sense():
    from speccascade_t5x.text.vocabulary import ByteVocabulary

    source = corpus(10)
    with pytest.raises(UserError, match="at least one corpus"):
        Mixed([])
    for rate in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="rate="):
            Mixed([(source, 1.0), (source, rate)])
    with pytest.raises(UserError, match="none of the corpus with the least rate"):
        Mixed([(source, 1.0), (source, 1e-6)])
    other = shards.from_examples([(np.array([1]), np.array([1]))], ByteVocabulary(0))
    with pytest.raises(UserError, match="different vocabularies"):
        Mixed([(source, 1.0), (other, 1.0)])


def test_evaluation_sees_all_in_order():
    source = corpus(45)
    view = packing.InOrder(source, 8, 12, 12, shapes=2)
    assert len(view) == 6
    seen = [example for batch in view for example in unbatched(batch).elements()]
    wanted = [example for i in range(len(source)) for example in [(tuple(source.inputs(i)), tuple(source.targets(i)))]]
    assert Counter(seen) == Counter(wanted)
    for step in range(len(view)):
        batch = view(step)
        for row, index in enumerate(view.indices(step).tolist()):
            targets = source.targets(index)
            np.testing.assert_array_equal(batch["decoder_target_tokens"][row, : len(targets)], targets)
    assert np.concatenate([view.indices(step) for step in range(6)]).tolist() == list(range(45))
    widths = {(b["encoder_input_tokens"].shape, b["decoder_target_tokens"].shape) for b in view}
    assert len(widths) <= 2 and view(5)["encoder_input_tokens"].shape[0] == 8
    with pytest.raises(UserError, match="step=6"):
        view(6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: packing.Packed(c, 0, 8, 8), "batch_size=0"),
        (lambda c: packing.Packed(c, 1, 8, 8.0), "targets_len=8.0"),
        (lambda c: packing.Packed(c, 1, 8, 8, window=0), "window=0"),
        (lambda c: packing.Packed(c, 1, 8, 8, seed=-1), "seed=-1"),
        (lambda c: packing.Bucketed(c, 10, 8, 8), "tokens_per_batch=10 has no room"),
        (lambda c: packing.Bucketed(c, 100, 8, 8, 0), "buckets=0"),
        (lambda c: packing.Bucketed(c, 100, 8, 8, [(2, 6), (4, 3)]), "must grow"),
        (lambda c: packing.Bucketed(c, 100, 8, 8, [(2, 6, 7)]), "is not a pair of lengths"),
        (lambda c: packing.InOrder(c, 0, 8, 8), "batch_size=0"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make(corpus(5))
