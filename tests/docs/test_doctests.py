"""The examples in docstrings and in the page on rules run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from speccascade_t5x.core.rules import base

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    *("core.divergences", "core.rules.base", "core.rules.token", "core.stopping", "decoding.api", "drafting.k_matrix"),
    *("models.table", "tasks.folding", "text.vocabulary"),
)
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_module_with_examples_is_run():
    files = [*(ROOT / "speccascade_t5x").rglob("*.py"), *(ROOT / "tasks").glob("*.py")]
    found = {file for file in files if re.search(r"^\s+>>> ", file.read_text(encoding="utf-8"), re.MULTILINE)}
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removeprefix("speccascade_t5x.") for file in found}
    assert names == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"speccascade_t5x.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_code_of_the_page_on_rules(monkeypatch):
    """What its comments say of the example is checked here."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    found = _BLOCK.findall((ROOT / "docs" / "rules.md").read_text(encoding="utf-8"))
    assert len(found) == 2
    space: dict = {}
    for block in found:
        exec(compile(block, "docs/rules.md", "exec"), space)
    token_v3, halfway = space["rules"].TokenV3(alpha=0.4), space["rules"].by_name("halfway", alpha=0.5)
    assert token_v3.target(space["pair"]).tolist() == pytest.approx([0.68, 0.24, 0.08])
    assert token_v3.verdict(space["pair"]).accept.tolist() == pytest.approx([1.0, 0.48, 0.267], abs=1e-3)
    assert halfway.target(space["pair"]).tolist() == pytest.approx([0.4, 0.4, 0.2])
