"""Every packaged gin file parses, says the same after it was written and read again, and names what exists."""

from __future__ import annotations

import math
import re
from pathlib import Path

import gin
import pytest

from speccascade_t5x import deferral  # noqa: F401 registers its rules
from speccascade_t5x.cli import gin_flags
from speccascade_t5x.common import paths
from speccascade_t5x.core import rules
from speccascade_t5x.interfaces import UserError

ROOT = paths.gin_configs_dir()
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.gin"))
RULE_FILES = [name for name in FILES if name.startswith("rules/")]


def required(name: str) -> list[str]:
    """Macros a file leaves for the user to set, or a file it includes does and it does not set them itself."""
    text = (ROOT / name).read_text("utf-8")
    own = dict(re.findall(r"^(\w+) = (.+)", text, re.MULTILINE))
    included = [macro for part in re.findall(r"^include '(.+)'", text, re.MULTILINE) for macro in required(part)]
    left = [macro for macro in included if macro not in own]
    return left + [macro for macro, value in own.items() if value == "%gin.REQUIRED"]


REQUIRED = {name: required(name) for name in FILES if required(name)}


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def given(name: str) -> list[str]:
    return [f"{macro} = 'somewhere'" for macro in REQUIRED.get(name, [])]


def settings():
    """Settings as the parsed files configure them."""
    from speccascade_t5x.inference import generate

    return gin.get_configurable(generate.Settings)()


@pytest.mark.parametrize("name", FILES)
def test_a_file_parses_and_survives_being_written(name, tmp_path):
    config = gin_flags.load([name], given(name))
    assert config.strip()
    written = tmp_path / "config.gin"
    written.write_text(config, "utf-8")
    assert gin_flags.load([str(written)], []) == config


def test_what_this_file_rests_on():
    assert REQUIRED["pairs/from_checkpoints.gin"] == ["DRAFTER", "VERIFIER", "VOCABULARY"]
    assert REQUIRED["runs/infer_l10n_en_de.gin"] == ["PAIR", "VOCABULARY"]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("runs/", "pairs/", "rules/"))])
def test_the_header_tells_what_is_required(name):
    header = (ROOT / name).read_text("utf-8").partition("from __gin__")[0]
    assert "\n# Required" in header and "\n# Commonly overridden" in header
    assert all(f"#   {macro} " in header for macro in REQUIRED.get(name, []))


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_required_is_named_when_it_is_missing(name):
    macros = REQUIRED[name]
    with pytest.raises(UserError) as caught:
        gin_flags.load([name], [])
    found = re.fullmatch(r"the configuration needs (.+?): set (.+)", str(caught.value))
    assert sorted(found[1].split(", ")) == sorted(set(macros))  # gin gives them in an order of its own
    assert found[2].split() == [f"--gin.{macro}=VALUE" for macro in found[1].split(", ")]
    for macro in macros:
        others = [binding for binding in given(name) if not binding.startswith(f"{macro} =")]
        with pytest.raises(UserError, match=f"needs {macro}: set --gin.{macro}=VALUE"):
            gin_flags.load([name], others)


@pytest.mark.parametrize("name", RULE_FILES)
def test_a_rule_file_configures_its_rule(name):
    gin_flags.load(["runs/infer_restore_de.gin", name], [])
    chosen = settings()
    assert chosen.rule == Path(name).stem
    assert chosen.method == "speculative"
    named = {name: value for name, value in chosen.rule_options.items() if name != "kind"}  # "kind": in the bundle
    rule = rules.by_name(chosen.rule, chosen.alpha, **named)  # refuses an alpha out of range
    assert type(rule) is rules.get(chosen.rule)
    if chosen.alpha is not None:
        low, high = type(rule).alpha_range
        assert low < chosen.alpha < high  # a trade-off, not one of its ends
        header = (ROOT / name).read_text("utf-8")
        assert all(f"{end:g}" in header for end in (low, high) if math.isfinite(end))


def test_every_rule_has_a_file():
    assert {Path(name).stem for name in RULE_FILES} == set(rules.names())


def test_a_later_rule_file_replaces_an_earlier_one():
    gin_flags.load(["runs/infer.gin", "rules/token_v3.gin", "rules/lossless.gin"], [])
    assert (settings().rule, settings().alpha) == ("lossless", None)


def test_a_pair_file_replaces_the_pair_of_a_run_file():
    files = ["runs/infer_l10n_en_de.gin", "pairs/from_checkpoints.gin"]
    gin_flags.load(files, given("pairs/from_checkpoints.gin"))  # PAIR is not asked for any more
    assert str(gin.query_parameter("infer.infer.pair")) == "@generate.from_checkpoints"
    gin_flags.load([*files, "pairs/restore_de.gin"], given("pairs/from_checkpoints.gin"))
    assert str(gin.query_parameter("infer.infer.pair")) == "@generate.load"
    assert gin.query_parameter("generate.load.path") is not None
