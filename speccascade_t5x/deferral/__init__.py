"""Learned deferral, for models that are not calibrated well enough for the plug-in rules.

The plug-in rules read max q, max p or entropies as if they were expected losses. Here a small head estimates the loss
gap g(x_<t) = E_P[loss(v, q)] - E_P[loss(v, p)] itself, from teacher-forced data, and the rule defers iff
g_hat > alpha D_TV(p, q). Calibration baselines (temperature, vector scaling, isotonic) change what a plug-in rule
READS; the distributions that are sampled do not change.

Importing this package registers the rules `learned_gap`, `learned_token` and `calibrated_opt`.

Sources: Narasimhan et al., "Faster Cascades via Speculative Decoding" (the objective); Jitkrittum et al. 2023
(2307.02764, learned deferral targets); Shen et al. 2024 (2403.03870, Co-LLM); Guo et al. 2017 (1706.04599,
calibration).
"""

from speccascade_t5x.deferral.calibration import Calibration, PairCalibration
from speccascade_t5x.deferral.features import FeatureSpec
from speccascade_t5x.deferral.head import Head, HeadConfig
from speccascade_t5x.deferral.rules import RULES, CalibratedOpt, LearnedGap, LearnedToken

__all__ = [
    "RULES",
    "CalibratedOpt",
    "Calibration",
    "FeatureSpec",
    "Head",
    "HeadConfig",
    "LearnedGap",
    "LearnedToken",
    "PairCalibration",
]
