"""Plans: ranked from given figures, measured on a tiny pair, followed by draft_len="auto"."""

from __future__ import annotations

import json

import pytest

from inference import small_pair
from speccascade_t5x.inference import generate, measuring, plan_files
from speccascade_t5x.inference.settings import Settings, make_settings
from speccascade_t5x.interfaces import SOURCE_ACCEPTED, SOURCE_BONUS, SOURCE_RESIDUAL, UserError
from speccascade_t5x.planning import cost_model, plan, probing

KINDS = ("model", "max_gram", *(f"{k} cascade{more}" for k in ("vertical", "mixed") for more in ("", ", lenient")))
A, R, B = SOURCE_ACCEPTED, SOURCE_RESIDUAL, SOURCE_BONUS
SHAPE = {"max_input_len": 32, "max_len": 12, "batch_size": 3, "buckets": (32,), "temperature": 0.0}


def given(acceptance, costs, output_dir=None, **options):
    return plan.plan(None, make_settings(**options), output_dir, acceptance=acceptance, costs=costs)


def test_plain_candidates_gain_what_leviathans_form_says():
    found = {c.label: c for c in given([[0.8]], [0.2]).candidates}
    for length in plan.LENGTHS:
        candidate = found[f"model, draft_len {length}"]
        # Leviathan et al. 2023, Theorem 3.8: (1 - a^(G+1)) / ((1 - a)(G c + 1)).
        assert candidate.gain == pytest.approx((1 - 0.8 ** (length + 1)) / (0.2 * (0.2 * length + 1)))
        tokens = candidate.tokens_per_round
        assert candidate.calls_per_token == pytest.approx((1 / tokens, length / tokens))
    assert len(found) == 1 + len(plan.LENGTHS)  # no Max-Gram was given
    assert found["no speculation"].gain == 1.0


def test_the_best_stands_first_and_may_be_not_to_speculate():
    good, bad = given([[0.8, 0.6], [0.6]], [0.3]), given([[0.1, 0.1], [0.1]], [0.9])
    assert good.speculate and good.candidates[0].drafter == "cascade"
    gains = [candidate.gain for candidate in good.candidates]
    assert gains == sorted(gains, reverse=True)
    # Max-Gram alone drafts at no cost, so even at 0.1 it gains where blocks cost what steps do.
    assert bad.candidates[0].drafter == "max_gram"
    hopeless = given([[0.1]], [0.9])
    assert not hopeless.speculate and hopeless.candidates[0].draft_len == 0


def test_a_rule_that_reads_the_drafter_pays_for_the_bonus_position():
    plain, reading = (
        {c.label: c for c in given([[0.8]], [0.2], **rule).candidates}
        for rule in ({}, {"rule": "token_v3", "alpha": 0.3})
    )
    tokens = plain["model, draft_len 4"].tokens_per_round
    assert plain["model, draft_len 4"].gain == pytest.approx(tokens / (1 + 4 * 0.2))
    assert reading["model, draft_len 4"].gain == pytest.approx(tokens / (1 + 5 * 0.2))
    assert reading["no speculation"].gain == pytest.approx(1 / 1.2)
    assert not any(label.startswith("max_gram") for label in reading)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acceptance": [[0.5]]}, "acceptance and costs belong together"),
        ({"acceptance": [[0.5, 0.1]], "costs": [0.2]}, r"rows of \[2\] figures, .* need rows of \[2, 1\], or \[1\]"),
        ({"acceptance": [[1.5]], "costs": [0.2]}, "acceptance=1.5 is outside its range"),
        ({"acceptance": [[0.5]], "costs": [-0.2]}, "costs=-0.2 is outside its range"),
        ({"acceptance": [[0.5]], "costs": [0.2], "measure": 1}, "measure decodes with a pair"),
        ({"acceptance": [[0.5]], "costs": [0.2], "settings": Settings(lenience=2.0)}, "lenience changes the accept"),
        ({}, "name either a task or an input file to measure on"),
    ],
)
def test_what_cannot_be_planned(options, message):
    with pytest.raises(UserError, match=message):
        plan.plan(None, **{"settings": Settings()} | options)


