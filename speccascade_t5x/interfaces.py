"""Names every layer shares: array aliases, the axis legend, constants and Protocols.

Axis letters, used in every einsum and shape comment of this package:

    B batch   T target positions   S encoder positions   G draft positions   V vocabulary
    D model   H heads   K head width   F mlp   L layers

Words: a *drafter* writes ahead, a *verifier* scores blocks, a *rule* turns their two distributions q and p
into the *target distribution* pi. `d` is the distribution a drafted token was really drawn from.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax

from speccascade_t5x import trees

Array = jax.Array
PyTree = Any

# The one mask value. Finite, so that a fully masked row gives a uniform softmax and never NaN;
# large enough that exp(NEG_INF - anything a float32 model produces) is exactly 0.
NEG_INF = -1e10

# Values of `source`: who wrote an output token.
SOURCE_PAD = 0
SOURCE_ACCEPTED = 1  # a drafted token the rule accepted
SOURCE_RESIDUAL = 2  # drawn from norm(max(0, pi - d)) after a rejection
SOURCE_BONUS = 3  # drawn from pi after a wholly accepted draft
SOURCE_VERIFIER = 4  # the verifier ran alone
SOURCE_DRAFTER = 5  # the drafter ran alone


class UserError(ValueError):
    """A mistake the user can mend. The message is one sentence that says how."""


class LanguageModel(Protocol):
    """A model that scores blocks of tokens at per-row positions. Holds no parameters itself.

    Implementations are frozen, hashable dataclasses marked with `jax.tree_util.register_static`: they are
    the static part of a `Bound`. Two attributes are optional, and compared between the models of a decode where they
    have them: `input_name`, the input that holds the prompt, and `start_id`, the token before the output.
    """

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits (padded tail included)."""

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Reads `inputs` once and returns the cache.

        Args:
          params: the model's parameters.
          inputs: named arrays with the same leading dimension, which divides `batch_size`.
          batch_size: rows to decode. n times the rows of `inputs` means n samples per row, side by side.
          room: cache slots per row, counted from where `first` lies; a model that caches a prompt adds the slots
            before that itself. The caller adds every draft length + 1 to the output length.

        Returns:
          A pytree whose every leaf has `batch_size` on axis 0.
        """

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        """Returns (tokens [rows], positions [rows]): what the first block of each row begins with."""

    def extend(
        self, params: PyTree, cache: PyTree, tokens: Array, positions: Array, capture: tuple[str, ...] = ()
    ) -> tuple[Array, PyTree]:
        """Scores a block.

        Args:
          params: the model's parameters.
          cache: what `start` or an earlier `extend` returned.
          tokens: [B, T] ids, any T >= 1.
          positions: [B] slot of the first token of each row. Slots positions[b]..+T-1 are OVERWRITTEN,
            so a rollback is a later call that starts lower. Later slots are never seen by earlier queries.
          capture: names of hidden states to return as well ("hidden": [B, T, D] before the output projection).

        Returns:
          (logits [B, T, V] of the NEXT token after each position, cache). With `capture`, logits is a
          pair (logits, {name: array}).
        """


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a drafter hands to the verifier for one round.

    Attributes:
      tokens: [B, G] drafted ids.
      lengths: [B] how many of them count in each row; the rest is padding.
      law: [B, G, V] d, the distribution each token was really drawn from.
      q: [B, G + 1, V] the drafter model's distribution after temperature, untruncated; None where the rule reads no
        drafter.
      q_raw: [B, G + 1, V] the same at temperature 1; None likewise.
      calls: [B] model calls this proposal cost each row, for the counters.
      level_calls: [B, N] the same of each of N models, from the largest; None if they are not counted separately.
      hidden: [B, G + 1, D] the drafter model's last hidden states at the positions of q; None where no rule reads them.
      broken: [B] bool, NaN went into a distribution behind the draft; None where `law` and `q` show it themselves.
    """

    tokens: Array
    lengths: Array
    law: Array
    q: Array | Any
    q_raw: Array | Any
    calls: Array
    level_calls: Array | None = None
    hidden: Array | None = None
    broken: Array | None = None


trees.register(Proposal)


@runtime_checkable
class Drafter(Protocol):
    """Who proposes. `noise_size` uniforms per row and round are handed to `propose`. A pytree.

    It may draft in any way, because the distribution of each token travels with the draft; only a q that a rule reads
    must be shaped as the verifier's p is, and `score_bonus`, `vocab_size` and `sampling` say whether it is.
    """

    sampling: Any  # core.probs.Sampling that shapes its distributions; traced

    @property
    def draft_len(self) -> int:
        """G, the most tokens it drafts."""

    @property
    def width(self) -> int:
        """V of the distributions it reports."""

    @property
    def noise_size(self) -> int:
        """Uniforms in [0, 1) this drafter consumes per row and round."""

    @property
    def vocab_size(self) -> int | None:
        """Ids at or above it are never drafted; None leaves all `width` of them."""

    @property
    def score_bonus(self) -> bool:
        """Whether q, a model's distribution, is reported at every drafted and bonus position.

        If not, rules that read it are rejected.
        """

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        """The language models it runs, from the largest; none where it only copies."""

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        """Reads `inputs` once and returns the drafter's state (batch on axis 0 of every leaf)."""

    def propose(
        self, params: PyTree, state: PyTree, tokens: Array, positions: Array, noise: Array
    ) -> tuple[Proposal, PyTree]:
        """Drafts after the last committed token.

        Args:
          params: the drafter's parameters.
          state: its state.
          tokens: [B, 2] the last two tokens of each row; where only the start token exists, it stands twice.
          positions: [B] position of the second of them.
          noise: [B, noise_size] uniforms.
        """

    def commit(self, state: PyTree, lengths: Array) -> PyTree:
        """Tells the drafter how many tokens [B] each row has committed after the round."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """A model and its parameters: the pair that can be passed around, jitted over and sharded.

    Attributes:
      model: a LanguageModel (static) or a Drafter (a pytree: its sampling options are leaves).
      params: its parameters; pytree leaves.
    """

    model: Any
    params: PyTree


trees.register(Bound)
