"""The `train` job: trains on shards or a seqio task, and writes checkpoints, curves and a summary.

<output_dir>/config.gin            the resolved configuration
<output_dir>/config.json           the architecture
<output_dir>/checkpoint_<step>/    see `training.train_checkpoints`; `checkpoints.load(output_dir)` takes the newest
<output_dir>/train-metrics.jsonl   every report and evaluation, one JSON object each
<output_dir>/train-summary.json, train-summary.md
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params, remote
from speccascade_t5x.common import checks, storage, text_table
from speccascade_t5x.data import mixing, packing, shards
from speccascade_t5x.distributed import hosts
from speccascade_t5x.distributed.partitioning import Partitioning, Topology
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models.t5 import T5, T5Config, param_shapes
from speccascade_t5x.text import vocabulary
from speccascade_t5x.training import train_loop

METRICS_FILE = "train-metrics.jsonl"
BATCHINGS = ("packed", "bucketed")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data to train and evaluate on.

    Attributes:
      cached: folder of tokenised shards or of a mixture of them (`speccascade cache`), or several with their rates:
        {folder: rate}.
      task: a registered seqio task, instead of `cached`.
      split: split of the task.
      eval_cached: shards to evaluate on.
      eval_split: split of the task to evaluate on; None for no evaluation. Only read if `task` is given.
      eval_limit: number of examples to evaluate on, from the first; None for all.
      inputs_len: encoder positions of a row; longer inputs are cut, with their EOS kept.
      targets_len: decoder positions of a row; longer targets are cut in the same way.
      batching: "packed" (several examples in a row) or "bucketed" (rows of similar lengths, a few shapes).
      batch_size: number of rows of a packed batch, and of an evaluation batch.
      tokens_per_batch: positions of a bucketed batch; None takes batch_size * (inputs_len + targets_len).
      buckets: number of shapes of bucketed batches.
      seed: seed of the order.
    """

    cached: str | Mapping[str, float] | None = None
    task: str | None = None
    split: str = "train"
    eval_cached: str | None = None
    eval_split: str | None = "validation"
    eval_limit: int | None = 1024
    inputs_len: int = 512
    targets_len: int = 128
    batching: str = "packed"
    batch_size: int = 64
    tokens_per_batch: int | None = None
    buckets: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("inputs_len", "targets_len", "batch_size", "buckets", "eval_limit", "tokens_per_batch")
        checks.fields(self, seed=checks.SEED, cached=(0.0,), **dict.fromkeys(sizes, (1,)))
        if (self.cached is None) == (self.task is None):
            raise UserError("name either tokenised shards or a task to train on (CACHED or TASK), and not both")
        if self.batching not in BATCHINGS:
            raise UserError(f"batching={self.batching!r} is unknown: use {' or '.join(BATCHINGS)}")

    def source(self, exchange: Path) -> mixing.Source:
        """The training examples.

        Args:
          exchange: a folder that all hosts share, where each writes its part of a task for the others to read.

        Raises:
          UserError: see `mixing.read` and `seqio_tasks.examples`.
        """
        if self.task is not None:
            return _shared_corpus(self.task, self.split, exchange)
        if isinstance(self.cached, Mapping):
            return mixing.Mixed([(shards.read(folder), rate) for folder, rate in self.cached.items()])
        return mixing.read(str(self.cached))

    def evaluation(self) -> shards.Corpus | None:
        """The examples to evaluate on, or None."""
        if self.eval_cached is not None:
            return mixing.first(mixing.read(self.eval_cached), self.eval_limit)
        if self.task is not None and self.eval_split is not None:
            return _task_corpus(self.task, self.eval_split, self.eval_limit)
        return None

    def batches(self, source: mixing.Source, multiple_of: int) -> packing.Packed | packing.Bucketed:
        """Training batches of `source`, whose rows are a multiple of `multiple_of` if that can be chosen."""
        if self.batching == "packed":
            return packing.Packed(source, self.batch_size, self.inputs_len, self.targets_len, self.seed)
        room = self.tokens_per_batch or self.batch_size * (self.inputs_len + self.targets_len)
        lengths = (self.inputs_len, self.targets_len)
        return packing.Bucketed(source, room, *lengths, self.buckets, self.seed, multiple_of)


