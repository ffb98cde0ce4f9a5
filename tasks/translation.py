"""WMT14 and WMT15, English to German and to French, as T5 was trained to translate.

  wmt14_en_de, wmt14_en_fr, wmt15_en_de, wmt15_en_fr   and each with _few_shot

Importing this module registers them; data and vocabulary are looked up when a split is opened.
Source of the convention: Raffel et al. 2020 (T5), appendix on preprocessed examples.
"""

from __future__ import annotations

import functools

from speccascade_t5x.data.seqio_tasks import tf
from speccascade_t5x.tasks import few_shot, metrics, text_task
from speccascade_t5x.tasks.tfds_source import TfdsSource

_LANGUAGES = {"en": "English", "de": "German", "fr": "French"}
_SPLITS = {split: split for split in ("train", "validation", "test")}


def pairs(dataset: tf.data.Dataset, source: str, target: str) -> tf.data.Dataset:
    """{"en": ..., "de": ...} -> {"inputs": ..., "targets": ...}."""
    return dataset.map(lambda example: {"inputs": example[source], "targets": example[target]})


def _register(year: int, target: str) -> None:
    language = _LANGUAGES[target]
    text_task.add(
        f"wmt{year}_en_{target}",
        source=TfdsSource(f"wmt{year}_translate/{target}-en:1.0.0", _SPLITS),
        plain=[functools.partial(pairs, source="en", target=target)],
        prefix=f"translate English to {language}: ",
        metric_fns=[metrics.bleu],
        shots=few_shot.Shots(question="English: ", answer=f"{language}: ", exemplars=f"en_{target}"),
    )


for _year in (14, 15):
    for _target in ("de", "fr"):
        _register(_year, _target)
