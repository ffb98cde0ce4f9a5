"""GSM8K: sums in words, with the working written out and "#### <number>" at its end.

  gsm8k, gsm8k_few_shot

The calculator notes of the published answers ("<<3*4=12>>") are taken out of the targets. Scored is the final number
alone (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems").
"""

from __future__ import annotations

from typing import Any

from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.tasks import answer_metrics, few_shot, text_task
from speccascade_t5x.tasks.tfds_source import TfdsSource


@seqio.map_over_dataset
def sums(example: dict[str, Any]) -> dict[str, tf.Tensor]:
    """A raw example -> the question, and the working without calculator notes."""
    return {
        "inputs": example["question"],
        "targets": tf.strings.regex_replace(example["answer"], r"<<[^>]*>>", ""),
    }


text_task.add(
    "gsm8k",
    source=TfdsSource("gsm8k:1.0.0", {split: split for split in ("train", "test")}),
    plain=[sums],
    prefix="question: ",
    metric_fns=[answer_metrics.final_number],
    shots=few_shot.Shots(question="Question: ", answer="Answer: ", exemplars="sums"),
)
