from __future__ import annotations

import fractions
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from corpora import ROWS
from speccascade_t5x.common import storage
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.inference import records
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary

LENGTHS = {"inputs": 8, "targets": 6}


def register(name: str, texts: list[dict[str, str]], **kwargs) -> None:
    """Registers a byte-level task over literal texts."""

    def source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        keys = texts[0] if texts else {"inputs": "", "targets": ""}
        columns = {k: tf.constant([t[k] for t in texts], tf.string) for k in keys}
        return tf.data.Dataset.from_tensor_slices(columns)

    keys = texts[0] if texts else ("inputs", "targets")
    kwargs.setdefault("preprocessors", [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=["test"]),
        output_features={k: seqio.Feature(seqio.ByteVocabulary()) for k in keys},
        **kwargs,
    )


@pytest.fixture
def tasks() -> Iterator[None]:
    texts = [{"inputs": "abc", "targets": "ABC"}, {"inputs": "de", "targets": "DEFGHIJ"}]
    register("tiny", texts, metric_fns=[exact])
    register("long", [*texts, {"inputs": "one two three", "targets": "1"}])
    register("empty", [])
    register("targets_only", [{"targets": "A"}])
    register("inputs_only", [{"inputs": "A"}])
    register("sums", texts[:1], metric_fns=[exact], postprocess_fn=swap_case)
    register(
        "bare",
        texts[:1],
        preprocessors=[
            lambda ds, output_features: seqio.preprocessors.tokenize(ds, output_features, copy_pretokenized=False)
        ],
    )
    seqio.MixtureRegistry.add("blend", ["tiny", "long"], default_rate=1)
    yield
    seqio.MixtureRegistry.remove("blend")
    for name in ("tiny", "long", "empty", "targets_only", "inputs_only", "sums", "bare"):
        seqio.TaskRegistry.remove(name)


def exact(targets, predictions):
    return {"exact": sum(t == p for t, p in zip(targets, predictions, strict=True))}


def swap_case(text, example=None, is_target=False):
    return text.lower() if is_target else f"{text}{example['inputs_pretokenized'][-1]}"


def ids(text: str) -> list[int]:
    return [b + 3 for b in text.encode()]


def test_examples_are_plain_numpy_in_order(tasks):
    first, second = seqio_tasks.examples("tiny", "test", {"inputs": 8})
    assert (first.index, first.inputs_text, first.targets_text) == (0, "abc", "ABC")
    assert first.inputs.tolist() == [*ids("abc"), 1]
    assert second.targets.tolist() == [*ids("DEFGHIJ"), 1]
    assert {a.dtype for a in (first.inputs, first.targets)} == {np.dtype(np.int32)}
    assert seqio_tasks.examples("tiny", "test", LENGTHS, limit=1)[0].inputs_text == "abc"


def test_targets_are_cut_to_their_length_and_end(tasks):
    targets = [e.targets.tolist() for e in seqio_tasks.examples("tiny", "test", LENGTHS)]
    assert targets == [[*ids("ABC"), 1], [*ids("DEFGH"), 1]]


def test_a_prompt_too_long_is_refused_by_example(tasks):
    message = r"example 2 \('one two three'\) has 14 tokens, EOS included.* 8"
    with pytest.raises(UserError, match=message):
        seqio_tasks.examples("long", "test", LENGTHS)
    assert len(seqio_tasks.examples("long", "test", {"inputs": 14})) == 3


def test_truncation_keeps_the_eos(tasks):
    cut = seqio_tasks.examples("long", "test", LENGTHS, truncate=True)[2]
    assert cut.inputs.tolist() == [*ids("one two"), 1]
    assert cut.inputs_text == "one two three"


def test_a_task_that_keeps_no_text_is_decoded(tasks):
    (example,) = seqio_tasks.examples("bare", "test", LENGTHS)
    assert (example.inputs_text, example.targets_text) == ("abc", "ABC")


def test_a_task_without_targets(tasks):
    (example,) = seqio_tasks.examples("inputs_only", "test", LENGTHS)
    assert example.targets is None
    assert example.targets_text is None
    with pytest.raises(UserError, match="example 0 of task 'inputs_only' has no target"):
        seqio_tasks.score("inputs_only", [example], ["A"])
    with pytest.raises(UserError, match="task 'inputs_only' has no targets to learn from"):
        seqio_tasks.corpus("inputs_only", "test", ByteVocabulary(0))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("tinny", "test", "no task 'tinny': did you mean 'tiny'"),
        ("tiny", "dev", "no split 'dev': use one of test"),
        ("blend", "test", "'blend' is a mixture of long, tiny"),
        ("empty", "test", "task 'empty' has no example in split 'test'"),
        ("targets_only", "test", "has no feature 'inputs'"),
    ],
)
def test_what_cannot_be_read_is_said(tasks, name, split, message):
    with pytest.raises(UserError, match=message):
        seqio_tasks.examples(name, split, LENGTHS)


