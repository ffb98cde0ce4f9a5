"""A seqio source of texts that a task reads whole: files of the user's that no dataset library holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.interfaces import UserError


class InMemorySource(seqio.DataSource):
    """Rows in their own order unless shuffled. A subclass says what a split holds: see `rows`.

    Args:
      name: what messages call it.
      splits: their names.
    """

    def __init__(self, name: str, splits: Sequence[str]):
        self._name = name
        super().__init__(splits=tuple(splits), performs_internal_shuffling=True)

    def rows(self, split: str) -> Sequence[Mapping[str, str]]:
        """All examples of a split, each with the same fields, "inputs" and "targets" among them."""
        raise NotImplementedError

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Opens a split; see `seqio.DataSource`.

        Raises:
          UserError: there is no such split, or what `rows` raises.
        """
        if split not in self.splits:
            raise UserError(f"{self._name} has no split {split!r}: name one of {', '.join(self.splits)}")
        rows = self.rows(split)
        if shard_info is not None:
            rows = rows[shard_info.index :: shard_info.num_shards]
        fields = list(rows[0]) if rows else ["inputs", "targets"]
        # The dtype is given because a list without rows carries none.
        columns = {field: tf.constant([row[field] for row in rows], tf.string) for field in fields}
        dataset = tf.data.Dataset.from_tensor_slices(columns)
        return dataset.shuffle(len(rows), seed=seed) if shuffle and rows else dataset
