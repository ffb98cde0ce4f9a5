"""Parsers of flag values. A value that cannot be parsed raises ValueError, as argparse expects."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """ "token_v3, opt" as texts; "" as none."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[float, ...]:
    """ "1,0.5" as numbers."""
    return tuple(map(float, words(text)))


def wholes(text: str) -> tuple[int, ...]:
    """ "3,5,7" as whole numbers."""
    return tuple(map(int, words(text)))


def rows(text: str) -> tuple[tuple[float, ...], ...]:
    """ "0.8,0.5;0.6" as rows of numbers."""
    return tuple(map(numbers, text.split(";")))


def alphas(text: str) -> dict[str, tuple[float, ...]]:
    """ "token_v3=0.1,0.3;opt=0" as alphas by method."""
    return {name: numbers(values) for name, values in (_named(part) for part in text.split(";") if part.strip())}


def rate(text: str) -> dict[str, float]:
    """ "deferral_rate=0.3" as a rate and its value."""
    name, value = _named(text)
    return {name: float(value)}


def _named(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(text)
    return name.strip(), value
