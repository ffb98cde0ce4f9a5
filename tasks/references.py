"""Examples with more than one right answer.

seqio's metrics get their targets through a postprocessor, which sees the example. All references of an example
travel there as one JSON text in `targets_pretokenized`; the tokenised targets hold what the model learns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from speccascade_t5x.data.seqio_tasks import seqio, tf

FIELD = "references"


def pack(texts: tf.Tensor) -> tf.Tensor:
    """[n] texts -> one JSON list, for the field `references` of an example."""

    def as_json(found) -> bytes:
        return json.dumps([text.decode("utf-8") for text in found.tolist()], ensure_ascii=False).encode()

    packed = tf.numpy_function(as_json, [texts], tf.string)
    packed.set_shape(())
    return packed


@seqio.map_over_dataset
def show(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Puts the references where postprocessors and records find them; after tokenising."""
    kept = {name: value for name, value in example.items() if name != FIELD}
    return {**kept, "targets_pretokenized": example[FIELD]}


def read(example: Mapping[str, Any]) -> Any:
    """The references of an example, as postprocessors get it: texts or bytes."""
    return json.loads(tf.compat.as_text(example["targets_pretokenized"]))


def all_of(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """A postprocessor: all references of a target, and the text of a prediction."""
    return read(example) if is_target and example is not None else text
