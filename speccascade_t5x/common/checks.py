"""Checks of option values: each names the option and what it must be.

What an option must be is what its annotation says, so `fields` and `arguments` check all of a dataclass or function at
once; only ranges are added. Numbers end in int32 and float32 arrays, so one that these cannot hold is rejected here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from speccascade_t5x.interfaces import UserError

# Options of other decoders that no method here supports.
_UNSUPPORTED = {
    *("num_beams", "beam_size", "beams", "length_penalty", "early_stopping"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("logit_bias", "bad_words"),
}

_LEAST_INT, MOST_INT = -(2**31), 2**31 - 1  # int32
_LEAST_REAL, MOST_REAL = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # float32, without numbers that XLA flushes to zero
SEED = (0, 2**32 - 1)  # what a random key holds

_REAL: Any = int | float | np.integer | np.floating
_Function = TypeVar("_Function", bound=Callable[..., Any])


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


def whole(name: str, value: Any, least: float = _LEAST_INT, most: float = MOST_INT) -> None:
    """Checks that `value` is a whole number from `least` to `most`; what int32 holds unless they say otherwise.

    Raises:
      UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        open_above = most == MOST_INT and not (isinstance(value, int | np.integer) and value > most)
        open_below = least == _LEAST_INT and open_above
        span = "" if open_below else f", {least} or more" if open_above else f" from {least} to {most}"
        raise UserError(f"{_said(name, value)} is outside its range: it must be a whole number{span}")


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Checks that `value` is a number from `low` to `high` that float32 can hold, and no NaN; infinities are numbers.

    Raises:
      UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, _REAL) or not low <= value <= high:
        above = f", {low:g} or more" if math.isfinite(low) else ""
        span = f" from {low:g} to {high:g}" if math.isfinite(high) else above
        raise UserError(f"{_said(name, value)} is outside its range: it must be a number{span}")
    if value and not math.isinf(value) and not _LEAST_REAL <= abs(value) <= MOST_REAL:
        raise UserError(
            f"{_said(name, value)} is beyond float32: it must be 0, or between {_LEAST_REAL:.3g} and "
            f"{MOST_REAL:.3g} in size"
        )


def text(name: str, value: Any) -> None:
    """Checks that `value` is a text.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, str):
        raise UserError(f"{_said(name, value)} is not a text")


def sequence(name: str, value: Any) -> tuple:
    """`value` as a tuple; one text is not a sequence of texts here.

    Raises:
      UserError: it is neither a list nor a tuple.
    """
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{_said(name, value)} is not a list: put it in brackets")
    return tuple(value)


def fields(made: Any, **ranges: tuple[float, ...]) -> None:
    """Checks every field of a dataclass against its annotation, at the end of its making; lists become tuples.

    Args:
      made: the dataclass; its fields are set, frozen or not.
      ranges: field -> (least,) or (least, most) of its numbers, those in its containers too.

    Raises:
      UserError: a field has another type or lies outside its range.
    """
    hints = _hints(made.__class__)
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        checked = as_type(field.name, value, hints[field.name], ranges.get(field.name, ()))
        if checked is not value:
            object.__setattr__(made, field.name, checked)


def arguments(**ranges: tuple[float, ...]) -> Callable[[_Function], _Function]:
    """Decorates a function so that its arguments are checked against their annotations; lists become tuples.

    Args:
      ranges: argument -> (least,) or (least, most) of its numbers, those in its containers too.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            bound, hints = signature.bind(*args, **kwargs), _hints(function)
            for name, value in bound.arguments.items():
                bound.arguments[name] = as_type(name, value, hints.get(name, Any), ranges.get(name, ()))
            return function(*bound.args, **bound.kwargs)

        made: Any = checked
        made.__signature__ = signature  # so that gin knows the names of the arguments
        return made

    return decorate


