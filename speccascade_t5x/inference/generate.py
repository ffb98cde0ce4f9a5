"""Text in, records out: a loaded pair under one choice of method, rule and sampling."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x import checkpoints, decoding
from speccascade_t5x.checkpoints import Bundle, load_bundle
from speccascade_t5x.checkpoints.opened import Placing
from speccascade_t5x.common import checks
from speccascade_t5x.core import accounting, noise
from speccascade_t5x.data import batching
from speccascade_t5x.data.examples import Example, PromptForm
from speccascade_t5x.decoding.compiled import CompiledDecoder, CompiledQueue, shape_key
from speccascade_t5x.deferral.fitted import Fitted
from speccascade_t5x.distributed import hosts
from speccascade_t5x.distributed.partitioning import Partitioning, Topology
from speccascade_t5x.drafting import NGramTable
from speccascade_t5x.inference import datasets, methods, plan_files
from speccascade_t5x.inference.settings import Settings, make_settings
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary, stop_ids

_Kind = TypeVar("_Kind", CompiledDecoder, CompiledQueue)


@dataclasses.dataclass
class Timing:
    """Times in seconds.

    Attributes:
      compile_s: time of compiling; 0 if the shape was compiled before.
      decode_s: time of decoding, until the results are on the host.
      compiled_shapes: number of programs compiled.
    """

    compile_s: float = 0.0
    decode_s: float = 0.0
    compiled_shapes: int = 0


@dataclasses.dataclass(frozen=True)
class Generation:
    """Records in input order, with their cost.

    Attributes:
      records: dicts with inputs, prediction, log_prob, tokens, counts, source, and with settings.trace also trace;
        if num_samples > 1, all but inputs are lists of samples.
      timing: compile and decode time.
      totals: counters summed over all outputs.
    """

    records: list[dict[str, Any]]
    timing: Timing
    totals: dict[str, Any]

    @property
    def rates(self) -> dict[str, Any]:
        """Acceptance and calls per token, see `accounting.rates`."""
        return accounting.rates(self.totals)


class LoadedPair:
    """A drafter, a verifier and their vocabulary, ready to decode. Compiled programs are kept by shape.

    Args:
      bundle: the loaded bundle.
      smaller: further drafters for cascades, from the largest; each smaller than the bundle's own.
      partitioning: the mesh that decodes; None for one device. Parameters on other devices are moved to it.
    """

    def __init__(self, bundle: Bundle, smaller: Sequence[Bound] = (), partitioning: Partitioning | None = None):
        drafters = [*([] if bundle.drafter is None else [bundle.drafter]), *smaller]
        self.verifier: Bound = bundle.verifier
        if partitioning is not None:
            self.verifier = partitioning.put(self.verifier)
            drafters = [partitioning.put(bound, drafter=True) for bound in drafters]
        self.drafter: Bound | None = drafters[0] if drafters else None
        self.smaller = tuple(drafters[1:])
        self.partitioning = partitioning
        self.table: NGramTable | None = bundle.table
        self.deferral: Fitted | None = bundle.deferral
        self.vocabulary = bundle.vocabulary
        self.feature_lengths = dict(bundle.feature_lengths)
        self.decode_defaults = dict(bundle.decode)
        self.description = bundle.description
        self._compiled: dict[tuple, Any] = {}  # by kind and shapes
        self._numbered = 0  # number of texts numbered so far

    @property
    def drafters(self) -> list[Bound]:
        """Every drafter model, from the largest."""
        return [] if self.drafter is None else [self.drafter, *self.smaller]

    def generate(self, texts: Sequence[str], ids: Sequence[int] | None = None, **settings: Any) -> list[dict[str, Any]]:
        """Decodes texts; keyword arguments are the fields of `Settings`. Returns one record per text.

        A text's random noise follows from the seed and from its number. A pair continues its numbering from call to
        call, so texts that are passed one by one are sampled independently, and a second call with the same texts and
        seed samples anew. Give `ids` to choose the numbers: the same ids and seed give the same records, whatever was
        decoded before, and in whichever batch.

        Args:
          texts: the texts to decode.
          ids: the number of each text, 0 to 2**31 - 1; texts with the same number share their noise.
          **settings: fields of `Settings`.

        Raises:
          UserError: an unknown or unsupported option, or what `run` raises.
        """
        return self.run(texts, make_settings(**settings), ids).records

    def run(self, texts: Sequence[str], settings: Settings, ids: Sequence[int] | None = None) -> Generation:
        """Decodes texts and reports time and counters as well; `ids` are as for `generate`.

        Raises:
          UserError: a prompt that is too long, a rule or option out of range, a missing drafter, or invalid ids.
        """
        if isinstance(texts, str):
            raise UserError("texts must be a list of texts, not one text: put it in brackets")
        runner = Runner(self, settings)
        dataset = datasets.from_texts(runner.prompt_form, texts)
        runner.noise_ids = self._numbers(len(dataset.prompts), ids)
        found: dict[int, dict[str, Any]] = {}
        for batch in runner.batches(dataset.prompts):
            found.update(runner.decode(batch))
        records = [dataset.record(i, found[i]) for i in range(len(dataset.prompts))]
        return Generation(records, runner.timing, runner.totals)

    def _numbers(self, count: int, ids: Sequence[int] | None) -> np.ndarray:
        """[count] int32, the next numbers or the given ones."""
        most = np.iinfo(np.int32).max
        if ids is None:
            self._numbered += count
            return ((np.arange(count) + self._numbered - count) % (most + 1)).astype(np.int32)
        found = list(ids)
        if len(found) != count:
            raise UserError(f"there are {len(found)} ids for {count} texts: give one for each")
        for each in found:
            if isinstance(each, bool) or not isinstance(each, int | np.integer) or not 0 <= each <= most:
                raise UserError(f"the id {each!r} must be a whole number from 0 to 2**31 - 1")
        return np.array(found, np.int32)

    def compiled(self, program: decoding.Program, inputs: Any, kind: type[_Kind]) -> tuple[_Kind, float]:
        """The compiled decode for these shapes, and the seconds of compiling it (0 if it was compiled before)."""
        key = (kind, shape_key(program, inputs))
        if key in self._compiled:
            return self._compiled[key], 0.0
        self._compiled[key] = kind(program, inputs, self.partitioning)
        return self._compiled[key], self._compiled[key].seconds


def loaded(pair: LoadedPair | Callable[[], LoadedPair]) -> LoadedPair:
    """The pair itself, or the result of a function that loads it, which jobs call after all other checks."""
    return pair if isinstance(pair, LoadedPair) else pair()


class Runner:
    """One pair under one Settings: decodes batches, adds up counters and time.

    Attributes:
      settings: the settings, with draft_len="auto" replaced by the value of the plan.
      timing: times so far.
      totals: counters so far.
      noise_ids: [examples] int32, the number from which each example's noise follows; None takes its index.
    """

    def __init__(self, pair: LoadedPair, settings: Settings):
        settings = plan_files.follow(settings, plan_files.identity(pair)) if settings.draft_len == "auto" else settings
        self.pair, self.settings = pair, settings
        self.timing = Timing()
        self.totals: dict[str, Any] = {}
        self.noise_ids: np.ndarray | None = None
        self.program = _program(pair, settings)
        self.key = noise.from_seed(settings.seed)
        if pair.partitioning is not None:
            pair.partitioning.check_batch(settings.batch_size * settings.num_samples)

    @property
    def prompt_form(self) -> PromptForm:
        """How texts become prompts; without an EOS if the bundle's decode settings have `prompt_eos`: false."""
        max_len = self.settings.max_input_len or self.pair.feature_lengths["inputs"]
        eos = self.pair.decode_defaults.get("prompt_eos", True)
        return PromptForm(self.pair.vocabulary, max_len, eos, self.settings.truncate)

    def batches(self, prompts: Iterable[Example]) -> list[batching.Batch]:
        """Groups prompts into batches of few shapes."""
        return batching.make_batches(
            prompts,
            batch_size=self.settings.batch_size,
            feature_length=self.prompt_form.max_len,
            buckets=self.settings.buckets,
            pad_id=self.pair.vocabulary.pad_id,
        )

    def decode(self, batch: batching.Batch) -> dict[int, dict[str, Any]]:
        """Decodes one batch. Returns {example index: prediction, log_prob, tokens, counts, source, maybe trace}.

        Raises:
          UserError: a model produced NaN.
        """
        compiled = self.compiled(batch, CompiledDecoder)
        begin = time.perf_counter()
        output = jax.device_get(compiled.finish(compiled.run(self.program, self.start(compiled, batch))))
        self.timing.decode_s += time.perf_counter() - begin
        places = np.flatnonzero(batch.valid).tolist()
        return {int(batch.example_ids[place]): self.record(output, place, batch.example_ids[place]) for place in places}

    def compiled(self, batch: batching.Batch, kind: type[_Kind]) -> _Kind:
        """The decoder for batches of this shape; compiling it is counted in `timing`."""
        compiled, seconds = self.pair.compiled(self.program, self._inputs(batch), kind)
        self.timing.compile_s += seconds
        self.timing.compiled_shapes += seconds > 0
        return compiled

    def start(self, compiled: CompiledDecoder | CompiledQueue, batch: batching.Batch) -> decoding.State:
        """The state of a batch before its first round."""
        ids = batch.example_ids if self.noise_ids is None else self.noise_ids[batch.example_ids]
        return compiled.start(self.program, self._inputs(batch), self.key, jnp.asarray(ids))

    def record(self, output: decoding.Output, place: int, index: int) -> dict[str, Any]:
        """The record of one input: prediction, log_prob, tokens, counts, source, maybe trace.

        Args:
          output: the output of the batch, on the host.
          place: index of the input in its batch.
          index: index of the example.

        Raises:
          UserError: a model produced NaN.
        """
        samples = self.settings.num_samples
        each = [self._record(output, place * samples + s, int(index)) for s in range(samples)]
        return each[0] if samples == 1 else {name: [one[name] for one in each] for name in each[0]}

    def _inputs(self, batch: batching.Batch) -> Any:
        return self.pair.verifier.model.inputs(jnp.asarray(batch.encoder_input_tokens))

    def _record(self, output: decoding.Output, row: int, index: int) -> dict[str, Any]:
        log_prob = float(output.log_probs[row])
        if math.isnan(log_prob):
            raise UserError(
                f"a model produced NaN while decoding example {index}: check its checkpoint, or decode in float32"
            )
        length = int(output.lengths[row])
        tokens = output.tokens[row, :length].tolist()
        counts = output.counts.row(row)
        self.totals = accounting.total([self.totals, counts])
        record = {
            "prediction": self.pair.vocabulary.decode(tokens),
            "log_prob": log_prob,
            "tokens": tokens,
            "counts": counts,
            "source": output.source[row, :length].tolist(),
        }
        if output.trace is not None:
            columns = {field.name: getattr(output.trace, field.name) for field in dataclasses.fields(output.trace)}
            record["trace"] = {
                name: [None if math.isnan(x) else x for x in column[row, :length].tolist()]
                for name, column in columns.items()
            }
        return record


