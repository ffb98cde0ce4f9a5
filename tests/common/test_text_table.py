from __future__ import annotations

import pytest

from speccascade_t5x.common import text_table


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
    assert text_table.escaped(value) == shown


def test_every_row_has_as_many_cells_as_the_header():
    lines = text_table.markdown([("na|me", "value"), ("x\n| forged | 1 |", 2)])
    assert lines == [r"| na\|me | value |", "|---|---|", r"| x \| forged \| 1 \| | 2 |"]


def test_a_cell_is_one_line_and_one_column():
    rows = [("name", "value"), ("a\tb\r\nc", "1")]
    assert text_table.plain(rows) == ["name   value", "a b c  1"]
