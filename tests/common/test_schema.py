"""JSON from anywhere: what is not JSON, what is refused, and what the checks say."""

from __future__ import annotations

import json
import os

import pytest

from speccascade_t5x.common import schema
from speccascade_t5x.interfaces import UserError


@pytest.mark.parametrize(
    "text", ["{}", "[1, -2.5, 1e10, true, null]", '{"a": "\\u00fc \\ud83d\\ude00"}', '"' + "x" * 9 + '"']
)
def test_plain_json_is_read_as_python_reads_it(text):
    assert schema.parse(text, "x") == schema.parse(text.encode(), "x") == json.loads(text)


def test_the_no_limit_of_some_writers_is_a_number():
    assert schema.parse('{"model_max_length": 1000000000000000019884624838656}', "x")["model_max_length"] > 10**30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n"b": ' + "9" * 5000 + "}", r"x is not usable JSON: a whole number of 5000 digits \(line 2\)"),
        ("[" * 100_000 + "]" * 100_000, "x is not usable JSON: its lists and objects are nested too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "the member 'a' is there twice"),
        ('{"a": NaN}', "NaN is not a number in JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number in JSON"),
        ('\n\n{"a": 1e999}', r"'1e999' is beyond any number \(line 3\)"),
        ('{"a":\n"\\ud800"}', r"half a surrogate pair is not a character \(line 2\)"),
        ('{"\\udc00": 1}', "half a surrogate pair"),
        ("\ufeff{}", "byte order mark"),
        ("\ufeff{}".encode(), "byte order mark"),
        ("{}".encode("utf-16"), "byte order mark"),
        (b'{"a":\n"\xff"}', r"x is not a text file in UTF-8 \(line 2\)"),
        ('{"a":\n1', r"x is not valid JSON: .*\(line 2, column 2\)"),
        ("", "x is not valid JSON"),
        ("{'a': 1}", "x is not valid JSON"),
    ],
)
def test_what_is_refused_and_where(text, message):
    with pytest.raises(UserError, match=message) as caught:
        schema.parse(text, "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


CHECK = schema.record(
    {"name": schema.of(str), "sizes": schema.list_of(schema.whole(1, 9), 2)},
    {"rate": schema.number(0, 1), "mode": schema.one_of("a", 1), "by_name": schema.map_of(schema.of(bool, type(None)))},
)
GOOD = {"name": "x", "sizes": [1, 9], "rate": 1, "mode": 1, "by_name": {"y": None}, "unknown": {"kept": []}}


def test_a_value_that_passes_comes_back_whole(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    assert schema.read(tmp_path / "a.json", CHECK) == GOOD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, r"a.json: name must be a text, found 3"),
        ({"name": None}, "name must be a text, found None"),
        ({"sizes": [1]}, r"sizes must be a list of 2, found a list of 1"),
        ({"sizes": {"0": 1}}, "sizes must be a list of 2, found an object of 1"),
        ({"sizes": [1, 10]}, r"sizes\[1\] must be a whole number from 1 to 9, found 10"),
        ({"sizes": [True, 2]}, r"sizes\[0\] must be a whole number"),
        ({"sizes": [1.0, 2]}, r"sizes\[0\] must be a whole number"),
        ({"rate": 1.5}, "rate must be a number from 0 to 1, found 1.5"),
        ({"rate": "0.5"}, "rate must be a number from 0 to 1, found '0.5'"),
        ({"rate": 10**30}, "rate must be a number"),
        ({"mode": True}, "mode must be 'a' or 1, found True"),
        ({"by_name": {"y": "yes"}}, "by_name.y must be true or false or null"),
        ({"name": "z" * 500, "rate": "z" * 500}, r"rate must be .*zz\.\.\.$"),
    ],
)
def test_a_value_that_does_not_pass_is_named(tmp_path, changes, message):
    (tmp_path / "a.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(UserError, match=message):
        schema.read(tmp_path / "a.json", CHECK)


def test_a_missing_member_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"sizes": [1, 2]}')
    with pytest.raises(UserError, match="a.json has no member 'name'"):
        schema.read(tmp_path / "a.json", CHECK)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format": "f", "version": 3}, "format version 3 but this release of speccascade_t5x reads up to 2; upgrade"),
        ({"format": "g", "version": 1}, r"is not the plan of this package, or damaged \(format 'g'\)"),
        ({"format": "f"}, "is not the plan"),
        ({"format": "f", "version": "1"}, "is not the plan"),
        ({"format": "f", "version": True}, "is not the plan"),
        ({"format": "f", "version": 1}, "has no member 'name'"),
    ],
)
def test_versions(tmp_path, facts, message):
    (tmp_path / "a.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=message):
        schema.read_versioned(tmp_path / "a.json", 2, "the plan", schema.record({"name": schema.of(str)}), format="f")


def test_files_that_are_none(tmp_path):
    for path, message in [(tmp_path, "is not a file"), (tmp_path / "none", "cannot read .*none: No such file")]:
        with pytest.raises(UserError, match=message):
            schema.read(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a file"):
        schema.read(tmp_path / "pipe")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list where an object is expected"):
        schema.read(tmp_path / "list.json")
    (tmp_path / "large.json").write_text('{"a": "' + "x" * 100 + '"}')
    with pytest.raises(UserError, match="larger than 50 bytes"):
        schema.read(tmp_path / "large.json", largest=50)