def as_type(name: str, value: Any, kind: Any, range: tuple[float, ...] = ()) -> Any:
    """`value` as its annotation says: lists as tuples, and the rest as it is.

    Args:
      name: what messages call it.
      value: to check.
      kind: an annotation: bool, int, float, str, a class, a union, or a list, tuple, sequence or mapping of such.
      range: (least,) or (least, most) of the numbers in it.

    Raises:
      UserError: it is something else, or outside the range.
    """
    if kind is Any:
        return value
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of_types(name, value, parts, range)
    if origin is tuple and parts[-1] is not ...:
        found = sequence(name, value)
        if len(found) != len(parts):
            raise UserError(f"{_said(name, value)} must hold {len(parts)} entries, and has {len(found)}")
        return tuple(as_type(name, each, part, range) for each, part in zip(found, parts, strict=True))
    if origin in _SEQUENCES:
        found = tuple(as_type(name, each, parts[0], range) for each in sequence(name, value))
        return value if isinstance(value, tuple) and all(map(_same, found, value)) else found
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{_said(name, value)} is not a dictionary")
        keys = [as_type(f"a name in {name}", key, parts[0]) for key in value]
        made = {key: as_type(f"{name}[{key!r}]", value[key], parts[1], range) for key in keys}
        return value if all(_same(made[key], value[key]) for key in keys) else made
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{_said(name, value)} is neither True nor False")
    if kind is int:
        whole(name, value, *range)
    elif kind is float:
        real(name, value, *range)
    elif kind is str:
        text(name, value)
    elif kind is types.NoneType and value is not None:
        raise UserError(f"{_said(name, value)} must be None")
    elif origin is Callable and not callable(value):
        raise UserError(f"{_said(name, value)} is not a function")
    elif _is_class(kind) and not isinstance(value, kind):
        raise UserError(f"{_said(name, value)} is not of type {kind.__name__}")
    return value


_SEQUENCES = (tuple, list, Sequence, Iterable, Collection)
_CHECKED = (bool, int, float, str, types.NoneType)


def _is_class(kind: Any) -> bool:
    """Whether values are instances of it; whether one keeps a protocol shows where it is used."""
    plain = isinstance(kind, type) and typing.get_origin(kind) is None and kind not in _CHECKED
    return plain and not getattr(kind, "_is_protocol", False)


def _same(one: Any, other: Any) -> bool:
    return one is other


def _one_of_types(name: str, value: Any, kinds: Sequence[Any], range: tuple[float, ...]) -> Any:
    """`value` as the first of some types that takes it; a path is said to be a text."""
    kinds = [types.NoneType if kind is Any else kind for kind in kinds]  # `int | Any` is None until it is settled
    if value is None and types.NoneType in kinds:
        return None
    if isinstance(value, str) and str in kinds:
        return value
    able = [kind for kind in kinds if kind is not types.NoneType and not (kind is Path and str in kinds)]
    refusals = []
    for kind in [*able, *(kind for kind in kinds if kind is Path)]:
        try:
            return as_type(name, value, kind, range)
        except UserError as error:
            refusals.append((kind, error))
    # The sentence of the kind the value comes closest to: of numbers for a number, of lists for a list.
    for kind, refusal in refusals:
        number = kind in (int, float) and isinstance(value, _REAL) and not isinstance(value, bool)
        if number or (typing.get_origin(kind) in _SEQUENCES and isinstance(value, (list, tuple))):
            raise refusal
    if len(able) == 1:
        raise refusals[0][1]
    raise UserError(f"{_said(name, value)} is none of {', '.join(map(_called, able))}")


def _called(kind: Any) -> str:
    """Human-readable name of a type."""
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    origin = typing.get_origin(kind)
    if origin is Callable:
        return "a function"
    if origin is not None:
        return "a dictionary" if origin is Mapping else "a list"
    return plain.get(kind) or str(getattr(kind, "__name__", kind))


def _said(name: str, value: Any) -> str:
    """ "name=value", cut where it is long; a number may be too long to be written at all."""
    try:
        shown = repr(value)
    except ValueError:
        shown = "a number of thousands of digits"
    return f"{name}={shown if len(shown) <= 80 else shown[:77] + '...'}"


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    return typing.get_type_hints(annotated)
