"""seqio tasks as plain numpy examples, in a fixed order, for decoding and for fitting.

This is the only module of the library that loads TensorFlow and seqio. It does so without log
output, and hides the accelerators from TensorFlow, so that JAX has the devices to itself. Tasks are
registered when the module that defines them is imported (usually by a gin file); this module only
looks them up.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from speccascade_t5x.common import checks
from speccascade_t5x.data import shards
from speccascade_t5x.data.examples import Example, check_ids, cut, fit
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary, check_same


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Captures what native libraries write to file descriptor 2, and shows it only if the block fails.

    TensorFlow logs before its logging can be configured, and no environment variable stops that.
    """
    try:
        original = os.dup(2)
    except OSError:  # a daemon without a standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            if failed:
                held.seek(0)
                with open(2, "wb", closefd=False) as stderr:
                    shutil.copyfileobj(held, stderr)


with _quiet_stderr():
    import seqio
    import tensorflow as tf

    # A device that another program has already given to TensorFlow cannot be taken back.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")


def examples(
    task_name: str,
    split: str,
    feature_lengths: Mapping[str, int],
    limit: int | None = None,
    truncate: bool = False,
    shard: tuple[int, int] | None = None,
) -> list[Example]:
    """Reads a whole split, unshuffled, so that every bad example is found before work starts.

    The task is run without sequence lengths, so its preprocessors cut nothing by themselves. Tasks
    that shape their examples by these lengths (span corruption, packing) are not supported here.

    Args:
      task_name: a registered seqio task.
      split: one of its splits.
      feature_lengths: maximum lengths of "inputs" and, if given, "targets", in ids with the EOS.
        Longer targets are always cut.
      limit: number of examples to read, from the first; None reads all.
      truncate: cut inputs that are too long instead of rejecting them. A cut feature keeps its EOS
        as last id where the task appends one.
      shard: (i, n) reads the i-th of n parts that together are the split, as seqio divides it: by files where there
        are enough, else every n-th example. Indices are then those of the part.

    Raises:
      UserError: unknown task or split, a mixture, an empty dataset, a task without inputs, or an
        input longer than feature_lengths["inputs"] while `truncate` is False.
    """
    features = _task(task_name).output_features
    dataset = _dataset(task_name, split, shard=shard)
    if "inputs" not in features or "inputs" not in dataset.element_spec:
        raise UserError(f"task {task_name!r} has no feature 'inputs', so there is nothing to read: name another task")
    if limit is not None:
        dataset = dataset.take(limit)
    with contextlib.closing(_rows(task_name, dataset, features)) as rows:
        found = [_example(index, raw, features, feature_lengths, truncate) for index, raw in enumerate(rows)]
    if not found:
        raise UserError(
            f"task {task_name!r} has no example in split {split!r}"
            + (f", part {shard[0]} of {shard[1]}" if shard else "")
            + ": check its data, its row filters and the limit"
        )
    return found


def corpus(
    task_name: str, split: str, spoken: Vocabulary, limit: int | None = None, shard: tuple[int, int] | None = None
) -> shards.Corpus:
    """Reads a split whole, as `examples` does, into a corpus to learn from.

    Raises:
      UserError: what `examples` raises; examples without targets.
    """
    found = examples(task_name, split, {}, limit=limit, shard=shard)
    pairs = [(example.inputs, example.targets) for example in found if example.targets is not None]
    if len(pairs) < len(found):
        raise UserError(f"task {task_name!r} has no targets to learn from: name another task")
    return shards.from_examples(pairs, spoken)


