"""Tokens/s of a pair on a slice, predicted from published bandwidths: when speculation pays, and when it stops.

A block of T tokens for each of B rows takes, on every chip,

    sum over (weights, attention, distributions) of max(bytes / HBM bandwidth, FLOPs / peak) + collectives

where *weights* are the decoder's kernels, read once per block whatever B and T are, *attention* the caches, whose every
slot is read, and *distributions* the vocabulary-wide arrays of logits and probabilities (`laws` in the code). Parts run
one after another, so their times add up; inside a part the slower of memory and arithmetic counts (their sum on a CPU,
whose cores do one after the other): the roofline of Williams et al. 2009 (CACM 52(4)), applied to decoding as in Pope
et al. 2022 ("Efficiently Scaling Transformer Inference", section 3). Collectives are rings over one axis of the torus,
and both directions are used. Nothing is fitted. What no published figure covers (launches, waiting, serial parts of a
program) is left out, so real rates are lower, and ratios are more accurate than rates.

A round = G drafter steps + a verifier block of G + 1; tokens of a round follow from acceptance (`planning.cost_model`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from jax.sharding import AbstractMesh

from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.distributed.partitioning import AXES, STANDARD_RULES, Partitioning, Rules
from speccascade_t5x.models import T5, T5Config, param_shapes
from speccascade_t5x.planning.cost_model import round_law, tokens_per_round
from speccascade_t5x.tpu.hardware import Chip

# How often the bytes of a distribution cross memory at every scored position: logits are written, read twice by a
# softmax and written as a distribution, which the draw or the verification reads twice.
LAW_PASSES = 6
# Seconds of one hop between neighbouring chips: "about 1 us" (Austin et al. 2025, "How to Scale Your Model").
HOP = 1e-6
_FLOAT32 = 4
# Whatever the activations are: distributions are float32, and so are the biases of attention.
_ALWAYS_FLOAT32 = ("logits_dense/kernel", "token_embedder/embedding", "rel_embedding")
# Read by the encoder's program only, once per input.
_NOT_IN_A_STEP = ("encoder_decoder_attention/key/", "encoder_decoder_attention/value/")


@dataclasses.dataclass(frozen=True)
class Place:
    """The slice and mesh on which a pair decodes.

    Attributes:
      chip: capabilities of each device.
      data: number of groups, which share the rows.
      model: number of chips of a group, which share the weights.
      rules: logical axis rules of the verifier.
      drafter_rules: logical axis rules of the drafter.
    """

    chip: Chip
    data: int = 1
    model: int = 1
    rules: Rules = STANDARD_RULES
    drafter_rules: Rules = STANDARD_RULES

    @property
    def partitioning(self) -> Partitioning:
        """The mesh without devices."""
        mesh = AbstractMesh((self.data, self.model), AXES)
        return Partitioning(mesh, self.rules, self.drafter_rules)


@dataclasses.dataclass(frozen=True)
class Load:
    """The load of one decoding step of a model on a chip.

    Attributes:
      weight_bytes: bytes of the kernels that a step reads, in the width in which they are read.
      weight_count: number of their values.
      resident_bytes: bytes of all parameters (float32) and of the copy in the activations' width that a decode keeps.
      heads: number of heads on this chip.
      reductions: all-reduces of [rows, T, D] per step.
      gathers_laws: whether logits are split over the group.
    """

    weight_bytes: int
    weight_count: int
    resident_bytes: int
    heads: int
    reductions: int
    gathers_laws: bool


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one block, by its parts."""

    weights: float
    attention: float
    laws: float
    network: float

    @property
    def total(self) -> float:
        """One after another."""
        return self.weights + self.attention + self.laws + self.network


@functools.lru_cache(maxsize=64)
def load(config: T5Config, place: Place, drafter: bool = False) -> Load:
    """The load of a step of a model on each chip.

    Args:
      config: architecture.
      place: slice and mesh.
      drafter: whether the drafters' rules hold.
    """
    flat = _per_chip(config, place, drafter)
    step = {name: size for name, size in flat.items() if _in_step(name, config)}
    width = config.activation_dtype.itemsize
    widths = {name: _FLOAT32 if name.endswith(_ALWAYS_FLOAT32) else width for name in step}
    nbytes = sum(size * widths[name] for name, size in step.items())
    copies = sum(size * width for name, size in step.items() if widths[name] < _FLOAT32)
    rules = dict(reversed(place.drafter_rules if drafter else place.rules))
    splits = {
        name: place.model > 1 and rules.get(name) == "model" and size % place.model == 0
        for name, size in (("joined_kv", config.num_heads), ("mlp", config.mlp_dim), ("vocab", config.vocab_size))
    }
    per_layer = 2 * splits["joined_kv"] + splits["mlp"]
    return Load(
        weight_bytes=nbytes,
        weight_count=sum(step.values()),
        resident_bytes=_FLOAT32 * sum(flat.values()) + copies,
        heads=config.num_heads // (place.model if splits["joined_kv"] else 1),
        reductions=config.num_decoder_layers * per_layer + splits["vocab"],
        gathers_laws=splits["vocab"],
    )


