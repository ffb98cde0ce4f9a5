"""Checks of option values; each error message names the option and the values it may have."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

from speccascade_t5x.interfaces import UserError

# Options of other decoders that no method here supports.
_UNSUPPORTED = {
    *("num_beams", "beam_size", "beams", "length_penalty", "early_stopping"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("logit_bias", "bad_words"),
}


def refuse_unsupported(name: str) -> None:
    """Rejects beam search, penalties and logit bias by name.

    Raises:
      UserError: `name` is one of their options.
    """
    if name in _UNSUPPORTED:
        raise UserError(f"{name} is not supported: leave it out, as outputs are sampled from a rule's distribution")


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to use instead of an unknown name: the nearest known one, else all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"


def one_of(what: str, name: str, known: Iterable[str]) -> str:
    """Returns `name`, which must be one of the known ones.

    Raises:
      UserError: it is not; the message names the nearest.
    """
    known = list(known)
    if name not in known:
        raise UserError(f"there is no {what} {name!r}: {suggestion(name, known)}")
    return name


def whole(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Checks that `value` is a whole number from `least` to `most`.

    Raises:
      UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
        span = f", {least} or more" if math.isinf(most) else f" from {least} to {most}"
        raise UserError(f"{name}={value!r} is outside its range: it must be a whole number{span}")


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Checks that `value` is a number from `low` to `high` and not NaN.

    Raises:
      UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        span = "" if math.isinf(high) else f" from {low:g} to {high:g}"
        raise UserError(f"{name}={value!r} is outside its range: it must be a number{span}")


def text(name: str, value: Any) -> None:
    """Checks that `value` is a text.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}={value!r} is not a text")


def sequence(name: str, value: Any) -> tuple:
    """`value` as a tuple; one text is not a sequence of texts here.

    Raises:
      UserError: it is neither a list nor a tuple.
    """
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name}={value!r} is not a list: put it in brackets")
    return tuple(value)
