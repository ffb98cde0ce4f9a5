"""Language models in Flax and jax.numpy. They know nothing of drafting or rules."""

from speccascade_t5x.models.decoder_only import DecoderOnly, DecoderOnlyConfig, DecoderOnlyModule
from speccascade_t5x.models.parameters import init_params, logical_axes, param_shapes
from speccascade_t5x.models.t5 import T5, T5Config, T5Module
from speccascade_t5x.models.table import NGramModel, TableModel, bigram, ngram_model

__all__ = [
    "T5",
    "DecoderOnly",
    "DecoderOnlyConfig",
    "DecoderOnlyModule",
    "NGramModel",
    "T5Config",
    "T5Module",
    "TableModel",
    "bigram",
    "init_params",
    "logical_axes",
    "ngram_model",
    "param_shapes",
]
