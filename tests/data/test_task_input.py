"""What seqio hands over is checked where it is read, and what is read is closed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from speccascade_t5x.data import seqio_tasks, shards
from speccascade_t5x.data.cache import cache
from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary

ROOT = Path(__file__).resolve().parents[2]
FEATURES = {name: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for name in ("inputs", "targets")}
TOKENISED = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
SPEC = {name: tf.TensorSpec([None], tf.int32) for name in FEATURES}
NAME = "handed_over"


@pytest.fixture
def task() -> Iterator[Callable]:
    """Registers the one task of a test."""

    def add(dataset: Callable, preprocessors=(), features=FEATURES) -> str:
        source = seqio.FunctionDataSource(lambda split, shuffle_files=False, seed=None: dataset(), splits=["test"])
        seqio.TaskRegistry.add(NAME, source=source, preprocessors=list(preprocessors), output_features=features)
        return NAME

    yield add
    seqio.TaskRegistry.remove(NAME)


def generated(rows: Callable) -> Callable:
    return lambda: tf.data.Dataset.from_generator(rows, output_signature=SPEC)


def rows_of(*inputs: list[int]) -> Callable:
    def rows():
        for ids in inputs:
            yield {"inputs": np.array(ids, np.int32), "targets": np.array([70, 1], np.int32)}

    return rows


def slices(**columns) -> Callable:
    return lambda: tf.data.Dataset.from_tensor_slices(columns)


def whole(name: str) -> list:
    return seqio_tasks.examples(name, "test", {"inputs": 8})


@pytest.mark.parametrize("bad", [259, 5000, -5])
def test_an_id_outside_the_vocabulary_is_named_by_every_reader(task, tmp_path, bad):
    message = f"example 1 of task '{NAME}' has id {bad} among its inputs, outside the vocabulary of 259 ids"
    name = task(generated(rows_of([100, 1], [100, bad, 1])))
    with pytest.raises(UserError, match=message):  # `infer`, `plan`, `sweep`, `train`, `train_deferral`, `tables`
        whole(name)
    with pytest.raises(UserError, match=message):
        cache(tmp_path, name, "test")


@pytest.mark.parametrize("bad", [259, -5, 2**32 + 5, 2**70])
def test_an_id_that_would_be_another_one_once_it_is_narrowed(bad):
    with pytest.raises(UserError, match=f"an example has id {bad} among its inputs, outside the vocabulary of 259"):
        shards.from_examples([(np.array([bad, 1]), np.array([1]))], ByteVocabulary())


def test_text_that_is_not_utf8(task):
    name = task(slices(inputs=[b"das t\xf6r"], targets=[b"x"]), TOKENISED)
    with pytest.raises(UserError, match=r"^example 0 has inputs that are not UTF-8 \(invalid start byte\)"):
        whole(name)


def test_a_task_without_inputs_whose_rows_have_them(task):
    name = task(slices(inputs=["a"], targets=["x"]), TOKENISED, {"targets": FEATURES["targets"]})
    for read in (whole, lambda name: seqio_tasks.stream(name, "test")):
        with pytest.raises(UserError, match=f"task '{NAME}' has no feature 'inputs'"):
            read(name)


def test_targets_that_are_no_feature_are_left_out(task):
    name = task(slices(inputs=["a"], targets=["x"]), TOKENISED, {"inputs": FEATURES["inputs"]})
    assert whole(name)[0].targets is None


def test_inputs_of_rank_2(task):
    name = task(slices(inputs=[["a", "b"]], targets=["x"]), TOKENISED)
    with pytest.raises(UserError, match=f"the source or preprocessor of task '{NAME}' failed with ValueError: .*rank"):
        whole(name)


def failing():
    yield from rows_of([100, 1])()
    raise OSError("the disk has gone")


def test_a_source_that_fails_while_it_is_read(task, tmp_path):
    name = task(generated(failing))
    message = (
        rf"the reading of example 1 of task '{NAME}' failed with \w+: OSError: the disk has gone: fix it and run again"
    )
    for read in (whole, lambda name: cache(tmp_path, name, "test")):
        with pytest.raises(UserError, match=message):
            read(name)


@pytest.mark.parametrize("read", [whole, lambda name: cache("out", name, "test")], ids=["examples", "cache"])
def test_what_is_left_early_is_closed(task, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    closed = threading.Event()

    def rows():
        try:
            while True:
                yield from rows_of([100, 5000, 1])()
        finally:
            closed.set()

    name = task(generated(rows))
    with pytest.raises(UserError, match="id 5000"):
        read(name)  # pytest holds the error, and with it the frames of the readers
        pytest.fail("it was read")
    assert closed.wait(30)


REGISTERS = """
import sys
sys.path.insert(0, {tests!r})
import test_task_input as tests
rows = tests.rows_of(*[[100, 5000, 1]] * 64)
source = tests.seqio.FunctionDataSource(
    lambda split, shuffle_files=False, seed=None: tests.generated(rows)(), splits=["test"]
)
tests.seqio.TaskRegistry.add("bad", source=source, preprocessors=[], output_features=tests.FEATURES)
"""


def test_a_verb_that_leaves_a_generator_early_ends(tmp_path):
    (tmp_path / "bad_task.py").write_text(REGISTERS.format(tests=str(Path(__file__).parent)))
    verb = ["cache", "--module=bad_task", "--task=bad", "--splits=test", "--output_dir=out"]
    command = [sys.executable, "-m", "speccascade_t5x.cli", *verb]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("speccascade cache: example 0 of task 'bad' has id 5000")
    assert done.stderr.count("\n") == 1, done.stderr
