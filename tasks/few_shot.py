"""Prompts that show a decoder-only model some solved examples before the one it is asked.

Every example is a block "<mark><input>\\n<mark><target>", and an empty line separates blocks. The examples
are this project's own (`exemplars`) or the first ones of the train split in file order; either way every run
shows the same ones.

    from speccascade_t5x.tasks import few_shot

    few_shot.number.shots = 2
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from speccascade_t5x.common import checks
from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks.exemplars import EXEMPLARS
from speccascade_t5x.tasks.late import configured

_SEPARATOR = "\n\n"


@dataclasses.dataclass(frozen=True)
class Shots:
    """How a task prompts.

    Attributes:
      answer: mark before a target, such as "Answer: ".
      question: mark before an input; "" where the input brings its own.
      after: put after a target.
      instruction: a first line; "" has none.
      default: examples shown unless gin binds `few_shot.number.shots`.
      exemplars: their name in `exemplars`; None takes them from the split below.
      split: where they are taken from otherwise.
      skip: how many examples of the split come before the first one shown.
      ends: texts that end an answer, beside the marks.
    """

    answer: str
    question: str = ""
    after: str = ""
    instruction: str = ""
    default: int = 4
    exemplars: str | None = None
    split: str = "train"
    skip: int = 0
    ends: tuple[str, ...] = (_SEPARATOR,)

    def head(self, solved: Sequence[tuple[str, str]]) -> str:
        """Everything before the input that is asked."""
        parts = [self.instruction] if self.instruction else []
        parts += [f"{self.question}{inputs}\n{self.answer}{targets}{self.after}" for inputs, targets in solved]
        return "".join(part + _SEPARATOR for part in parts) + self.question

    @property
    def tail(self) -> str:
        """What follows the input that is asked. No space ends it: pieces of SentencePiece begin with theirs."""
        return f"\n{self.answer.rstrip()}"

    def cut(self, text: str) -> str:
        """The answer in a model's output: the text before a further block.

        A vocabulary without line breaks gives spaces for them, so marks and `after` end an answer as well.
        """
        marks = [mark.strip() for mark in (self.question, self.answer, self.after) if mark]
        ends = [rf"(?:^|(?<=\s)){re.escape(mark)}" for mark in marks] + [re.escape(end) for end in self.ends]
        found = re.search("|".join(ends), text.strip())
        return text.strip()[: found.start()].strip() if found else text.strip()


def number(shots: int | None = None) -> int | None:
    """Says how many solved examples prompts show; None leaves it to each task."""
    return shots


def prefixed(prefix: str) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor that puts T5's name of the task before every input."""
    return functools.partial(_joined, before=lambda: prefix, after="")


def prompted(
    shots: Shots, source: seqio.DataSource, plain: Sequence[Callable]
) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    """A preprocessor that wraps every input in a prompt.

    Args:
      shots: the form.
      source: where examples come from if the project has none of its own.
      plain: preprocessors of raw examples.
    """
    return functools.partial(_joined, before=lambda: shots.head(solved(shots, source, plain)), after=shots.tail)


def _joined(dataset: tf.data.Dataset, before: Callable[[], str], after: str) -> tf.data.Dataset:
    head = before()
    return dataset.map(lambda example: {**example, "inputs": tf.strings.join([head, example["inputs"], after])})


def solved(shots: Shots, source: seqio.DataSource, plain: Sequence[Callable]) -> list[tuple[str, str]]:
    """The (input, target) texts a prompt shows.

    Raises:
      UserError: fewer exist than are asked for, or that is not a number.
    """
    wanted = configured(number)()
    wanted = shots.default if wanted is None else wanted
    checks.whole("few_shot.number.shots", wanted, 0)
    if not wanted:
        return []
    found = list(EXEMPLARS[shots.exemplars]) if shots.exemplars else _first(wanted, source, plain, shots)
    if len(found) < wanted:
        raise UserError(
            f"a prompt of {wanted} examples was asked for, but there are {len(found)}: lower few_shot.number.shots"
        )
    return found[:wanted]


def _first(wanted: int, source: seqio.DataSource, plain: Sequence[Callable], shots: Shots) -> list[tuple[str, str]]:
    dataset = source.get_dataset(split=shots.split, shuffle=False)
    for step in plain:
        dataset = step(dataset)
    texts = dataset.skip(shots.skip).take(wanted).as_numpy_iterator()
    return [(example["inputs"].decode("utf-8"), example["targets"].decode("utf-8")) for example in texts]


def cut_answers(shots: Shots, postprocess_fn: Callable | None) -> Callable[..., Any]:
    """The postprocessor of a few-shot task: cuts predictions, then does what the task itself does."""

    def postprocess(text: str, **about: Any) -> Any:
        text = text if about.get("is_target") else shots.cut(text)
        return postprocess_fn(text, **about) if postprocess_fn else text

    return postprocess
