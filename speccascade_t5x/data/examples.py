"""Examples to decode: a text and its ids, checked and cut to length in one place for all sources of text."""

from __future__ import annotations

import dataclasses

import numpy as np

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import Vocabulary, ids_of


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
      index: its place in the data, counted from 0; decoding derives its random numbers from it.
      inputs: [S] int32 ids, with the EOS where the task or the bundle appends one.
      inputs_text: the text before it was tokenised, or the decoded ids where a task kept none.
      targets: [T] int32 ids of the reference, or None.
      targets_text: the reference, or None.
    """

    index: int
    inputs: np.ndarray
    inputs_text: str = ""
    targets: np.ndarray | None = None
    targets_text: str | None = None


def cut(ids: np.ndarray, room: int | None, eos_id: int | None) -> np.ndarray:
    """The first `room` ids.

    Args:
      ids: [S] ids.
      room: how many ids to keep; None keeps all.
      eos_id: replaces the last id of a cut sequence; None if sequences have no EOS.
    """
    ids = np.asarray(ids, np.int32)
    if room is None or len(ids) <= room:
        return ids
    ids = ids[:room].copy()
    if eos_id is not None and room:
        ids[-1] = eos_id
    return ids


def check_ids(ids: np.ndarray, vocab_size: int, where: str, name: str) -> None:
    """Checks ids from outside while they are as wide as they came.

    Args:
      ids: [S] whole numbers.
      vocab_size: of the vocabulary they are of.
      where: what a message calls the example.
      name: of the feature.

    Raises:
      UserError: another rank, something else than whole numbers, or an id outside the vocabulary.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iuO"):
        raise UserError(
            f"{where} has {name} of shape {ids.shape} and type {ids.dtype} where a row of ids is read: give it one "
            "text, and tokenise it"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise UserError(
            f"{where} has id {wrong} among its {name}, outside the vocabulary of {vocab_size} ids: name the vocabulary "
            "its ids were made with"
        )


def fit(ids: np.ndarray, room: int | None, where: str, *, truncate: bool, eos_id: int | None) -> np.ndarray:
    """Input ids that fit the feature length: as they are, cut, or rejected.

    Args:
      ids: [S] ids.
      room: the feature length; None is unlimited.
      where: name of the example in messages.
      truncate: cut what is too long instead of rejecting it.
      eos_id: see `cut`.

    Raises:
      UserError: the ids are too long and `truncate` is off.
    """
    if room is not None and len(ids) > room and not truncate:
        raise UserError(
            f"{where} has {len(ids)} tokens{', EOS included' * (eos_id is not None)}, more than the feature length "
            f"{room} of the inputs: shorten it, set max_input_len, or set truncate"
        )
    return cut(ids, room, eos_id)


@dataclasses.dataclass(frozen=True)
class PromptForm:
    """How a text becomes a prompt.

    Attributes:
      vocabulary: the vocabulary that encodes it.
      max_len: maximum length of a prompt in tokens, EOS included.
      eos: end every prompt with EOS.
      truncate: cut longer prompts instead of rejecting them.
    """

    vocabulary: Vocabulary
    max_len: int
    eos: bool = True
    truncate: bool = False

    def encode(self, index: int, text: str, where: str, targets_text: str | None = None) -> Example:
        """The example of a text; `where` is its name in messages.

        Raises:
          UserError: the value is not a text, or the text is too long while `truncate` is off.
        """
        eos_id = self.vocabulary.eos_id if self.eos else None
        ids = np.array([*ids_of(self.vocabulary, text, where), *([] if eos_id is None else [eos_id])], np.int32)
        inputs = fit(ids, self.max_len, where, truncate=self.truncate, eos_id=eos_id)
        return Example(index, inputs, text, targets_text=targets_text)
