"""Typing mistakes in German, the same for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

LEAST_RATE, MOST_RATE = 0.01, 0.05  # of letters; each text has a rate of its own in between
_ROWS = ("qwertzuiopü", "asdfghjklöä", "yxcvbnm")
_NEIGHBOURS = {key: row[max(i - 1, 0) : i] + row[i + 1 : i + 2] for row in _ROWS for i, key in enumerate(row)}
_PLAIN = {"ä": "a", "ö": "o", "ü": "u", "Ä": "A", "Ö": "O", "Ü": "U", "ß": "ss"}
_SPELT = _PLAIN | {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"}
# Placeholders, markup, names of functions and figures: nothing in the text could tell what they were.
_CODE = re.compile(r"[%{}<>\\$&_@#=/\d]")


def make_mistakes(text: str, seed: int) -> str:
    """Returns `text` with mistakes in it, or as it is where none was drawn.

    One to five of a hundred letters are mistyped (a neighbouring key), swapped with the next one, dropped or doubled;
    in three of ten texts each, capitals are wrong, commas are missing, and umlauts and sharp s are written without
    (a or ae). Words that look like code are left alone.

    Args:
      text: what is right.
      seed: draws the mistakes.
    """
    # Of all methods only random() is promised to give the same numbers in every version of Python.
    draw = random.Random(seed).random
    rate = LEAST_RATE + (MOST_RATE - LEAST_RATE) * draw()
    capitals, commas, umlauts = (draw() < 0.3 for _ in range(3))
    parts = re.split(r"(\s+)", text)  # words at even places, what is between them at odd ones
    for i in range(0, len(parts), 2):
        if _CODE.search(parts[i]):
            continue
        if umlauts:
            parts[i] = _without_umlauts(parts[i], draw)
        if capitals and draw() < 0.2:
            parts[i] = parts[i][:1].swapcase() + parts[i][1:]
        if commas and parts[i].endswith(",") and draw() < 0.7:
            parts[i] = parts[i][:-1]
        parts[i] = _mistyped(parts[i], rate, draw)
    return "".join(parts)


def _without_umlauts(word: str, draw: Callable[[], float]) -> str:
    spelling = _PLAIN if draw() < 0.5 else _SPELT
    return "".join(spelling.get(letter, letter) if draw() < 0.6 else letter for letter in word)


def _mistyped(word: str, rate: float, draw: Callable[[], float]) -> str:
    typed, i = [], 0
    while i < len(word):
        letter = word[i]
        i += 1
        if not letter.isalpha() or draw() >= rate:
            typed.append(letter)
            continue
        kind = int(4 * draw())
        if kind == 0:
            typed.append(_neighbour(letter, draw))
        elif kind == 1 and i < len(word) and word[i].isalpha():
            typed += [word[i], letter]
            i += 1
        elif kind in (1, 2):  # the last letter has none to be swapped with
            continue
        else:
            typed += [letter, letter]
    return "".join(typed)


def _neighbour(letter: str, draw: Callable[[], float]) -> str:
    near = _NEIGHBOURS.get(letter.lower())
    if near is None:
        return ""
    key = near[int(len(near) * draw())]
    return key.upper() if letter.isupper() else key
