"""The examples run, on small settings, and print what they promise."""

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path

import pytest

from speccascade_t5x.core import rules
from speccascade_t5x.core.rules import base

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRINTED = {
    "first_decode": r"verifier calls: \d+ alone, \d+ speculative(?s:.)*\[.\](?s:.)*speculative: \d+ tokens/s",
    "own_rule": r"sober +2\.0 +[\d.]+% +[\d.]+% +0\.\d\d",
    "distil_drafter": r"distilled drafter: \d\.\d\dx, 0\.\d\d verifier calls per token",
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(name, monkeypatch, capsys, tmp_path):
    """They assert as they go: equal outputs of lossless speculation, frequencies that follow pi."""
    monkeypatch.setenv("SPECCASCADE_EXAMPLE_TINY", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # the example's own rule is gone afterwards
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out)


def test_the_rule_of_an_example_does_not_stay():
    assert "sober" not in rules.names()
