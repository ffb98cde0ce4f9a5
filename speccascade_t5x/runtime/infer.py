"""The `infer` job: decode a seqio task, or lines of text, and leave records, metrics, timing and a summary."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speccascade_t5x.core import accounting
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.runtime import batching, measuring, options, records, text_input, vocabulary
from speccascade_t5x.runtime.generate import LoadedPair, Runner, Settings

_RECORD_FIELDS = ("prediction", "log_prob", "tokens", "counts", "source", "trace")

# Called after each batch: (examples it held, examples in all, rates so far).
Progress = Callable[[int, int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is decoded.

    Attributes:
      name: the task's name, or what stands for it in file names.
      prompts: ids of each example; `index` is its place below.
      inputs_text: text of each example.
      targets_text: reference of each example, None where there is none.
      score: predictions -> metrics; None where nothing can be scored.
    """

    name: str
    prompts: list[batching.Example]
    inputs_text: list[str]
    targets_text: list[str | None]
    score: Callable[[Sequence[str]], dict[str, float]] | None


@dataclasses.dataclass(frozen=True)
class InferResult:
    """What an `infer` job has left behind.

    Attributes:
      records: in input order.
      predictions: path of the records; None where no output folder was named.
      metrics: the task's metrics and the rates of the decode.
      timing: what `<task>-timing.json` holds.
    """

    records: list[dict[str, Any]]
    predictions: Path | None
    metrics: dict[str, float]
    timing: dict[str, Any]


def infer(
    pair: LoadedPair,
    settings: Settings,
    output_dir: str | Path | None = None,
    task: str | None = None,
    split: str = "test",
    input: str | None = None,
    limit: int | None = None,
    batches_per_chunk: int = 8,
    config_text: str = "",
    progress: Progress | None = None,
) -> InferResult:
    """Decodes a task's split or an input file. Started again after a kill, it continues at the first missing chunk.

    Args:
      pair: what decodes.
      settings: how to decode.
      output_dir: where the files go, see `runtime.records`; None (for an input file only) writes none.
      task: a registered seqio task; its vocabulary must be the pair's.
      split: of the task.
      input: text file, `.jsonl` file or "-", instead of a task.
      limit: decode only the first so many examples.
      batches_per_chunk: how many batches are stored at once: what a kill can cost.
      config_text: the resolved configuration; records made with another one are never mixed in.
      progress: called after each batch.

    Raises:
      UserError: neither or both of task and input; bad data, options or models; a full disk.
    """
    if (task is None) == (input is None):
        raise UserError("name either a task or an input file to decode (TASK or INPUT), and not both")
    if task is not None and output_dir is None:
        raise UserError("decoding a task needs an output folder: set OUTPUT_DIR, or give --output_dir")
    options.whole("batches_per_chunk", batches_per_chunk, 1)
    if limit is not None:
        options.whole("limit", limit, 1)
    runner = Runner(pair, settings)  # refuses bad settings before any data is read
    dataset = read_dataset(runner, task, split, input, limit)
    batches = runner.batches(dataset.prompts)
    written = [int(i) for batch in batches for i in batch.example_ids[batch.valid]]
    order = np.argsort(written).tolist()
    if output_dir is None:
        found = _decode(runner, dataset, batches, progress)
        in_order = [found[i] for i in order]
        metrics = _metrics(dataset, settings, in_order)
        return InferResult(in_order, None, metrics, _timing(runner, resumed=False) | _standardised(runner, metrics))
    chunks = [batches[i : i + batches_per_chunk] for i in range(0, len(batches), batches_per_chunk)]
    made_with = {"settings": runner.settings, "data": _data_identity(dataset), "pair": _pair_identity(pair)}
    identity = f"{config_text}\n" + "".join(f"# {name}: {value}\n" for name, value in made_with.items())
    writer = records.RecordWriter(output_dir, dataset.name, identity, len(chunks))
    done = set(writer.done_chunks())
    for i, chunk in enumerate(chunks):
        if i not in done:
            writer.write_chunk(i, _decode(runner, dataset, chunk, progress))
        elif progress:
            progress(sum(int(batch.valid.sum()) for batch in chunk), len(dataset.prompts), {})
    path = writer.finish(order)
    in_order = list(writer.read_all())
    metrics = _metrics(dataset, settings, in_order)
    writer.write_metrics(metrics)
    timed = path.parent / f"{records.file_stem(dataset.name)}-timing.json"
    if len(done) == len(chunks) and timed.is_file():  # nothing was left to decode, so nothing to time anew
        return InferResult(in_order, path, metrics, json.loads(timed.read_text("utf-8")))
    timing = _timing(runner, resumed=bool(done)) | _standardised(runner, metrics)
    writer.write_timing(timing)
    writer.write_summary(_summary(dataset, settings, metrics, timing))
    return InferResult(in_order, path, metrics, timing)


