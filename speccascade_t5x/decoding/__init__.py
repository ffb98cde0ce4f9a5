"""Decoding: one on-device loop for every method."""

from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.decoding.api import (
    autoregressive,
    autoregressive_program,
    decode,
    finish,
    refill,
    run,
    speculative,
    speculative_program,
    start,
)
from speccascade_t5x.decoding.config import DecodeConfig
from speccascade_t5x.decoding.state import Output, Program, State

__all__ = [
    "DecodeConfig",
    "Output",
    "Program",
    "Sampling",
    "State",
    "autoregressive",
    "autoregressive_program",
    "decode",
    "finish",
    "refill",
    "run",
    "speculative",
    "speculative_program",
    "start",
]
