"""Renders an output token by token, coloured by which model wrote each token.

Where colours are off (files, pipes, NO_COLOR), marks around the tokens show the same:

    H{ö}r zu, Kap[i]tän      accepted drafts plain, {bonus}, [residual]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_BONUS,
    SOURCE_DRAFTER,
    SOURCE_RESIDUAL,
    SOURCE_VERIFIER,
)


@dataclasses.dataclass(frozen=True)
class Writer:
    """How the tokens of one source are shown.

    Attributes:
      meaning: text in the legend.
      style: rich style on a terminal with colours.
      marks: texts before and after such tokens when there are no colours.
    """

    meaning: str
    style: str
    marks: tuple[str, str]


# The common source keeps the terminal's own colours; the others bring their background along, so
# that dark and light terminals show them alike and a single space can be seen. Blue, orange and
# purple stay apart for every common colour blindness; bold and underline repeat the difference.
WRITERS = {
    SOURCE_ACCEPTED: Writer("accepted draft", "", ("", "")),
    SOURCE_RESIDUAL: Writer("residual of a rejection", "bold #000000 on #e69f00", ("[", "]")),
    SOURCE_BONUS: Writer("bonus of a whole draft", "underline #ffffff on #0060a8", ("{", "}")),
    SOURCE_VERIFIER: Writer("verifier alone", "#ffffff on #8a3d78", ("<", ">")),
    SOURCE_DRAFTER: Writer("drafter alone", "#ffffff on #5f5f5f", ("|", "|")),
}
_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def has_colour(console: Console) -> bool:
    """Whether colours are on: the output is a terminal that supports them, and NO_COLOR is not set."""
    return console.color_system is not None and not console.no_color


def trace(pieces: Sequence[str], sources: Sequence[int], *, colour: bool) -> Text:
    """Renders every token in the style of its source; neighbouring tokens of one source are joined.

    Args:
      pieces: display text per token, as `Vocabulary.decode_pieces` gives it: '' for tokens without
        a text of their own, such as EOS or the first byte of an umlaut.
      sources: `source` of the same tokens, SOURCE_*.
      colour: styles if True, marks if not.

    Raises:
      ValueError: `pieces` and `sources` differ in length, or a source is unknown.
    """
    shown = [(s, p) for p, s in zip(pieces, sources, strict=True) if p]
    text = Text()
    for source, group in itertools.groupby(shown, key=lambda item: item[0]):
        if source not in WRITERS:
            raise ValueError(f"source {source} has no writer: known are {sorted(WRITERS)}")
        writer = WRITERS[source]
        # A model may emit any byte, also those that steer a terminal.
        words = "".join(c if c.isprintable() else _UNPRINTABLE for _, piece in group for c in piece)
        before, after = ("", "") if colour else writer.marks
        text.append(f"{before}{words}{after}", writer.style if colour else "")
    return text


def legend(sources: Iterable[int], *, colour: bool) -> Text:
    """A legend of the given sources, each rendered in its own style."""
    entries = []
    for source in sorted(set(sources)):
        entry = Text("plain: ") if source == SOURCE_ACCEPTED else Text()
        entries.append(entry + trace([WRITERS[source].meaning], [source], colour=colour))
    return Text("  ").join(entries)
