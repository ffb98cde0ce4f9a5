"""What reaches a terminal, seen from the other end of a real pseudo-terminal, and what reaches a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from speccascade_t5x.cli import terminal

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a\x1b[2Jb\x1b]0;title\x07c\rd\x9be\u202ef\u2066g\tname\nh\u2028i"


def on_a_terminal(code: str) -> bytes:
    """Runs Python whose three streams are a pseudo-terminal, and returns all it wrote there."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    written = b""
    while True:
        try:
            some = os.read(ours, 4096)
        except OSError:  # the other end has closed
            break
        if not some:
            break
        written += some
    os.close(ours)
    child.wait()
    return written.replace(b"\r\n", b"\n")  # the terminal's own line ends


def test_a_line_stays_one_line():
    assert terminal.line("a\tb\nc\r\nd\u2028e\x85f\x1cg") == "a\\tb\\nc\\r\\nd\\u2028e\\u0085f\\u001cg"
    assert len(terminal.line(HOSTILE).splitlines()) == 1
    assert terminal.line("Grüße, 你好 שלום 👩‍👩‍👧 \\n") == "Grüße, 你好 שלום 👩‍👩‍👧 \\n"
    assert terminal.line("half \ud800").encode() == b"half \\ud800"
    assert terminal.lines({"a\nb": ["c\td", 3, None]}) == {"a\\nb": ["c\\td", 3, None]}


def test_a_terminal_is_not_steered():
    code = f"from speccascade_t5x.cli import terminal\nimport sys\nterminal.guard()\nx = {HOSTILE!r}\n"
    code += "terminal.guard()\nprint(x)\nprint(x, file=sys.stderr)\nsys.stdout.writelines([x])\nraise ValueError(x)\n"
    written = on_a_terminal(code).decode()
    assert written.count("a\\u001b[2Jb\\u001b]0;title\\u0007c\\rd\\u009be\\u202ef\\u2066g\tname\nh\\u2028i") >= 3
    assert not set(written) & set("\x1b\x07\r\x9b\u202e\u2066\u2028")


def test_colours_are_drawn_and_texts_are_not():
    code = f"from speccascade_t5x.cli import terminal\nfrom rich.text import Text\nterminal.guard()\nx = {HOSTILE!r}\n"
    code += "c = terminal.console(color_system='standard', force_terminal=True)\nc.print(x + '[bold]')\n"
    code += "c.print(Text('red', 'red'))\n"
    written = on_a_terminal(code).decode()
    assert "\\u001b[2J" in written and "[bold]" in written and "\x1b[31mred\x1b[0m" in written
    assert "\x1b[2J" not in written and "\x1b]" not in written


def test_libraries_redraw_their_bars():
    code = "from speccascade_t5x.cli import terminal\nimport sys\nterminal.guard()\n"
    code += "sys.stderr.write('\\r 10%')\nsys.stderr.write('\\x1b[A\\x1b[A')\nsys.stderr.write('x\\ry')\n"
    assert on_a_terminal(code).decode() == "\r 10%\x1b[A\x1b[Ax\\ry"


@pytest.mark.parametrize("verb", ["inspect", "infer"])
def test_an_error_message_is_one_clean_line(verb):
    path = "missing\x1b[2J\nspeccascade: all is well"
    argv = ["inspect", path] if verb == "inspect" else ["infer", f"--input={path}"]
    code = f"import sys\nfrom speccascade_t5x.cli import __main__ as cli\nsys.exit(cli.main({argv!r}))"
    (said,) = [line for line in on_a_terminal(code).decode().splitlines() if "missing" in line]
    said = said.removeprefix("\x1b[?25h")  # rich shows the cursor again
    assert said.startswith(f"speccascade {verb}: ") and "missing\\u001b[2J\\nspeccascade: all is well" in said
    piped = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert piped.returncode == 2
    assert "missing\x1b[2J\\nspeccascade: all is well" in piped.stderr