def _per_chip(config: T5Config, place: Place, drafter: bool) -> dict[str, int]:
    """Name -> values of each parameter on one chip."""
    found = flat_params.flatten(param_shapes(config))
    where = flat_params.flatten(place.partitioning.params(T5(config), drafter))
    return {name: math.prod(where[name].shard_shape(leaf.shape)) for name, leaf in found.items()}


def _in_step(name: str, config: T5Config) -> bool:
    if name.startswith("decoder/"):
        return not any(part in name for part in _NOT_IN_A_STEP)
    return config.logits_via_embedding and name.startswith("token_embedder/")


def block_times(
    config: T5Config, place: Place, rows: int, block: int, slots: int, input_len: int, drafter: bool = False
) -> Times:
    """Seconds to score a block.

    Args:
      config: architecture.
      place: slice and mesh.
      rows: B, of the whole slice.
      block: T, tokens of each row.
      slots: of the decoder's cache, all of which attention reads.
      input_len: S, encoder positions that cross-attention reads.
      drafter: whether the drafters' rules hold.
    """
    chip, asked, width = place.chip, load(config, place, drafter), config.activation_dtype.itemsize
    own = math.ceil(rows / place.data)  # rows of this chip
    tokens = own * block
    cached = config.num_decoder_layers * asked.heads * config.head_dim * (slots + input_len)  # keys, and as many values
    law_bytes = _FLOAT32 * tokens * config.vocab_size
    slower = max if chip.overlaps else lambda reading, arithmetic: reading + arithmetic
    memory, arithmetic = 1.0 / chip.hbm_bandwidth, 1.0 / chip.flops
    network = asked.reductions * all_reduce(width * tokens * config.emb_dim, place)
    network += all_gather(law_bytes, place) if asked.gathers_laws else 0.0
    return Times(
        weights=slower(_reading(asked, chip, tokens), 2 * asked.weight_count * tokens * arithmetic),
        attention=slower(2 * width * own * cached * memory, 4 * tokens * cached * arithmetic),
        laws=LAW_PASSES * law_bytes / (chip.law_bandwidth or chip.hbm_bandwidth),
        network=network,
    )


def _reading(asked: Load, chip: Chip, tokens: int) -> float:
    """Seconds to read the weights for a product of so many rows."""
    several = tokens > 1 and chip.block_bandwidth
    return asked.weight_bytes / (several or chip.hbm_bandwidth)


def all_gather(nbytes: int, place: Place) -> float:
    """Seconds to gather an array of `nbytes` that is split over a group: a ring in both directions."""
    group = place.model
    if group == 1:
        return 0.0
    return (group - 1) / group * nbytes / (2 * place.chip.link_bandwidth) + group // 2 * HOP


def all_reduce(nbytes: int, place: Place) -> float:
    """Seconds to sum arrays of `nbytes` over a group: a reduce-scatter, then an all-gather."""
    return 2 * all_gather(nbytes, place)


@dataclasses.dataclass(frozen=True)
class Predicted:
    """One choice of batch and draft length.

    Attributes:
      batch: rows.
      draft_len: G; 0 is the verifier alone.
      tokens_per_round: of each row.
      seconds: of a round.
      tokens_per_s: of the slice.
      gain: over the verifier alone at the same batch; above 1 speculation pays.
      break_even: acceptance rate (the same at every position) above which it would pay off; None if none is enough.
      memory_bytes: on each chip: parameters, their copies, caches, distributions.
      fits: whether that is less than the memory of the chip.
      bound: "memory", "arithmetic" or "network": the largest part of the verifier's block.
    """

    batch: int
    draft_len: int
    tokens_per_round: float
    seconds: float
    tokens_per_s: float
    gain: float
    break_even: float | None
    memory_bytes: int
    fits: bool
    bound: str


@dataclasses.dataclass(frozen=True)
class Decode:
    """What is decoded.

    Attributes:
      drafter: architecture.
      verifier: architecture.
      input_len: encoder positions.
      max_len: output tokens.
      reads: whether the rule reads the drafter's distribution, which costs one more drafter step per round.
      overhead_s: of a round beside the models, where it is known.
    """

    drafter: T5Config
    verifier: T5Config
    input_len: int
    max_len: int
    reads: bool = False
    overhead_s: float = 0.0

    def slots(self, draft_len: int) -> int:
        """Cache slots per row, as `DecodeConfig.room` counts them."""
        return self.max_len + draft_len + 2


