"""The data to decode: texts, a file of texts, or a split of a seqio task, all as one kind of data set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speccascade_t5x.data.examples import Example, PromptForm
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text import text_input

# Fields of a record that come from decoding; inputs and targets come from the data.
_DECODED = ("prediction", "log_prob", "tokens", "counts", "source", "trace")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set to decode.

    Attributes:
      name: the task's name, or its replacement in file names.
      prompts: the examples; `index` is the place of each in the list.
      score: predictions -> metrics, or (predictions, places) -> metrics of the examples at these places alone; None
        if nothing can be scored.
    """

    name: str
    prompts: list[Example]
    score: Callable[..., dict[str, float]] | None = None

    @property
    def references(self) -> list[str]:
        """The reference of each example.

        Raises:
          UserError: an example has none.
        """
        found = [example.targets_text for example in self.prompts if example.targets_text is not None]
        if len(found) < len(self.prompts):
            raise UserError(f"{self.name} has examples without targets: a sweep needs a reference for each")
        return found

    def record(self, index: int, decoded: Mapping[str, Any]) -> dict[str, Any]:
        """The record of example `index`: its texts, and the fields that come from decoding."""
        example = self.prompts[index]
        targets = {} if example.targets_text is None else {"targets": example.targets_text}
        decoded = {name: decoded[name] for name in _DECODED if name in decoded}
        return {"inputs": example.inputs_text, **targets, **decoded}

    def identity(self) -> str:
        """A short text that differs if the examples differ, so that records of different data are never mixed."""
        digest = hashlib.sha256()
        for example in self.prompts:
            digest.update(repr((example.inputs_text, example.targets_text)).encode())
        return f"{self.name}, {len(self.prompts)} examples, sha256 {digest.hexdigest()[:16]}"


def check_source(task: str | None, split: str, input: str | None) -> None:
    """Checks everything about the data that can be checked before a pair is loaded.

    Raises:
      UserError: neither or both of task and input file are named, or there is no such task, split or file.
    """
    if (task is None) == (input is None):
        raise UserError("name either a task or an input file to decode (TASK or INPUT), and not both")
    if task is not None:
        from speccascade_t5x.data import seqio_tasks

        seqio_tasks.check(task, split)
    elif input is not None and input != "-":
        text_input.check(input)


def read(form: PromptForm, task: str | None, split: str, input: str | None, limit: int | None = None) -> Dataset:
    """Reads a task's split, or an input file; exactly one of the two is named.

    Args:
      form: how a text becomes a prompt.
      task: a registered seqio task; its vocabulary must be the form's.
      split: split of the task.
      input: see `text_input.read`.
      limit: number of examples to read, from the first.

    Raises:
      UserError: neither or both are named, or the data are bad; the message names the first bad example.
    """
    check_source(task, split, input)
    if task is not None:
        return _from_task(form, task, split, limit)
    assert input is not None
    texts = text_input.read(input, limit)
    prompts = [form.encode(each.index, each.inputs_text, each.where, each.targets_text) for each in texts]
    return Dataset("stdin" if input == "-" else Path(input).stem, prompts)


def from_texts(form: PromptForm, texts: Iterable[str]) -> Dataset:
    """Texts as a data set, numbered from 0.

    Raises:
      UserError: one is not a text, or too long while the form does not truncate.
    """
    return Dataset("texts", [form.encode(i, text, f"text {i}") for i, text in enumerate(texts)])


def _from_task(form: PromptForm, task: str, split: str, limit: int | None) -> Dataset:
    """Reads a seqio task and checks that it has the form's vocabulary."""
    from speccascade_t5x.data import seqio_tasks

    seqio_tasks.check_vocabulary(task, form.vocabulary)
    examples = seqio_tasks.examples(task, split, {"inputs": form.max_len}, limit=limit, truncate=form.truncate)
    with_targets = all(example.targets_text is not None for example in examples)
    seqio_tasks.metric_fns(task)  # one that cannot be called is told before anything is decoded

    def score(predictions: Sequence[str], places: Sequence[int] | None = None) -> dict[str, float]:
        return seqio_tasks.score(task, examples if places is None else [examples[i] for i in places], predictions)

    return Dataset(task, examples, score if with_targets else None)
