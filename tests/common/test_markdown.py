from __future__ import annotations

import pytest

from speccascade_t5x.common import markdown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a|b", r"a\|b"),
        ("a\\|b", r"a\\\|b"),  # a backslash of its own would free the bar
        ("a\nb\r\nc\u2028d\x1b[2J", "a b c d [2J"),
        ("<img src=x onerror=y> &", "&lt;img src=x onerror=y&gt; &amp;"),
        ("![x](http://y) [x][y]", r"![x\](http://y) [x\][y]"),
        ("`code`", r"\`code\`"),
        ("0.5 [0.4, 0.6]", "0.5 [0.4, 0.6]"),
        (3, "3"),
    ],
)
def test_a_text_is_shown_as_it_is(value, shown):
    assert markdown.text(value) == shown


def test_every_row_has_as_many_cells_as_the_header():
    lines = markdown.table(("na|me", "value"), [("x\n| forged | 1 |", 2)])
    assert lines == [r"| na\|me | value |", "| --- | --- |", r"| x \| forged \| 1 \| | 2 |"]
