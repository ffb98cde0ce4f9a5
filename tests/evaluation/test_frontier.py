"""Answers worked out by hand: the table, the hull, the area, the words, and the points a user picks from."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from evaluation.synthetic import group, point
from speccascade_t5x.evaluation import frontier, notes, operating_points
from speccascade_t5x.evaluation.analysis import Group
from speccascade_t5x.evaluation.grid import Condition
from speccascade_t5x.evaluation.scoring import CHOOSE, REPORT
from speccascade_t5x.evaluation.statistics import Bootstrap
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


def test_a_bad_choice_counts_in_the_area():
    # Chosen as a corner by one half; on the other worse than the drafter, which nobody could know.
    unlucky = point("opt", 0.1, (75, 50), (0.5, 0.5))
    found = frontier.area(group(unlucky), [unlucky])
    assert found.value == pytest.approx((0.3 * 55 + 0.5 * 65) / 0.8)


def test_what_to_run_is_what_infer_chooses(written):
    fastest, best = frontier.overall(group(SLOW, FAST, POOR))
    assert fastest.point.name == operating_points.choose(written)["name"] == "token_v3_a0.5"
    assert best.point.name == operating_points.choose(written, latency_budget=1.0)["name"] == "token_v3_a0.1"
    said = notes.advice(group(SLOW, FAST, POOR), 0.0, "exact_match")
    assert "token_v3 0.5. On the other half its speed-up is 1.67" in said[0] and "less the verifier's -1.00" in said[0]
    assert "token_v3 0.1" in said[1] and said[1].endswith("--operating_point=FOLDER --latency_budget=1")
    alone = notes.advice(group(POOR), 0.0, "exact_match")
    assert all(text.startswith("Of all timed points the verifier alone is the ") for text in alone)


def test_a_tolerance_holds_for_infer_as_well(tmp_path):
    operating_points.write(tmp_path, [group(SLOW, FAST, POOR)], "exact_match", "a pair", tolerance=10.0)
    assert operating_points.choose(tmp_path)["name"] == "token_v3_a0.9"


def test_no_area_where_the_drafter_is_no_faster():
    slow = group(FAST)
    points = [p for p in slow.points if p.arm != "drafter"] + [point("drafter", None, (60, 60), (1.1, 1.1))]
    assert frontier.area(type(slow)(slow.condition, tuple(points)), [FAST]) is None


@pytest.mark.parametrize(
    ("cascade", "truncated", "said"),
    [
        ((85, 0.5), (85.0, 0.5), "ARTEFACT: truncation explains the gain"),
        ((85, 0.5), (90.0, 0.5), "ARTEFACT"),
        ((85, 0.5), (82.0, 0.5), "Truncation does not explain all of the gain: the difference from MinP is above 0."),
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


def test_few_items_decide_nothing():
    few = {half: Bootstrap(7, draws=200).mean(np.arange(7.0) + 80) for half in (CHOOSE, REPORT)}
    ours, fair = (dataclasses.replace(point(arm, 0.3, (85, 85), None), quality=few) for arm in ("token_v3", "min_p"))
    (text,) = notes.truncation(group(ours, fair), "exact_match")
    assert text.endswith("Undecided: there are too few items for an interval.") and "[" not in text


def test_chance_is_called_rounding_where_nothing_is_sampled():
    same = point("lossless", None, (80, 80), (0.5, 0.5))
    (drawn,) = notes.chance(group(same), "exact_match")
    (greedy,) = notes.chance(Group(Condition(5, 0.0, 1.0), group(same).points), "exact_match")
    assert "sampling noise" in drawn and "sampling" not in greedy and "At temperature 0" in greedy


def test_an_interval_has_the_digits_it_needs():
    small = point("opt", 0.1, (0, -0.0345), (1, 1), spread=0.004).quality[REPORT]
    assert notes.interval(small).startswith("-0.03 [-0.0")
    assert notes.interval(small, None).startswith("-0.0345 [-0.03")
    assert notes.interval(point("opt", 0.1, (80, 80), (1, 1), spread=9).quality[REPORT], None).startswith("80.00 [")


def test_a_missing_baseline_is_named():
    (text,) = notes.truncation(group(FAST), "exact_match")
    assert "MinP was not measured at this alpha" in text


@pytest.fixture
def written(tmp_path):
    operating_points.write(tmp_path, [group(SLOW, FAST, POOR)], "exact_match", "a pair")
    return tmp_path


def test_a_budget_or_a_floor_chooses_a_point(written):
    # By the half that the table of answers is chosen on; the figures that are shown come from the other.
    choose = lambda **limits: operating_points.choose(written, **limits)["name"]  # noqa: E731
    assert choose(latency_budget=1.0) == "token_v3_a0.1"
    assert choose(latency_budget=0.55) == "token_v3_a0.5"  # 0.6 on the other half
    assert choose(latency_budget=0.25) == "drafter"
    assert choose(quality_floor=70.0) == "token_v3_a0.9"
    assert choose(quality_floor=74.0) == "token_v3_a0.5"  # 0.9 has 75 on the other half, and 70 here
    assert choose() == "token_v3_a0.5"  # the fastest at the verifier's quality
    assert choose(wanted={"temperature": 1.0, "draft_len": 5}, quality_floor=81.0) == "token_v3_a0.1"
    assert operating_points.choose(written)["quality"]["value"] == pytest.approx(79)


def conditioned(condition: Condition, latency: float) -> Group:
    """Both models alone, a method that drafts what the condition says, and one that drafts nothing."""
    sampling = {"temperature": condition.temperature, "top_p": condition.top_p}
    told = f"_t{condition.temperature:g}_p{condition.top_p:g}"
    free = [*group().points, point("oracle", 0.1, (81, 81), (latency, latency))]
    opt = point("opt", 0.1, (81, 81), (latency + 0.01, latency + 0.01))
    opt = dataclasses.replace(opt, name=f"opt_g{condition.draft_len}{told}")
    own = {opt.name: {"rule": "opt", "alpha": 0.1, "draft_len": condition.draft_len}}
    named = [dataclasses.replace(p, name=f"{p.arm}{told}") if p is not opt else p for p in (*free, opt)]
    plain = {"verifier": {"method": "verifier"}, "drafter": {"method": "drafter"}, "oracle": {"method": "oracle"}}
    settings = [own.get(p.name, plain.get(p.arm)) | sampling for p in named]
    rows = [dataclasses.replace(p, row={**p.row, "settings": s}) for p, s in zip(named, settings, strict=True)]
    return Group(condition, tuple(rows))


def test_flags_choose_among_conditions_and_leave_the_others_at_the_main_one(tmp_path):
    # The further from the main condition, the faster: what mixes conditions up takes one of these.
    conditions = [((5, 1.0, 1.0), 0.9), ((3, 1.0, 1.0), 0.9), ((5, 0.0, 1.0), 0.5), ((5, 1.0, 0.1), 0.4)]
    groups = [conditioned(Condition(*condition), latency) for condition, latency in conditions]
    operating_points.write(tmp_path, groups, "exact_match", "a pair")
    choose = lambda **wanted: operating_points.choose(tmp_path, quality_floor=81.0, wanted=wanted)["name"]  # noqa: E731
    assert choose() == choose(temperature=1.0) == choose(top_p=1.0) == choose(draft_len=5) == "oracle_t1_p1"
    assert choose(draft_len=3) == "oracle_t1_p1"  # it drafts nothing, so it belongs here as well
    assert (choose(temperature=0.0), choose(top_p=0.1)) == ("oracle_t0_p1", "oracle_t1_p0.1")
    with pytest.raises(UserError, match=r"no point under draft_len=3, top_p=0\.1: it has .*top-p 1, draft_len 3"):
        choose(draft_len=3, top_p=0.1)


def test_a_file_of_an_earlier_release_can_still_be_read(written):
    offered = json.loads((written / operating_points.FILE).read_text("utf-8"))
    for name in ("main", "quality_tolerance", "weights"):
        del offered[name]
    for entry in offered["points"]:
        del entry["chosen_on"], entry["conditions"]
    (written / operating_points.FILE).write_text(json.dumps(offered))
    assert operating_points.choose(written, latency_budget=0.7)["name"] == "token_v3_a0.5"
    assert operating_points.choose(written, quality_floor=74.0)["name"] == "token_v3_a0.9"


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
        ({"quality_floor": 99.0}, "no operating point reaches quality_floor=99: the best has exact_match 81"),
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
    for text in ("{}", json.dumps({"format": operating_points.FORMAT, "points": [{}]})):
        (tmp_path / operating_points.FILE).write_text(text)
        with pytest.raises(UserError, match="is not a file of operating points"):
            operating_points.read(tmp_path)


def test_intervals_are_paired_between_points():
    noisy = [point("opt", alpha, (80 + alpha, 80 + alpha), (0.5, 0.5), spread=20.0) for alpha in (0.0, 1.0)]
    difference = noisy[1].quality[REPORT] - noisy[0].quality[REPORT]
    assert difference.low == pytest.approx(1.0) and difference.high == pytest.approx(1.0)
    assert np.ptp(noisy[0].quality[REPORT].draws) > 5
