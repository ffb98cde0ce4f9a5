from __future__ import annotations

import pytest

from speccascade_t5x.tasks.mistakes import make_mistakes

PLAIN = "Das Fenster wird erst geschlossen wenn alle Dateien gespeichert sind " * 8
UMLAUTS = "Öffnen Sie die größere Datei und ändern Sie die übrigen Maße " * 8
COMMAS = "eins, zwei, drei, vier, sechs, sieben, acht, neun, zehn, elf, " * 8


def test_the_same_seed_makes_the_same_mistakes():
    # Written out, so that another version of Python or of this module that draws differently is noticed.
    assert make_mistakes("Wählen Sie die Datei, die geöffnet werden soll.", 5) == (
        "Wälhen Sie die Satei, die ggeöffnet werden soll."
    )
    assert len({make_mistakes(PLAIN, seed) for seed in range(20)}) == 20


def edits(a: str, b: str) -> int:
    """Edit distance of two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(last + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def test_one_to_five_of_a_hundred_letters_are_changed():
    letters = sum(letter.isalpha() for letter in PLAIN)
    shares = [edits(PLAIN.lower(), make_mistakes(PLAIN, seed).lower()) / letters for seed in range(30)]
    assert 0.02 < sum(shares) / len(shares) < 0.045  # a swap is two edits
    assert max(shares) < 0.11 and len(set(shares)) > 5


@pytest.mark.parametrize(
    ("text", "lost"),
    [(UMLAUTS, "äöüÄÖÜß"), (COMMAS, ",")],
)
def test_some_texts_lose_umlauts_or_commas_and_others_do_not(text, lost):
    total = sum(text.count(sign) for sign in lost)
    left = [sum(make_mistakes(text, seed).count(sign) for sign in lost) / total for seed in range(40)]
    without = sum(share < 0.7 for share in left)
    assert 5 < without < 20  # three of ten
    assert sum(share > 0.85 for share in left) == 40 - without


def test_some_texts_have_wrong_capitals():
    initials = [[word[:1].isupper() for word in make_mistakes(PLAIN, seed).split()] for seed in range(40)]
    right = [word[:1].isupper() for word in PLAIN.split()]
    wrong = [sum(a != b for a, b in zip(found, right, strict=True)) / len(right) for found in initials]
    assert 5 < sum(share > 0.1 for share in wrong) < 20


def test_words_that_look_like_code_and_white_space_stay():
    text = "%s\t{name}  <br/> Z1 file_name \\frac &amp; 100"
    assert all(make_mistakes(text, seed) == text for seed in range(60))
    assert make_mistakes("", 1) == "" and make_mistakes(" \t ", 1) == " \t "
