"""The relative links of the documentation lead somewhere, headings included, and every page can be reached."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "tests/*.md", "results/**/*.md")
    for page in ROOT.glob(pattern)
)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")


def links(text: str) -> Iterator[str]:
    """The targets of the Markdown links of a page, those in code left out."""
    prose = [line for line in _FENCE.sub("", text).splitlines() if not line.startswith("    ")]
    yield from _LINK.findall(_CODE.sub("", "\n".join(prose)))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    found = []
    for link in links(page.read_text(encoding="utf-8")):
        if urllib.parse.urlsplit(link).scheme:
            continue
        path, _, anchor = urllib.parse.unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and target.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_seen(monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# One & two\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#one--two) [c](gone.md) [d](there.md#three) [e](https://example.org/x)\n"
        "[f\nwrapped](../outside.md) [g](#here) `[h](code.md)`\n\n    [i](indented.md)\n\n# Here\n"
    )
    assert broken(page) == ["gone.md", "there.md#three", "../outside.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(page):
    """Code spans such as `core/verify.py`, read from the checkout, the package, the tests or the gin files."""
    if page.name == "CHANGELOG.md":
        return  # it names what is gone
    named = set(re.findall(r"`([\w./]+/[\w.]+\.(?:py|gin))`", page.read_text(encoding="utf-8")))
    homes = (ROOT, ROOT / "speccascade_t5x", ROOT / "gin_configs", ROOT / "tests", page.parent)
    assert {name for name in named if not any((home / name).exists() for home in homes)} == set()


def test_every_page_of_the_documentation_is_in_its_index():
    index = set(links((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages - {link.partition("#")[0] for link in index} == set()


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
