"""Arms, alphas, conditions and cells."""

from __future__ import annotations

import math

import numpy as np
import pytest

from speccascade_t5x.core import rules
from speccascade_t5x.evaluation import grid, measure
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError

MAIN = grid.Condition(5, 1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("token_v3", {"rule": "token_v3"}),
        ("opt+block", {"rule": "opt", "verification": "block"}),
        ("lossless@max_gram", {"rule": "lossless", "drafter": "max_gram"}),
        ("token_cascade:chow", {"method": "token_cascade", "rule": "chow"}),
        ("oracle:diff", {"method": "oracle", "rule": "diff"}),
        ("verifier", {"method": "verifier"}),
        ("bild", {"method": "bild"}),
        ("sequence_cascade", {"method": "sequence_cascade"}),
        ("lossy_sd_optimal", {"rule": "lossy_sd", "rule_options": {"residual": "optimal"}}),
    ],
)
def test_short_forms(text, options):
    made = grid.arm(text)
    assert (made.name, dict(made.options)) == (text, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token_v9", "there is no method 'token_v9': did you mean 'token_v"),
        ("tokn_cascade:chow", "there is no execution 'tokn_cascade': did you mean 'token_cascade'"),
        ("oracle", "needs a rule: write oracle:chow"),
        ("opt+blocks", "there is no verification 'blocks'"),
        ("lossless@maxgram", "there is no drafter 'maxgram': did you mean 'max_gram'"),
    ],
)
def test_unknown_names(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        grid.arm(text)


def test_names_are_files_names_and_stand_for_one_method():
    with pytest.raises(UserError, match="the method name 'a/b' names files as well"):
        grid.Arm("a/b", {"rule": "lossless"})
    with pytest.raises(UserError, match="two methods are called 'lossless'"):
        grid.arms([grid.Arm("lossless", {"rule": "token_v3"})], {})  # it would take the baseline's place
    with pytest.raises(UserError, match="two methods are called 'token_cascade-chow'"):
        grid.arms([grid.Arm("token_cascade-chow", {"method": "oracle", "rule": "chow"})], {})
    own = grid.Arm("lossy_sd", {"rule": "lossy_sd"}, alphas=(0.5,))
    assert own in grid.arms([own], {})  # alphas of one's own are no other method


def test_an_alpha_outside_its_range_names_the_range():
    with pytest.raises(UserError, match="alpha=1.5 is outside the range of the method 'chow': from 0 to 1"):
        grid.arms(["chow"], {"chow": [0.5, 1.5]})
    with pytest.raises(UserError, match="takes no alpha, but alpha=0.1"):
        grid.arms(["lossless"], {"lossless": [0.1]})
    grid.check_alpha(grid.arm("sequence_cascade"), -12.5)  # a log-probability, of no rule
    with pytest.raises(UserError, match="there is no method with alphas 'opt'"):
        grid.arms(["chow"], {"opt": [0.1]})
    with pytest.raises(UserError, match="sets temperature, which no method of a sweep may"):
        grid.Arm("hot", {"temperature": 2.0})


@pytest.mark.parametrize("name", [name for name in rules.names() if rules.get(name).alpha_range])
def test_every_rule_has_default_alphas_inside_its_range(name):
    made = grid.arm(name)
    for count in (1, 6):
        alphas = grid.default_alphas(made, count)
        assert len(set(alphas)) == count and list(alphas) == sorted(alphas)
        for alpha in alphas:
            grid.check_alpha(made, alpha)
            low, high = made.range
            assert low < alpha < high


def test_thresholds_of_a_sequence_cascade_part_the_outputs_evenly():
    means = np.linspace(-2, 0, 101)
    found = grid.sequence_alphas(means, 4)
    assert [float(np.mean(means < alpha)) for alpha in found] == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.01)
    with pytest.raises(UserError, match="has an open range of alphas"):
        grid.default_alphas(grid.arm("sequence_cascade"), 3)


def test_a_curve_is_judged_by_likelihood_where_every_cell_has_one():
    with_law, without = {"nll": 0.5, "exact": 0.25}, {"exact": 0.75}
    assert measure._qualities([with_law, with_law], "exact") == [-0.5, -0.5]
    assert measure._qualities([with_law, without], "exact") == [0.25, 0.75]
    assert measure._qualities([with_law, without], "nll") is None  # texts without references


