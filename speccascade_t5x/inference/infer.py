"""The `infer` job: decodes a seqio task, or lines of text, and writes records, metrics, timing and a summary."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speccascade_t5x.common import checks, fingerprints, storage, text_table
from speccascade_t5x.core import accounting
from speccascade_t5x.data import batching
from speccascade_t5x.distributed import hosts
from speccascade_t5x.distributed.hosts import Preempted
from speccascade_t5x.inference import datasets, measuring, methods, records
from speccascade_t5x.inference import refill as refilling
from speccascade_t5x.inference.generate import LoadedPair, Runner, Settings, loaded
from speccascade_t5x.interfaces import UserError

# Called after each batch: (examples in the batch, examples in total, rates so far).
Progress = Callable[[int, int, Mapping[str, float]], None]
_Decoded = Mapping[int, dict[str, Any]]  # example index -> record


@dataclasses.dataclass(frozen=True)
class InferResult:
    """The result of an `infer` job.

    Attributes:
      records: the records, in input order.
      predictions: path of the records; None without an output folder.
      metrics: the task's metrics and the rates of the decode.
      timing: the content of `<task>-timing.json`.
    """

    records: list[dict[str, Any]]
    predictions: Path | None
    metrics: dict[str, float]
    timing: dict[str, Any]


@checks.arguments(limit=(1,), batches_per_chunk=(1,), host_patience_s=(0.0,))
def infer(
    pair: LoadedPair | Callable[[], LoadedPair],
    settings: Settings,
    output_dir: str | Path | None = None,
    task: str | None = None,
    split: str = "test",
    input: str | None = None,
    limit: int | None = None,
    batches_per_chunk: int = 8,
    config_text: str = "",
    progress: Progress | None = None,
    refill: bool = False,
    stop: Callable[[], bool] = lambda: False,
    host_patience_s: float = hosts.PATIENCE_S,
) -> InferResult:
    """Decodes a task's split or an input file. After a kill, the same call continues at the first missing chunk.

    On several hosts each decodes whole chunks, into a folder that all of them see, and host 0 joins them. The batches
    are those of a single host, and so are the records, byte for byte, if the meshes are the same.

    Args:
      pair: the pair, or a function that loads it, called after all other checks.
      settings: how to decode.
      output_dir: folder of the files, see `inference.records`; None (for an input file only) writes none.
      task: a registered seqio task; its vocabulary must be the pair's.
      split: split of the task.
      input: text file, `.jsonl` file or "-", instead of a task.
      limit: number of examples to decode, from the first.
      batches_per_chunk: how many batches are stored at once, and so can be lost by a kill.
      config_text: the resolved configuration; records made with another one are never mixed in.
      progress: called after each batch, or with `refill` after each segment.
      refill: put new examples in the rows of finished ones instead of waiting for a batch's slowest row; the records
        are the same, see `inference.refill`.
      stop: called after each batch or segment; once it returns True (on any host), the current chunk is discarded.
      host_patience_s: how long hosts wait for each other, see `distributed.hosts`.

    Raises:
      UserError: neither or both of task and input; bad data, options or models; a full disk.
      Preempted: `stop` returned True before everything was decoded.
      hosts.HostLost: another host died or hangs.

    Returns:
      The result; on all hosts but the first, only its path is set.
    """
    here = dataclasses.replace(hosts.current(), patience_s=host_patience_s)
    if here.count > 1 and (output_dir is None or input == "-"):
        raise UserError("several hosts decode a task or a file, into an output folder that all share: name both")
    datasets.check_source(task, split, input)
    if task is not None and output_dir is None:
        raise UserError("decoding a task needs an output folder: set OUTPUT_DIR, or give --output_dir")
    methods.check(settings)
    pair = loaded(pair)
    runner = Runner(pair, settings)  # rejects what this pair cannot do before any data is read
    dataset = datasets.read(runner.prompt_form, task, split, input, limit)
    batches = runner.batches(dataset.prompts)
    written = [int(i) for batch in batches for i in batch.example_ids[batch.valid]]
    order = np.argsort(written).tolist()
    if output_dir is None:
        found: dict[int, dict[str, Any]] = {}
        for decoded in _decoded(runner, dataset, batches, refill, progress):
            found.update(decoded)
            if stop() and len(found) < len(order):
                raise Preempted("told to stop; no output folder was named, so nothing is kept")
        in_order = [found[index] for index in sorted(found)]
        metrics = _metrics(dataset, settings, in_order)
        timing = _timing(runner, False, [{"leads": True, **_spent(runner)}])
        return InferResult(in_order, None, metrics, timing | _standardised(runner, metrics))
    chunks = [batches[i : i + batches_per_chunk] for i in range(0, len(batches), batches_per_chunk)]
    made_with = {"settings": runner.settings, "data": dataset.identity(), "pair": pair_identity(pair)}
    if pair.partitioning is not None:  # results are the same on every mesh, except for the rounding of sums
        made_with["mesh"] = pair.partitioning.described()
    identity = f"{config_text}\n" + "".join(f"# {name}: {value}\n" for name, value in made_with.items())
    team = hosts.team(pair.partitioning, here)
    with storage.one_writer(output_dir, dataset.name, here.first):
        writer, done = _open(here, output_dir, dataset.name, identity, len(chunks))
        mine = {i: chunks[i] for i in team.mine([i for i in range(len(chunks)) if i not in done])}
        if progress and done:
            held = sum(int(batch.valid.sum()) for i in done for batch in chunks[i])
            progress(held, len(dataset.prompts), {})
        coming = _decoded(runner, dataset, [batch for chunk in mine.values() for batch in chunk], refill, progress)
        whole = _store(writer if team.leads else None, mine, coming, hosts.StopInDecoding(team, stop))
        ended = here.gather("all is decoded", {"whole": whole, "leads": team.leads, **_spent(runner)})
        if not all(host["whole"] for host in ended):
            kept = len(writer.done_chunks())
            raise Preempted(f"told to stop; {kept} of {len(chunks)} chunks are kept: the same command continues")
        if not here.first:
            here.wait("the records are whole")
            return InferResult([], writer.path, {}, {})
        here.see(lambda: len(writer.done_chunks()) == len(chunks), "some chunk")
        path = writer.finish(order)
        in_order = list(writer.read_all())
        failure = None
        try:
            metrics = _metrics(dataset, settings, in_order)
        except UserError as error:  # an error of the task's own code: everything else is written before it is raised
            failure, metrics = error, _metrics(dataclasses.replace(dataset, score=None), settings, in_order)
        writer.write_metrics(metrics)
        timed = path.parent / f"{storage.file_stem(dataset.name)}-timing.json"
        if len(done) == len(chunks) and timed.is_file():  # nothing was left to decode, so there is no new timing
            timing = storage.from_json(timed.read_text("utf-8"))
        else:
            timing = _timing(runner, bool(done), ended) | _standardised(runner, metrics)
            writer.write_timing(timing)
        writer.write_summary(_summary(dataset, settings, metrics, timing))
        here.wait("the records are whole")
        if failure is not None:
            raise UserError(f"{failure}; the predictions are kept in {path}") from failure
        return InferResult(in_order, path, metrics, timing)


def _open(
    here: hosts.Hosts, folder: str | Path, name: str, identity: str, chunks: int
) -> tuple[records.RecordWriter, set[int]]:
    """The writer of the records, and the list of existing chunks, the same on all hosts."""
    folder = Path(folder)
    if not here.first:
        done = here.share("chunks that are there")  # host 0 has made the folder
        claimed = records.claim(folder, name)
        here.see(claimed.exists, claimed)
        return records.RecordWriter(folder, name, identity, chunks), set(done)
    writer = records.RecordWriter(folder, name, identity, chunks)
    return writer, set(here.share("chunks that are there", writer.done_chunks()))


def _decoded(
    runner: Runner, dataset: datasets.Dataset, batches: list[batching.Batch], refill: bool, progress: Progress | None
) -> Iterator[_Decoded]:
    """Yields the records of some batches as they are finished."""
    for decoded in refilling.decode(runner, batches) if refill else map(runner.decode, batches):
        found = {index: dataset.record(index, fields) for index, fields in decoded.items()}
        if progress:
            progress(len(found), len(dataset.prompts), accounting.rates(runner.totals))
        yield found


def _store(
    writer: records.RecordWriter | None,
    chunks: Mapping[int, list[batching.Batch]],
    decoded: Iterable[_Decoded],
    stop: Callable[[], bool],
) -> bool:
    """Writes each chunk when its last record is there, in the order of its batches; None leaves that to another host.

    Returns:
      False if `stop` returned True while chunks were missing; the records of these are discarded.
    """
    rows = {i: [int(index) for b in chunk for index in b.example_ids[b.valid]] for i, chunk in chunks.items()}
    chunk_of = {index: i for i, chunk in rows.items() for index in chunk}
    found: dict[int, dict[int, dict[str, Any]]] = {i: {} for i in rows}
    for some in decoded:
        for index, record in some.items():
            found[chunk_of[index]][index] = record
        for i in sorted({chunk_of[index] for index in some}):
            if len(found[i]) == len(rows[i]):
                in_chunk = found.pop(i)
                if writer is not None:
                    writer.write_chunk(i, [in_chunk[index] for index in rows[i]])
        if found and stop():
            return False
    return True


def pair_identity(pair: LoadedPair) -> str:
    """A short text that differs if the models or their vocabulary differ."""
    models = (pair.verifier, pair.drafter, *pair.smaller)
    learned = None if pair.deferral is None else (pair.deferral.heads, pair.deferral.calibrations)
    drafted_with = models + tuple(part for part in (pair.table, learned) if part is not None)
    kinds = [bound and bound.model for bound in models]
    text = repr((pair.vocabulary.fingerprint(), fingerprints.of_tree(drafted_with), kinds))
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _metrics(dataset: datasets.Dataset, settings: Settings, in_order: list[dict[str, Any]]) -> dict[str, float]:
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


def _spent(runner: Runner) -> dict[str, Any]:
    """Times and counts of this host."""
    return {**dataclasses.asdict(runner.timing), "tokens": runner.totals.get("committed", 0)}


def _timing(runner: Runner, resumed: bool, ended: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Times of the run; of several hosts, the longest times and the tokens of all. `ended` holds `_spent` of each."""
    longest = {name: max(host[name] for host in ended) for name in ("compile_s", "decode_s", "compiled_shapes")}
    seconds, tokens = longest["decode_s"], sum(host["tokens"] for host in ended if host["leads"])
    device, mesh = jax.devices()[0], runner.pair.partitioning
    teams = sum(host["leads"] for host in ended)
    return {
        "compile_s": round(longest["compile_s"], 3),
        "decode_s": round(seconds, 3),
        "compiled_shapes": longest["compiled_shapes"],
        "tokens_decoded": tokens,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else 0.0,
        "resumed": resumed,
        "device": f"{device.device_kind} x {teams * (mesh.mesh.size if mesh else 1)}",
        **({"mesh": mesh.described()} if mesh else {}),
        **({"hosts": len(ended)} if len(ended) > 1 else {}),
        "machine": platform.platform(),
        "jax": jax.__version__,
    }


