"""Flags and bindings: how they are parsed, and how each mistake is named in one line."""

from __future__ import annotations

import argparse
import logging
import re
import sys

import gin
import pytest

from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import gin_files, gin_flags
from speccascade_t5x.interfaces import UserError

RUN = ["runs/infer.gin"]


@pytest.fixture(autouse=True)
def clean_gin():
    path = list(sys.path)
    yield
    gin.clear_config()
    gin_files.ask(gin_files.Asked())
    sys.path[:] = path


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
        (["--gin.A"], r"'--gin.A' is not a binding: write --gin.NAME=VALUE"),
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


def asked(*argv: str) -> tuple[list[str], list[str]]:
    """Flags as a verb takes them. Returns (values of --gin_file, bindings)."""
    parser = argparse.ArgumentParser()
    gin_flags.add_flags(parser)
    flags, bindings = gin_flags.split(parser, argv)
    return flags.gin_file, bindings


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A working directory whose files have the names of packaged ones."""
    for name in ("runs", "rules", "topologies", "models"):
        (tmp_path / "here" / name).mkdir(parents=True)
    for name in ("runs/infer.gin", "runs/infer_restore_de.gin", "rules/token_v3.gin", "topologies/any.gin"):
        write(tmp_path / "here", name, "PLACE = 'here'")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("file", [*RUN, "runs/infer_restore_de.gin", "rules/token_v3.gin", "topologies/any.gin"])
def test_the_working_directory_holds_only_files_that_the_user_names(planted, file, capsys):
    asked()
    assert "PLACE" not in gin_flags.load([file], [])
    (named, _) = asked(f"--gin_file={file}")
    assert "PLACE = 'here'" in gin_flags.load(named, [])
    assert f"{file} of the working directory is read, not the packaged file" in capsys.readouterr().err


def test_a_verb_reads_no_file_that_nobody_named(planted, capsys):
    write(planted / "here", "runs/infer.gin", "import antigravity_that_runs")
    assert cli.main(["infer", "--input=missing.txt"]) == 2
    assert "missing.txt" in capsys.readouterr().err


def test_what_files_include_is_searched_likewise(planted):
    (planted / "there").mkdir()
    mine = write(planted / "there", "mine.gin", "include 'runs/infer.gin'\ninclude 'own.gin'\nOTHER = 1\n")
    write(planted / "there", "own.gin", "OWN = 1")
    found = gin_flags.load([mine], [])
    assert "PLACE" not in found and "OWN = 1" in found  # beside the file that includes it, but packaged names first
    assert "PLACE = 'here'" in gin_flags.load([mine], [], str(planted / "here"))
    write(planted / "here", "runs/deeper.gin", "PLACE = 'deeper'")
    write(planted / "there", "mine.gin", "include 'runs/deeper.gin'")
    assert "PLACE = 'deeper'" in gin_flags.load([mine], [])
    write(planted / "there", "mine.gin", "include 'mine.gin'")
    with pytest.raises(UserError, match=r"line 1 is not usable: mine\.gin includes itself"):
        gin_flags.load([mine], [])


@pytest.mark.parametrize(
    ("bindings", "shown"),
    [
        (["LIMIT = %LIMIT"], "LIMIT by itself (LIMIT needs LIMIT)"),
        (["SPLIT = %LIMIT", "LIMIT = [{'a': %SPLIT}]"], "SPLIT by itself (SPLIT needs LIMIT needs SPLIT)"),
        (["LIMIT = @infer.infer()"], "LIMIT needs speccascade_t5x.inference.infer.infer needs LIMIT"),
    ],
)
def test_a_value_that_needs_itself_is_refused(bindings, shown):
    with pytest.raises(UserError, match=re.escape(shown)):
        gin_flags.load(RUN, bindings)
    gin.clear_config()
    assert gin_flags.load(RUN, ["LIMIT = 3", "SPLIT = %LIMIT"])  # one that is read twice is none


REACHING = [
    ("import subprocess\ngenerate.Settings.rule = @subprocess.getoutput()", "imports subprocess, which", "subprocess"),
    ("import os\ngenerate.Settings.rule = @os.getcwd()", "imports os, which", "os"),
    ("import speccascade_t5x.tasks.l10n\ngenerate.Settings.rule = @speccascade_t5x.tasks.l10n.os.getcwd()",
     "it names speccascade_t5x.tasks.l10n.os.getcwd, which is of os", "os"),
    ("from speccascade_t5x.tasks import mbpp\nmbpp.json.loads.s = '1'", "mbpp.json.loads, which is of json", "json"),
    ("from speccascade_t5x.tasks import mbpp\nmbpp.Path.home.cls = 1", "which is of pathlib", "pathlib"),
    ("import seqio\ngenerate.Settings.rule = @seqio.utils.os.getcwd()", "seqio.utils.os.getcwd, which is of os", "os"),
    ("generate.Settings.rule = @generate.Settings.__init__.__globals__()", "begins with an underscore", None),
    ("generate.Settings.rule = @gin.macro.__globals__()", "gin is not a module, class or function", None),
    ("from speccascade_t5x.tasks import sandbox\nsandbox.run.protected = False", "tasks.sandbox, which",
     "speccascade_t5x.tasks.sandbox"),
    ("from speccascade_t5x.tasks import mbpp\nmbpp.sandbox.run.protected = False", "of speccascade_t5x.tasks.sandbox",
     "speccascade_t5x.tasks.sandbox"),
    ("from speccascade_t5x.cli import infer as verb\nverb.main.argv = []", "imports speccascade_t5x.cli.infer, which",
     "speccascade_t5x.cli"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "module"), REACHING)
def test_names_stay_inside_the_modules_that_files_may_reach(tmp_path, text, message, module):
    head = "from __gin__ import dynamic_registration\nfrom speccascade_t5x.inference import generate\n"
    mine = write(tmp_path, "mine.gin", head + text)
    asked(f"--gin_file={mine}")
    with pytest.raises(UserError, match=f"mine.gin.*{message}") as caught:
        gin_flags.load([mine], [])
    assert "\n" not in str(caught.value)
    if module:
        assert "add --gin_allow_module=" in str(caught.value)
        asked(f"--gin_allow_module={module}")
        gin_flags.load([mine], [])
        asked()
        with pytest.raises(UserError, match=message):  # what was allowed once is not for ever
            gin_flags.load([mine], [])


def test_without_dynamic_registration_too(tmp_path):
    """Names that some library has registered with gin, its own or another's."""
    gin.external_configurable(len, "registered_elsewhere", module="elsewhere")
    mine = write(tmp_path, "mine.gin", "elsewhere.registered_elsewhere.obj = 'text'")
    asked()
    with pytest.raises(UserError, match="which is of builtins, which gin files may not reach"):
        gin_flags.load([mine], [])