def test_refinement_goes_where_the_curve_bends():
    alphas = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    costs = [1 - a for a in alphas]
    knee = [0.0, 0.0, 0.0, 0.0, -1.0, -2.0]  # flat, then steep from 0.6 on
    assert grid.refined(alphas, costs, knee) == pytest.approx(0.7)
    assert grid.refined(alphas[::-1], costs[::-1], knee[::-1]) == pytest.approx(0.7)  # in any order
    assert grid.refined(alphas, costs, [-2 * a for a in alphas]) is None  # straight
    assert grid.refined([0.1, 0.2], [1, 2], [1, 2]) is None


def test_conditions_change_one_thing_at_a_time():
    found = grid.conditions((5, 3), (1.0, 0.5), (1.0, 0.25))
    assert found == (
        MAIN,
        grid.Condition(3, 1.0, 1.0),
        grid.Condition(5, 0.5, 1.0),
        grid.Condition(5, 1.0, 0.25),
    )
    with pytest.raises(UserError, match="top_ps is empty"):
        grid.conditions((5,), (1.0,), ())


def test_baselines_are_always_there_and_min_p_follows_token_v3():
    names = [each.name for each in grid.arms(["token_v3"], {})]
    assert names == [*grid.BASELINES, "token_v3", "min_p"]
    assert "min_p" not in [each.name for each in grid.arms(["opt"], {})]


def test_cells_have_names_of_their_own_and_settings_that_run():
    found = grid.arms(["token_v3", "token_v3+block", "lossless@max_gram"], {})
    cells = [
        grid.Cell(each, 0.25 if each.range else None, condition, seed)
        for each in found
        for condition in grid.conditions((5, 3), (1.0, 0.0), (1.0,))
        for seed in (0, 1)
    ]
    by_settings = {repr(cell.settings(Settings())): cell.id for cell in cells}
    assert len(by_settings) == len({cell.id for cell in cells})  # the same name iff the same settings
    assert all(set(cell.id) & set(":@+/ ") == set() for cell in cells)
    settings = grid.Cell(grid.arm("token_v3+block"), 0.25, MAIN, 2).settings(Settings())
    assert (settings.rule, settings.alpha, settings.draft_len, settings.seed) == ("token_v3", 0.25, 5, 2)
    # BiLD ends its drafts by itself, and a model alone drafts nothing.
    assert grid.Cell(grid.arm("bild"), 2.0, MAIN, 0).settings(Settings()).draft_len is None
    assert grid.Cell(grid.arm("verifier"), None, MAIN, 0).id == "verifier_t1_p1_s0"


def test_min_p_goes_under_every_condition_token_v3_goes_under():
    arms, conditions = grid.arms(["token_v3", "opt"], {}, ()), grid.conditions((5,), (1.0, 0.0), (1.0,))
    told = lambda *varied: measure.planned(measure.Choices(arms, conditions, varied, (0,), 3, 0, "nll"))  # noqa: E731
    assert (told(), told("opt"), told("token_v3"), told("token_v3", "min_p")) == (9, 12, 15, 15)


def test_alphas_that_look_alike_are_cells_of_their_own():
    near = [grid.Cell(grid.arm("opt"), alpha, MAIN, 0).id for alpha in (0.12345678, 0.12345679, 0.25, 1.0)]
    assert len(set(near)) == 4 and near[2:] == ["opt_a0.25_g5_t1_p1_s0", "opt_a1_g5_t1_p1_s0"]


def test_a_draft_length_of_ones_own_belongs_to_every_condition():
    long = grid.Arm("long", {"rule": "lossless", "draft_len": 9})
    cells = [grid.Cell(long, None, condition, 0) for condition in grid.conditions((5, 3), (1.0,), (1.0,))]
    assert {cell.id for cell in cells} == {"long_t1_p1_s0"}
    assert cells[0].settings(Settings()).draft_len == 9


def test_base_settings_leave_the_choice_to_the_sweep():
    grid.check_base(Settings(batch_size=4, top_k=3, max_len=10))
    with pytest.raises(UserError, match="generate.Settings.alpha is chosen by the sweep itself"):
        grid.check_base(Settings(alpha=0.1))
    assert math.isinf(grid.arm("opt").range[0])