def test_what_is_shown_was_not_chosen_by(tmp_path, monkeypatch):
    """Candidates are ranked on every other example, and the gains that are shown come from the rest."""
    pair = generate.load(small_pair.write(tmp_path / "bundle"))
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(["aa", "bb", "cc", "dd"]), "utf-8")
    probed, decoded = [], []
    known = probing.Measured(
        alone=measuring.Run(1.0, 12, {"committed": 12}, (), ((1,) * 12,)),
        acceptance=cost_model.Acceptance({(0, 1): (0.9,), (0, 2): (0.5,), (1, 2): (0.5,)}),
        lenient=None,
        costs=cost_model.Costs.relative([0.1]),
        corrections=dict.fromkeys(KINDS, 1.0),
        probes={},
    )

    def ids(batches):
        return sorted(int(i) for batch in batches for i in batch.example_ids[batch.valid])

    def measure(pair, settings, batches, lenience):
        probed.append(ids(batches))
        return known

    def gains(pair, settings, candidates, batches):
        decoded.append(ids(batches))
        gain = 3.0 if len(decoded) % 2 else 0.9  # flattered where it was chosen
        return [gain - 0.5 * i for i in range(len(candidates))]

    monkeypatch.setattr(probing, "measure", measure)
    monkeypatch.setattr(plan, "_measured_gains", gains)
    found = plan.plan(pair, make_settings(**SHAPE), input=str(lines), measure=2)
    assert probed == [[0, 2]] and decoded == [[0, 2], [1, 3]]
    assert not found.speculate and found.candidates[0].draft_len == 0  # it gains nothing where it was not chosen
    shown = {candidate.chosen_by: candidate.measured for candidate in found.candidates if candidate.measured}
    assert shown == {3.0: 0.9, 2.5: 0.4}
    plan.plan(pair, make_settings(**SHAPE), input=str(lines))
    assert probed[1] == [0, 1, 2, 3]  # all, where nothing is measured beyond
    with pytest.raises(UserError, match="measure needs at least 2 examples"):
        plan.plan(pair, make_settings(**SHAPE), input=str(lines), limit=1, measure=1)


