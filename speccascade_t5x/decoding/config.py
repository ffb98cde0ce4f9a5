"""Options that are fixed per compiled program."""

from __future__ import annotations

import dataclasses

from speccascade_t5x.core import verify
from speccascade_t5x.interfaces import UserError


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Static decoding options: changing one compiles a new program.

    Attributes:
      max_len: most output tokens per row, EOS included.
      draft_len: G, tokens drafted per round; 0 is plain autoregression.
      eos_id: ends a row; kept in the output.
      pad_id: fills the output after the end.
      start_id: decoder start token, checked against the models'.
      vocab_size: ids at or above it are never emitted; None leaves all of the logits' width.
      verification: "token" or "block".
      stop_sequences: token sequences that end a row once its output holds one; they are kept.
      num_samples: outputs per input, side by side in the batch.
      trace: keep per-token diagnostics (`Output.trace`); the drafter is then scored at the bonus position too.
    """

    max_len: int
    draft_len: int = 5
    eos_id: int = 1
    pad_id: int = 0
    start_id: int = 0
    vocab_size: int | None = None
    verification: str = "token"
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    num_samples: int = 1
    trace: bool = False

    def __post_init__(self) -> None:
        if any(isinstance(s, (str, int)) for s in self.stop_sequences):
            raise UserError(f"stop_sequences={self.stop_sequences!r} must be sequences of token ids, one each")
        object.__setattr__(self, "stop_sequences", tuple(tuple(map(int, s)) for s in self.stop_sequences))
        for name, least in (("max_len", 1), ("draft_len", 0), ("num_samples", 1)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"{name}={value} is too small: it must be {least} or more")
        if self.verification not in verify.BY_NAME:
            options = " or ".join(map(repr, verify.BY_NAME))
            raise UserError(f"verification={self.verification!r} is unknown: use {options}")
        if any(not s for s in self.stop_sequences):
            raise UserError("a stop sequence is empty: every stop sequence needs at least one token")

    @property
    def room(self) -> int:
        """Cache slots per row: the start token, the output and one block beyond it."""
        return self.max_len + self.draft_len + 2
