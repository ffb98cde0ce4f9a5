"""Sequence lengths of the tasks, in tokens with EOS, and their evaluation splits, for gin files and Python.

Sources: WMT 80 in and out, XSum 1,024 in: Narasimhan et al., "Faster Cascades via Speculative Decoding" (ICLR 2025).
The others are this project's: room for nearly all examples of a task under T5's vocabulary. Bytes need about four
times as many, and MBPP counts them. A few-shot prompt holds its examples too. Loads no TensorFlow.

    from speccascade_t5x.tasks import lengths

    generate.Settings.max_input_len = @lengths.inputs()
    lengths.inputs.task = 'wmt14_en_de'
"""

from __future__ import annotations

from typing import NamedTuple

from speccascade_t5x.interfaces import UserError


class Lengths(NamedTuple):
    """Longest prompt and output."""

    inputs: int
    targets: int


LENGTHS = {
    "wmt14_en_de": Lengths(80, 80),
    "wmt14_en_fr": Lengths(80, 80),
    "wmt15_en_de": Lengths(80, 80),
    "wmt15_en_fr": Lengths(80, 80),
    "cnn_dailymail": Lengths(2048, 128),
    "xsum": Lengths(1024, 64),
    "squad_v2": Lengths(512, 32),
    "gsm8k": Lengths(256, 320),
    "trivia_qa": Lengths(64, 32),
    "natural_questions": Lengths(64, 32),
    "web_questions": Lengths(64, 32),
    "mbpp": Lengths(1024, 1024),
    "wmt14_en_de_few_shot": Lengths(512, 80),
    "wmt14_en_fr_few_shot": Lengths(512, 80),
    "wmt15_en_de_few_shot": Lengths(512, 80),
    "wmt15_en_fr_few_shot": Lengths(512, 80),
    "cnn_dailymail_few_shot": Lengths(4096, 128),
    "xsum_few_shot": Lengths(2048, 64),
    "squad_v2_few_shot": Lengths(2048, 32),
    "gsm8k_few_shot": Lengths(1024, 320),
    "trivia_qa_few_shot": Lengths(512, 32),
    "natural_questions_few_shot": Lengths(512, 32),
    "web_questions_few_shot": Lengths(512, 32),
    "mbpp_few_shot": Lengths(4096, 1024),
}
_VALIDATED = ("wmt", "cnn_dailymail", "xsum", "squad")


def of(task: str) -> Lengths:
    """Returns the lengths of a task.

    Raises:
      UserError: the table does not have it.
    """
    if task not in LENGTHS:
        raise UserError(
            f"no lengths are known for the task {task!r}: set them yourself, or name one of {', '.join(LENGTHS)}"
        )
    return LENGTHS[task]


def inputs(task: str) -> int:
    """Longest prompt of a task; see `of`."""
    return of(task).inputs


def targets(task: str) -> int:
    """Longest output of a task; see `of`."""
    return of(task).targets


def truncates(task: str) -> bool:
    """Whether longer prompts are cut, as T5 does it; not for a few-shot task, whose prompt asks at its end."""
    return not task.endswith("_few_shot")


def split(task: str) -> str:
    """The split that is decoded: the validation split of translation, summaries and SQuAD 2, else the test split."""
    of(task)
    return "validation" if task.startswith(_VALIDATED) else "test"
