"""The coloured trace, on scripted tokens."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from speccascade_t5x.cli import colour
from speccascade_t5x.interfaces import (
    SOURCE_ACCEPTED,
    SOURCE_BONUS,
    SOURCE_DRAFTER,
    SOURCE_PAD,
    SOURCE_RESIDUAL,
    SOURCE_VERIFIER,
)
from speccascade_t5x.text.vocabulary import ByteVocabulary

BYTES = ByteVocabulary()


def rendered(text, **options) -> str:
    """What a console with these options writes."""
    file = io.StringIO()
    Console(file=file, width=80, highlight=False, _environ={}, **options).print(text)
    return file.getvalue()


def scripted(*written: tuple[str, int]) -> tuple[list[str], list[int]]:
    """Pieces and sources of a byte decode in which each text has one source, with EOS at the end."""
    tokens, sources = [], []
    for text, source in written:
        ids = BYTES.encode(text)
        tokens += ids
        sources += [source] * len(ids)
    return BYTES.decode_pieces([*tokens, BYTES.eos_id]), [*sources, SOURCE_ACCEPTED]


def test_marks_say_who_wrote_what():
    written = scripted(
        ("Scho", SOURCE_ACCEPTED),
        ("n", SOURCE_RESIDUAL),
        ("e Gr", SOURCE_ACCEPTED),
        ("ü", SOURCE_BONUS),
        ("ß", SOURCE_RESIDUAL),
        ("e", SOURCE_ACCEPTED),
    )
    text = colour.trace(*written, colour=False)
    assert rendered(text) == "Scho[n]e Gr{ü}[ß]e\n"
    # On a terminal too, marks come without any escape code.
    assert rendered(text, force_terminal=True) == "Scho[n]e Gr{ü}[ß]e\n"


def test_a_model_alone_is_marked_as_one_piece():
    assert colour.trace(*scripted(("Käse", SOURCE_VERIFIER)), colour=False).plain == "<Käse>"
    assert colour.trace(*scripted(("Käse", SOURCE_DRAFTER)), colour=False).plain == "|Käse|"


def test_a_character_of_several_tokens_counts_as_its_last_ones():
    pieces = BYTES.decode_pieces(BYTES.encode("für"))  # f, two bytes of ü, r
    assert pieces == ["f", "", "ü", "r"]
    sources = [SOURCE_ACCEPTED, SOURCE_BONUS, SOURCE_RESIDUAL, SOURCE_ACCEPTED]
    assert colour.trace(pieces, sources, colour=False).plain == "f[ü]r"


def test_neighbours_of_one_source_share_their_marks_across_tokens_that_show_nothing():
    pieces = BYTES.decode_pieces(BYTES.encode("für"))
    sources = [SOURCE_BONUS, SOURCE_RESIDUAL, SOURCE_BONUS, SOURCE_BONUS]
    assert colour.trace(pieces, sources, colour=False).plain == "{für}"


def test_colours_leave_the_text_alone_and_style_each_token():
    text = colour.trace(*scripted(("a", SOURCE_ACCEPTED), (" ", SOURCE_RESIDUAL), ("b", SOURCE_BONUS)), colour=True)
    assert text.plain == "a b"
    shown = rendered(text, force_terminal=True, color_system="truecolor")
    residual = "\x1b[1;38;2;0;0;0;48;2;230;159;0m \x1b[0m"
    bonus = "\x1b[4;38;2;255;255;255;48;2;0;96;168mb\x1b[0m"
    assert shown == f"a{residual}{bonus}\n"


def test_what_the_model_wrote_is_no_markup_and_steers_no_terminal():
    written = scripted(("[bold]:smile:", SOURCE_ACCEPTED), ("\x1b[2J\t", SOURCE_RESIDUAL))
    assert rendered(colour.trace(*written, colour=False)) == "[bold]:smile:[\ufffd[2J\ufffd]\n"


@pytest.mark.parametrize("coloured", [False, True])
def test_styles_and_marks_are_told_apart(coloured):
    """No two sources look alike, whichever way they are shown."""
    looks = [(w.style if coloured else w.marks) for w in colour.WRITERS.values()]
    assert len(set(looks)) == len(colour.WRITERS) == 5


def test_backgrounds_keep_the_contrast_readers_need():
    """At least 4.5 to 1 between text and background (WCAG AA), so the terminal's theme plays no part."""

    def luminance(hexadecimal: str) -> float:
        parts = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    styled = {s: w.style for s, w in colour.WRITERS.items() if w.style}
    assert set(colour.WRITERS) - set(styled) == {SOURCE_ACCEPTED}
    for style in styled.values():
        front, back = (luminance(word) for word in style.split() if word.startswith("#"))
        high, low = max(front, back), min(front, back)
        assert (high + 0.05) / (low + 0.05) >= 4.5, style


def test_the_legend_names_only_what_is_there():
    sources = [SOURCE_BONUS, SOURCE_ACCEPTED, SOURCE_ACCEPTED, SOURCE_RESIDUAL]
    legend = colour.legend(sources, colour=False)
    assert rendered(legend) == "plain: accepted draft  [residual of a rejection]  {bonus of a whole draft}\n"
    assert colour.legend([SOURCE_VERIFIER], colour=True).plain == "verifier alone"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"force_terminal": True, "color_system": "standard"}, True),
        ({"force_terminal": True, "color_system": "standard", "no_color": True}, False),
        ({"_environ": {"FORCE_COLOR": "1"}}, True),
        ({"_environ": {"FORCE_COLOR": "1", "NO_COLOR": "1"}}, False),
        ({"_environ": {"TERM": "dumb"}, "force_terminal": True}, False),
    ],
)
def test_colour_needs_a_terminal_that_has_it(options, expected):
    console = Console(**{"file": io.StringIO(), "_environ": {}, **options})
    assert colour.has_colour(console) is expected


def test_wrong_sources_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        colour.trace(["a", "b"], [SOURCE_ACCEPTED], colour=False)
    with pytest.raises(ValueError, match="source 0 has no writer"):
        colour.trace(["a"], [SOURCE_PAD], colour=False)