@checks.arguments()
def load(path: str | Path, topology: Topology | None = None) -> LoadedPair:
    """Loads a bundle (see `checkpoints.save_bundle`) for decoding.

    Args:
      path: a bundle's folder, or the name of a packaged bundle.
      topology: the mesh that decodes; every parameter is read directly into its sharding. None takes one device.

    Raises:
      UserError: no bundle is there, or it is damaged (the message names the file), or the machine does not have the
        devices of the mesh.
    """
    if topology is None:
        return LoadedPair(load_bundle(path))
    mesh = hosts.partitioning(topology)
    placing: dict[str, Placing] = {"verifier": mesh.placement}
    placing["drafter"] = functools.partial(mesh.placement, drafter=True)
    return LoadedPair(load_bundle(path, placing=placing), partitioning=mesh)


@checks.arguments(extra_ids=(0,), max_input_len=(1,), max_len=(1,), draft_len=(0,))
def from_checkpoints(
    *,
    verifier: str | Path,
    drafter: str | Path | None = None,
    smaller: Sequence[str | Path] = (),
    vocabulary: str | Path = "bytes",
    extra_ids: int | None = None,
    max_input_len: int,
    max_len: int,
    draft_len: int = 5,
    prompt_eos: bool = True,
    allow_drivers: Sequence[str] = (),
    topology: Topology | None = None,
) -> LoadedPair:
    """A pair from two checkpoint folders of any kind `checkpoints.load` reads.

    Args:
      verifier: checkpoint of the verifier.
      drafter: checkpoint of the drafter; None to run the verifier alone.
      smaller: checkpoints of further drafters for cascades, from the largest.
      vocabulary: "bytes", or the path of a SentencePiece model.
      extra_ids: number of sentinels after the ordinary pieces; None gives 125 for bytes and 0 for SentencePiece.
      max_input_len: maximum length of a prompt in tokens, EOS included.
      max_len: maximum length of an output in tokens, EOS included.
      draft_len: number of tokens drafted per round unless Settings set another.
      prompt_eos: end every text with EOS; False for decoder-only models that continue their prompts.
      allow_drivers: see `checkpoints.load`.
      topology: the mesh that decodes, see `load`.

    Raises:
      UserError: a checkpoint that is missing or damaged, or logits narrower than the vocabulary; no such mesh.
    """
    pieces: Vocabulary
    if vocabulary == "bytes":
        pieces = ByteVocabulary(125 if extra_ids is None else extra_ids)
    else:
        pieces = SentencePieceVocabulary(vocabulary, extra_ids or 0)
    if smaller and drafter is None:
        raise UserError("smaller names drafters below the drafter, but no drafter is given: name one")
    named = {"verifier": verifier} | ({} if drafter is None else {"drafter": drafter})
    named |= {f"smaller drafter {i}": path for i, path in enumerate(smaller)}
    mesh = None if topology is None else hosts.partitioning(topology)
    models = {}
    for name, path in named.items():
        placing = None if mesh is None else functools.partial(mesh.placement, drafter=name != "verifier")
        models[name] = bound = checkpoints.load(path, placing=placing, allow_drivers=allow_drivers)
        if bound.model.vocab_size < pieces.vocab_size:
            raise UserError(
                f"the {name} has {bound.model.vocab_size} logits but the vocabulary {pieces.vocab_size} pieces: "
                "give the vocabulary it was trained with"
            )
    lengths = {"inputs": max_input_len, "targets": max_len}
    defaults = {"draft_len": draft_len, "start_id": models["verifier"].model.start_id, "prompt_eos": prompt_eos}
    return LoadedPair(
        checkpoints.Bundle(Path(verifier), models["verifier"], models.get("drafter"), pieces, lengths, defaults, ""),
        smaller=[models[f"smaller drafter {i}"] for i in range(len(smaller))],
        partitioning=mesh,
    )


def program_config(pair: LoadedPair, settings: Settings) -> decoding.DecodeConfig:
    """The static options of these settings, except the draft length."""
    defaults, vocabulary = pair.decode_defaults, pair.vocabulary
    return decoding.DecodeConfig(
        max_len=settings.max_len or pair.feature_lengths["targets"],
        eos_id=vocabulary.eos_id,
        pad_id=vocabulary.pad_id,
        start_id=defaults["start_id"],
        vocab_size=vocabulary.vocab_size,
        verification=settings.verification,
        stop_sequences=stop_ids(vocabulary, settings.stop_sequences),
        num_samples=settings.num_samples,
        trace=settings.trace,
    )


def _program(pair: LoadedPair, settings: Settings) -> decoding.Program:
    """The Program of these settings."""
    default = pair.decode_defaults["draft_len"]
    config = program_config(pair, settings)
    return methods.program(settings, pair.verifier, pair.drafters, config, default, pair.table, pair.deferral)
