"""Drafters: each proposes tokens and reports the distribution they were drawn from."""

from speccascade_t5x.core.ngram import NGramTable, build_table
from speccascade_t5x.drafting.build import cascade
from speccascade_t5x.drafting.cascade import CascadeDrafter
from speccascade_t5x.drafting.k_matrix import KMatrix, k_matrix
from speccascade_t5x.drafting.max_gram import MaxGram, max_gram, prompt_lookup
from speccascade_t5x.drafting.model import ModelDrafter
from speccascade_t5x.drafting.stop import Confidence, Deferral, DraftStop, Entropy

__all__ = [
    "CascadeDrafter",
    "Confidence",
    "Deferral",
    "DraftStop",
    "Entropy",
    "KMatrix",
    "MaxGram",
    "ModelDrafter",
    "NGramTable",
    "build_table",
    "cascade",
    "k_matrix",
    "max_gram",
    "prompt_lookup",
]
