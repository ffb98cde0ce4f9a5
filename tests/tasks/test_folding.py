from __future__ import annotations

import pytest

from speccascade_t5x.tasks.folding import fold


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("Größe der Schaltfläche …", "grosse der schaltflache ..."),
        ("STRASSE Straße ẞ", "strasse strasse ss"),
        ("»Café« – ½", "»cafe« – 1⁄2"),
        ("e\u0301", "e"),  # an accent that already stands apart
        ("ﬁ ²", "fi 2"),
        ("", ""),
    ],
)
def test_fold(text, folded):
    assert fold(text) == folded


def test_the_order_of_the_steps_is_kept():
    """Lower case comes first, so the capital sharp s counts as 'ß'; NFKD comes after it, so a
    letter that only NFKD reveals keeps its case."""
    assert fold("ẞ") == "ss"
    assert fold("ℕ") == "N"


def test_benutzerdefinierte_example_of_the_pair():
    folded = "benutzerdefinierte farbe fur diesen bewegungspfad"
    assert fold("Benutzerdefinierte Farbe für diesen Bewegungspfad") == folded
