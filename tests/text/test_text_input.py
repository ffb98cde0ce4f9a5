"""Files of texts: lines, and JSON however it is spelt."""

from __future__ import annotations

import pytest

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text import text_input

ENTRY = '{"inputs": "das tor", "targets": "Das Tor"}'


def read(tmp_path, name: str, content: str, **options) -> list[text_input.TextExample]:
    (tmp_path / name).write_text(content, "utf-8", errors="surrogatepass")
    return text_input.read(tmp_path / name, **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.JSON"])
def test_lines_of_json_by_any_name(tmp_path, name):
    first, second = read(tmp_path, name, f'{ENTRY}\n\n{{"inputs": "[a"}}\n')
    assert first[:3] == (0, "das tor", "Das Tor") and second[:3] == (1, "[a", None)
    assert second.where.endswith(f"{name}, line 3")


def test_a_list_of_json(tmp_path):
    found = read(tmp_path, "a.json", f'\n[\n {ENTRY},\n {{"inputs": "zwei"}}\n]\n')
    assert [each[:3] for each in found] == [(0, "das tor", "Das Tor"), (1, "zwei", None)]
    assert found[1].where.endswith("a.json, entry 2")
    assert len(read(tmp_path, "b.json", f"[{ENTRY}, {ENTRY}]", limit=1)) == 1
    assert read(tmp_path, "b.txt", "[das]\n")[0].inputs_text == "[das]"  # a file of lines holds lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"inputs": "a", "id": ' + "9" * 5000 + "}", r"line 1 is not JSON \(it holds a number with too many digits"),
        ('{"inputs": "a", "m": ' + "[" * 100_000, r"line 1 is not JSON \(it is nested too deeply"),
        ('{"inputs": "a"', r"line 1 is not JSON \(Expecting"),
        ('{"inputs": 3}', 'needs an object with a text under "inputs"'),
        ('["a"]', 'needs an object with a text under "inputs"'),
        ('{"inputs": "a", "targets": 3}', 'has a value under "targets" that is not a text'),
        ('{"inputs": "\\ud800"}', 'a text under "inputs" that is not Unicode'),
        ('{"inputs": "a", "targets": "\\ud800"}', 'a text under "targets" that is not Unicode'),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(UserError, match=message if content[0] == "{" or name == "a.jsonl" else "entry 1 needs"):
            read(tmp_path, name, content)


def test_what_is_no_file(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        text_input.read(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        text_input.read("-")
