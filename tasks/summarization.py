"""CNN/DailyMail and XSum, as T5 was trained to summarise.

  cnn_dailymail, xsum   and each with _few_shot

Importing this module registers them; data and vocabulary are looked up when a split is opened. The articles of XSum
have to be collected by hand: `tfds_source.location.manual_dir` names the folder of the archive.
"""

from __future__ import annotations

import functools

from speccascade_t5x.data.seqio_tasks import tf
from speccascade_t5x.tasks import few_shot, metrics, text_task
from speccascade_t5x.tasks.tfds_source import TfdsSource

_SPLITS = {split: split for split in ("train", "validation", "test")}
_XSUM_ARCHIVE = "xsum-extracts-from-downloads.tar.gz"
_XSUM_HOW = (
    "run the download and extraction scripts of the repository EdinburghNLP/XSum (XSum-Dataset/README.md), pack the "
    "folder xsum-extracts-from-downloads into that archive"
)


def summaries(dataset: tf.data.Dataset, article: str, summary: str) -> tf.data.Dataset:
    """An article and its summary -> {"inputs": ..., "targets": ...}."""
    return dataset.map(lambda example: {"inputs": example[article], "targets": example[summary]})


# Articles are long, so prompts show one.
_SHOTS = few_shot.Shots(question="Article: ", answer="Summary: ", default=1)

text_task.add(
    "cnn_dailymail",
    source=TfdsSource("cnn_dailymail:3.4.0", _SPLITS),
    plain=[functools.partial(summaries, article="article", summary="highlights")],
    prefix="summarize: ",
    metric_fns=[metrics.rouge],
    shots=_SHOTS,
)

text_task.add(
    "xsum",
    source=TfdsSource("xsum:1.1.0", _SPLITS, by_hand=_XSUM_ARCHIVE, by_hand_how=_XSUM_HOW),
    plain=[functools.partial(summaries, article="document", summary="summary")],
    prefix="summarize: ",
    metric_fns=[metrics.rouge],
    shots=_SHOTS,
)
