"""Training batches with little padding, each a pure function of the step number.

There is no iterator state to save: the batch of a step follows from the corpus, the options, the seed and the step. A
continued run asks for the next step, and every process that asks for a step gets the same arrays. An epoch contains
every example once. Its last batch may end in empty rows (weight 0). Which examples share a row or a batch is decided
anew in each epoch. All epochs have the number of steps of the first: if a later one needs a batch more or less, its
surplus is left out or its first batch is repeated.

Features are named and shaped as T5X's encoder-decoder models take them: decoder inputs are the targets shifted
right behind `start_id`; in packed rows segments count from 1, positions restart and each segment begins with
`start_id`. Everything is int32 but `decoder_loss_weights`, which is float32.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from speccascade_t5x.common import checks
from speccascade_t5x.data import length_buckets, shards
from speccascade_t5x.data.mixing import Source

_PAD_ID = 0  # what models and losses leave out

Batch = dict[str, np.ndarray]
# Of an epoch: each batch as its shape (rows, inputs, targets) and, for each row that holds any, its examples.
Plan = list[tuple[tuple[int, int, int], Sequence[np.ndarray]]]


class _Planned(abc.ABC):
    """What packed and bucketed batches share: plans by epoch, and steps counted through them."""

    def __init__(self, source: Source, seed: int, rooms: tuple[int, int], start_id: int, *key: object):
        checks.whole("seed", seed, 0, 2**32 - 1)
        self._source, self._seed, self._start_id = source, seed, start_id
        # Length of each example in a row, after cutting.
        self._taken = np.stack(
            [np.minimum(source.input_lengths, rooms[0]), np.minimum(source.target_lengths, rooms[1])], axis=1
        )
        self._rooms = rooms
        over = (source.input_lengths > rooms[0]) | (source.target_lengths > rooms[1])
        self.cut_examples = int(over.sum())
        self.cut_share = float(over.mean())
        self.fingerprint = _hash(type(self).__name__, source.fingerprint, seed, rooms, start_id, _PAD_ID, *key)
        self._planned: dict[int, Plan] = {}

    def _measure(self) -> None:
        """Plans the first epoch and measures it."""
        plan = self._epoch_plan(0)
        self.steps_per_epoch = len(plan)
        slots = sum(rows * (inputs + targets) for (rows, inputs, targets), _ in plan)
        held = int(self._taken[self._source.epoch(self._seed, 0)].sum())
        self.tokens_per_epoch = held
        self.padding_share = 1.0 - held / slots

    @abc.abstractmethod
    def _plan(self, order: np.ndarray, epoch: int) -> Plan:
        """Sorts the examples of an epoch into batches."""

    @abc.abstractmethod
    def _build(self, shape: tuple[int, int, int], rows: Sequence[np.ndarray]) -> Batch:
        """Makes one batch."""

    def _epoch_plan(self, epoch: int) -> Plan:
        if epoch not in self._planned:
            order = self._source.epoch(self._seed, epoch)
            plan = self._plan(order, epoch)
            # Batches are shuffled, because a plan puts batches of similar length side by side.
            shuffled = shards.permutation(len(plan), self._seed, epoch, 1)
            self._planned = {
                **({epoch - 1: self._planned[epoch - 1]} if epoch - 1 in self._planned else {}),
                epoch: [plan[i] for i in shuffled.tolist()],
            }
        return self._planned[epoch]

    def __call__(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs.

        Raises:
          UserError: the step is negative.
        """
        checks.whole("step", step, 0)
        epoch, within = divmod(int(step), self.steps_per_epoch)
        plan = self._epoch_plan(epoch)
        shape, rows = plan[within % len(plan)]
        return self._build(shape, rows)

    def _example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        source = self._source
        inputs = shards.cut(source.inputs(index), self._rooms[0], source.eos_id)
        return inputs, shards.cut(source.targets(index), self._rooms[1], source.eos_id)


