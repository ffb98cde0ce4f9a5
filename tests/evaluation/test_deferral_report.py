"""The table of deferral rules: a star is corrected for how many comparisons it is one of."""

from __future__ import annotations

import numpy as np

from speccascade_t5x.deferral.objective import Positions
from speccascade_t5x.evaluation import deferral_report
from speccascade_t5x.evaluation.deferral_report import LEARNED, PLUG_IN


def table(seed: int, better: float = 0.0) -> tuple[list[str], int]:
    """(lines of the table, differences whose own interval leaves 0 out) of seven rules that are noise.

    Every rule is one score with noise of its own, so none is better than plug-in OPT but the learned one, by `better`
    of the true gap.
    """
    rng, examples, tokens = np.random.default_rng(seed), 120, 10
    n = examples * tokens
    gap = rng.choice([-1.0, 0.0, 1.0], size=n, p=[0.1, 0.75, 0.15])
    loss_p = rng.integers(0, 2, size=n) * (gap == 0)
    positions = Positions(
        np.maximum(gap, 0) + loss_p, np.maximum(-gap, 0) + loss_p, rng.random(n), np.repeat(np.arange(examples), tokens)
    )
    noise = lambda: rng.normal(size=n)  # noqa: E731
    scores = {PLUG_IN: noise(), **{f"rule {i}": noise() for i in range(4)}, LEARNED: better * gap + noise()}
    alphas = np.linspace(-1.0, 1.0, 10)
    found = deferral_report.curves(scores, positions, alphas, draws=400)
    alone = sum(each.above() or each.below() for name in scores for each in found[name].against)
    kept = {name: curve for name, curve in found.items() if name in scores}
    lines = deferral_report.objective_table({"curves": kept, "alphas": alphas.tolist()})
    return lines, alone


def stars(lines: list[str]) -> int:
    return sum(line.count("*") for line in lines if line.startswith("| ") and "alpha" not in line)


def test_chance_is_not_starred():
    starred = alone = 0
    for seed in range(12):
        lines, found = table(seed)
        assert "corrected for the 50 comparisons of the table (Holm)" in lines[0]
        starred, alone = starred + (stars(lines) > 0), alone + (found > 0)
    assert alone >= 6 and starred <= 1  # each by itself, most tables had some


def test_a_real_difference_is():
    lines, _ = table(0, better=5.0)
    assert stars(lines) >= 5
