"""A pair and text to records: settings, methods, drafters, decoding, and the `infer` job."""

from speccascade_t5x.inference.generate import LoadedPair, from_checkpoints, load
from speccascade_t5x.inference.settings import Settings

__all__ = ["LoadedPair", "Settings", "from_checkpoints", "generate", "infer", "load", "t5x_model"]