def read_dataset(runner: Runner, task: str | None, split: str, input: str | None, limit: int | None) -> Dataset:
    """Reads a task's split, or an input file; exactly one of the two is named. Arguments as for `infer`."""
    return _from_text(runner, input, limit) if task is None else _from_task(runner.pair, runner, task, split, limit)


def _decode(
    runner: Runner, dataset: Dataset, batches: list[batching.Batch], progress: Progress | None
) -> list[dict[str, Any]]:
    """Records of some batches, in the order of their rows."""
    found = []
    for batch in batches:
        decoded = runner.decode(batch)
        for index in batch.example_ids[batch.valid].tolist():
            record = {"inputs": dataset.inputs_text[index]}
            if dataset.targets_text[index] is not None:
                record["targets"] = dataset.targets_text[index]
            found.append(record | {name: decoded[index][name] for name in _RECORD_FIELDS if name in decoded[index]})
        if progress:
            progress(int(batch.valid.sum()), len(dataset.prompts), accounting.rates(runner.totals))
    return found


def _from_task(pair: LoadedPair, runner: Runner, task: str, split: str, limit: int | None) -> Dataset:
    """Reads a seqio task and checks that it speaks the pair's vocabulary."""
    from speccascade_t5x.runtime import data  # loads TensorFlow and seqio

    for feature, spoken in data.task_vocabularies(task).items():
        ours = data.as_vocabulary(spoken)
        vocabulary.check_same(ours, pair.vocabulary, (f"feature {feature!r} of task {task!r}", "pair"))
    lengths = {"inputs": runner.max_input_len}
    examples = data.examples(task, split, lengths, limit=limit, truncate=runner.settings.truncate)
    with_targets = all(example.targets_text is not None for example in examples)
    return Dataset(
        name=task,
        prompts=[batching.Example(e.index, e.inputs) for e in examples],
        inputs_text=[e.inputs_text for e in examples],
        targets_text=[e.targets_text for e in examples],
        score=(lambda predictions: data.score(task, examples, predictions)) if with_targets else None,
    )


def _from_text(runner: Runner, source: str, limit: int | None) -> Dataset:
    """Reads lines of text."""
    examples = text_input.read(source, limit)
    return Dataset(
        name="stdin" if source == "-" else Path(source).stem,
        prompts=[runner.prompt(e.index, e.inputs_text, e.where) for e in examples],
        inputs_text=[e.inputs_text for e in examples],
        targets_text=[e.targets_text for e in examples],
        score=None,
    )


def _data_identity(dataset: Dataset) -> str:
    """A short text that differs where the examples differ, so that records of other data are never mixed in."""
    digest = hashlib.sha256()
    for inputs, targets in zip(dataset.inputs_text, dataset.targets_text, strict=True):
        digest.update(repr((inputs, targets)).encode())
    return f"{dataset.name}, {len(dataset.prompts)} examples, sha256 {digest.hexdigest()[:16]}"


