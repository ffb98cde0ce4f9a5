"""Raw examples from TensorFlow Datasets, whose folder is looked up and prepared when a split is opened.

from speccascade_t5x.tasks import tfds_source

tfds_source.location.data_dir = 'datasets'
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks.late import configured


class Location(NamedTuple):
    """See `location`."""

    data_dir: str | None
    manual_dir: str | None
    download: bool


def location(data_dir: str | None = None, manual_dir: str | None = None, download: bool = True) -> Location:
    """Says where datasets are.

    Args:
      data_dir: folder of prepared datasets; None is TensorFlow Datasets' own (TFDS_DATA_DIR, else the home folder).
      manual_dir: folder of what must be downloaded by hand; None is `<data_dir>/downloads/manual`.
      download: download and prepare what is missing; if False, missing data is an error.
    """
    return Location(data_dir, manual_dir, download)


class TfdsSource(seqio.TfdsDataSource):
    """A dataset by its full name, with the splits of the task.

    Args:
      name: with config and version, such as "squad/v2.0:3.0.0".
      splits: the task's name of each split to TensorFlow Datasets' (which may be a slice).
      by_hand: a file that has to be put into the manual folder first; None where everything is downloaded.
      by_hand_how: what to say about that file.
    """

    def __init__(self, name: str, splits: Mapping[str, str], by_hand: str | None = None, by_hand_how: str = ""):
        super().__init__(name, splits=dict(splits))
        self._name, self._split_map = name, dict(splits)
        self._by_hand, self._by_hand_how = by_hand, by_hand_how

    @property
    def tfds_dataset(self) -> seqio.utils.LazyTfdsLoader:
        """The loader for the folder configured now; it keeps its builders by folder."""
        data_dir = configured(location)().data_dir
        data_dir = None if data_dir is None else os.path.expanduser(data_dir)
        return seqio.utils.LazyTfdsLoader(self._name, data_dir, split_map=self._split_map, read_only=True)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Opens a split, preparing the dataset if need be; see `seqio.DataSource`.

        Raises:
          UserError: no such split; something is missing that has to be downloaded by hand, or may not or cannot be
            downloaded; a dataset that cannot be read.
        """
        if split not in self._split_map:
            raise UserError(f"{self._name} has no split {split!r}: name one of {', '.join(self._split_map)}")
        with self._in_one_sentence():
            loader = self._prepared()
            return loader.load(split, shuffle_files=shuffle, seed=seed, shard_info=shard_info)

    def list_shards(self, split: str) -> Sequence[str]:
        """Files of a split, preparing the dataset if need be; raises as `get_dataset` does."""
        with self._in_one_sentence():
            return [file.filename for file in self._prepared().files(split)]

    def num_input_examples(self, split: str) -> int | None:
        """Examples of a split; None where the dataset does not say."""
        try:
            return self.tfds_dataset.size(split)
        except KeyError:
            return None

    @contextlib.contextmanager
    def _in_one_sentence(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # whatever its many ways to download and to read raise
            lines = str(error).strip().splitlines() or [""]
            raise UserError(
                f"the dataset {self._name} could not be opened ({type(error).__name__}: {lines[0].strip()}): prepare "
                "it where there is a network, with `tfds build` or a first run, and name its folder with "
                "`tfds_source.location.data_dir` or the environment variable TFDS_DATA_DIR"
            ) from error

    def _prepared(self) -> seqio.utils.LazyTfdsLoader:
        """The loader, its dataset downloaded and prepared where it was not yet."""
        loader = self.tfds_dataset
        builder = loader.builder
        if builder.is_prepared():
            return loader
        import tensorflow_datasets as tfds

        place = configured(location)()
        root = epath.Path(builder.data_dir_root)
        if not place.download:
            raise UserError(
                f"the dataset {self._name} is not in {root} and `tfds_source.location.download` is False: prepare it "
                "first, or name its folder with `tfds_source.location.data_dir`"
            )
        manual = epath.Path(place.manual_dir).expanduser() if place.manual_dir else root / "downloads" / "manual"
        if self._by_hand and not (manual / self._by_hand).exists():
            raise UserError(
                f"{self._name} needs {manual / self._by_hand}, which cannot be downloaded by a program: "
                f"{self._by_hand_how}, put it there, or name its folder with `tfds_source.location.manual_dir`"
            )
        config = tfds.download.DownloadConfig(manual_dir=str(manual) if self._by_hand else None)
        builder.download_and_prepare(download_config=config)
        return loader
