"""`speccascade methods` names everything a user can ask for, on a narrow terminal too."""

from __future__ import annotations

import pytest

from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import methods as verb
from speccascade_t5x.core import rules
from speccascade_t5x.inference.drafters import DRAFTERS
from speccascade_t5x.inference.methods import METHODS
from speccascade_t5x.interfaces import UserError


@pytest.fixture
def lines(monkeypatch, capsys) -> list[str]:
    """What the verb prints at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["methods"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    return [line.rstrip() for line in out.splitlines()]


def section(lines: list[str], title: str) -> list[tuple[str, str]]:
    """(first cell, rest of the row as one text) of a table; a row goes on where its first cell is empty."""
    begin = next(i for i, line in enumerate(lines) if line.startswith(title))
    header, rows = lines[begin + 1], []
    width = len(header) - len(header.split(None, 1)[1])
    for line in lines[begin + 2 :]:
        if not line:
            break
        name, rest = line[:width].strip(), line[width:].strip()
        if name and (not rows or rest):
            rows.append((name, rest))
        else:
            rows[-1] = (rows[-1][0] + name, f"{rows[-1][1]} {rest}")
    return rows


def test_every_method_is_listed(lines):
    rows = dict(section(lines, "Executions"))
    assert list(rows) == list(METHODS)
    for name, method in METHODS.items():
        assert all(option in rows[name] for option in method.reads)


def test_every_rule_is_listed_with_its_range_and_its_ends(lines):
    rows = dict(section(lines, "Rules"))
    assert list(rows) == rules.names()
    for name in rules.names():
        cls = rules.get(name)
        alpha = "none" if cls.alpha_range is None else rules.describe_range(cls)
        assert rows[name].startswith(f"{alpha} ")
        for word in (*cls.ends.split(), *cls.source.split()):
            assert word in rows[name], (name, word)


def test_every_drafter_is_listed(lines):
    assert "\n".join(lines).count("draft_stop=") >= 2
    rows = dict(section(lines, "Drafters"))
    assert list(rows) == list(DRAFTERS)
    for name, kind in DRAFTERS.items():
        assert all(option in rows[name] for option in kind.reads), name
        assert all(word in rows[name] for word in kind.source.split()), name


def test_it_takes_no_options():
    with pytest.raises(UserError, match="unknown flag '--rule=chow'"):
        verb.main(["--rule=chow"])
