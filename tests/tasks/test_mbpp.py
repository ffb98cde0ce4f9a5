from __future__ import annotations

import json
import logging

import gin
import pytest

from raw_examples import byte_ids, configure
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import mbpp

ROOM = {"inputs": 10_000}


def line(task_id: int, **changed) -> dict:
    return {
        "task_id": task_id,
        "text": f"Write a function to add {task_id}.",
        "code": f"def f(x):\r\n\treturn x + {task_id}",
        "test_setup_code": "",
        "test_list": [f"assert f(1) == {task_id + 1}", f"assert f(0) == {task_id}"],
    } | changed


@pytest.fixture
def problems(tmp_path):
    """Ids of every split, in no order."""
    file = tmp_path / "mbpp.jsonl"
    ids = (601, 974, 511, 600, 510, 11, 10, 4, 3, 2, 1, 975)
    file.write_text("\n".join(json.dumps(line(i)) for i in ids) + "\n\n", "utf-8")
    configure(f"mbpp.data_file.path = {str(file)!r}")
    yield file
    gin.clear_config()


def allow(**how: float) -> None:
    """The programs here are ours, so they run on machines without bubblewrap as well."""
    bindings = {"allow_code_execution": True, "unprotected": True, "seconds": 10.0, "workers": 2} | how
    configure("\n".join(f"mbpp.execution.{name} = {value!r}" for name, value in bindings.items()))


def test_the_splits_and_the_exact_texts(problems):
    counts = {split: len(seqio_tasks.examples("mbpp", split, ROOM)) for split in mbpp.SPLITS}
    assert counts == {"train": 2, "validation": 2, "test": 2, "prompt": 5}
    example = seqio_tasks.examples("mbpp", "test", ROOM)[0]
    assert example.inputs_text == (
        "You are an expert Python programmer, and here is your task: Write a function to add 11. "
        "Your code should pass these tests:\n\nassert f(1) == 12\nassert f(0) == 11"
    )
    assert example.inputs.tolist() == byte_ids(example.inputs_text)
    assert example.targets.tolist() == byte_ids("def f(x):\n    return x + 11")
    assert json.loads(example.targets_text) == {"tests": line(11)["test_list"], "setup": ""}


def test_a_few_shot_prompt_shows_problems_2_to_4(problems):
    example = seqio_tasks.examples("mbpp_few_shot", "test", ROOM)[0]
    blocks = [mbpp.prompt(problem) for problem in mbpp.read_problems(problems) if problem.task_id in (2, 3, 4)]
    assert example.inputs_text.count("[BEGIN]") == 4
    assert all(block in example.inputs_text for block in blocks)
    assert example.inputs_text.startswith(
        f"{blocks[-1]}\n[BEGIN]\ndef f(x):\n    return x + 2\n[DONE]\n\nYou are an expert"
    )
    assert example.inputs_text.endswith("assert f(0) == 11\n[BEGIN]")
    assert example.inputs[-1] != 1


def test_pass_at_1_runs_only_what_is_allowed(problems, caplog):
    found = seqio_tasks.examples("mbpp", "test", ROOM)
    right = "def f(x):\n    return x + 11"
    with caplog.at_level(logging.WARNING):
        scores = seqio_tasks.score("mbpp", found, [right, right])
    assert scores == {"parses": 100.0}
    assert "allow_code_execution" in caplog.text
    allow()
    assert seqio_tasks.score("mbpp", found, [right, right]) == {"parses": 100.0, "pass_at_1": 50.0}
    wrote = [
        "[BEGIN]\ndef f(x):\n    return x + 11\n[DONE]\nnonsense(",
        "```python\ndef f(x):\n    return x + 510\n```",
    ]
    assert seqio_tasks.score("mbpp", found, wrote)["pass_at_1"] == 100.0
    assert seqio_tasks.score("mbpp", found, ["import sys; sys.exit(0)", "def f(:"]) == {
        "parses": 50.0,
        "pass_at_1": 0.0,
    }


def test_one_consent_is_not_enough_where_programs_cannot_be_held(problems, monkeypatch, tmp_path):
    """Said before anything is decoded."""
    allow(unprotected=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no bubblewrap to run programs in: install it with"):
        seqio_tasks.examples("mbpp", "test", ROOM)
    with pytest.raises(UserError, match="no bubblewrap"):
        mbpp.pass_at_1([{"setup": "", "tests": []}], [""])


def test_few_shot_predictions_end_at_their_mark(problems):
    allow()
    found = seqio_tasks.examples("mbpp_few_shot", "test", ROOM)
    wrote = [
        "\ndef f(x):\n\n    return x + 11\n[DONE]\n\nYou are",
        "\ndef f(x):\n    return x + 510\nYou are an expert Python",
    ]
    assert seqio_tasks.score("mbpp_few_shot", found, wrote)["pass_at_1"] == 100.0


def test_code_before_the_tests_runs():
    configure()
    allow()
    target = {"setup": "import math", "tests": ["assert f(4) == math.sqrt(16)"]}
    assert mbpp.pass_at_1([target], ["def f(x):\n    return math.sqrt(x * x)"]) == {"pass_at_1": 100.0}
    gin.clear_config()


@pytest.mark.parametrize(
    ("code", "is_python"),
    [("x = 1", True), ("", False), ("\n", False), ("x = (", False), ("\x00", False), ("(" * 10_000, False),
     ("print 'a'", False), ("'\\d'", True), ("-" * 100_000 + "1", False)],
)  # fmt: skip
def test_parses_runs_nothing(code, is_python):
    assert mbpp.parses([None], [code])["parses"] == 100.0 * is_python


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 has no usable field 'task_id'"),
        (json.dumps(line(12, code=3)), "line 2 has no usable field 'code'"),
        (json.dumps(line(12, test_list=[])), "line 2 has no usable field 'test_list'"),
        (json.dumps(line(12, test_list=[1])), "a test in 'test_list' that is not a text"),
        (json.dumps(line(11)), "a task_id twice"),
    ],
)
def test_a_bad_line_is_named(problems, text, message):
    problems.write_text(f"{json.dumps(line(11))}\n{text}\n", "utf-8")
    with pytest.raises(UserError, match=rf"mbpp\.jsonl.*{message}"):
        seqio_tasks.examples("mbpp", "test", ROOM)


def test_the_sanitised_field_names_are_known(problems):
    row = line(11, prompt="Add.", test_imports=["import math", "import re"])
    del row["text"], row["test_setup_code"]
    problems.write_text(json.dumps(row), "utf-8")
    (problem,) = mbpp.read_problems(problems)
    assert (problem.text, problem.setup) == ("Add.", "import math\nimport re")


def test_a_missing_file_or_split_is_said(problems):
    with pytest.raises(UserError, match="has no split 'dev'"):
        seqio_tasks.examples("mbpp", "dev", ROOM)
    problems.unlink()
    with pytest.raises(UserError, match=r"cannot be read.*mbpp\.data_file\.path"):
        seqio_tasks.examples("mbpp", "test", ROOM)
    gin.clear_config()
    configure()
    with pytest.raises(UserError, match="No data|no data is set for mbpp"):
        seqio_tasks.examples("mbpp", "test", ROOM)
