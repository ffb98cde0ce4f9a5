"""What is concluded from probes: acceptance with lenience, corrections' kinds, copies timed at every place."""

from __future__ import annotations

import numpy as np
import pytest

from speccascade_t5x import drafting
from speccascade_t5x.data import batching
from speccascade_t5x.drafting import k_matrix
from speccascade_t5x.inference import measuring
from speccascade_t5x.planning import probing
from speccascade_t5x.planning.cost_model import Acceptance, CascadeModel

CURVE = (0.9, 0.8, 0.7)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("between", [0.0, 0.35, 0.8])
@pytest.mark.parametrize("copies", [True, False])
def test_acceptance_is_read_off_the_calls(copies, between, reads):
    """A decode that took as many reviews as the model expects at an acceptance is taken to have had it."""
    length, models = probing.PROBE_LEN, 1 if copies else 2
    k = ((length, 0), (0, length))
    expected = CascadeModel(k_matrix(k, models, copies), Acceptance({(0, 1): CURVE, (1, 2): (between,)})).expected()
    counted = [1000 * (expected.calls[0] + reads), *(1000 * calls for calls in expected.calls[1:])]
    run = measuring.Run(1.0, 1000, {"rounds": 1000, "level_calls": counted}, CURVE, ())
    probe = probing._Cascade(k, models, copies, 2.0, reads, run)
    assert probing._acceptance_by_calls(probe) == pytest.approx(between, abs=1e-4)


@pytest.mark.parametrize("models", [1, 2, 3])
def test_the_calibrating_cascades_are_unlike_and_of_both_kinds(models):
    found = [k_matrix(k, models, True) for k in probing.calibration_matrices(models)]
    kinds = [probing.kind_of("cascade", plan.rows) for plan in found]
    assert kinds == ["vertical cascade", "mixed cascade"]
    assert found[0].rows[-1] != found[1].rows[-1]  # short copies and long ones, so that both costs can be told
    assert probing.kind_of("cascade", found[1].rows, 2.0) == "mixed cascade, lenient"
    assert probing.kind_of("model") == "model"


def test_copies_are_timed_in_every_row():
    copier = drafting.max_gram(4, 9, drafting.build_table([[5, 6, 7]], 9))
    batch = batching.Batch(np.array([[5, 6, 7, 0], [7, 5, 6, 7]], np.int32), np.arange(2), np.ones(2, bool), 4)
    times = measuring.copy_times(copier, batch, [[5, 6, 7], []], samples=1, room=6, sizes=(1, 3))
    assert set(times) == {1, 3} and all(time > 0 for time in times.values())
