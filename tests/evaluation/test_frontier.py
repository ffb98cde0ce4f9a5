"""Answers worked out by hand: the table, the hull, the area, the words, and the points a user picks from."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evaluation.synthetic import group, point
from speccascade_t5x.evaluation import frontier, notes, operating_points
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.interfaces import UserError

# (choose, report) each: chosen by the first, shown with the second.
SLOW = point("token_v3", 0.1, (81, 80.5), (0.9, 0.8))
FAST = point("token_v3", 0.5, (80, 79), (0.5, 0.6))
POOR = point("token_v3", 0.9, (70, 75), (0.3, 0.3))
TARDY = point("token_v3", 0.05, (90, 95), (1.2, 0.7))


def test_the_table_is_chosen_on_one_half_and_shown_on_the_other():
    (answer,) = frontier.answers(group(TARDY, SLOW, FAST, POOR))
    assert answer.at_quality.point.alpha == 0.5  # the fastest of those at 80 or better
    assert answer.at_quality.speed_up.value == pytest.approx(1 / 0.6)
    assert answer.at_quality.gain.value == pytest.approx(-1)  # what the other half says of it
    assert answer.at_latency.point.alpha == 0.1  # 0.05 is better and, there, faster; but it was not known to be
    assert answer.at_latency.quality.value == pytest.approx(80.5)


def test_a_tolerance_lets_in_what_is_a_little_worse():
    (answer,) = frontier.answers(group(FAST, POOR), tolerance=10.0)
    assert answer.at_quality.point.alpha == 0.9


def test_where_nothing_fits_there_is_no_answer():
    (answer,) = frontier.answers(group(point("opt", 0.0, (70, 90), (1.5, 0.5))))
    assert answer.at_quality is None and answer.at_latency is None
    assert frontier.answers(group(point("opt", 0.0, (70, 90), None))) == []  # it was not timed


def test_the_hull_leaves_out_what_a_mixture_beats():
    below = point("opt", 0.1, (64, 64), (0.4, 0.4))  # under the line from (0.2, 60) to (0.5, 80)
    found = group(FAST, below, TARDY)
    assert [p.arm for p in frontier.pareto(found.points, CHOOSE)] == ["drafter", "opt", "token_v3", "token_v3"]
    assert [p.alpha for p in frontier.hull(found.points, CHOOSE)] == [None, 0.5, 0.05]


def test_the_area_is_the_mean_quality_over_budgets():
    # Corners on the half that is reported: (0.2, 60), (0.6, 79); on the other the verifier was no better than FAST.
    found = frontier.area(group(FAST), [FAST])
    assert found.value == pytest.approx((0.4 * 69.5 + 0.4 * 79.0) / 0.8)
    assert found.low == pytest.approx(found.value) == pytest.approx(found.high)  # no noise went in
    alone = frontier.area(group(), [])
    assert alone.value == pytest.approx(70, abs=1e-6)


def test_no_area_where_the_drafter_is_no_faster():
    slow = group(FAST)
    points = [p for p in slow.points if p.arm != "drafter"] + [point("drafter", None, (60, 60), (1.1, 1.1))]
    assert frontier.area(type(slow)(slow.condition, tuple(points)), [FAST]) is None


@pytest.mark.parametrize(
    ("cascade", "truncated", "said"),
    [
        ((85, 0.5), (85.0, 0.5), "ARTEFACT: truncation explains the gain"),
        ((85, 0.5), (90.0, 0.5), "ARTEFACT"),
        ((85, 0.5), (82.0, 0.5), "Truncation does not explain all of it: the difference from MinP is above 0."),
        ((85, 0.5), (79.9, 0.5), "above 0, and truncation alone shows none"),
        ((80.1, 3.0), (80, 0.5), "No gain is shown"),
        ((75, 0.5), (80, 0.5), "A loss, not a gain"),
    ],
)
def test_a_gain_is_called_an_artefact_where_min_p_shows_it_too(cascade, truncated, said):
    ours = point("token_v3", 0.3, (cascade[0],) * 2, (0.5, 0.5), spread=cascade[1])
    fair = point("min_p", 0.3, (truncated[0],) * 2, (0.9, 0.9), spread=truncated[1])
    (text,) = notes.truncation(group(ours, fair), "exact_match")
    assert said in text and text.startswith("token_v3 at alpha 0.3: exact_match ")
    assert "MinP" in text


def test_a_missing_baseline_is_named():
    (text,) = notes.truncation(group(FAST), "exact_match")
    assert "MinP was not measured at this alpha" in text


@pytest.fixture
def written(tmp_path):
    operating_points.write(tmp_path, [group(SLOW, FAST, POOR)], "exact_match", "a pair")
    return tmp_path


def test_a_budget_or_a_floor_chooses_a_point(written):
    choose = lambda **limits: operating_points.choose(written, **limits)["name"]  # noqa: E731
    assert choose(latency_budget=1.0) == "token_v3_a0.1"
    assert choose(latency_budget=0.7) == "token_v3_a0.5"
    assert choose(latency_budget=0.25) == "drafter"
    assert choose(quality_floor=74.0) == "token_v3_a0.9"
    assert choose(quality_floor=79.5) == "token_v3_a0.1"
    assert choose() == "token_v3_a0.1"  # the fastest at the verifier's quality
    assert choose(wanted={"temperature": 1.0, "draft_len": 5}, quality_floor=79.0) == "token_v3_a0.5"


def test_every_operating_point_names_its_cells(written):
    points = json.loads((written / operating_points.FILE).read_text("utf-8"))["points"]
    assert [p["cells"] for p in points if p["name"] == "token_v3_a0.5"] == [["token_v3_a0.5_s0"]]
    latencies = [p["latency"] for p in points]
    assert latencies == sorted(latencies)
    assert {p["name"] for p in points if p["frontier"]} == {
        p.name for p in frontier.hull(group(SLOW, FAST, POOR).points, CHOOSE)
    }


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"latency_budget": 0.1}, "no operating point stays within latency_budget=0.1: the fastest takes 0.2 of"),
        ({"quality_floor": 99.0}, "no operating point reaches quality_floor=99: the best has exact_match 80.5"),
        ({"quality_floor": 1.0, "latency_budget": 1.0}, "a latency budget or a quality floor, not both"),
        ({"wanted": {"temperature": 0.0}}, "has no point under temperature=0.0: it has temperature 1, top-p 1"),
    ],
)
def test_limits_nothing_meets(written, limits, message):
    with pytest.raises(UserError, match=message):
        operating_points.choose(written, **limits)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UserError, match="there are no operating points"):
        operating_points.read(tmp_path)
    (tmp_path / operating_points.FILE).write_text("{}")
    with pytest.raises(UserError, match="holds no operating points"):
        operating_points.read(tmp_path)


def test_intervals_are_paired_between_points():
    noisy = [point("opt", alpha, (80 + alpha, 80 + alpha), (0.5, 0.5), spread=20.0) for alpha in (0.0, 1.0)]
    difference = noisy[1].quality[REPORT] - noisy[0].quality[REPORT]
    assert difference.low == pytest.approx(1.0) and difference.high == pytest.approx(1.0)
    assert np.ptp(noisy[0].quality[REPORT].draws) > 5