@checks.arguments(devices=(1,))
def train(
    model: T5Config,
    data: Data,
    config: train_loop.TrainConfig,
    output_dir: str | Path,
    start_from: str | Path | None = None,
    teacher: str | Path | None = None,
    devices: int | None = None,
    config_text: str = "",
    observer: train_loop.Observer | None = None,
    topology: Topology | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains a model. After a kill, the same call continues at the newest checkpoint.

    Args:
      model: the architecture.
      data: the training and evaluation data.
      config: how to train.
      output_dir: folder of all files; an earlier run of the same settings there is continued.
      start_from: a checkpoint or bundle with the initial parameters; None initialises them.
      teacher: a checkpoint or bundle (its verifier) to learn from, and to compare with in evaluations.
      devices: number of devices that share each batch; None takes all. Each holds all parameters.
      config_text: the resolved configuration, kept beside the checkpoints.
      observer: receives the events of the run.
      topology: a mesh instead of `devices`, whose rules also define how parameters and moments are split.
      stop: called after each step; once it returns True, a checkpoint is written and the run ends.

    Returns:
      The summary, as train-summary.json holds it. On several hosts the first one writes it, curves and TensorBoard.

    Raises:
      UserError: data, models and options that do not fit; see also `train_loop.train_loop`.
      Preempted: `stop` returned True before the last step.
    """
    if devices is not None and topology is not None:
        raise UserError("devices and topology are both given: name one")
    output_dir, here = Path(output_dir), hosts.current()
    layout = train_loop.data_mesh(devices) if topology is None else topology.partitioning()
    mesh = layout.mesh if isinstance(layout, Partitioning) else layout
    share = mesh.shape["data"]
    source, held_out = data.source(output_dir / "tokenised"), data.evaluation()
    _check_vocabularies(model, source, held_out)
    batches = data.batches(source, share * config.microbatches)
    instructor = None if teacher is None else load_model(teacher, source.vocabulary)
    begin = None if start_from is None else _parameters(start_from, model, source.vocabulary)
    eval_batches = None
    if held_out is not None:
        rows = -(-data.batch_size // share) * share
        eval_batches = packing.InOrder(held_out, rows, data.inputs_len, data.targets_len)
    told = observer if observer and here.first else train_loop.Observer()
    with storage.one_writer(output_dir, "training", here.first):
        curves = Curves(output_dir, config_text, told) if here.first else None
        result = train_loop.train_loop(
            model, batches, config, output_dir=output_dir, start_from=begin, eval_batches=eval_batches,
            teacher=instructor, observer=curves or told, mesh=layout, stop=stop,
        )  # fmt: skip
        summary = _summary(result, batches, curves.read() if curves else [], mesh.size)
        if here.first:
            storage.write_json(output_dir / "train-summary.json", summary)
            storage.write_text(output_dir / "train-summary.md", _page(output_dir.name, summary))
        here.wait("the summary is written")
        return summary


class Curves(train_loop.Observer):
    """Writes every report of all parts of a run to train-metrics.jsonl, and forwards it."""

    def __init__(self, folder: Path, config_text: str, then: train_loop.Observer):
        self._path, self._config_text, self._then = folder / METRICS_FILE, config_text, then

    def started(self, step: int, steps: int, output_dir: Path | None) -> None:
        # Reports of steps after the checkpoint will be made again.
        kept = [row for row in self.read() if row["step"] <= step] if step else []
        storage.write_text(self._path, "".join(storage.to_json(row) + "\n" for row in kept))
        if self._config_text:
            storage.write_text(self._path.parent / "config.gin", self._config_text)
        self._then.started(step, steps, output_dir)

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append({"kind": "train", "step": step, **metrics})
        self._then.logged(step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append({"kind": "eval", "step": step, **metrics})
        self._then.evaluated(step, metrics)

    def saved(self, step: int, path: Path) -> None:
        self._then.saved(step, path)

    def read(self) -> list[dict[str, Any]]:
        """Rows so far, without a line that a killed run left unfinished."""
        return storage.read_rows(self._path)

    def _append(self, row: Mapping[str, Any]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(storage.to_json(row) + "\n")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}; checkpoints so far are kept") from error


def load_model(path: str | Path, spoken: vocabulary.Vocabulary | None = None) -> Bound:
    """A model from a checkpoint, or from a bundle (its verifier).

    Raises:
      UserError: see `checkpoints.load`; or a decoder-only model, another vocabulary in the bundle or beside the
        checkpoint, or logits narrower than ours.
    """
    if checkpoints.detect(path) == "bundle":
        bundle = checkpoints.load_bundle(path)
        if spoken is not None:
            vocabulary.check_same(bundle.vocabulary, spoken, (f"bundle {path}", "training data"))
        bound = bundle.verifier
    else:
        with remote.local_copy(path) as local:
            opened = checkpoints.open_model(local)
            if spoken is not None and opened.vocabulary_file is not None:
                own = vocabulary.SentencePieceVocabulary(opened.vocabulary_file)
                vocabulary.check_same(own, spoken, (f"checkpoint {path}", "training data"))
            bound = opened.load()
    if not isinstance(bound.model, T5):
        raise UserError(f"{path} is a decoder-only model, which can be decoded with but not trained here: name a T5")
    if spoken is not None and bound.model.vocab_size < spoken.vocab_size:
        raise UserError(
            f"{path} has {bound.model.vocab_size} logits and the data {spoken.vocab_size} pieces: it was made for "
            "another vocabulary"
        )
    return bound


def _parameters(path: str | Path, model: T5Config, spoken: vocabulary.Vocabulary) -> Any:
    bound = load_model(path, spoken)
    flat_params.require_match(param_shapes(model), flat_params.flatten(bound.params), str(path))
    return bound.params


def _shared_corpus(task: str, split: str, exchange: Path) -> mixing.Source:
    """A task's examples: each of several hosts tokenises its shard of the input, and all hosts read all shards.

    So batches are the same arrays on every host, and contain every example once.
    """
    here = hosts.current()
    if here.count == 1:
        return _task_corpus(task, split, None)
    mine = _task_corpus(task, split, None, (here.index, here.count))
    folders = [exchange / f"{i:05d}-of-{here.count:05d}" for i in range(here.count)]
    shutil.rmtree(folders[here.index], ignore_errors=True)  # of a killed run
    examples = ((mine.inputs(i), mine.targets(i)) for i in range(len(mine)))
    shards.write(folders[here.index], examples, name=task, split=split, spoken=mine.vocabulary)
    here.wait("the task is tokenised")
    for folder in folders:
        here.see((folder / shards.MANIFEST).exists, folder)
    parts = [shards.read(folder) for folder in folders]
    here.wait("the task is read")
    if here.first:
        shutil.rmtree(exchange, ignore_errors=True)
    return mixing.Mixed([(part, len(part)) for part in parts])  # at these rates an epoch holds each example once


def _task_corpus(task: str, split: str, limit: int | None, shard: tuple[int, int] | None = None) -> shards.Corpus:
    from speccascade_t5x.data import seqio_tasks

    spoken = [seqio_tasks.as_vocabulary(found) for found in seqio_tasks.task_vocabularies(task).values()]
    vocabulary.check_same(spoken[0], spoken[-1], (f"inputs of task {task!r}", "targets"))
    return seqio_tasks.corpus(task, split, spoken[0], limit, shard)


def _check_vocabularies(model: T5Config, source: mixing.Source, held_out: shards.Corpus | None) -> None:
    if held_out is not None:
        vocabulary.check_same(source.vocabulary, held_out.vocabulary, ("training data", "evaluation data"))
    if model.vocab_size < source.vocabulary.vocab_size:
        raise UserError(
            f"the model has {model.vocab_size} logits and the data {source.vocabulary.vocab_size} pieces: set "
            "T5Config.vocab_size to that number or, rounded up, to a multiple of 128"
        )


def _summary(
    result: train_loop.TrainResult,
    batches: packing.Packed | packing.Bucketed,
    curves: Sequence[Mapping[str, Any]],
    devices: int,
) -> dict[str, Any]:
    evaluations = [row for row in curves if row["kind"] == "eval"]
    reports = [row for row in curves if row["kind"] == "train"]
    figures = lambda row: {name: value for name, value in row.items() if name != "kind"}  # noqa: E731
    return {
        "steps": result.step,
        "epochs": round(result.step / batches.steps_per_epoch, 3),
        "parameters": flat_params.count(result.bound.params),
        "padding_share": round(batches.padding_share, 4),
        "cut_share": round(batches.cut_share, 6),
        "last_report": figures(reports[-1]) if reports else {},
        "before": figures(evaluations[0]) if evaluations else {},
        "after": figures(evaluations[-1]) if evaluations else {},
        "resumed_from": result.resumed_from,
        "tokens": result.tokens,
        "tokens_per_s": round(result.tokens / result.train_s, 1) if result.train_s else 0.0,
        "train_s": round(result.train_s, 3),
        "compile_s": round(result.compile_s, 3),
        "device": f"{jax.devices()[0].device_kind} x {devices}",
        "machine": platform.platform(),
        "jax": jax.__version__,
    }


def _page(name: str, summary: Mapping[str, Any]) -> str:
    """A human-readable page."""
    figures = [(key, value) for key, value in summary.items() if not isinstance(value, dict)]
    lines = [
        f"# {text_table.escaped(name)}: {summary['steps']} steps",
        "",
        *text_table.markdown([("figure", "value"), *figures]),
    ]
    before, after = summary["before"], summary["after"]
    if after:
        header = ("evaluation", f"after step {before['step']}", f"after step {after['step']}")
        rows = [(key, f"{before.get(key, 0):.4f}", f"{after[key]:.4f}") for key in after if key != "step"]
        lines += ["", *text_table.markdown([header, *rows])]
    if summary["resumed_from"] is not None:
        lines += ["", "This run was resumed: tokens and times are those of its last part."]
    return "\n".join(lines) + "\n"
