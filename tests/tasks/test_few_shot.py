from __future__ import annotations

import gin
import pytest

from raw_examples import configure
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import answer_metrics, few_shot
from speccascade_t5x.tasks.exemplars import EXEMPLARS

SHOTS = few_shot.Shots(question="Q: ", answer="A: ", default=1, exemplars="sums")
CODE = few_shot.Shots(answer="[BEGIN]\n", after="\n[DONE]", ends=("Next",))


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def test_the_form_of_a_prompt():
    shots = few_shot.Shots(question="Q: ", answer="A: ", after=".", instruction="Add.")
    assert shots.head([("1 1", "2"), ("2 2", "4")]) == "Add.\n\nQ: 1 1\nA: 2.\n\nQ: 2 2\nA: 4.\n\nQ: "
    assert shots.head([]) == "Add.\n\nQ: "
    assert shots.tail == "\nA:"
    assert CODE.head([("say", "x = 1")]) + "ask" + CODE.tail == "say\n[BEGIN]\nx = 1\n[DONE]\n\nask\n[BEGIN]"


@pytest.mark.parametrize(
    ("wrote", "answer"),
    [
        (" 12", "12"),
        (" 12\n\nQ: more\nA: 13", "12"),
        ("12 Q: more A: 13", "12"),  # a vocabulary without line breaks
        ("12\nA: 13", "12"),
        ("FAQ: 12", "FAQ: 12"),  # a mark begins a word
        ("Q: 12", ""),
        ("", ""),
    ],
)
def test_an_answer_ends_where_the_next_example_begins(wrote, answer):
    assert SHOTS.cut(wrote) == answer


def test_code_may_hold_empty_lines():
    assert CODE.cut("\nx = 1\n\ny = 2\n[DONE]\n\nsay") == "x = 1\n\ny = 2"
    assert CODE.cut("x = 1\nNext") == "x = 1"


def test_how_many_are_shown():
    assert few_shot.solved(SHOTS, None, []) == list(EXEMPLARS["sums"])[:1]
    configure("few_shot.number.shots = 3")
    assert few_shot.solved(SHOTS, None, []) == list(EXEMPLARS["sums"])[:3]
    configure("few_shot.number.shots = 0")
    assert few_shot.solved(SHOTS, None, []) == []


@pytest.mark.parametrize("wrong", ["99", "-1", "'two'", "True"])
def test_a_number_that_cannot_be_shown_is_refused(wrong):
    configure(f"few_shot.number.shots = {wrong}")
    with pytest.raises(UserError, match=r"few_shot\.number\.shots"):
        few_shot.solved(SHOTS, None, [])


def test_this_projects_sums_are_right():
    """Every worked line of the examples is true, and the last one is the answer."""
    shown = EXEMPLARS["sums"]
    assert len(shown) == 4
    for _, worked in shown:
        *lines, last = worked.splitlines()
        results = []
        for line in lines:
            left, right = line.rstrip(".").split(" = ")
            sum_words = [w.strip("$") for w in left.split() if w.strip("$")[:1].isdigit() or w in "+-*/"]
            value = float(right.split()[0].strip("$"))
            assert eval(" ".join(sum_words[-3:])) == value
            results.append(value)
        assert last.startswith("#### ")
        assert float(answer_metrics.last_number(worked)) == results[-1]


@pytest.mark.parametrize("name", ["en_de", "en_fr"])
def test_this_projects_translations_are_distinct(name):
    pairs = EXEMPLARS[name]
    assert len(pairs) == 4
    assert len(set(pairs)) == 4 and all(source != target for source, target in pairs)