def stream(
    task_name: str,
    split: str,
    limit: int | None = None,
    task_lengths: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Generator[tuple[np.ndarray, np.ndarray]]:
    """Yields (inputs, targets) ids of a split of any size, unshuffled and uncut, one example in memory at a time.

    Args:
      task_name: a registered seqio task.
      split: one of its splits.
      limit: number of examples to yield, from the first; None yields all.
      task_lengths: lengths for the task's own preprocessors; those that shape examples by them (span corruption) need
        them. seqio then cuts longer examples by itself.
      seed: seed of preprocessors that draw random numbers.

    Raises:
      UserError: at the call, for an unknown task or split, a mixture, or a task without inputs or targets; while
        iterating, for preprocessors that need `task_lengths`.
    """
    features = _task(task_name).output_features
    dataset = _dataset(task_name, split, task_lengths, seed)
    for feature in ("inputs", "targets"):
        if feature not in features or feature not in dataset.element_spec:
            raise UserError(
                f"task {task_name!r} has no feature {feature!r}, so there is nothing to train on: name another task"
            )
    dataset = dataset if limit is None else dataset.take(limit)
    return _pairs(_rows(task_name, dataset, features))


def _pairs(rows: Generator[Mapping[str, Any]]) -> Generator[tuple[np.ndarray, np.ndarray]]:
    with contextlib.closing(rows):
        for raw in rows:
            yield raw["inputs"], raw["targets"]


def _rows(
    task_name: str, dataset: tf.data.Dataset, features: Mapping[str, seqio.Feature]
) -> Generator[Mapping[str, Any]]:
    """The examples of a data set as numpy arrays, those that will be read as ids checked.

    It is closed, or read to its end: TensorFlow's threads, which may be in a generator of the task, then stop while
    there still is an interpreter for them.

    Raises:
      UserError: the task's own code fails, or an example holds no ids of its vocabulary.
    """
    iterator, index = dataset.as_numpy_iterator(), 0
    while True:
        with _named(task_name, f"reading of example {index}"):
            raw = next(iterator, None)
        if raw is None:
            return
        for name in ("inputs", "targets"):
            if name in raw and name not in features:
                del raw[name]  # a text that is no feature
            elif name in raw:
                where = f"example {index} of task {task_name!r}"
                check_ids(raw[name], features[name].vocabulary.vocab_size, where, name)
        yield raw
        index += 1


def texts(name: str, split: str = "train", limit: int | None = None) -> Iterator[str]:
    """Yields every text of a task or mixture before tokenising: of each example its input, then its target.

    Args:
      name: a registered seqio task or mixture; of a mixture each task is read once, whatever its rate.
      split: one split of it.
      limit: number of examples of each task to read, from the first; None reads all.

    Raises:
      UserError: at the first text, for an unknown name or split.
    """
    for part, _ in parts(name):
        features = _task(part).output_features
        dataset = _dataset(part, split)
        dataset = dataset if limit is None else dataset.take(limit)
        with contextlib.closing(_rows(part, dataset, features)) as rows:
            for index, raw in enumerate(rows):
                for feature in ("inputs", "targets"):
                    if feature in raw:
                        yield _text(raw, feature, features, f"example {index} of task {part!r}")


def _dataset(
    task_name: str,
    split: str,
    lengths: Mapping[str, int] | None = None,
    seed: int | None = None,
    shard: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """Opens a split of a task, or a shard of it, unshuffled."""
    part = None if shard is None else seqio.ShardInfo(index=shard[0], num_shards=shard[1])
    task = check(task_name, split)
    try:
        with _named(task_name, "source or preprocessor"):
            return task.get_dataset(sequence_length=lengths, split=split, shuffle=False, seed=seed, shard_info=part)
    except UserError as error:
        if lengths is not None or not isinstance(error.__cause__, (TypeError, KeyError)):
            raise
        raise UserError(
            f"the preprocessors of task {task_name!r} failed without feature lengths ({error.__cause__!r}): where they "
            "shape examples by them, give the task its lengths"
        ) from error


def check(task_name: str, split: str) -> seqio.Task:
    """Returns a registered task which has this split.

    Raises:
      UserError: unknown task or split, or a mixture.
    """
    task = _task(task_name)
    if split not in task.splits:
        raise UserError(f"task {task_name!r} has no split {split!r}: use one of {', '.join(task.splits)}")
    return task


def parts(name: str) -> list[tuple[str, float]]:
    """Returns the tasks of a mixture with their rates, by name; a plain task gives itself at rate 1.

    Raises:
      UserError: there is neither a task nor a mixture of that name, or the rates cannot be computed.
    """
    if name not in seqio.MixtureRegistry.names() or name in seqio.TaskRegistry.names():
        if name not in seqio.TaskRegistry.names() and seqio.MixtureRegistry.names():
            checks.one_of("task or mixture", name, [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
        return [(_task(name).name, 1.0)]
    mixture = seqio.MixtureRegistry.get(name)
    try:
        return [(task.name, float(mixture.get_rate(task))) for task in sorted(mixture.tasks, key=lambda t: t.name)]
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"the rates of mixture {name!r} cannot be computed ({error}): give it numbers") from error


def _example(
    index: int,
    raw: Mapping[str, Any],
    features: Mapping[str, seqio.Feature],
    lengths: Mapping[str, int],
    truncate: bool,
) -> Example:
    text = _text(raw, "inputs", features, f"example {index}")
    where = f"example {index} ({_opening(text)!r})"
    inputs = fit(raw["inputs"], lengths.get("inputs"), where, truncate=truncate, eos_id=_eos(features["inputs"]))
    if "targets" not in raw:
        return Example(index, inputs, text)
    targets = cut(raw["targets"], lengths.get("targets"), _eos(features["targets"]))
    return Example(index, inputs, text, targets, _text(raw, "targets", features, where))


def _opening(text: str, words: int = 6) -> str:
    """Returns the first words of a text, for a message."""
    start = " ".join(text.split()[:words])[:60]
    return start if start == text else f"{start} ..."


def _eos(feature: seqio.Feature) -> int | None:
    return feature.vocabulary.eos_id if feature.add_eos else None


def _text(raw: Mapping[str, Any], name: str, features: Mapping[str, seqio.Feature], where: str) -> str:
    kept = raw.get(f"{name}_pretokenized")
    if isinstance(kept, bytes):
        try:
            return kept.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} has {name} that are not UTF-8 ({error.reason}): decode them in a preprocessor"
            ) from error
    return features[name].vocabulary.decode(raw[name].tolist())


def _task(name: str) -> seqio.Task:
    """Looks a task up.

    Raises:
      UserError: no task has that name, or it is a mixture.
    """
    tasks = seqio.TaskRegistry.names()
    if name in tasks:
        return seqio.TaskRegistry.get(name)
    if name in seqio.MixtureRegistry.names():
        parts = ", ".join(sorted(t.name for t in seqio.MixtureRegistry.get(name).tasks))
        raise UserError(f"{name!r} is a mixture of {parts}: name one of these tasks")
    raise UserError(
        f"there is no task {name!r}: {checks.suggestion(name, tasks)} (a task is registered by importing its module in "
        "a gin file, as in `from speccascade_t5x.tasks import l10n`)"
    )


def task_vocabularies(task_name: str) -> dict[str, seqio.Vocabulary]:
    """Returns the vocabulary of each feature of a task, by feature name.

    Raises:
      UserError: there is no such task, or its vocabulary is not configured.
    """
    return {name: feature.vocabulary for name, feature in _task(task_name).output_features.items()}


def check_vocabulary(task_name: str, spoken: Vocabulary) -> None:
    """Checks that every feature of a task speaks a pair's vocabulary.

    Raises:
      UserError: one does not, or there is no such task.
    """
    for feature, named in task_vocabularies(task_name).items():
        check_same(as_vocabulary(named), spoken, (f"feature {feature!r} of task {task_name!r}", "pair"))


def as_vocabulary(spoken: seqio.Vocabulary) -> Vocabulary:
    """Returns the same vocabulary without seqio, so that it can be compared with a pair's.

    Raises:
      UserError: it is of a kind that only seqio supports.
    """
    if isinstance(spoken, seqio.ByteVocabulary):
        return ByteVocabulary(spoken.extra_ids)
    if isinstance(spoken, seqio.SentencePieceVocabulary):
        return SentencePieceVocabulary(spoken.sentencepiece_model_file, spoken.extra_ids)
    raise UserError(f"a vocabulary of class {type(spoken).__name__} cannot be decoded to: use bytes or SentencePiece")


def score(task_name: str, scored: Sequence[Example], predictions: Sequence[str]) -> dict[str, Any]:
    """Returns the task's metrics for the predicted texts of some of its examples, as JSON types.

    Targets and predictions pass through the task's postprocessor first, as seqio does it. What a metric returns is
    normalised, see `metric_value`.

    Args:
      task_name: a registered seqio task.
      scored: examples with targets, as `examples` returned them.
      predictions: one text per example.

    Raises:
      UserError: there is no such task, an example has no target, the counts differ, or the task's own code fails; the
        message names the function and what it raised.
    """
    task = _task(task_name)
    if len(scored) != len(predictions):
        raise UserError(f"there are {len(scored)} examples but {len(predictions)} predictions: give one for each")
    missing = next((e.index for e in scored if e.targets_text is None), None)
    if missing is not None:
        raise UserError(f"example {missing} of task {task_name!r} has no target to score against: leave metrics out")
    fields = [
        {
            "inputs": e.inputs,
            "targets": e.targets,
            "inputs_pretokenized": e.inputs_text,
            "targets_pretokenized": e.targets_text,
        }
        for e in scored
    ]
    with _named(task_name, "postprocessor"):
        targets = [
            task.postprocess_fn(e.targets_text, example=f, is_target=True) for e, f in zip(scored, fields, strict=True)
        ]
        outputs = [task.postprocess_fn(p, example=f, is_target=False) for p, f in zip(predictions, fields, strict=True)]
    results: dict[str, Any] = {}
    for metric in metric_fns(task_name):
        name = _name_of(metric)
        with _named(task_name, f"metric {name!r}"):
            found = metric(targets, outputs)
            results |= metric_value(found if isinstance(found, Mapping) else {name: found})
    return results


def metric_fns(task_name: str) -> list[Callable[..., Any]]:
    """The task's metric functions that read predicted texts.

    As `task.predict_metric_fns`, which fails where an argument has an array for a default.

    Raises:
      UserError: there is no such task, or a function takes other arguments than seqio gives.
    """
    found = []
    for metric in _task(task_name)._metric_fn_constructor_args or ():
        arguments = inspect.signature(metric).parameters.values()
        needed = [each for each in arguments if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
        names = tuple(each.name for each in needed)
        if names == ("targets", "predictions"):
            found.append(metric)
        elif names not in (("targets", "scores"), ("targets", "predictions", "aux_values")):
            raise UserError(
                f"the metric {_name_of(metric)!r} of task {task_name!r} takes {names}: name its arguments targets and "
                "predictions, and give any other a default"
            )
    return found


def _name_of(metric: Callable[..., Any]) -> str:
    return getattr(metric, "__name__", type(metric).__name__)


@contextlib.contextmanager
def _named(task_name: str, what: str) -> Iterator[None]:
    """Turns an exception of a task's own code into a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        said = re.sub(r"^\{\{function_node \S+\}\} ", "", lines[0])
        told = " ".join(f"{type(error).__name__}: {said}".split())[:300]
        raise UserError(f"the {what} of task {task_name!r} failed with {told}: fix it and run again") from error


def metric_value(value: Any) -> Any:
    """The result of a metric function as JSON types: numbers, texts, lists and mappings of them.

    seqio's `Scalar` and `Text` are replaced by their values. NaN and infinities become None. Images, sounds and
    histograms of seqio, and any other object, are replaced by the name of their type.
    """
    if isinstance(value, seqio.metrics.Scalar):
        return metric_value(value.value)
    if isinstance(value, seqio.metrics.Text):
        return metric_value(value.textdata)
    if isinstance(value, Mapping):
        return {_as_text(name): metric_value(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [metric_value(part) for part in value]
    if isinstance(value, (str, bytes)):
        return _as_text(value)
    if value is None or (isinstance(value, int) and value.bit_length() < 1024):
        return value
    if hasattr(value, "__array__"):  # numpy, jax, TensorFlow
        array = np.asarray(value)
        if array.dtype.kind not in "biufSUO":
            array = array.astype(np.float64 if array.dtype.kind == "V" else str)  # bfloat16, and dates and the like
        return metric_value(array.tolist())
    if isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            return float(value) if math.isfinite(value) else None
        return None
    return f"a value of type {type(value).__name__}"


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