def test_continuation_by_hand():
    rows = [[A, A, B, A, R, R], [R, A, A]]
    # Starts: 4 rounds and the last of the second row; of these 3 went on, and of the next 3 two.
    assert measuring.continuation(rows, 3) == pytest.approx((3 / 5, 2 / 3, 0.0))
    assert measuring.continuation([[A, B]], 3) == (1.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(pair, plan, its folder): the tiny pair measured once, two candidates decoded."""
    folder = tmp_path_factory.mktemp("planned")
    pair = generate.load(small_pair.write(folder / "bundle"))
    lines = folder / "lines.txt"
    lines.write_text("\n".join(small_pair.TEXTS), "utf-8")
    found = plan.plan(pair, make_settings(**SHAPE, lenience=2.0), folder, input=str(lines), measure=3)
    return pair, found, folder


@pytest.mark.slow
def test_a_measured_plan(measured):
    pair, found, folder = measured
    tested = [candidate for candidate in found.candidates if candidate.measured is not None]
    assert len(tested) == 3 and all(candidate.measured > 0 and candidate.chosen_by > 0 for candidate in tested)
    assert found.measured.alone.outputs and len(found.measured.alone.lengths) == 2  # the third text is for the gain
    curves = {(0, 1), (0, 2), (1, 2)}
    assert set(found.measured.acceptance.curves) == set(found.measured.lenient.curves) == curves
    assert {candidate.lenience for candidate in found.candidates if candidate.k_matrix} == {None, 2.0}
    assert set(found.measured.corrections) == set(KINDS)
    assert all(time > 0 for time in found.measured.costs.copies.values())
    assert found.measured.costs.step > 0 and len(found.measured.costs.drafters) == 1
    # The same probe, counted independently of how the plan reads it.
    run = generate.Runner(pair, make_settings(**SHAPE, draft_len=probing.PROBE_LEN))
    totals = pair.run(small_pair.TEXTS[::2], run.settings).totals
    tokens = found.measured.probes["drafter for verifier"]["tokens_per_round"]
    assert tokens == pytest.approx(totals["committed"] / totals["rounds"])
    written = plan_files.read(folder)
    assert written["candidates"][0]["draft_len"] == found.candidates[0].draft_len


@pytest.mark.slow
def test_auto_follows_a_measured_plan(measured):
    pair, _, folder = measured
    records = pair.generate(small_pair.TEXTS, **SHAPE, draft_len="auto", plan=str(folder))
    assert [r["tokens"] for r in records] == [
        r["tokens"] for r in pair.generate(small_pair.TEXTS, **SHAPE, method="verifier")
    ]


@pytest.fixture
def written(tmp_path):
    """A plan of given figures, made out for the pair 'ours'."""
    path = given([[0.8, 0.6], [0.6]], [0.3], tmp_path, temperature=0.5).path
    content = json.loads(path.read_text("utf-8")) | {"pair": "ours"}
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_auto_takes_the_best_or_the_best_of_a_drafter(written):
    best = plan_files.read(written)["candidates"][0]
    auto = Settings(draft_len="auto", plan=str(written), temperature=0.5)
    followed = plan_files.follow(auto, "ours")
    assert followed.drafter == "cascade" and followed.draft_len == best["draft_len"]
    assert followed.k_matrix == tuple(map(tuple, best["k_matrix"]))
    copying = make_settings(draft_len="auto", plan=str(written), temperature=0.5, drafter="max_gram")
    alone = plan_files.follow(copying, "ours")
    assert (alone.drafter, alone.k_matrix) == ("max_gram", None) and alone.draft_len > 0


def test_a_plan_chooses_the_lenience(written):
    """The candidate's own goes into the run; a run that asks for another takes none of the plan's."""
    plan_json = json.loads(written.read_text("utf-8"))
    cascade = next(c for c in plan_json["candidates"] if c["k_matrix"])
    plan_json["candidates"].insert(0, cascade | {"lenience": 2.0})
    written.write_text(json.dumps(plan_json), "utf-8")
    auto = {"draft_len": "auto", "plan": str(written), "temperature": 0.5}
    assert plan_files.follow(make_settings(**auto), "ours").lenience == 2.0
    assert plan_files.follow(make_settings(**auto, lenience=2.0), "ours").drafter == "cascade"
    with pytest.raises(UserError, match=r"ranks nothing with drafter='model', lenience=3\.0"):
        plan_files.follow(make_settings(**auto, lenience=3.0), "ours")


def measured_by_hand(corrections, lenient=None) -> probing.Measured:
    """Measurements of one drafter and Max-Gram that nobody made."""
    alone = measuring.Run(1.0, 10, {}, (), ((5, 6, 7) * 10,))
    curves = cost_model.Acceptance({(0, 1): (0.8,), (0, 2): (0.5,), (1, 2): (0.6,)})
    costs = cost_model.Costs(1.0, {1: 1.0}, ({1: 0.1},), 0.2, round=0.1, copies={1: 0.05}, review=0.1)
    return probing.Measured(alone, curves, lenient, costs, corrections, {})


def test_predictions_are_corrected_by_what_the_probe_of_their_kind_gained():
    ones = dict.fromkeys(KINDS, 1.0)
    plain = {c.label: c for c in plan.rank_measured(measured_by_hand(ones), 1, False)}
    factors = ones | {"model": 0.9, "vertical cascade": 0.5, "mixed cascade": 0.6, "mixed cascade, lenient": 2.0}
    changed = measured_by_hand(factors, measured_by_hand(ones).acceptance)
    found = {c.label: c for c in plan.rank_measured(changed, 1, False, 2.0)}
    for label, candidate in plain.items():
        kind = candidate.drafter
        if candidate.k_matrix:
            copies = candidate.k_matrix[0][1] > 0
            kind = "mixed cascade" if copies else "vertical cascade"
            assert found[f"{label}, lenience 2"].gain == pytest.approx((2.0 if copies else 1.0) * candidate.gain)
        assert found[label].gain == pytest.approx((factors[kind] if candidate.draft_len else 1.0) * candidate.gain)


def test_auto_refuses_what_says_nothing_about_this_run(written, tmp_path):
    auto = {"draft_len": "auto", "plan": str(written), "temperature": 0.5}
    for change, pair, message in [
        ({"temperature": 1.0}, "ours", "was made for temperature=0.5, but this run has 1.0: run `speccascade plan`"),
        ({"batch_size": 1}, "ours", "was made for batch_size=8, but this run has 1"),
        ({"drafter": "ngram"}, "ours", "ranks nothing with drafter='ngram'"),
        ({}, "theirs", "was made for another pair, or from given figures"),
        ({"plan": str(tmp_path / "none.json")}, "ours", "there is no plan .*none.json: make one"),
        ({"plan": None}, "ours", "none is named: run `speccascade plan"),
    ]:
        with pytest.raises(UserError, match=message):
            plan_files.follow(make_settings(**auto | change), pair)
    header = '{"format": "speccascade_t5x.plan", "version": 1'
    for text, message in [
        ("{", "is not valid JSON"),
        ("[]", "where an object is expected"),
        ('{"format": "x", "version": 1}', "is not a plan of `speccascade plan`"),
        (header + "}", "has no member 'candidates'"),
        (header + ', "candidates": [], "conditions": {}}', "holds no candidates"),
    ]:
        written.write_text(text, "utf-8")
        with pytest.raises(UserError, match=message):
            plan_files.read(written)


def test_do_not_speculate_becomes_draft_len_0(tmp_path):
    path = given([[0.1]], [0.9], tmp_path).path
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"pair": "ours"}), "utf-8")
    followed = plan_files.follow(Settings(draft_len="auto", plan=str(path)), "ours")
    assert (followed.method, followed.drafter, followed.draft_len) == ("speculative", "model", 0)


def test_a_decode_that_follows_it_does_not_speculate(tmp_path):
    """The verifier writes alone, one call a token, and the drafter is never asked."""
    pair = generate.load(small_pair.write(tmp_path / "bundle"))
    path = given([[0.1]], [0.9], tmp_path, **SHAPE).path
    content = json.loads(path.read_text("utf-8")) | {"pair": plan_files.identity(pair)}
    path.write_text(json.dumps(content), "utf-8")
    totals = pair.run(small_pair.TEXTS, make_settings(**SHAPE, draft_len="auto", plan=str(path))).totals
    assert totals["drafted"] == totals["drafter_calls"] == 0
    assert totals["verifier_calls"] == totals["committed"] > 0
