"""What several tests of the core share: golden cases, alphas worth testing, random logits."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

GOLDEN_FILE = Path(__file__).resolve().parents[1] / "fixtures" / "golden_rules.json"

# Names and residuals as the golden file spells them.
GOLDEN_NAMES = {"bild_fixed": "bild", "lossy_sd": "lossy"}
GOLDEN_RESIDUALS = {"shifted": "one", "optimal": "mentored"}
# Rules the golden file does not hold; the oracle alone covers them.
ORACLE_ONLY = ("bild",)
# Rules that need more than a pair of laws; they are tested where they live.
NOT_A_TABLE_RULE = ("learned_gap", "learned_token", "calibrated_opt")

# Alphas that keep some tokens or prefixes and defer others, and both ends where they are exact.
ALPHAS = {
    "lossless": (None,),
    "chow": (0.0, 0.3, 0.55, 0.9),
    "chow_log": (0.2, 0.8, 1.1, 1.4),
    "diff": (-1.0, -0.2, 0.03, 0.4, 1.0),
    "diff_log": (-0.5, 0.0, 0.13, 0.4),
    "opt": (-3.0, -0.5, 0.0, 0.3, 2.0),
    "opt_log": (-1.0, 0.0, 0.25, 4.0),
    "bild_fixed": (0.3, 0.9, 3.0),
    "bild": (0.3, 1.2, 3.0),
    "token_v1": (-1.0, 0.0, 0.25, 0.6),
    "token_v2": (-1.0, 0.0, 0.25, 0.6),
    "token_v3": (-0.1, 0.0, 0.45, 0.9, 1.0),
    "lossy_sd": (0.0, 0.2, 0.45, 0.6),
    "cos": (0.0, 0.35, 1.0),
    "typical": (0.05, 0.35, 0.8),
    "min_p": (0.1, 0.55, 0.9, 1.0),
}


def variants(names) -> list[tuple[str, dict]]:
    """(name, options) of every table rule among `names`; LossySD once per residual."""
    found = []
    for name in names:
        if name == "lossy_sd":
            found += [(name, {"residual": residual}) for residual in GOLDEN_RESIDUALS]
        elif name not in NOT_A_TABLE_RULE:
            found.append((name, {}))
    return found


def variant_id(variant) -> str:
    name, options = variant
    return "-".join([name, *options.values()])


@functools.cache
def golden_cases() -> list[dict]:
    """All golden cases."""
    return json.loads(GOLDEN_FILE.read_text())["cases"]


def golden(name: str, options: dict) -> list[dict]:
    """The golden cases of one rule variant."""
    wanted = GOLDEN_RESIDUALS.get(options.get("residual"))
    rule = GOLDEN_NAMES.get(name, name)
    return [case for case in golden_cases() if case["rule"] == rule and case.get("residual_kind") == wanted]


def random_logits(seed: int, rows: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated drafter and verifier logits, [rows, vocab] float32."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0.0, 1.4, (rows, vocab))
    drafter = shared + rng.normal(0.0, 0.9, (rows, vocab))
    verifier = 1.2 * shared + rng.normal(0.0, 0.9, (rows, vocab))
    return drafter.astype(np.float32), verifier.astype(np.float32)
