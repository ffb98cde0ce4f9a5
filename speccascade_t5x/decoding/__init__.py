"""Decoding: one on-device loop for every method."""

from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.decoding.api import (
    autoregressive,
    decode,
    finish,
    refill,
    run,
    run_queue,
    sequence_cascade,
    speculative,
    start,
    token_cascade,
)
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.decoding.programs import (
    autoregressive_program,
    sequence_cascade_program,
    speculative_program,
    token_cascade_program,
)
from speccascade_t5x.decoding.state import Output, Program, State, Trace

__all__ = [
    "DecodeConfig",
    "Output",
    "Program",
    "Sampling",
    "State",
    "Trace",
    "autoregressive",
    "autoregressive_program",
    "decode",
    "finish",
    "refill",
    "run",
    "run_queue",
    "sequence_cascade",
    "sequence_cascade_program",
    "speculative",
    "speculative_program",
    "start",
    "token_cascade",
    "token_cascade_program",
]