def test_a_module_of_the_user_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "tasks_of_mine.py", "import helper_of_mine\ndef kept(path=None):\n    return helper_of_mine.X\n")
    write(tmp_path, "helper_of_mine.py", "X = 7\n")
    text = "from __gin__ import dynamic_registration\nimport tasks_of_mine\ntasks_of_mine.kept.path = 'here'\n"
    write(tmp_path, "mine.gin", text)
    named, _ = asked("--gin_file=mine.gin")
    with pytest.raises(UserError, match="add --gin_allow_module=tasks_of_mine if you trust it"):
        gin_flags.load(named, [])
    for how in ("--module=tasks_of_mine", "--gin.MIXTURE_OR_TASK_MODULE='tasks_of_mine'"):
        named, bindings = asked(how, "--gin_file=mine.gin")
        assert "tasks_of_mine.kept.path = 'here'" in gin_flags.load(named, bindings)
    assert gin.get_configurable(sys.modules["tasks_of_mine"].kept)() == 7
    write(tmp_path, "mine.gin", "MIXTURE_OR_TASK_MODULE = 'tasks_of_mine'")
    asked()
    with pytest.raises(UserError, match="wants the module tasks_of_mine of tasks: add --module=tasks_of_mine"):
        gin_flags.load([str(tmp_path / "mine.gin")], [])
    write(tmp_path, "broken.py", "1 / 0\n")
    asked("--module=broken")
    with pytest.raises(UserError, match=r"--module=broken cannot be imported \(ZeroDivisionError: division by zero\)"):
        gin_flags.load(RUN, [])


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
        ("TASK = restore_de", r"'restore_de' is not a value: a text needs quotes of its own"),
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
        ("from speccascade_t5x import thing\n", r"bad\.gin, line 1 .*No module named 'speccascade_t5x\.thing'"),
        ("A = 1\nB = (1,\n", r"bad\.gin .*not closed"),
        ("A = 1\nB = one\n", r"bad\.gin.*'one' is not a value"),
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