class Packed(_Planned):
    """Several short examples in each row of fixed lengths, separated by segment ids.

    Rows are filled first-fit, longest examples first, within windows of the shuffled epoch: the examples that share a
    row change from epoch to epoch, and little room is left over.

    Args:
      source: where examples come from.
      batch_size: rows of a batch.
      inputs_len: width of the encoder's rows; longer inputs are cut, their EOS kept.
      targets_len: width of the decoder's rows; likewise.
      seed: of the order.
      window: number of examples among which the packing chooses; a larger one leaves less padding and takes longer.
      start_id: what the decoder starts with.

    Attributes:
      padding_share: share of all slots, encoder's and decoder's, that hold nothing; measured over the first epoch.
      steps_per_epoch: batches of an epoch.
      tokens_per_epoch: input and target ids of the first epoch.
      cut_examples, cut_share: number and share of examples that are cut to the lengths.
      fingerprint: sha256; equal if every batch is.

    Raises:
      UserError: a length, batch size or window below 1.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        inputs_len: int,
        targets_len: int,
        seed: int = 0,
        window: int = 4096,
        start_id: int = 0,
    ):
        sizes = {"batch_size": batch_size, "inputs_len": inputs_len, "targets_len": targets_len, "window": window}
        for name, value in sizes.items():
            checks.whole(name, value, 1)
        super().__init__(source, seed, (inputs_len, targets_len), start_id, batch_size, window)
        self._batch_size, self._window = batch_size, window
        self._measure()

    def _plan(self, order: np.ndarray, epoch: int) -> Plan:
        rows: list[np.ndarray] = []
        for start in range(0, len(order), self._window):
            chosen = order[start : start + self._window]
            rows += [chosen[members] for members in length_buckets.first_fit(self._taken[chosen], self._rooms)]
        # Rows of one window are sorted by fullness, so a batch takes rows from all windows.
        mixed = shards.permutation(len(rows), self._seed, epoch, 2).tolist()
        size, shape = self._batch_size, (self._batch_size, *self._rooms)
        return [(shape, [rows[i] for i in mixed[at : at + size]]) for at in range(0, len(rows), size)]

    def _build(self, shape: tuple[int, int, int], rows: Sequence[np.ndarray]) -> Batch:
        batch = _empty(shape, packed=True)
        for row, members in enumerate(rows):
            read = written = 0
            for segment, index in enumerate(members.tolist(), start=1):
                inputs, targets = self._example(index)
                place = slice(read, read + len(inputs))
                batch["encoder_input_tokens"][row, place] = inputs
                batch["encoder_segment_ids"][row, place] = segment
                batch["encoder_positions"][row, place] = np.arange(len(inputs))
                place = slice(written, written + len(targets))
                _write_targets(batch, row, place, targets, self._start_id)
                batch["decoder_segment_ids"][row, place] = segment
                batch["decoder_positions"][row, place] = np.arange(len(targets))
                read, written = read + len(inputs), written + len(targets)
        return batch


class Bucketed(_Planned):
    """One example per row; examples of similar lengths share a batch of one of a few shapes.

    Args:
      source: where examples come from.
      tokens_per_batch: slots of a batch, encoder's and decoder's together: short buckets get more rows.
      inputs_len: longest inputs; longer ones are cut, their EOS kept.
      targets_len: longest targets; likewise.
      buckets: number of shapes, chosen for the least padding; or the (inputs, targets) lengths themselves.
      seed: of the order.
      multiple_of: rows of a batch are a multiple of this, such as the number of devices.
      start_id: what the decoder starts with.

    Attributes:
      shapes: (rows, inputs, targets) of each bucket, shortest first.
      padding_share, steps_per_epoch, tokens_per_epoch, cut_examples, cut_share, fingerprint: see `Packed`.

    Raises:
      UserError: a length or count below 1, or no room for a single row in `tokens_per_batch`.
    """

    def __init__(
        self,
        source: Source,
        tokens_per_batch: int,
        inputs_len: int,
        targets_len: int,
        buckets: int | Sequence[tuple[int, int]] = 4,
        seed: int = 0,
        multiple_of: int = 1,
        start_id: int = 0,
    ):
        sizes = {"tokens_per_batch": tokens_per_batch, "inputs_len": inputs_len, "targets_len": targets_len}
        for name, value in (sizes | {"multiple_of": multiple_of}).items():
            checks.whole(name, value, 1)
        rooms = (inputs_len, targets_len)
        if isinstance(buckets, int):
            checks.whole("buckets", buckets, 1)
            taken = np.stack([np.minimum(source.input_lengths, inputs_len)] * 2, axis=1)
            taken[:, 1] = np.minimum(source.target_lengths, targets_len)
            lengths = length_buckets.best_buckets(taken, buckets)
        else:
            lengths = length_buckets.given_buckets(buckets, rooms)
        super().__init__(source, seed, rooms, start_id, tokens_per_batch, multiple_of, lengths)
        self.shapes = [(length_buckets.rows(tokens_per_batch, pair, multiple_of), *pair) for pair in lengths]
        fits = (self._taken[:, None, :] <= np.array(lengths)[None, :, :]).all(-1)
        self._bucket = fits.argmax(axis=1)  # buckets grow, so the first that fits is the smallest
        self._measure()

    def _plan(self, order: np.ndarray, epoch: int) -> Plan:
        plan = []
        for bucket, shape in enumerate(self.shapes):
            members = order[self._bucket[order] == bucket]
            for at in range(0, len(members), shape[0]):
                plan.append((shape, members[at : at + shape[0], None]))
        return plan

    def _build(self, shape: tuple[int, int, int], rows: Sequence[np.ndarray]) -> Batch:
        return _one_to_a_row(shape, [self._example(int(row[0])) for row in rows], self._start_id)


class InOrder:
    """All examples once, in order, for evaluation: batch i holds the examples i * batch_size and on.

    A batch is as wide as the narrowest shape its longest example fits. The last may end in empty rows (weight 0).

    Args:
      source: where examples come from.
      batch_size: rows of every batch.
      inputs_len: longest inputs; longer ones are cut, their EOS kept.
      targets_len: longest targets; likewise.
      shapes: at most so many widths.
      start_id: what the decoder starts with.

    Raises:
      UserError: a length or count below 1.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        inputs_len: int,
        targets_len: int,
        shapes: int = 2,
        start_id: int = 0,
    ):
        sizes = {"batch_size": batch_size, "inputs_len": inputs_len, "targets_len": targets_len, "shapes": shapes}
        for name, value in sizes.items():
            checks.whole(name, value, 1)
        self._source, self._size, self._start_id = source, batch_size, start_id
        self._rooms = (inputs_len, targets_len)
        starts = np.arange(0, len(source), batch_size)
        longest = [
            np.maximum.reduceat(np.minimum(lengths, room), starts)
            for lengths, room in zip((source.input_lengths, source.target_lengths), self._rooms, strict=True)
        ]
        longest = np.maximum(np.stack(longest, axis=1), 1)
        self._shapes = np.array(length_buckets.best_buckets(longest, shapes))
        self._shape_of = (longest[:, None, :] <= self._shapes[None, :, :]).all(-1).argmax(axis=1)

    def __len__(self) -> int:
        return len(self._shape_of)

    def __call__(self, step: int) -> Batch:
        """Batch `step`, 0 to len(self) - 1.

        Raises:
          UserError: there is no such batch.
        """
        checks.whole("step", step, 0, len(self) - 1)
        eos = self._source.eos_id
        examples = [
            (
                shards.cut(self._source.inputs(i), self._rooms[0], eos),
                shards.cut(self._source.targets(i), self._rooms[1], eos),
            )
            for i in self.indices(step).tolist()
        ]
        shape = (self._size, *self._shapes[self._shape_of[step]].tolist())
        return _one_to_a_row(shape, examples, self._start_id)

    def __iter__(self) -> Iterator[Batch]:
        return (self(step) for step in range(len(self)))

    def indices(self, step: int) -> np.ndarray:
        """The examples in the first rows of batch `step`; further rows are empty."""
        return np.arange(step * self._size, min((step + 1) * self._size, len(self._source)))


