"""A whole sweep of a tiny pair: killed and resumed, traced back to its rows, refused where it must be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inference import small_pair
from speccascade_t5x.evaluation import grid, operating_points, sweep
from speccascade_t5x.evaluation.analysis import Analyst
from speccascade_t5x.evaluation.cells import CellStore
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError

TEXTS = ["abcabcabcabc", "aaaabbbb", "xyzxyz", "hello", "good day", "abba"]
# At batch 1 wall times need no programs of their own, and few baselines compile little: the report says which lack.
BASE = Settings(batch_size=1, buckets=(32,))
FEW = ("verifier", "drafter", "lossless")
CHOICE = {
    "methods": ("token_v3",),
    "alpha_points": 3,
    "refine": 1,
    "seeds": (0, 1),
    "timing_items": 2,
    "timing_repeats": 2,
    "traces": 1,
    "baselines": FEW,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    small_pair.write(folder / "pair", table=False)
    lines = [json.dumps({"inputs": text, "targets": text[::-1]}) for text in TEXTS]
    (folder / "in.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="module")
def pair(place) -> generate.LoadedPair:
    return generate.load(place / "pair")


@pytest.fixture
def run(pair, place):
    """Runs a sweep into a folder below `place`."""

    def sweep_into(folder: str, **changed):
        return sweep.sweep(pair, BASE, place / folder, input=str(place / "in.jsonl"), **CHOICE | changed)

    return sweep_into


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(pair, place):
    """(result, rows) of a sweep that was killed after five cells, with a write left half done, and started again."""

    def kill(news):
        if news.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(pair, BASE, place / "whole", input=str(place / "in.jsonl"), progress=kill, **CHOICE)
    before = (place / "whole" / "cells.jsonl").read_text("utf-8")
    assert len(before.splitlines()) == 5
    leftover = place / "whole" / "cells" / ".x.json.gz.abc.partial"
    leftover.write_text("half")
    news = []
    result = sweep.sweep(pair, BASE, place / "whole", input=str(place / "in.jsonl"), progress=news.append, **CHOICE)
    assert (place / "whole" / "cells.jsonl").read_text("utf-8").startswith(before)  # not measured again
    assert not leftover.exists()
    phases = {one.phase: one for one in news}
    assert phases["quality"].done == phases["quality"].total and phases["time"].done == phases["time"].total == 2
    return result, rows(place / "whole")


def test_a_killed_sweep_ends_as_one_that_was_not(whole, place, run):
    result, found = whole
    again = run("again")
    kept = ("cell", "metrics", "rates", "settings", "tokens")
    theirs = [{name: row[name] for name in kept} for row in rows(place / "again")]
    assert theirs == [{name: row[name] for name in kept} for row in found]
    assert [p.name for p in again.groups[0].points] == [p.name for p in result.groups[0].points]


def test_one_program_per_shape(whole):
    compiled = [row["arm"] for row in whole[1] if row["compiled_shapes"]]
    assert sorted(compiled) == sorted(set(compiled))  # one per arm, whatever the alpha and the seed
    assert all(row["compile_s"] == 0 for row in whole[1] if not row["compiled_shapes"])


def test_min_p_is_measured_at_every_alpha_of_token_v3(whole):
    by_arm = {arm: {row["alpha"] for row in whole[1] if row["arm"] == arm} for arm in ("token_v3", "min_p")}
    assert by_arm["token_v3"] == by_arm["min_p"] and len(by_arm["token_v3"]) == 4  # three, and one where it bends


def test_methods_take_turns(whole):
    first = [row["arm"] for row in whole[1]][:9]
    assert first == ["verifier", "drafter", "lossless", *["token_v3", "min_p"] * 3]


def test_every_figure_goes_back_to_rows(whole, place):
    (group,), found = whole[0].groups, {row["cell"]: row for row in whole[1]}
    for point in group.points:
        mine = [found[cell] for cell in point.cells]
        assert [row["seed"] for row in mine] == [0, 1] and {row["point"] for row in mine} == {point.name}
        for half in ("choose", "report"):
            assert point.quality[half].value == pytest.approx(-mine[0]["metrics"][half]["nll"], abs=1e-4)
        calls = np.mean([row["rates"]["all"]["verifier_calls_per_token"] for row in mine])
        assert point.rates["verifier_calls_per_token"] == pytest.approx(calls)
    offered = operating_points.read(place / "whole")["points"]
    assert all(set(one["cells"]) <= set(found) for one in offered)
    table = (place / "whole" / "report.md").read_text("utf-8")
    assert all(cell in table for cell in found)


def test_wall_times_are_of_all_points_in_turn(whole, place):
    blocks = [json.loads(path.read_text("utf-8")) for path in sorted((place / "whole" / "timing").iterdir())]
    assert [len(block["items"]) for block in blocks] == [1, 1]
    for block in blocks:
        assert set(block["points"]) == {row["point"] for row in whole[1]}
        for times in block["points"].values():
            assert np.shape(times["one_s"]) == (2, 1) and np.shape(times["batch_s"]) == (2,)
            assert np.min(times["one_s"]) > 0 and np.min(times["one_tokens"]) > 0
        assert block["seeds"] == [0, 1]
    (group,) = whole[0].groups
    assert group.alone("verifier").speed_up["report"].value == 1.0
    assert all(point.predicted > 0 for point in group.points if point.row["rule"])


def test_the_report_says_what_lacks(whole, place):
    text = (place / "whole" / "report.md").read_text("utf-8")
    assert "Baselines that were not measured: lossy_sd, lossy_sd_optimal, bild_fixed, bild" in text
    assert "NLL of the references, which charges truncation" in text
    trace = (place / "whole" / "trace.html").read_text("utf-8")
    assert (
        "verifier alone" in trace and "drafter alone" in trace and "a draft of it is accepted with probability" in trace
    )


def test_a_folder_of_another_sweep_is_refused(whole, run, place):
    before = (place / "whole" / "cells.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds another sweep.* seeds: then \[0, 1\], now \[7\]"):
        run("whole", seeds=(7,))
    with pytest.raises(UserError, match=r"alpha_points: then 3, now 4; refine: then 1, now 0"):
        run("whole", alpha_points=4, refine=0)
    assert (place / "whole" / "cells.jsonl").read_bytes() == before


def test_a_second_sweep_in_the_folder_is_refused_while_one_is_at_work(run, place):
    refused = []

    def start_another(news):
        if not refused:
            with pytest.raises(
                UserError, match="another process is at work on the sweep in .*two: wait until it"
            ) as why:
                run("two", methods=(), progress=lambda _: None)
            refused.append(str(why.value))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("two", methods=(), progress=start_another)
    assert refused and not list((place / "two").glob(".*.lock"))


def test_nothing_decoded_is_lost_over_a_metric(pair, tmp_path, monkeypatch):
    """A metric breaks on outputs: the cells fail, keep what was decoded, and are only scored the next time."""
    from speccascade_t5x.data.seqio_tasks import seqio, tf

    broken = [True]

    def odd_values(targets, predictions):
        if broken[0] and list(targets) != list(predictions):
            raise ZeroDivisionError("of a metric")
        scalar = seqio.metrics.Scalar(float(np.mean([len(text) for text in predictions])))
        return {"length": scalar, "note": seqio.metrics.Text("fine"), "lacks": None, "deep": {"one": np.float32(1.0)}}

    def rows_of(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"inputs": TEXTS, "targets": TEXTS})

    seqio.TaskRegistry.add(
        "odd_values",
        source=seqio.FunctionDataSource(rows_of, splits=["validation"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={name: seqio.Feature(seqio.ByteVocabulary(0)) for name in ("inputs", "targets")},
        metric_fns=[odd_values],
    )
    chosen = CHOICE | {"methods": ("lossless",), "seeds": (0,)}
    try:
        with pytest.raises(UserError, match="the metric 'odd_values' of task 'odd_values' failed with ZeroDivisionErr"):
            sweep.sweep(pair, BASE, tmp_path, task="odd_values", **chosen)
        failed = rows(tmp_path)
        assert [row["status"] for row in failed] == ["failed"] * 2  # the models alone, without which nothing goes on
        broken[0] = False
        decoded = []
        decode = sweep.Measurement._decode
        monkeypatch.setattr(
            sweep.Measurement,
            "_decode",
            lambda self, settings: decoded.append(settings.method) or decode(self, settings),
        )
        result = sweep.sweep(pair, BASE, tmp_path, task="odd_values", **chosen)
    finally:
        seqio.TaskRegistry.remove("odd_values")
    assert decoded == ["speculative"]  # verifier and drafter alone were not decoded again
    (group,) = result.groups
    assert set(group.alone("verifier").row["metrics"]["report"]) >= {"length", "deep/one"}
    assert all(row["status"] == "done" and row["tokens"] > 0 for row in rows(tmp_path))


def test_partial_results_can_be_reported(run, place):
    def kill(news):
        if news.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("partial", progress=kill)
    growing = place / "partial" / "cells" / ".x.json.gz.abc.partial"
    growing.write_text("half")  # by a sweep that is at work there
    before = (place / "partial" / "cells.jsonl").stat().st_mtime_ns
    result = run("partial", report_only=True)
    assert growing.exists() and (place / "partial" / "cells.jsonl").stat().st_mtime_ns == before
    assert len(result.groups[0].points) == 4
    assert "No wall time was measured yet" in (place / "partial" / "report.md").read_text("utf-8")
    with pytest.raises(UserError, match=r"there is no sweep in .*nothing to report: it has no sweep\.json"):
        run("nothing", report_only=True)
    assert not (place / "nothing").exists()


def test_without_a_cell_that_succeeded_the_reason_is_told(tmp_path):
    store = CellStore(tmp_path, {})
    store.write_failure({"cell": "a_s0", "point": "a"}, "a model produced NaN")
    with pytest.raises(UserError, match="no cell of the sweep in .* has succeeded: .*: a model produced NaN"):
        Analyst(store, None, {}, "nll").groups((), [], None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ("token_v4",)}, "there is no method 'token_v4': did you mean 'token_v"),
        ({"alphas": {"token_v3": (0.5, 2.0)}}, "alpha=2 is outside the range of the method 'token_v3': 1 or less"),
        ({"metric": "bleu"}, "in has no metric 'bleu': use one of nll"),
        ({"methods": ("token_v3@max_gram",)}, "the rule 'token_v3' reads the distribution q of a drafter model"),
        ({"methods": ("lossless@ngram",)}, "needs an n-gram table"),
        ({"seeds": (1, 1)}, "must be different whole numbers"),
        ({"seeds": (0, -1)}, "seeds=-1 is outside its range"),  # the first one's cells would be there by then
        ({"varied": ("tokn_v3",)}, "there is no method 'tokn_v3': did you mean 'token_v3'"),
        ({"varied": "token_v3"}, "varied='token_v3' is not a list"),
        ({"methods": ("opt", "lossless"), "calibrate": {"acceptance": 0.5}}, "'lossless' takes no alpha, so there is"),
        ({"methods": (), "calibrate": {"acceptance": 0.5}}, "a calibration needs methods"),
        ({"calibrate": {"acceptance": 0.5}, "report_only": True}, "report_only reports a sweep"),
        ({"timing_items": 1}, "timing_items=1 is outside its range"),
        ({"calibrate": {"speed": 1.0}}, "there is no rate 'speed' to calibrate"),
        ({"limit": 1}, "at least 2 items"),
        ({"task": "restore_de"}, "name either a task or an input file"),
    ],
)
def test_bad_wishes_are_refused_before_anything_is_written(run, place, changed, message):
    with pytest.raises(UserError, match=message):
        run("refused", **changed)
    assert not (place / "refused").exists()


def test_inputs_without_targets_are_refused(pair, place):
    (place / "bare.jsonl").write_text('{"inputs": "a"}\n{"inputs": "b"}\n')
    with pytest.raises(UserError, match="examples without targets"):
        sweep.sweep(pair, BASE, place / "refused", input=str(place / "bare.jsonl"), **CHOICE)


def test_a_rate_is_calibrated_and_checked_on_held_out_items(run, place):
    result = run("calibrated", calibrate={"deferral_rate": 0.7})
    (found,) = result.calibrated
    known = {row["alpha"]: row["rates"]["choose"]["deferral_rate"] for row in rows(place / "calibrated")}
    assert len(known) > CHOICE["alpha_points"] and found["reached"]
    assert abs(found["chosen_on"] - 0.7) == min(abs(rate - 0.7) for rate in known.values())
    (row,) = [row for row in rows(place / "calibrated") if row["cell"] == found["cell"]]
    assert found["held_out"]["value"] == pytest.approx(row["rates"]["report"]["deferral_rate"])
    assert found["held_out"]["units"] == 3 and found["held_out"]["low"] is None  # too few
    (out,) = run("unreached", calibrate={"verifier_calls_per_token": 3.0}).calibrated
    assert not out["reached"]


def test_a_rate_beyond_the_default_alphas_is_found_at_the_ends_of_the_range(run, place):
    (found,) = run("ends", methods=("chow",), calibrate={"deferral_rate": 0.0}).calibrated
    known = {row["alpha"]: row["rates"]["choose"]["deferral_rate"] for row in rows(place / "ends")}
    inside = grid.default_alphas(grid.arm("chow"), CHOICE["alpha_points"])
    assert min(known[alpha] for alpha in inside) > 0 and known[1.0] == 0
    assert found["reached"] and found["chosen_on"] == 0 and found["alpha"] > max(inside)


@pytest.mark.parametrize("options", [{"confidence": "sum"}, {"confidence": "quantile", "quantile": 0.25}])
def test_a_sequence_cascade_is_calibrated_by_its_own_confidence(run, place, options):
    """Its default alphas rewrite even shares of the half they are chosen on, whatever its confidence is."""
    chosen = grid.Arm("rewriting", {"method": "sequence_cascade", **options})
    folder = "rewriting_" + "_".join(map(str, options.values()))
    (found,) = run(folder, methods=(chosen,), calibrate={"verifier_calls_per_token": 0.5}).calibrated
    rewritten = [row["rates"]["choose"]["deferral_rate"] for row in rows(place / folder) if row["arm"] == "rewriting"]
    assert found["reached"] and (rewritten[0], rewritten[2]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_a_failed_cell_is_noted_and_tried_again(tmp_path):
    store = CellStore(tmp_path, {"seeds": [0]})
    store.write_failure({"cell": "a_s0", "point": "a"}, "a model produced NaN")
    assert store.done == [] and store.row("a_s0") is None
    assert json.loads((tmp_path / "cells.jsonl").read_text())["error"] == "a model produced NaN"
    store.write({"cell": "a_s0", "point": "a"}, [{"prediction": "x"}], None)
    again = CellStore(tmp_path, {"seeds": [0]})
    assert again.row("a_s0")["status"] == "done" and "error" not in again.row("a_s0")
    assert again.read("a_s0").records == [{"prediction": "x"}]
    (tmp_path / "cells" / "a_s0.json.gz").write_bytes(b"torn")
    with pytest.raises(UserError, match="is damaged: remove it"):
        CellStore(tmp_path, {"seeds": [0]})
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(UserError, match=r"no sweep\.json"):
        CellStore(tmp_path, {"seeds": [0]})
