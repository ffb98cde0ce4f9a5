"""SQuAD 2: answers from a paragraph, or that it holds none.

  squad_v2, squad_v2_few_shot

Inputs are T5's for SQuAD, "question: ... context: ...", with spaces around punctuation (Raffel et al. 2020; T5's own
checkpoints saw no other form). A question without an answer has the target "unanswerable"; a prediction of that word,
or of nothing, counts as no answer (here: T5 itself was not trained on SQuAD 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.tasks import answer_metrics, few_shot, references, text_task
from speccascade_t5x.tasks.tfds_source import TfdsSource

UNANSWERABLE = "unanswerable"


def _spaced(text: tf.Tensor) -> tf.Tensor:
    """Spaces around ASCII punctuation, and one space for every run of white space."""
    return _one_space(tf.strings.regex_replace(text, r"([[:punct:]])", r" \1 "))


def _one_space(text: tf.Tensor) -> tf.Tensor:
    return tf.strings.regex_replace(text, r"\s+", " ")


@seqio.map_over_dataset
def questions(example: dict[str, Any]) -> dict[str, tf.Tensor]:
    """A raw example -> inputs, the first answer as targets, all answers (empty if there is none) as references."""
    answers = _spaced(example["answers"]["text"])
    joined = tf.strings.join(
        ["question:", _spaced(example["question"]), "context:", _spaced(example["context"])], separator=" "
    )
    return {
        "inputs": _one_space(joined),
        "targets": tf.concat([answers, [UNANSWERABLE]], axis=0)[0],
        references.FIELD: references.pack(answers),
    }


def answer(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """A postprocessor: all answers of a target, and a prediction with "unanswerable" as no text."""
    if is_target:
        return references.read(example)
    return "" if answer_metrics.squad_normal(text) == UNANSWERABLE else text


text_task.add(
    "squad_v2",
    source=TfdsSource("squad/v2.0:3.0.0", {split: split for split in ("train", "validation")}),
    plain=[questions],
    metric_fns=[answer_metrics.squad_v2],
    postprocess_fn=answer,
    has_references=True,
    shots=few_shot.Shots(
        answer="answer: ",
        ends=("\n\n", "question:"),
        instruction=f"Answer from the context, or with {UNANSWERABLE}.",
    ),
)