def _empty(shape: tuple[int, int, int], packed: bool) -> Batch:
    rows, inputs, targets = shape
    batch = {
        "encoder_input_tokens": np.full((rows, inputs), _PAD_ID, np.int32),
        "decoder_input_tokens": np.full((rows, targets), _PAD_ID, np.int32),
        "decoder_target_tokens": np.full((rows, targets), _PAD_ID, np.int32),
        "decoder_loss_weights": np.zeros((rows, targets), np.float32),
    }
    if packed:
        for name, width in (("encoder", inputs), ("decoder", targets)):
            batch[f"{name}_segment_ids"] = np.zeros((rows, width), np.int32)
            batch[f"{name}_positions"] = np.zeros((rows, width), np.int32)
    return batch


def _write_targets(batch: Batch, row: int, place: slice, targets: np.ndarray, start_id: int) -> None:
    batch["decoder_target_tokens"][row, place] = targets
    batch["decoder_loss_weights"][row, place] = 1.0
    if len(targets):
        batch["decoder_input_tokens"][row, place.start] = start_id
        batch["decoder_input_tokens"][row, place.start + 1 : place.stop] = targets[:-1]


def _one_to_a_row(
    shape: tuple[int, int, int], examples: Sequence[tuple[np.ndarray, np.ndarray]], start_id: int
) -> Batch:
    batch = _empty(shape, packed=False)
    for row, (inputs, targets) in enumerate(examples):
        batch["encoder_input_tokens"][row, : len(inputs)] = inputs
        _write_targets(batch, row, slice(0, len(targets)), targets, start_id)
    return batch


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
