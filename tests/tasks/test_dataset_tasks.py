"""The tasks over TensorFlow Datasets: exact texts of hand-written examples, and the fields of the real builders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gin
import pytest
import tensorflow_datasets as tfds

from raw_examples import byte_ids, configure, mocked
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.data.examples import Example
from speccascade_t5x.data.seqio_tasks import seqio
from speccascade_t5x.tasks import closed_book, gsm8k, lengths, squad, summarization, translation
from speccascade_t5x.tasks.exemplars import EXEMPLARS

ROOT = Path(__file__).resolve().parents[2]
MODULES = (translation, summarization, squad, closed_book, gsm8k)
OF_TFDS = [name for name in lengths.LENGTHS if not name.startswith("mbpp")]
ROOM = {"inputs": 10_000}


@pytest.fixture(autouse=True)
def bytes_everywhere():
    configure()
    yield
    gin.clear_config()


def read(task: str, split: str, rows) -> list[Example]:
    with mocked(rows):
        return seqio_tasks.examples(task, split, ROOM)


def texts(task: str, split: str, rows) -> list[tuple[str, str]]:
    return [(e.inputs_text, e.targets_text) for e in read(task, split, rows)]


@pytest.mark.parametrize("year", [14, 15])
@pytest.mark.parametrize(("code", "language"), [("de", "German"), ("fr", "French")])
def test_translation(year, code, language):
    rows = [{"en": "That is good.", code: "Voilà ß."}]
    (example,) = read(f"wmt{year}_en_{code}", "validation", rows)
    assert example.inputs_text == f"translate English to {language}: That is good."
    assert example.inputs.tolist() == byte_ids(example.inputs_text)
    assert example.targets.tolist() == byte_ids("Voilà ß.")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("cnn_dailymail", {"article": "Rain fell. It stopped.", "highlights": "Rain.\nThen none.", "id": "1"}),
        ("xsum", {"document": "Rain fell. It stopped.", "summary": "Rain.\nThen none."}),
    ],
)
def test_summarization(task, row, tmp_path):
    (tmp_path / "xsum-extracts-from-downloads.tar.gz").touch()
    configure(f"tfds_source.location.manual_dir = {str(tmp_path)!r}")
    assert texts(task, "test", [row]) == [("summarize: Rain fell. It stopped.", "Rain.\nThen none.")]


SQUAD = [
    {
        "context": "Marie  Curie (1867-1934) won two prizes.",
        "question": "Who won?",
        "answers": {"text": ["Marie Curie", "Curie", "Marie Curie"]},
    },
    {"context": "It rained.", "question": "Who won?", "answers": {"text": []}},
]


def test_squad_in_the_form_t5_saw():
    found = read("squad_v2", "validation", SQUAD)
    assert found[0].inputs_text == ("question: Who won ? context: Marie Curie ( 1867 - 1934 ) won two prizes . ")
    assert found[0].targets.tolist() == byte_ids("Marie Curie")
    assert json.loads(found[0].targets_text) == ["Marie Curie", "Curie", "Marie Curie"]
    assert found[1].targets.tolist() == byte_ids("unanswerable")
    assert json.loads(found[1].targets_text) == []


def test_squad_is_scored_against_every_answer():
    found = read("squad_v2", "validation", SQUAD)
    assert seqio_tasks.score("squad_v2", found, ["The Curie .", "Unanswerable."]) == {
        "exact_match": 100.0, "f1": 100.0, "exact_match_has_answer": 100.0, "f1_has_answer": 100.0,
        "exact_match_no_answer": 100.0, "f1_no_answer": 100.0,
    }  # fmt: skip
    worse = seqio_tasks.score("squad_v2", found, ["unanswerable", "Curie"])
    assert set(worse.values()) == {0.0}


def test_seqios_own_evaluator_sees_every_answer():
    """T5X scores through it; what decodes is scripted."""
    spoken = seqio.ByteVocabulary(125)
    wrote = [spoken.encode(text) + [1] for text in ("Curie", "unanswerable")]
    padded = [ids + [0] * (16 - len(ids)) for ids in wrote]
    with mocked(SQUAD):
        evaluator = seqio.Evaluator(
            "squad_v2",
            feature_converter=seqio.EncDecFeatureConverter(pack=False),
            eval_split="validation",
            sequence_length={"inputs": 128, "targets": 32},
        )
        predict = lambda dataset, *shapes: list(enumerate(padded))  # noqa: E731
        found, *_ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=None)
    scores = found.result()["squad_v2"]
    assert scores["exact_match"] == scores["f1_no_answer"] == 100.0


def test_trivia_qa():
    row = {"question": "Who?", "answer": {"value": "Danger Mouse", "aliases": ["Danger Mouse", "D.M."]}}
    (example,) = read("trivia_qa", "test", [row])
    assert example.inputs_text == "trivia_qa question: Who?"
    assert example.targets.tolist() == byte_ids("Danger Mouse")
    assert seqio_tasks.score("trivia_qa", [example], ["d m"]) == {"exact_match": 100.0, "f1": 100.0}
    assert seqio_tasks.score("trivia_qa", [example], ["danger"])["f1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("task", "field", "prefix"), [("natural_questions", "answer", "nq"), ("web_questions", "answers", "wq")]
)
def test_listed_answers(task, field, prefix):
    rows = [{"question": "q0", field: []}, {"question": "q1", field: ["Zürich", "Bern"]}]
    (example,) = read(task, "validation", rows)  # a question without an answer is left out
    assert example.inputs_text == f"{prefix} question: q1"
    assert example.targets.tolist() == byte_ids("Zürich")
    assert json.loads(example.targets_text) == ["Zürich", "Bern"]
    assert seqio_tasks.score(task, [example], ["the bern"]) == {"exact_match": 100.0, "f1": 100.0}


GSM8K = [{"question": "3 * 4?", "answer": "That is 3*4=<<3*4=12>>12.\n#### 12"}]


def test_gsm8k():
    assert texts("gsm8k", "test", GSM8K) == [("question: 3 * 4?", "That is 3*4=12.\n#### 12")]
    found = read("gsm8k", "test", GSM8K)
    assert seqio_tasks.score("gsm8k", found, ["#### 12.0"]) == {"final_number": 100.0}


def test_a_few_shot_prompt_of_this_projects_own_examples():
    configure("few_shot.number.shots = 2")
    rows = [{"en": "Good night.", "de": "Gute Nacht."}]
    (example,) = read("wmt14_en_de_few_shot", "test", rows)
    first, second = EXEMPLARS["en_de"][:2]
    assert example.inputs_text == (
        f"English: {first[0]}\nGerman: {first[1]}\n\nEnglish: {second[0]}\nGerman: {second[1]}\n\n"
        "English: Good night.\nGerman:"
    )
    assert example.inputs.tolist() == byte_ids(example.inputs_text)[:-1]  # no EOS: the model goes on here
    assert example.targets.tolist() == byte_ids("Gute Nacht.")


def test_a_few_shot_prompt_of_the_train_split():
    rows = {
        "train[:3417]": [{"question": f"t{i}", "answers": [f"a{i}", "x"]} for i in range(9)],
        "test": [{"question": "asked", "answers": ["right", "also"]}],
    }
    configure("few_shot.number.shots = 2")
    (example,) = read("web_questions_few_shot", "test", rows)
    assert example.inputs_text == ("Question: t0\nAnswer: a0\n\nQuestion: t1\nAnswer: a1\n\nQuestion: asked\nAnswer:")
    wrote = [" also\n\nQuestion: more\nAnswer: no"]
    assert seqio_tasks.score("web_questions_few_shot", [example], wrote)["exact_match"] == 100.0
    assert seqio_tasks.score("web_questions_few_shot", [example], [" also Question: more"])["exact_match"] == 100.0


def test_a_few_shot_prompt_of_squad():
    configure("few_shot.number.shots = 1")
    found = read("squad_v2_few_shot", "validation", SQUAD)
    form = "question: Who won ? context: {}\nanswer:"
    begin = "Answer from the context, or with unanswerable.\n\n"
    shown = form.format("Marie Curie ( 1867 - 1934 ) won two prizes . ") + " Marie Curie\n\n"
    assert found[1].inputs_text == begin + shown + form.format("It rained . ")
    assert seqio_tasks.score("squad_v2_few_shot", found, ["Curie question: x", "unanswerable\n\n"])["f1"] == 100.0


@pytest.mark.parametrize("task", OF_TFDS)
def test_the_fields_are_those_of_the_real_builder(task, tmp_path):
    """Random examples with the features each builder declares."""
    (tmp_path / "xsum-extracts-from-downloads.tar.gz").touch()
    configure(f"tfds_source.location.manual_dir = {str(tmp_path)!r}")
    configure("few_shot.number.shots = 1")
    with tfds.testing.mock_data(num_examples=2):
        splits = list(seqio.TaskRegistry.get(task).splits)
        for split in splits[-1:] if task.endswith("few_shot") else splits:
            found = seqio_tasks.examples(task, split, ROOM)
            assert len(found) == 2
            assert all(len(e.inputs) > 1 and len(e.targets) > 1 for e in found)


def test_every_task_has_lengths():
    ours = {name for name in seqio.TaskRegistry.names() if "l10n" not in name and name != "restore_de"}
    assert ours >= set(OF_TFDS)
    assert all(name in lengths.LENGTHS for name in OF_TFDS)
    assert lengths.of("wmt14_en_de") == (80, 80)
    assert lengths.inputs("xsum") == 1024
    with pytest.raises(ValueError, match=r"no lengths are known for the task 'wmt'"):
        lengths.targets("wmt")


def test_importing_a_task_module_reads_and_asks_for_nothing():
    """No socket, no builder, and no file but source code."""
    names = [module.__name__ for module in MODULES] + ["speccascade_t5x.tasks.mbpp"]
    lines = [
        "import sys, importlib",
        "from speccascade_t5x.data.seqio_tasks import seqio",
        "import gin, sacrebleu, sentencepiece, urllib.request, concurrent.futures.thread",
        "seen = []",
        "def hook(event, args):",
        "    if event.startswith('socket.') or event == 'urllib.Request':",
        "        seen.append((event, str(args)))",
        "    if event == 'open' and not str(args[0]).endswith(('.py', '.pyc', 'site-packages')):",
        "        seen.append((event, str(args[0])))",
        "sys.addaudithook(hook)",
        f"[importlib.import_module(name) for name in {names!r}]",
        "found = list(seen)",
        "assert 'xsum' in seqio.TaskRegistry.names() and 'mbpp_few_shot' in seqio.TaskRegistry.names()",
        "assert seqio.TaskRegistry.get('xsum').splits",
        "assert not seqio.utils.LazyTfdsLoader._MEMOIZED_BUILDERS",
        "print(found, 'jax' in sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("[] ")
