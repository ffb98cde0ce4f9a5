"""Verbs whose standard streams are closed, full or ASCII, whose files are named in bytes, and which are interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A verb that prints, as `speccascade` runs one; sys.argv[1] says how.
VERB = """
import sys
from speccascade_t5x.cli import __main__ as cli, streams

def verb(argv):
    text = "Tür\\udcfc" if sys.argv[1] == "letters" else "x"
    streams.show([text]) if sys.argv[1] == "results" else print(text)
    return 0

streams.end(cli.run_verb(verb, [], "speccascade x"))
"""


def run(how: str, redirected: str = "", before: str = "", tmp: str = "/tmp") -> tuple[int, bytes, str]:
    """(exit code, standard output, standard error) of the verb under a shell's redirections."""
    line = f'exec env {before} TMPDIR="$2" "$0" -c "$1" {how} {redirected}'
    done = subprocess.run(["bash", "-c", line, sys.executable, VERB, tmp], cwd=ROOT, capture_output=True, timeout=300)
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")


def test_letters_that_the_encoding_lacks_are_escaped():
    assert run("letters", before="PYTHONIOENCODING=ascii") == (0, b"T\\xfcr\\udcfc\n", "")
    assert run("letters", before="PYTHONIOENCODING=utf-8") == (0, "Tür\\udcfc\n".encode(), "")


@pytest.mark.parametrize(("where", "why"), [(">/dev/full", "No space left"), (">&-", "Bad file descriptor")])
def test_output_that_goes_nowhere_is_one_sentence(where, why, tmp_path):
    code, _, said = run("plain", where)
    assert code == 2 and said.startswith(f"speccascade x: standard output cannot be written ({why}"), said
    assert said.count("\n") == 1
    code, _, said = run("results", where, tmp=str(tmp_path))
    kept = list(tmp_path.glob("*/predictions.txt"))
    assert code == 2 and said.count("\n") == 1 and said.endswith(f"the predictions are kept in {kept[0]}\n"), said
    assert kept[0].read_text() == "x\n"


def test_without_standard_error_it_works():
    assert run("plain", "2>&-") == (0, b"x\n", "")


def test_the_help_of_a_verb_is_written_or_the_reason_told():
    line = 'exec env -u PYTHONUNBUFFERED "$0" -m speccascade_t5x.cli methods --help >/dev/full'
    done = subprocess.run(["bash", "-c", line, sys.executable], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("speccascade methods: standard output cannot be written")


# A thread that never ends, as one of TensorFlow's that waits for the interpreter.
STAYS = """
import threading
from speccascade_t5x.cli import streams

threading.Thread(target=threading.Event().wait).start()
print("done")
streams.end(2)
"""


def test_a_process_ends_whatever_its_threads_do():
    done = subprocess.run([sys.executable, "-c", STAYS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "done\n", "")


# Says when the verb begins to load what it needs, which takes a while.
LOADS = """
import sys, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            print("loading", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
from speccascade_t5x.cli.__main__ import main

main()
"""


def test_an_interrupt_while_libraries_load_is_one_sentence():
    command = [sys.executable, "-c", LOADS, "methods"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that starts the tests in the background has SIGINT ignored, and a child would inherit that.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, cwd=ROOT, **pipes, **heard) as process:
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.2)  # into its sleep
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "speccascade methods: interrupted; what was finished is kept\n")
