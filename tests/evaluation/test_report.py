"""The report: the same in HTML and Markdown, no network, and a real browser finds nothing to complain about."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluation.synthetic import facts, group, point
from speccascade_t5x.evaluation import grid, page, report

POINTS = (
    point("lossless", None, (80, 81), (0.6, 0.6), spread=3),
    *(point("token_v3", a, (80 + a, 82 + a), (0.6 - a / 3, 0.6 - a / 3), spread=4) for a in (0.1, 0.5, 0.9)),
    *(point("min_p", a, (80 + a, 82 - a), (0.65, 0.64), spread=4) for a in (0.1, 0.5, 0.9)),
    point("opt", 0.2, (79, 79), None),
)
VOID = {"meta", "link", "img", "br"}


class Checker(HTMLParser):
    """Collects tags, and every attribute that could fetch something."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    failed = {"cell": "bild_a1_t1_p1_s0", "error": "a model produced NaN"}
    (folder / "trace.html").write_text(page.page("trace", "<h1>trace</h1>"), "utf-8")
    report.write(folder, [group(*POINTS)], facts(failures=[failed], missing=["bild"], traces=1))
    return folder


def test_the_page_is_whole_and_fetches_nothing(written):
    text = (written / "report.html").read_text("utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert all(one.startswith("data:") or one == "trace.html" for one in checker.fetched)
    assert checker.tags.count("img") == 6 and "a task &lt;b&gt;&amp;" in text and "<b>&" not in text
    assert 'name="viewport"' in text and "default-src 'none'" in text


def test_both_forms_say_the_same(written):
    markdown, text = ((written / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == text.count("<tr>")
    for said in ("The cell bild_a1_t1_p1_s0 failed: a model produced NaN", "were not measured: bild", "ARTEFACT"):
        assert (said in markdown) == (said in text)
    assert "Where a gain is an artefact of truncation" in markdown
    # How many items stand behind a speed-up is said beside it, and three batches have no interval.
    assert "| 1.67 [1.67, 1.67] n=50 | 1.10 n=3 |" in markdown and "fewer than 8 have none" in markdown
    assert "token_v3_a0.5_s0" in markdown  # every figure names its cells
    assert {path.suffix for path in (written / "plots").iterdir()} == {".png", ".svg"}
    assert "![frontier-0](plots/frontier-0.png)" in markdown


def test_the_same_points_give_the_same_bytes(written, tmp_path):
    (tmp_path / "again").mkdir()
    failed = {"cell": "bild_a1_t1_p1_s0", "error": "a model produced NaN"}
    report.write(tmp_path / "again", [group(*POINTS)], facts(failures=[failed], missing=["bild"], traces=1))
    assert (tmp_path / "again" / "report.html").read_bytes() == (written / "report.html").read_bytes()


def test_without_wall_times_there_is_still_a_report(tmp_path):
    bare = [
        point("verifier", None, (80, 80), None),
        point("drafter", None, (60, 60), None),
        point("lossless", None, (80, 80), None),
    ]
    report.write(tmp_path, [type(group())(grid.Condition(5, 1.0, 1.0), tuple(bare))], facts(timed=0, repeats=0))
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "No wall time was measured yet" in text and "quality-by-calls" in text and "frontier-0" not in text
    assert "trace.html" not in (tmp_path / "report.html").read_text("utf-8")  # there is none to go to


def test_what_is_not_drafted_by_the_drafter_has_no_overlap(tmp_path):
    copied = point("max_gram", None, (80, 80), (0.5, 0.5), settings={"rule": "lossless", "drafter": "max_gram"})
    found = group(point("lossless", None, (80, 80), (0.5, 0.5)), copied)
    report.write(tmp_path, [found], facts(timed=8))
    table = (tmp_path / "report.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in table if line.startswith("| ")]
    column = next(row for row in rows if "overlap on references" in row).index("overlap on references")
    asked = ("verifier", "lossless", "max_gram")
    shown = {row[1]: row[column] for row in rows if len(row) > column and row[1] in asked}
    assert shown == {"verifier": "-", "lossless": "0.900", "max_gram": "-"}
    assert any("too few to trust a speed-up" in line for line in table)


def test_an_nll_is_shown_with_the_digits_it_needs(tmp_path):
    found = group(point("opt", 0.1, (-0.0345, -0.0345), (0.5, 0.5), spread=0.004))
    report.write(tmp_path, [found], facts(metric="nll"))
    assert "| -0.0345 [-0.03" in (tmp_path / "report.md").read_text("utf-8")


def browser() -> str:
    """A headless browser's command; skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("needs a headless browser (chromium or google-chrome), which is not installed")


def shoot(file: Path, picture: Path, size: str) -> list[str]:
    """Opens a page from disk, keeps a screenshot as an artefact of the test, and returns what the console said."""
    how = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0")
    profile = f"--user-data-dir={picture.with_suffix('.profile')}"
    shot = (f"--window-size={size}", "--virtual-time-budget=3000", f"--screenshot={picture}")
    command = [browser(), *how, profile, *shot, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert picture.read_bytes()[:4] == b"\x89PNG", done.stderr
    return re.findall(r"CONSOLE.*", done.stderr)


@pytest.mark.parametrize(("name", "size"), [("desktop", "1280,1600"), ("phone", "390,844")])
def test_a_browser_shows_it_without_complaint(written, name, size):
    assert shoot(written / "report.html", written / f"{name}.png", size) == []


def test_a_complaint_would_be_seen(tmp_path):
    (tmp_path / "bad.html").write_text(page.page("bad", '<img src="https://example.org/x.png">', script="missing()"))
    said = " ".join(shoot(tmp_path / "bad.html", tmp_path / "bad.png", "300,300"))
    assert "missing is not defined" in said and "Content Security Policy" in said


def test_names_of_others_are_no_formulas_and_no_rows(tmp_path):
    """A task may be called anything."""
    strange = "a $\\frac{1}{$ |task|\n| forged | 1 |"
    report.write(tmp_path, [group(*POINTS)], facts(name=strange, metric="$x$ and $\\y$"))
    heading = (tmp_path / "report.md").read_text("utf-8").splitlines()[0]
    assert heading.startswith("# Sweep on a $") and heading.endswith(r"\| forged \| 1 \|")
    drawn = "".join(path.read_text("utf-8") for path in (tmp_path / "plots").glob("*.svg"))
    assert "$x$ and $\\y$" in drawn
