"""Rules: each gives the target distribution pi from the drafter's distribution q and the verifier's distribution p.

A rule implements ONE method, `target(pair) -> pi`. How drafts are accepted and what replaces a rejected one
follow from pi alone (`core.verify`). Tests read the raw pair (temperature 1), while pi mixes the temperature-scaled
pair. Every test keeps the drafter iff >=.

To add a rule, write one class in `prefix`, `token` or `mixture`, `register` it, and add one oracle and one gin file.

Sources: [SC] Narasimhan et al., "Faster Cascades via Speculative Decoding" (ICLR 2025); [LEV] Leviathan et al.
2023; [LV] the lossy-verification audit (2607.26627).
"""

from speccascade_t5x.core.rules.base import (
    AlphaRule,
    Pair,
    PrefixRule,
    Rule,
    TokenRule,
    Verdict,
    by_name,
    describe_range,
    get,
    names,
    register,
)
from speccascade_t5x.core.rules.mixture import CoS, Lossless, LossySD, MinP
from speccascade_t5x.core.rules.prefix import BiLDFixed, Chow, ChowLog, Diff, DiffLog, Opt, OptLog
from speccascade_t5x.core.rules.token import BiLD, TokenV1, TokenV2, TokenV3, Typical

__all__ = [
    "AlphaRule",
    "BiLD",
    "BiLDFixed",
    "Chow",
    "ChowLog",
    "CoS",
    "Diff",
    "DiffLog",
    "Lossless",
    "LossySD",
    "MinP",
    "Opt",
    "OptLog",
    "Pair",
    "PrefixRule",
    "Rule",
    "TokenRule",
    "TokenV1",
    "TokenV2",
    "TokenV3",
    "Typical",
    "Verdict",
    "by_name",
    "describe_range",
    "get",
    "names",
    "register",
]
