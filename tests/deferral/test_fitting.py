"""Fits on columns made up so that the answer is known; resume, early stopping, and data nothing can be learnt from."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from speccascade_t5x.deferral import FeatureSpec, HeadConfig, fitting
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.runtime.deferral_store import OrbaxStore

SPEC = FeatureSpec(top=2)
CONFIG = HeadConfig(features=SPEC, loss="log", width=16, layers=1)
FIT = fitting.FitConfig(steps=60, batch_size=64, eval_every=20, learning_rate=0.02, patience=50)


def columns(rows: int, seed: int) -> dict[str, np.ndarray]:
    """The expected gap is 0.3 + 0.5 max_q, which only one feature tells."""
    rng = np.random.default_rng(seed)
    features = rng.uniform(0, 1, (rows, len(SPEC.names))).astype(np.float32)
    features[:, SPEC.names.index("agree")] = 0
    gap = 0.3 + 0.5 * features[:, SPEC.names.index("max_q")] + rng.normal(0, 0.2, rows)
    return {
        "features": features,
        "tokens": np.zeros(rows, np.int32),
        "log_q": np.full(rows, -1.0, np.float32) - gap.astype(np.float32),
        "log_p": np.full(rows, -1.0, np.float32),
        "hit_q": np.zeros(rows, np.float32),
        "hit_p": np.ones(rows, np.float32),
        "distance": rng.uniform(0, 1, rows).astype(np.float32),
    }


FITTING, HELD_OUT = columns(2000, 0), columns(300, 1)


def gap_of(found: fitting.Fit) -> np.ndarray:
    return fitting.scores(found.head, HELD_OUT)


def test_squared_error_finds_the_gap():
    (found,) = fitting.fit_head(CONFIG, FIT, FITTING, HELD_OUT)
    wanted = 0.3 + 0.5 * HELD_OUT["features"][:, SPEC.names.index("max_q")]
    assert np.abs(gap_of(found) - wanted).mean() < 0.08
    assert found.held_out < 0.06 and found.head.config.objective == "squared"  # 0.04 is the noise


@pytest.mark.parametrize("objective", ["surrogate", "co_llm"])
def test_other_objectives_defer_where_it_pays(objective):
    fit = dataclasses.replace(FIT, objective=objective, alphas=(0.5,))
    (found,) = fitting.fit_head(CONFIG, fit, FITTING, HELD_OUT)
    start = found.history[0]["fit"] if found.history else None
    assert start is not None and found.held_out < start
    score = gap_of(found)
    if objective == "co_llm":
        assert (score > 0).mean() > 0.95  # the verifier is likelier right everywhere
    else:
        wanted = 0.3 + 0.5 * HELD_OUT["features"][:, SPEC.names.index("max_q")] > 0.5 * HELD_OUT["distance"]
        assert ((score > 0.5 * HELD_OUT["distance"]) == wanted).mean() > 0.75


def test_a_killed_fit_goes_on_with_the_same_bits(tmp_path):
    whole = fitting.fit_head(CONFIG, FIT, FITTING, HELD_OUT)[0]
    store = lambda seed: OrbaxStore(tmp_path / f"seed-{seed}", {"what": "test"}, 2)  # noqa: E731

    class Killed(fitting.Observer):
        def looked(self, seed, step, metrics):
            if step == 40:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitting.fit_head(CONFIG, FIT, FITTING, HELD_OUT, store=store, observer=Killed())
    resumed = fitting.fit_head(CONFIG, FIT, FITTING, HELD_OUT, store=store)[0]
    assert resumed.history[0]["step"] == 60 and len(resumed.history) == 1
    for one, other in zip(*(jax.tree.leaves(x.head.variables) for x in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(one, other)
    other = lambda seed: OrbaxStore(tmp_path / f"seed-{seed}", {"what": "another"}, 2)  # noqa: E731
    with pytest.raises(UserError, match="belongs to another run"):
        fitting.fit_head(CONFIG, FIT, FITTING, HELD_OUT, store=other)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    store = lambda seed: OrbaxStore(tmp_path / f"seed-{seed}", {}, 2)  # noqa: E731
    fitting.fit_head(CONFIG, dataclasses.replace(FIT, steps=20), FITTING, HELD_OUT, store=store)
    wild = dataclasses.replace(FIT, learning_rate=1e30)
    with pytest.raises(UserError, match=r"became NaN or infinite by step 40; the checkpoint of step 20 is kept"):
        fitting.fit_head(CONFIG, wild, FITTING, HELD_OUT, store=store)
    assert store(0).latest() == 20


def test_patience_ends_a_fit_and_seeds_are_ranked():
    fit = dataclasses.replace(FIT, steps=400, patience=1, eval_every=10, learning_rate=0.05, seeds=(0, 1))
    found = fitting.fit_head(CONFIG, fit, FITTING, HELD_OUT)
    assert all(each.stopped_early and each.steps < 400 for each in found)
    assert found[0].held_out <= found[1].held_out
    for each in found:
        assert each.held_out == pytest.approx(min(row["held_out"] for row in each.history))


def test_data_nothing_can_be_learnt_from():
    def refused(match, fitting_columns=FITTING, held_out=HELD_OUT, config=CONFIG, fit=FIT):
        with pytest.raises(UserError, match=match):
            fitting.fit_head(config, fit, fitting_columns, held_out)

    empty = {name: column[:0] for name, column in FITTING.items()}
    refused("the fitting split holds no position", empty)
    refused("the held-out split holds no position", held_out=empty)
    refused("every label of the fitting split is the same", config=dataclasses.replace(CONFIG, loss="zero_one"))
    refused("NaN or infinite log_q", {**FITTING, "log_q": np.full(2000, np.nan, np.float32)})
    refused("objective='likelihood' does not fit a prefix head", fit=dataclasses.replace(FIT, objective="likelihood"))
    with pytest.raises(UserError, match="objective='best' is unknown"):
        fitting.FitConfig(objective="best")
