"""The infer job with the packaged pair: what it writes, what it refuses, and that a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import pytest

from corpora import ROWS, train_sentencepiece, write_split
from speccascade_t5x.core import accounting
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.generate import LoadedPair, Settings
from speccascade_t5x.inference.infer import infer
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.tasks.folding import fold
from speccascade_t5x.text import text_input
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary

SHAPE = {"max_input_len": 32, "max_len": 32, "draft_len": 3, "batch_size": 2}
LINES = ["grusse aus munchen", "schliessen", "uber die grosse", "ja", "nein", "offnen", "datei offnen"]
FIELDS = ["inputs", "targets", "prediction", "log_prob", "tokens", "counts", "source"]
# Mixed lengths, so that batches of two buckets change the order of the examples.
SENTENCES = [
    ("The size of the large window has changed", "Die Größe des Fensters ist geändert", "a"),
    ("Yes", "Ja", "a"),
    ("Open the file", "Öffnen Sie die Datei", "a"),
    ("The background is larger than before", "Für den Hintergrund ist er größer", "a"),
    ("No", "Nein", "a"),
]


@pytest.fixture(scope="module")
def pair() -> LoadedPair:
    return generate.load("restore_de_pair")


@pytest.fixture
def lines(tmp_path) -> Path:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(LINES) + "\n", "utf-8")
    return file


@pytest.fixture
def restore_de(corpus) -> Path:
    """The corpus folder of the task restore_de, which is registered."""
    import_module("speccascade_t5x.tasks.l10n")  # loads TensorFlow
    return corpus


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}-predict.jsonl-00000-of-00001").open(encoding="utf-8")]


def test_a_task_leaves_records_metrics_timing_and_summary(pair, restore_de, tmp_path):
    from speccascade_t5x.tasks import metrics

    write_split(restore_de, "test", SENTENCES)
    out = tmp_path / "out"
    seen = []
    result = infer(
        pair,
        Settings(**SHAPE | {"max_input_len": 40}),
        out,
        task="restore_de",
        progress=lambda examples, total, rates: seen.append((examples, total)),
    )
    assert {path.name for path in out.iterdir()} == {
        "restore_de-predict.jsonl-00000-of-00001",
        "restore_de-predict.config.txt",
        "restore_de-metrics.json",
        "restore_de-timing.json",
        "restore_de-summary.md",
    }
    records = read(out, "restore_de")
    assert records == result.records
    assert [record["targets"] for record in records] == [german for _, german, _ in SENTENCES]
    assert [record["inputs"] for record in records] == [fold(german) for _, german, _ in SENTENCES]
    assert all(list(record) == FIELDS for record in records)
    buckets = {len(record["inputs"].encode()) + 1 > 32 for record in records}
    assert buckets == {True, False}  # or the order of the file would prove nothing
    assert sum(examples for examples, _ in seen) == len(SENTENCES)
    assert {total for _, total in seen} == {len(SENTENCES)}

    found = json.loads((out / "restore_de-metrics.json").read_text("utf-8"))
    targets, predictions = ([record[name] for record in records] for name in ("targets", "prediction"))
    expected = {}
    for metric in (metrics.exact_match, metrics.word_accuracy, metrics.character_accuracy):
        expected |= metric(targets, predictions)
    totals = {name: sum(record["counts"][name] for record in records) for name in records[0]["counts"]}
    by_position = accounting.acceptance_by_position(record["source"] for record in records)
    assert found.pop("acceptance_by_position") == pytest.approx(by_position)
    assert found == pytest.approx({**expected, **accounting.rates(totals), "examples": len(records)})
    timing = json.loads((out / "restore_de-timing.json").read_text("utf-8"))
    assert timing["compiled_shapes"] == 2 and timing["resumed"] is False and timing["decode_s"] > 0
    assert timing["tokens_decoded"] == totals["committed"] and timing["tokens_per_s"] > 0
    summary = (out / "restore_de-summary.md").read_text("utf-8")
    assert "rule lossless" in summary and "| exact_match |" in summary


def test_metric_values_of_any_kind_are_written_and_a_metric_that_fails_costs_nothing(pair, tmp_path):
    from speccascade_t5x.data.seqio_tasks import seqio, tf

    broken = [True]

    def odd(targets, predictions):
        if broken[0]:
            raise KeyError("of a metric")
        return {"scalar": seqio.metrics.Scalar(0.5), "text": seqio.metrics.Text("two | of\ntwo"), "none": None}

    def rows(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": ["ja", "nein"], "targets": ["Ja", "Nein"]})

    seqio.TaskRegistry.add(
        "odd",
        source=seqio.FunctionDataSource(rows, splits=["test"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={name: seqio.Feature(seqio.ByteVocabulary(0)) for name in ("inputs", "targets")},
        metric_fns=[odd],
    )
    try:
        with pytest.raises(
            UserError, match="metric 'odd' of task 'odd' failed with KeyError.*; the predictions are kept"
        ):
            infer(pair, Settings(**SHAPE), tmp_path, task="odd")
        kept = (tmp_path / "odd-predict.jsonl-00000-of-00001").read_bytes()
        assert json.loads((tmp_path / "odd-metrics.json").read_text())["examples"] == 2
        broken[0] = False
        before = (tmp_path / "odd-timing.json").read_bytes()
        metrics = infer(pair, Settings(**SHAPE), tmp_path, task="odd").metrics
    finally:
        seqio.TaskRegistry.remove("odd")
    assert json.loads((tmp_path / "odd-metrics.json").read_text()) == metrics
    assert (metrics["scalar"], metrics["text"], metrics["none"]) == (0.5, "two | of\ntwo", None)
    assert (tmp_path / "odd-predict.jsonl-00000-of-00001").read_bytes() == kept  # nothing was decoded again
    assert (tmp_path / "odd-timing.json").read_bytes() == before
    assert "| text | two \\| of two |" in (tmp_path / "odd-summary.md").read_text()


def test_a_line_and_an_example_of_a_task_are_decoded_alike(pair, restore_de, tmp_path):
    long = [("x", "Überlänge " * 6, "a"), *ROWS]
    write_split(restore_de, "test", long)
    settings = Settings(**SHAPE, truncate=True)
    task = infer(pair, settings, tmp_path / "out", task="restore_de")
    file = tmp_path / "same.jsonl"
    rows = [{"inputs": fold(german), "targets": german} for _, german, _ in long]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    text = infer(pair, settings, input=str(file))
    assert text.predictions is None
    assert text.records == task.records


def test_lines_of_text_in_order(pair, lines, tmp_path):
    whole = infer(pair, Settings(**SHAPE), tmp_path / "out", input=str(lines))
    assert [record["inputs"] for record in whole.records] == LINES
    assert "targets" not in whole.records[0]
    assert whole.predictions == tmp_path / "out" / "lines-predict.jsonl-00000-of-00001"
    assert read(tmp_path / "out", "lines") == whole.records
    few = infer(pair, Settings(**SHAPE), input=str(lines), limit=3)
    assert few.records == whole.records[:3]
    assert few.metrics["examples"] == 3


# A process that decodes LINES, and kills itself after KILL batches as nothing but the kernel could.
JOB = """
import os, signal, sys
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.infer import infer