def round_seconds(decode: Decode, place: Place, batch: int, draft_len: int) -> float:
    """Seconds of a round: the draft, then the verifier's block.

    A draft begins with a block of two tokens, to catch up; if the rule reads the drafter's distribution, it begins with
    one token and takes one more step at its end.
    """
    slots = decode.slots(draft_len)
    block = block_times(decode.verifier, place, batch, draft_len + 1, slots, decode.input_len).total
    if draft_len == 0:
        alone = drafter_step(decode, place, batch, 1, slots) if decode.reads else 0.0
        return block + alone + decode.overhead_s
    first, steps = (1, draft_len) if decode.reads else (2, draft_len - 1)
    drafting = drafter_step(decode, place, batch, first, slots) + steps * drafter_step(decode, place, batch, 1, slots)
    return block + drafting + decode.overhead_s


def drafter_step(decode: Decode, place: Place, batch: int, block: int, slots: int) -> float:
    """Seconds of a drafter's block."""
    return block_times(decode.drafter, place, batch, block, slots, decode.input_len, drafter=True).total


def memory_bytes(decode: Decode, place: Place, batch: int, draft_len: int) -> int:
    """Bytes on each chip: parameters, the copies a decode reads, caches, three distributions per scored position."""
    own = math.ceil(batch / place.data)
    total = 3 * _FLOAT32 * own * (draft_len + 1) * decode.verifier.vocab_size
    for config, drafter in ((decode.drafter, True), (decode.verifier, False)):
        asked = load(config, place, drafter)
        positions = decode.slots(draft_len) + decode.input_len
        width = config.activation_dtype.itemsize
        total += asked.resident_bytes
        total += 2 * width * own * config.num_decoder_layers * asked.heads * config.head_dim * positions
    return total


def predict(
    decode: Decode,
    place: Place,
    tokens: dict[int, float],
    batches: Sequence[int],
) -> list[Predicted]:
    """Every batch with every draft length, and with none.

    Args:
      decode: what is decoded.
      place: slice and mesh.
      tokens: draft length -> tokens of a round, see `expected_tokens`.
      batches: rows.
    """
    return [_one(decode, place, batch, length, tokens) for batch in batches for length in (0, *sorted(tokens))]


def _one(decode: Decode, place: Place, batch: int, draft_len: int, tokens: dict[int, float]) -> Predicted:
    alone = round_seconds(decode, place, batch, 0)
    seconds = alone if draft_len == 0 else round_seconds(decode, place, batch, draft_len)
    per_round = tokens[draft_len] if draft_len else 1.0
    needed = memory_bytes(decode, place, batch, draft_len)
    return Predicted(
        batch=batch,
        draft_len=draft_len,
        tokens_per_round=per_round,
        seconds=seconds,
        tokens_per_s=batch * per_round / seconds,
        gain=per_round * alone / seconds,
        break_even=break_even(seconds / alone, draft_len) if draft_len else None,
        memory_bytes=needed,
        fits=needed <= place.chip.hbm_bytes,
        bound=_bound(decode, place, batch, draft_len),
    )


def _bound(decode: Decode, place: Place, batch: int, draft_len: int) -> str:
    """The largest part of the verifier's block."""
    slots = decode.slots(draft_len)
    times = block_times(decode.verifier, place, batch, draft_len + 1, slots, decode.input_len)
    tokens = math.ceil(batch / place.data) * (draft_len + 1)
    reading = _reading(load(decode.verifier, place), place.chip, tokens)
    arithmetic = times.weights if times.weights > reading else 0.0
    spent = {"arithmetic": arithmetic, "network": times.network}
    spent["memory"] = times.total - arithmetic - times.network
    return max(spent, key=lambda name: spent[name])


def expected_tokens(curve: Sequence[float], draft_lens: Sequence[int]) -> dict[int, float]:
    """Draft length -> tokens of a round, of outputs without end.

    Args:
      curve: acceptance at each draft position given that all before it stand; the last holds for all later ones.
      draft_lens: of interest.
    """
    return {length: tokens_per_round(round_law(curve, length)) for length in draft_lens}


def break_even(cost: float, draft_len: int) -> float | None:
    """The acceptance rate, the same at every position, at which a round of `cost` verifier steps adds `cost` tokens.

    None if even a draft that is always accepted adds fewer; 0 if the residual token alone is enough.
    """
    if cost > draft_len + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_round(round_law([middle], draft_len)) < cost else (low, middle)
    return high if cost > 1.0 else 0.0


def stops_paying(predicted: Sequence[Predicted]) -> int | None:
    """The smallest batch from which on no draft length gains any more; None if the largest batch still gains."""
    pays: dict[int, bool] = {}
    for each in predicted:
        if each.draft_len and each.fits:
            pays[each.batch] = pays.get(each.batch, False) or each.gain > 1.0
    stopped = None
    for batch in sorted(pays, reverse=True):
        if pays[batch]:
            break
        stopped = batch
    return stopped