def test_metrics_and_vocabularies_of_a_task(tasks):
    assert seqio_tasks.metric_fns("tiny") == [exact]
    assert {k: v.eos_id for k, v in seqio_tasks.task_vocabularies("tiny").items()} == {
        "inputs": 1,
        "targets": 1,
    }
    with pytest.raises(UserError, match="no task 'nothing'"):
        seqio_tasks.metric_fns("nothing")


def test_score_runs_the_metrics_after_the_postprocessor(tasks):
    found = seqio_tasks.examples("tiny", "test", {"inputs": 8})
    assert seqio_tasks.score("tiny", found, ["ABC", "?"]) == {"exact": 1}
    (example,) = seqio_tasks.examples("sums", "test", LENGTHS)
    assert seqio_tasks.score("sums", [example], ["ab"]) == {"exact": 1}
    with pytest.raises(UserError, match="1 examples but 2 predictions"):
        seqio_tasks.score("sums", [example], ["a", "b"])


def test_score_of_a_corpus_task(corpus):
    from speccascade_t5x.tasks import l10n  # noqa: F401  (registers restore_de)

    found = seqio_tasks.examples("restore_de", "test", {"inputs": 64})
    scores = seqio_tasks.score("restore_de", found, [e.inputs_text for e in found])
    assert set(scores) == {"exact_match", "word_accuracy", "character_accuracy"}
    assert scores["exact_match"] == 0.0
    assert 50 < scores["character_accuracy"] < 100
    assert len(found) == len(ROWS)


def test_tensorflow_is_quiet_and_sees_no_accelerator():
    code = (
        "from speccascade_t5x.data.seqio_tasks import tf; "
        "print(tf.config.get_visible_devices('GPU'), "
        "[int(x) for x in tf.data.Dataset.range(2).map(lambda x: x + 1)])"
    )
    plain = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert done.stdout.strip() == "[] [1, 2]"
    assert done.stderr == ""


def test_what_a_failing_block_wrote_is_shown(capfd):
    with pytest.raises(ImportError), seqio_tasks._quiet_stderr():
        os.write(2, b"the native reason\n")
        raise ImportError("no such library")
    assert "the native reason" in capfd.readouterr().err
    with seqio_tasks._quiet_stderr():
        os.write(2, b"chatter\n")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (seqio.metrics.Scalar(np.float32(0.5)), 0.5),
        (seqio.metrics.Text(b"two of two"), "two of two"),
        ("0.85", "0.85"),
        ({"a": 1.0, 2: [np.int64(3), None]}, {"a": 1.0, "2": [3, None]}),
        (np.array([1.0, np.nan]), [1.0, None]),
        (np.array([True, False]), [True, False]),
        (tf.constant([b"x", b"\xff"]), ["x", "\ufffd"]),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.arange(2), [0, 1]),
        (None, None),
        (float("nan"), None),
        (-np.inf, None),
        (10**400, None),
        (fractions.Fraction(1, 4), 0.25),
        (1 + 2j, "a value of type complex"),
        (seqio.metrics.Histogram([1.0, 2.0]), "a value of type Histogram"),
        (np.datetime64("2026-01-02"), "2026-01-02"),
    ],
)
def test_what_metrics_return_is_kept_as_json(value, kept):
    scores = score_with(lambda targets, predictions: {"m": value, b"n": 1})
    assert scores == {"m": kept, "n": 1} and json.loads(storage.to_json(scores)) == scores
    assert "\n" not in records.shown(scores["m"])


def test_a_metric_that_fails_is_named():
    def shaky(targets, predictions):
        return 1 / 0

    with pytest.raises(UserError, match="metric 'shaky' of task 'odd' failed with ZeroDivisionError: division by zero"):
        score_with(shaky)
    assert score_with(lambda targets, predictions: 0.25) == {"<lambda>": 0.25}  # no mapping: called after its function
    weights = np.ones(2)
    assert score_with(lambda targets, predictions, w=weights: {"m": w}) == {"m": [1.0, 1.0]}  # seqio fails on this
    with pytest.raises(UserError, match=r"metric '<lambda>' of task 'odd' takes \('truth', 'guess'\): name its argum"):
        score_with(lambda truth, guess: 0.25)


def score_with(metric) -> dict:
    """The scores of two texts by one metric."""
    texts = [{"inputs": "abc", "targets": "ABC"}, {"inputs": "de", "targets": "DE"}]
    register("odd", texts, metric_fns=[metric])
    try:
        return seqio_tasks.score("odd", seqio_tasks.examples("odd", "test", LENGTHS), ["A", "B"])
    finally:
        seqio.TaskRegistry.remove("odd")