out, lines, kill = sys.argv[1], sys.argv[2], int(sys.argv[3])
batches = 0

def after_each_batch(examples, total, rates):
    global batches
    batches += 1
    if batches == kill:
        os.kill(os.getpid(), signal.SIGKILL)

settings = generate.Settings(max_input_len=32, max_len=32, draft_len=3, batch_size=2)
pair = generate.load("restore_de_pair")
result = infer(pair, settings, out, input=lines, batches_per_chunk=2, progress=after_each_batch)
print(result.timing["resumed"], result.timing["tokens_decoded"])
"""


def test_a_killed_run_continues_to_the_same_bytes(pair, lines, tmp_path):
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),  # the second process need not compile again
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(kill: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", JOB, str(tmp_path / "killed"), str(lines), str(kill)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    done = run(kill=3)  # of four batches, two to a chunk
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = tmp_path / "killed"
    chunks = list(killed.rglob("*-of-00002.jsonl"))
    assert [chunk.name for chunk in chunks] == ["00000-of-00002.jsonl"]
    assert not (killed / "lines-predict.jsonl-00000-of-00001").exists()
    assert not (killed / "lines-metrics.json").exists()

    done = run(kill=0)
    assert done.returncode == 0, done.stderr
    whole = infer(pair, Settings(**SHAPE), tmp_path / "whole", input=str(lines), batches_per_chunk=2)
    name = whole.predictions.name
    assert (killed / name).read_bytes() == whole.predictions.read_bytes()
    assert json.loads((killed / "lines-metrics.json").read_text()) == json.loads(json.dumps(whole.metrics))
    rest = sum(len(record["tokens"]) for record in whole.records[4:])
    assert done.stdout.split() == ["True", str(rest)]  # the first chunk was not decoded again
    assert not list(killed.rglob("*.partial")) and not list(killed.rglob("*chunks*"))


def test_a_finished_run_is_left_alone(pair, lines, tmp_path):
    def run():
        return infer(pair, Settings(**SHAPE), tmp_path / "out", input=str(lines), limit=4)

    first = run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert again.records == first.records and again.timing == first.timing


def test_a_second_run_of_the_same_input_is_refused_while_one_is_at_work(pair, lines, tmp_path):
    refused = []

    def start_another(examples, total, rates):
        with pytest.raises(UserError, match="another process is at work on lines in .*out: wait until it has ended"):
            infer(pair, Settings(**SHAPE), tmp_path / "out", input=str(lines))
        refused.append(examples)

    infer(pair, Settings(**SHAPE), tmp_path / "out", input=str(lines), progress=start_another)
    assert refused and len(read(tmp_path / "out", "lines")) == len(LINES)


def test_records_of_other_runs_are_not_mixed_in(pair, lines, tmp_path):
    out = tmp_path / "out"
    infer(pair, Settings(**SHAPE), out, input=str(lines), limit=2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    scaled = jax.tree.map(lambda leaf: leaf * 1.01, pair.drafter.params)
    other = generate.load("restore_de_pair")
    other.drafter = Bound(pair.drafter.model, scaled)
    for who, settings, options in (
        (pair, Settings(**SHAPE, seed=1), {}),
        (pair, Settings(**SHAPE), {"limit": 4}),
        (pair, Settings(**SHAPE), {"config_text": "LIMIT = 2"}),
        (other, Settings(**SHAPE), {}),
    ):
        with pytest.raises(UserError, match="made with other settings"):
            infer(who, settings, out, **{"input": str(lines), "limit": 2, **options})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": "out"}, "either a task or an input file"),
        ({"output_dir": "out", "task": "restore_de", "input": "x.txt"}, "and not both"),
        ({"task": "restore_de"}, r"needs an output folder: set OUTPUT_DIR"),
        ({"input": "x.txt", "limit": 0}, r"limit=0 .*1 or more"),
        ({"input": "x.txt", "limit": "3"}, r"limit='3' .*whole number"),
        ({"input": "x.txt", "batches_per_chunk": 0}, r"batches_per_chunk=0 .*1 or more"),
        ({"input": "missing.txt", "output_dir": "out"}, r"missing\.txt cannot be read: No such file"),
    ],
)
def test_bad_jobs_are_refused_before_anything_is_written(pair, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        infer(pair, Settings(**SHAPE), **options)
    assert not list(tmp_path.iterdir())


def test_a_file_whose_name_is_not_utf8(pair, tmp_path):
    name = os.fsdecode(b"t\xfcr.txt")
    (tmp_path / name).write_text("ja\n")
    found = [infer(pair, Settings(**SHAPE), tmp_path / "out", input=str(tmp_path / name)) for _ in range(2)]
    assert found[0].predictions == found[1].predictions and found[0].predictions.name.startswith(name[:3])
    assert "t\\udcfcr" in (tmp_path / "out" / f"{name[:3]}-summary.md").read_text("utf-8")


def test_nan_leaves_no_records(pair, lines, tmp_path):
    broken = generate.load("restore_de_pair")
    broken.verifier = Bound(pair.verifier.model, jax.tree.map(lambda leaf: leaf * float("nan"), pair.verifier.params))
    with pytest.raises(UserError, match="NaN while decoding example 0"):
        infer(broken, Settings(**SHAPE), tmp_path / "out", input=str(lines))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lines-predict.config.txt"]


def test_a_task_of_another_vocabulary_is_refused(pair, restore_de, tmp_path):
    wrong = generate.load("restore_de_pair")
    wrong.vocabulary = SentencePieceVocabulary(train_sentencepiece(tmp_path))
    with pytest.raises(UserError, match=r"feature 'inputs' of task 'restore_de' has a vocabulary of 384 pieces"):
        infer(wrong, Settings(**SHAPE), tmp_path / "out", task="restore_de")
    assert not (tmp_path / "out").exists()


def test_a_long_line_is_named(pair, tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("kurz\n\n" + "a" * 40 + "\n", "utf-8")
    with pytest.raises(UserError, match=r"long\.txt, line 3 has 41 tokens.*feature length 32"):
        infer(pair, Settings(**SHAPE), input=str(file))
    cut = infer(pair, Settings(**SHAPE, truncate=True), input=str(file))
    assert [record["inputs"] for record in cut.records] == ["kurz", "a" * 40]


def test_inputs_are_read_whole_before_decoding(tmp_path):
    assert text_input.read(write(tmp_path, "bom.txt", b"\xef\xbb\xbfeins\r\n \nzwei"))[1] == (
        1,
        "zwei",
        None,
        f"{tmp_path / 'bom.txt'}, line 3",
    )
    assert text_input.read(tmp_path / "bom.txt", limit=1)[0].inputs_text == "eins"
    examples = text_input.read(write(tmp_path, "a.jsonl", b'{"inputs": "eins", "targets": "Eins"}\n{"inputs": ""}\n'))
    assert [example[1:3] for example in examples] == [("eins", "Eins"), ("", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt holds no text"),
        ("a.txt", b"\n \n", r"a\.txt holds no text"),
        ("a.txt", b"gut\n\xff\n", r"a\.txt, line 2 is not UTF-8"),
        ("a.jsonl", b'{"inputs": "a"}\n{"inputs": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'"a"\n', r"a\.jsonl, line 1 needs an object with a text under"),
        ("a.jsonl", b'{"input": "a"}\n', r"a\.jsonl, line 1 needs an object with a text under"),
        ("a.jsonl", b'{"inputs": "a", "targets": 3}\n', r"a\.jsonl, line 1 .*\"targets\""),
        ("a.jsonl", b'{"inputs": "\\ud800"}\n', r"a\.jsonl, line 1 .*not Unicode"),
    ],
)
def test_bad_inputs_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        text_input.read(write(tmp_path, name, content))


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name