def _standardised(runner: Runner, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Standardised walltime improvement of a cascade, in both published cost conventions; empty for other runs.

    A count of calls over all records, not a time: see `accounting.standardised_improvement`. `by_parameters` charges a
    drafter its parameters over the verifier's, `by_step` its measured step time over the verifier's.
    """
    if "level_calls_per_token" not in metrics:
        return {}
    pair = runner.pair
    models = pair.drafters[: len(metrics["level_calls_per_token"])]
    per_token = {
        "committed": 1.0,
        "verifier_calls": metrics["verifier_calls_per_token"],
        "level_calls": metrics["level_calls_per_token"],
    }
    improvement = {
        name: round(accounting.standardised_improvement(per_token, costs), 3)
        for name, costs in measuring.published_costs(pair.verifier, models).items()
    }
    return {"standardised_walltime_improvement": improvement}


def _summary(
    dataset: datasets.Dataset, settings: Settings, metrics: Mapping[str, Any], timing: Mapping[str, Any]
) -> str:
    """A human-readable page."""
    how = settings.method
    if settings.method == "speculative":
        how = f"speculative, rule {settings.rule}" + ("" if settings.alpha is None else f", alpha {settings.alpha:g}")
    title = text_table.escaped(f"{dataset.name}: {how}, temperature {settings.temperature:g}")
    standardised = timing.get("standardised_walltime_improvement", {})
    shown = {name: value for name, value in timing.items() if value is not standardised}
    shown |= {f"standardised walltime improvement, {name}": value for name, value in standardised.items()}
    rows = [*((records.shown(name), records.shown(value)) for name, value in metrics.items()), *shown.items()]
    lines = [f"# {title}", "", *text_table.markdown([("figure", "value"), *rows])]
    if standardised:
        lines += ["", "The standardised walltime improvement counts calls; decode_s and tokens_per_s are real time."]
    if timing["resumed"]:
        lines += ["", "This run was resumed: the times are those of its last part."]
    return "\n".join(lines) + "\n"
