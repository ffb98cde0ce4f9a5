"""What a user reads who lacks a dataset, and that a prepared one is read from the folder named in gin."""

from __future__ import annotations

import gin
import pytest
import tensorflow_datasets as tfds

from raw_examples import configure
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.data.seqio_tasks import seqio
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import summarization  # noqa: F401
from speccascade_t5x.tasks.tfds_source import TfdsSource


class Notes(tfds.core.GeneratorBasedBuilder):
    """Ten numbered texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            yield i, {"text": f"note {i}"}


@pytest.fixture(autouse=True)
def clean_gin(tmp_path):
    configure(f"tfds_source.location.data_dir = {str(tmp_path)!r}")
    yield
    gin.clear_config()


def test_the_articles_of_xsum_are_named_with_the_way_to_get_them(tmp_path):
    archive = tmp_path / "downloads" / "manual" / "xsum-extracts-from-downloads.tar.gz"
    with pytest.raises(UserError, match="cannot be downloaded by a program: run the download") as caught:
        seqio_tasks.examples("xsum", "validation", {})
    message = str(caught.value)
    assert str(archive) in message
    assert "tfds_source.location.manual_dir" in message and "EdinburghNLP/XSum" in message
    assert "\n" not in message and "gs://" not in message
    configure(f"tfds_source.location.manual_dir = {str(tmp_path / 'mine')!r}")
    with pytest.raises(UserError, match=r"mine/xsum-extracts"):
        seqio_tasks.examples("xsum", "validation", {})


def test_downloads_can_be_forbidden(tmp_path):
    configure("tfds_source.location.download = False")
    with pytest.raises(UserError, match=rf"cnn_dailymail:3\.4\.0 is not in {tmp_path}.*download` is False"):
        seqio_tasks.examples("cnn_dailymail", "test", {})


def test_an_unknown_dataset_is_one_sentence():
    with pytest.raises(UserError, match=r"no_such_data:1\.0\.0 could not be opened.*TFDS_DATA_DIR") as caught:
        TfdsSource("no_such_data:1.0.0", {"train": "train"}).get_dataset("train")
    assert "\n" not in str(caught.value)


def test_an_unknown_split_names_the_known_ones():
    with pytest.raises(UserError, match="has no split 'dev': name one of train, validation"):
        TfdsSource("squad/v2.0:3.0.0", {"train": "train", "validation": "validation"}).get_dataset("dev")


def test_a_missing_dataset_is_prepared_once_and_read_in_slices(tmp_path):
    source = TfdsSource("notes:1.0.0", {"train": "train[:8]", "validation": "train[8:]"})

    def read(split: str, **how) -> list[str]:
        rows = source.get_dataset(split, shuffle=False, **how).as_numpy_iterator()
        return sorted(row["text"].decode() for row in rows)

    assert source.num_input_examples("train") is None  # not there yet
    assert len(source.list_shards("train")) == 1
    assert (tmp_path / "notes" / "1.0.0" / "dataset_info.json").is_file()
    configure("tfds_source.location.download = False")
    train, validation = read("train"), read("validation")
    assert (len(train), len(validation)) == (8, 2)
    assert sorted(train + validation) == [f"note {i}" for i in range(10)]
    assert source.num_input_examples("validation") == 2
    assert read("train", shard_info=seqio.ShardInfo(0, 1)) == train
