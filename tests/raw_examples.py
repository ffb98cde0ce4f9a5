"""Hand-written raw examples in place of a dataset's files, behind the real builders."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import tensorflow as tf
import tensorflow_datasets as tfds

HEADER = """
    from __gin__ import dynamic_registration
    from speccascade_t5x.tasks import few_shot
    from speccascade_t5x.tasks import mbpp
    from speccascade_t5x.tasks import tfds_source
    from speccascade_t5x.tasks import vocabularies

    vocabularies.choice.model = 'byt5'
"""


def configure(text: str = "") -> None:
    gin.parse_config(textwrap.dedent(HEADER) + text)


def byte_ids(text: str) -> list[int]:
    return [b + 3 for b in text.encode()] + [1]


def _spec(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _spec(inner) for name, inner in value.items()}
    return tf.TensorSpec((None,) if isinstance(value, list) else (), tf.string)


def _tensor(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tensor(inner) for name, inner in value.items()}
    return tf.constant(value, tf.string)


def mocked(rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]]):
    """Every dataset holds `rows` (texts, lists of texts, or dicts of them); a mapping gives them by split."""

    def as_dataset(self, split, **unused):
        chosen = rows[str(split)] if isinstance(rows, Mapping) else rows
        return tf.data.Dataset.from_generator(lambda: map(_tensor, chosen), output_signature=_spec(chosen[0]))

    return tfds.testing.mock_data(as_dataset_fn=as_dataset)