def _pair_identity(pair: LoadedPair) -> str:
    """A short text that differs where the models or their vocabulary differ."""
    digest = hashlib.sha256(pair.vocabulary.fingerprint().encode())
    models = (pair.verifier, pair.drafter, *pair.smaller)
    drafted_with = models if pair.table is None else (*models, pair.table)
    for path, leaf in jax.tree_util.tree_leaves_with_path(drafted_with):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    digest.update(repr([bound and bound.model for bound in models]).encode())
    return f"sha256 {digest.hexdigest()[:16]}"


def _metrics(dataset: Dataset, settings: Settings, in_order: list[dict[str, Any]]) -> dict[str, float]:
    """The task's metrics, of the first sample, and the rates of all records, resumed ones included."""
    one = settings.num_samples == 1
    predictions = [record["prediction"] if one else record["prediction"][0] for record in in_order]
    totals = accounting.total(
        counts for record in in_order for counts in ([record["counts"]] if one else record["counts"])
    )
    scores = dataset.score(predictions) if dataset.score else {}
    sources = [source for record in in_order for source in ([record["source"]] if one else record["source"])]
    rates = accounting.rates(totals) | {"acceptance_by_position": accounting.acceptance_by_position(sources)}
    return {**scores, **rates, "examples": len(in_order)}


def _timing(runner: Runner, resumed: bool) -> dict[str, Any]:
    seconds, tokens = runner.timing.decode_s, runner.totals.get("committed", 0)
    device = jax.devices()[0]
    return {
        "compile_s": round(runner.timing.compile_s, 3),
        "decode_s": round(seconds, 3),
        "compiled_shapes": runner.timing.compiled_shapes,
        "tokens_decoded": tokens,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else 0.0,
        "resumed": resumed,
        "device": f"{device.device_kind} x {jax.device_count()}",
        "machine": platform.platform(),
        "jax": jax.__version__,
    }


def _standardised(runner: Runner, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Standardised walltime improvement of a cascade, in both published cost conventions; nothing for other runs.

    A count of calls over all records, not a time: see `accounting.standardised_improvement`. `by_parameters` charges a
    drafter its parameters over the verifier's, `by_step` a measured step of its over one of the verifier's.
    """
    if "level_calls_per_token" not in metrics:
        return {}
    pair = runner.pair
    models = [pair.drafter, *pair.smaller][: len(metrics["level_calls_per_token"])]
    per_token = {
        "committed": 1.0,
        "verifier_calls": metrics["verifier_calls_per_token"],
        "level_calls": metrics["level_calls_per_token"],
    }
    sizes, steps = (
        [measure(bound) for bound in (pair.verifier, *models)]
        for measure in (lambda bound: sum(leaf.size for leaf in jax.tree.leaves(bound.params)), measuring.step_seconds)
    )
    improvement = {
        name: round(accounting.standardised_improvement(per_token, [cost / costs[0] for cost in costs[1:]]), 3)
        for name, costs in (("by_parameters", sizes), ("by_step", steps))
    }
    return {"standardised_walltime_improvement": improvement}


def _summary(dataset: Dataset, settings: Settings, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """A page for people."""
    how = settings.method
    if settings.method == "speculative":
        how = f"speculative, rule {settings.rule}" + ("" if settings.alpha is None else f", alpha {settings.alpha:g}")
    lines = [f"# {dataset.name}: {how}, temperature {settings.temperature:g}", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {records.shown(value)} |" for name, value in metrics.items()]
    standardised = timing.get("standardised_walltime_improvement", {})
    shown = {name: value for name, value in timing.items() if value is not standardised}
    shown |= {f"standardised walltime improvement, {name}": value for name, value in standardised.items()}
    lines += [f"| {name} | {value} |" for name, value in shown.items()]
    if standardised:
        lines += ["", "The standardised walltime improvement counts calls; decode_s and tokens_per_s are real time."]
    if timing["resumed"]:
        lines += ["", "This run was resumed: the times are those of its last part."]
    return "\n".join(lines) + "\n"
