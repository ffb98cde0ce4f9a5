"""TriviaQA, Natural Questions and WebQuestions without any context: the model has to know the answer.

  trivia_qa, natural_questions, web_questions   and each with _few_shot

Prefixes, splits (the last tenth of train as validation), targets (the first answer) and metrics are those of
Roberts et al. 2020, "How Much Knowledge Can You Pack Into the Parameters of a Language Model?"
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from speccascade_t5x.data.seqio_tasks import tf
from speccascade_t5x.tasks import answer_metrics, few_shot, references, text_task
from speccascade_t5x.tasks.tfds_source import TfdsSource


def _answered(example: dict[str, Any], target: tf.Tensor, answers: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"inputs": example["question"], "targets": target, references.FIELD: references.pack(answers)}


def trivia(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """The answer's usual name as target, all its aliases as references."""
    return dataset.map(lambda e: _answered(e, e["answer"]["value"], e["answer"]["aliases"]))


def listed(dataset: tf.data.Dataset, field: str) -> tf.data.Dataset:
    """The first of a list of answers as target; a question without any is left out."""
    answered = dataset.filter(lambda e: tf.size(e[field]) > 0)
    return answered.map(lambda e: _answered(e, e[field][0], e[field]))


def _register(name: str, dataset: str, splits: dict[str, str], prefix: str, plain: Callable, metric: Callable) -> None:
    text_task.add(
        name,
        source=TfdsSource(dataset, splits),
        plain=[plain],
        prefix=prefix,
        metric_fns=[metric],
        postprocess_fn=references.all_of,
        has_references=True,
        shots=few_shot.Shots(question="Question: ", answer="Answer: "),
    )


_register(
    "trivia_qa",
    "trivia_qa/unfiltered.nocontext:1.1.0",
    {"train": "train[:78785]", "validation": "train[78785:]", "test": "validation"},
    "trivia_qa question: ",
    trivia,
    answer_metrics.trivia_qa,
)
_register(
    "natural_questions",
    "natural_questions_open:1.0.0",
    {"train": "train[:79168]", "validation": "train[79168:]", "test": "validation"},
    "nq question: ",
    functools.partial(listed, field="answer"),
    answer_metrics.squad,
)
_register(
    "web_questions",
    "web_questions:1.0.0",
    {"train": "train[:3417]", "validation": "train[3417:]", "test": "test"},
    "wq question: ",
    functools.partial(listed, field="answers"),
    answer_metrics.squad,
)
