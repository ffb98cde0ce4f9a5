"""`speccascade`: verbs, exit codes and one sentence on stderr for whatever a user got wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.interfaces import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_verb_it_lists_them(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == shown
    assert all(f"\n  {verb}" in shown for verb in cli.VERBS)


def test_every_verb_has_a_module():
    for verb in cli.VERBS:
        assert (ROOT / "speccascade_t5x" / "cli" / f"{verb}.py").is_file()


@pytest.mark.parametrize(
    ("verb", "message"),
    [("ifner", "did you mean 'infer'?"), ("xyz", f"known are {', '.join(sorted(cli.VERBS))}")],
)
def test_an_unknown_verb(capsys, verb, message):
    assert cli.main([verb]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"speccascade: there is no verb {verb!r}: ") and message in err
    assert err.count("\n") == 1


def raising(error):
    def verb(argv):
        raise error

    return verb


def test_exit_codes(capsys):
    assert cli.run_verb(lambda argv: 0, [], "speccascade x") == 0
    assert cli.run_verb(raising(UserError("no such thing")), [], "speccascade x") == 2
    assert capsys.readouterr().err == "speccascade x: no such thing\n"
    assert cli.run_verb(raising(KeyboardInterrupt()), [], "speccascade x") == 130
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        cli.run_verb(raising(ZeroDivisionError()), [], "speccascade x")


def test_what_gin_appends_to_an_error_is_cut(capsys):
    import gin

    @gin.configurable(module="tests.cli")
    def fail():
        raise UserError("alpha is wrong")

    assert cli.run_verb(lambda argv: gin.get_configurable(fail)(), [], "speccascade x") == 2
    assert capsys.readouterr().err == "speccascade x: alpha is wrong\n"


# A verb that speaks once its reader has had the time to leave.
SPEAKER = """
import sys
from speccascade_t5x.cli.__main__ import run_verb

def verb(argv):
    sys.stdin.readline()
    print("a line")
    return 0

sys.exit(run_verb(verb, [], "speccascade x"))
"""


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-c", SPEAKER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(b"\n", timeout=120)
    assert (process.returncode, err) == (141, b"")


def test_a_typo_in_a_process_of_its_own():
    command = [sys.executable, "-m", "speccascade_t5x.cli", "ifner"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("speccascade: there is no verb 'ifner'") and done.stderr.count("\n") == 1
