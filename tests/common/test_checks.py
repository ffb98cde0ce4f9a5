"""Options checked from their annotations, and numbers against what arrays can hold."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speccascade_t5x.common import checks
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary, Vocabulary


@dataclasses.dataclass(frozen=True)
class Options:
    count: int = 1
    rate: float | None = 0.5
    name: str = "a"
    path: str | Path | None = None
    fast: bool = False
    sizes: tuple[int, ...] | None = None
    rows: tuple[tuple[str, float | None] | None, ...] = ()
    shares: Mapping[str, float] | None = None
    length: int | str = 1
    more: Mapping[str, Any] | None = None
    load: Callable[[], int] | None = None
    inner: Settings | None = None
    spoken: Vocabulary | None = None

    def __post_init__(self) -> None:
        checks.fields(self, count=(1,), rate=(0.0, 1.0), sizes=(1, 9), shares=(0.0,))


def test_what_fits_stays_and_lists_become_tuples():
    made = Options(sizes=[1, 9], rows=[["a", None], None], shares={"x": 2}, path=Path("p"), load=dict, rate=1)
    assert (made.sizes, made.rows, made.shares) == ((1, 9), (("a", None), None), {"x": 2})
    assert Options(count=np.int32(3), rate=np.float32(0.5)).count == 3
    assert Options(length="auto", more={"a": object()}, inner=Settings(), spoken=ByteVocabulary()).length == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0 is outside its range: it must be a whole number, 1 or more"),
        ({"count": True}, "count=True is outside its range"),
        ({"count": 1.0}, "count=1.0 is outside its range"),
        ({"count": 2**31}, "count=2147483648 is outside its range: it must be a whole number from 1 to 2147483647"),
        ({"count": 10**5000}, "count=a number of thousands of digits is outside"),
        ({"rate": 1.5}, "rate=1.5 is outside its range: it must be a number from 0 to 1"),
        ({"rate": float("nan")}, "rate=nan is outside"),
        ({"rate": 1e-40}, "rate=1e-40 is beyond float32"),
        ({"rate": "x"}, "rate='x' is outside"),
        ({"name": None}, "name=None is not a text"),
        ({"path": 3}, "path=3 is not a text"),
        ({"fast": 1}, "fast=1 is neither True nor False"),
        ({"sizes": 3}, "sizes=3 is not a list"),
        ({"sizes": "12"}, "sizes='12' is not a list"),
        ({"sizes": [1, "a"]}, "sizes='a' is outside"),
        ({"sizes": [10]}, "sizes=10 is outside its range: it must be a whole number from 1 to 9"),
        ({"rows": [["a"]]}, r"rows=\['a'\] must hold 2 entries, and has 1"),
        ({"rows": [["a", "b"]]}, "rows='b' is outside"),
        ({"shares": [1]}, r"shares=\[1\] is not a dictionary"),
        ({"shares": {1: 1.0}}, "a name in shares=1 is not a text"),
        ({"shares": {"x": 1e39}}, r"shares\['x'\]=1e\+39 is beyond float32"),
        ({"length": 1.5}, "length=1.5 is outside its range"),
        ({"length": []}, r"length=\[\] is none of a whole number, a text"),
        ({"load": 3}, "load=3 is not a function"),
        ({"inner": 3}, "inner=3 is not of type Settings"),
        ({"name": ["x" * 99]}, r"name=\['x{75}\.\.\. is not a text$"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_arguments_of_a_function():
    @checks.arguments(limit=(1,))
    def job(names: Sequence[str], limit: int | None = None, *, scale: float = 1.0) -> tuple:
        """Does it."""
        return names, limit, scale

    assert job(["a"]) == (("a",), None, 1.0)
    assert (job.__doc__, list(inspect.getfullargspec(job).args)) == ("Does it.", ["names", "limit"])
    for arguments, message in (
        ({"names": "a"}, "names='a' is not a list"),
        ({"names": [], "limit": 0}, "limit=0 is outside"),
        ({"names": [], "scale": 1e-46}, "scale=1e-46 is beyond float32"),
    ):
        with pytest.raises(UserError, match=message):
            job(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2**31}, "top_k=2147483648"),
        ({"min_ngram": 2**31}, "min_ngram=2147483648"),
        ({"top_p": 1e-40}, "top_p=1e-40 is beyond float32"),
        ({"lenience": 1e39}, "lenience=1e.39 is outside"),
        ({"lenience": float("inf")}, "lenience=inf is outside"),
        ({"buckets": ("a",)}, "buckets='a'"),
        ({"k_matrix": (("a",),)}, "k_matrix='a'"),
        ({"k_matrix": ((-1,),)}, "k_matrix=-1"),
        ({"edge_rules": (("chow",),)}, "must hold 2 entries"),
        ({"stop_sequences": (3,)}, "stop_sequences=3 is not a text"),
        ({"rule_options": {1: 1}}, "a name in rule_options=1 is not a text"),
        ({"plan": 3}, "plan=3 is not a text"),
        ({"seed": 2**32}, "seed=4294967296 is outside its range: it must be a whole number from 0 to 4294967295"),
    ],
)
def test_settings(options, message):
    with pytest.raises(UserError, match=message):
        Settings(**options)
    assert Settings(top_p=1e-30, top_k=2**31 - 1).top_p == 1e-30
