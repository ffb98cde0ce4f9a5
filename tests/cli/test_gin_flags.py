"""Flags and bindings: how they are parsed, and how each mistake is named in one line."""

from __future__ import annotations

import argparse
import logging

import gin
import pytest

from speccascade_t5x.cli import gin_flags
from speccascade_t5x.interfaces import UserError

RUN = ["runs/infer.gin"]


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(prog="verb", allow_abbrev=False)
    parser.add_argument("--batch_size", type=int)
    gin_flags.add_flags(parser)
    return parser


def settings():
    from speccascade_t5x.inference import generate

    return gin.get_configurable(generate.Settings)()


def write(folder, name, text):
    (folder / name).write_text(text, "utf-8")
    return str(folder / name)


def test_split_takes_bindings_out_and_keeps_their_order(parser):
    argv = ["--gin.A=1", "--gin_file=x.gin", "--gin.s/b.c='d = e'", "--batch_size", "3", "--gin_file", "y.gin"]
    flags, bindings = gin_flags.split(parser, argv)
    assert bindings == ["A = 1", "s/b.c = 'd = e'"]
    assert (flags.gin_file, flags.batch_size) == (["x.gin", "y.gin"], 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batchsize=3"], r"unknown flag '--batchsize=3': did you mean '--batch_size'\?"),
        (["--batch_size=many"], r"argument --batch_size: invalid int value: 'many'"),
        (["--gin.A"], r"'--gin.A' is no binding: write --gin.NAME=VALUE"),
        (["lines.txt"], r"unknown flag 'lines.txt'"),
    ],
)
def test_bad_flags(parser, capsys, argv, message):
    with pytest.raises(UserError, match=message):
        gin_flags.split(parser, argv)
    assert capsys.readouterr() == ("", "")  # argparse would print its usage


def test_bindings_come_last_and_a_load_forgets_the_one_before():
    gin_flags.load([*RUN, "rules/token_v3.gin"], ["generate.Settings.alpha = 0.9", "LIMIT = 3"])
    assert (settings().rule, settings().alpha) == ("token_v3", 0.9)
    assert "LIMIT = 3" in gin.config_str()
    gin_flags.load(RUN, [])
    assert (settings().rule, settings().alpha) == ("lossless", None)


def test_files_are_searched_in_order(tmp_path, monkeypatch):
    (tmp_path / "here" / "runs").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "here", "runs/infer.gin", "PLACE = 'here'")
    write(tmp_path / "there", "mine.gin", "include 'runs/infer.gin'\nOTHER = 1\n")
    assert "PLACE = 'here'" in gin_flags.load(["mine.gin"], [], str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path)  # the packaged file again: an earlier search path is forgotten
    assert "PLACE" not in gin_flags.load(["mine.gin"], [], str(tmp_path / "there"))


def test_gin_does_not_chatter(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.DEBUG):
        gin_flags.load(["runs/infer_restore_de.gin"], [])  # its include is not in the working directory
    assert [record.getMessage() for record in caplog.records if "Path not found" in record.getMessage()] == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("generate.Settings.tempature = 1", r"generate\.Settings has no parameter 'tempature': did you mean 'temp"),
        ("infer.infer.limt = 1", r"infer\.infer has no parameter 'limt': did you mean 'limit'\?"),
        ("generate.Setings.alpha = 1", r"there is no 'generate\.Setings': did you mean 'generate\.Settings'\?"),
        ("genrate.Settings.alpha = 1", r"there is no 'genrate\.Settings': did you mean 'generate\.Settings'\?"),
        ("infer.infer.pair = @generate.lod()", r"there is no 'generate\.lod': did you mean 'generate\.load'\?"),
        ("LIMTI = 1", r"sets LIMTI, which no gin file reads: did you mean 'LIMIT'\?"),
        ("infer.infer.limit = %LIMTI", r"reads %LIMTI, which nothing sets: did you mean 'LIMIT'\?"),
        ("TASK = restore_de", r"'restore_de' is no value: a text needs quotes of its own"),
        ("TASK = 'restore_de", r"syntax error"),
        ("LIMIT = 3)", r"syntax error"),
        ("LIMIT = [3", r"a bracket or a quote is not closed"),
        ("LIMIT = ", r"syntax error"),
    ],
)
def test_a_bad_binding_is_named_with_the_nearest_valid_name(binding, message):
    with pytest.raises(UserError, match=message) as caught:
        gin_flags.load(RUN, [binding])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include 'runs/infer.gin'\n\ngenerate.Settings.tempature = 1\n", r"bad\.gin, line 3 .*mean 'temperature'"),
        ("include 'runs/nothing.gin'\n", r"bad\.gin, line 1 .*includes runs/nothing\.gin"),
        ("from nowhere import thing\n", r"bad\.gin, line 1 .*No module named 'nowhere'"),
        ("A = 1\nB = (1,\n", r"bad\.gin .*not closed"),
        ("A = 1\nB = one\n", r"bad\.gin.*'one' is no value"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        gin_flags.load([write(tmp_path, "bad.gin", text)], [])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_where_it_was_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the gin file rules/nothing\.gin was not found in .*gin_configs"):
        gin_flags.load(["rules/nothing.gin"], [])


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "bad.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bad\.gin is not usable: .*utf-8"):
        gin_flags.load([str(tmp_path / "bad.gin")], [])


def test_a_part_alone_asks_for_a_run_file():
    with pytest.raises(UserError, match=r"sets TASK, which no gin file reads: begin with a run file"):
        gin_flags.load(["rules/token_v3.gin"], ["TASK = 'restore_de'"])


def test_literals():
    assert gin_flags.literal({"A": 3, "B": None, "C": "it's", "D": 0.5}) == ["A = 3", 'C = "it\'s"', "D = 0.5"]
    with pytest.raises(UserError, match=r"alpha=inf cannot be written in a gin file: give a finite number"):
        gin_flags.literal({"alpha": float("inf")})
