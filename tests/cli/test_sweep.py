"""`speccascade sweep` as a user meets it, and `infer` at an operating point it has found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gin
import pytest

from evaluation.synthetic import group, point
from inference import small_pair
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import gin_flags, infer, operating_point, sweep
from speccascade_t5x.evaluation import grid, operating_points
from speccascade_t5x.evaluation.measure import Progress
from speccascade_t5x.evaluation.sweep import SweepResult
from speccascade_t5x.inference import generate, plan_files

SHAPE = ["--batch_size=1", "--gin.generate.Settings.buckets=(32,)"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory with a tiny pair and texts with references."""
    monkeypatch.chdir(tmp_path)
    small_pair.write(tmp_path / "pair", table=False)
    lines = [json.dumps({"inputs": text, "targets": text[::-1]}) for text in [*small_pair.TEXTS, "abba"]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), "utf-8")
    yield
    gin.clear_config()


def refused(capsys, verb: str, *argv: str) -> str:
    """Runs a command that must fail with one sentence, and returns it. Nothing may have been written."""
    before = sorted(os.listdir())
    assert cli.main([verb, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"speccascade {verb}: ") and err.count("\n") == 1, err
    assert sorted(os.listdir()) == before
    return err


def test_flags_become_python():
    assert sweep.words("token_v3, opt+block") == ("token_v3", "opt+block")
    assert sweep.alphas("token_v3=0.1,0.3;opt=-1") == {"token_v3": (0.1, 0.3), "opt": (-1.0,)}
    assert sweep.rate("deferral_rate=0.3") == {"deferral_rate": 0.3}
    assert (sweep.wholes("3,5"), sweep.numbers("1,0.5")) == ((3, 5), (1.0, 0.5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir=out"], "name either a task or an input file to sweep on (TASK or INPUT)"),
        (["--input=in.jsonl"], "needs an output folder: set OUTPUT_DIR, or give --output_dir"),
        (["--method=token_v3"], "unknown flag '--method=token_v3': did you mean '--methods'?"),
        (["--alphas=0.1"], "--alphas: invalid alphas value: '0.1'"),
        (["--seeds=one"], "--seeds: invalid wholes value: 'one'"),
        (["--gin_file=rules/chow.gin"], "no gin file binds sweep.sweep.pair: begin with a run file"),
        (["--input=in.jsonl", "--output_dir=out", "--methods=opy"], "there is no method 'opy': did you mean 'opt'?"),
        (["--input=in.jsonl", "--output_dir=out", "--metric=bleu"], "in has no metric 'bleu': use one of nll"),
        (
            ["--input=in.jsonl", "--output_dir=out", "--alphas=token_v3=1.5"],
            "alpha=1.5 is outside the range of the method 'token_v3': 1 or less",
        ),
        (
            ["--input=in.jsonl", "--output_dir=out", "--gin.generate.Settings.alpha=0.3"],
            "generate.Settings.alpha is chosen by the sweep itself",
        ),
    ],
)
def test_a_mistake_is_one_sentence(capsys, flags, message):
    pair = [] if any("gin_file" in flag for flag in flags) else ["--gin.PAIR='pair'"]
    assert message in refused(capsys, "sweep", *pair, *flags)


def test_what_is_told_meanwhile(capsys):
    row = {"status": "done", "cell": "a", "metrics": {"all": {"nll": 1.0}}, "decode_s": 2.0}
    row["rates"] = {"all": {"verifier_calls_per_token": 0.5, "acceptance": 0.9}}
    with sweep._live() as tell:
        for done in range(1, 41):
            tell(Progress("quality", done, 40, 60.0 * (40 - done), row))
    told = capsys.readouterr().err.splitlines()  # no terminal here: a line in each tenth of the way
    assert len(told) == 10 and told[0] == "4 of 40 cells, about 36 min left" and told[-1] == "40 of 40 cells"
    table = sweep._table([row, {"status": "failed", "cell": "b", "error": "NaN"}], Progress("quality", 1, 2, None))
    assert table.row_count == 2 and table.title == "1 of 2 cells"


def test_the_table_that_is_printed_is_the_reports(tmp_path):
    points = [point("token_v3", a, (q, q), (t, t)) for a, q, t in ((0.5, 80, 0.5), (0.9, 75, 0.25))]
    strict, lenient = (
        sweep.lines(SweepResult(tmp_path, [group(*points)], [], {}, tolerance)) for tolerance in (0.0, 10.0)
    )
    assert "token_v3  0.5    2.00" in "\n".join(strict) and "token_v3  0.9    4.00" in "\n".join(lenient)
    assert any("--operating_point=FOLDER" in line for line in strict)


def points(folder: Path, **settings) -> str:
    """A file of one operating point, and the verifier alone beside it."""

    def one(name: str, latency: float, quality: float, chosen: dict) -> dict:
        figures = {"latency": latency, "quality": {"value": quality, "low": None, "high": None}}
        return {"name": name, "settings": chosen, "main": True, "cells": [], **figures}

    offered = [one("fast", 0.5, 70.0, settings), one("verifier", 1.0, 80.0, {"method": "verifier"})]
    described = {"format": operating_points.FORMAT, "version": 1, "metric": "exact_match"}
    described["pair"] = plan_files.identity(generate.load(folder / "pair"))
    (folder / "points.json").write_text(json.dumps({**described, "points": offered}))
    return "--operating_point=points.json"


def test_infer_runs_at_an_operating_point(tmp_path, capsys):
    point = points(tmp_path, method="drafter", temperature=0.5)
    flags = ["--pair=pair", "--input=in.jsonl", "--output_dir=out", "--limit=2", *SHAPE]
    assert cli.main(["infer", *flags, point, "--latency_budget=0.6"]) == 0
    assert "operating point fast: 0.5 of the verifier's time, exact_match 70" in capsys.readouterr().err
    config = Path("out/config.gin").read_text("utf-8")
    assert "generate.Settings.method = 'drafter'" in config and "generate.Settings.temperature = 0.5" in config
    capsys.readouterr()
    assert "no operating point stays within latency_budget=0.1" in refused(
        capsys, "infer", *flags, point, "--latency_budget=0.1"
    )
    assert "no point under temperature=0.0" in refused(capsys, "infer", *flags, point, "--temperature=0", "--top_p=0.5")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rule=opt"], "the operating point verifier chooses rule itself: leave --rule out"),
        (["--gin.generate.Settings.alpha=0.1"], "chooses alpha itself"),
        (["--quality_floor=75", "--latency_budget=1"], "a latency budget or a quality floor, not both"),
    ],
)
def test_a_flag_that_chooses_what_the_point_chooses_is_refused(tmp_path, capsys, flags, message):
    point = points(tmp_path, rule="token_v3", alpha=0.3)
    assert message in refused(capsys, "infer", "--pair=pair", "--input=in.jsonl", point, *flags)


def test_a_gin_file_does_not_mix_into_an_operating_point(tmp_path, capsys):
    point = points(tmp_path, draft_len=5)  # lossless speculation: all but the draft length is as it is by default
    Path("own.gin").write_text("generate.Settings.rule = 'token_v3'\ngenerate.Settings.alpha = 0.3\n")
    files = ["--gin_file=runs/infer.gin", "--gin_file=own.gin", "--gin.PAIR='pair'", "--input=in.jsonl"]
    said = refused(capsys, "infer", *files, point, "--latency_budget=0.6")
    assert "point fast was measured with rule='lossless', but a gin file sets it to 'token_v3'" in said


def test_a_flag_that_chose_the_condition_changes_no_method():
    flags, _ = gin_flags.split(infer._parser(), ["--draft_len=3", "--operating_point=x"])
    bild = {"name": "bild", "settings": {"method": "bild", "alpha": 2.0}}  # measured with its own 10
    bound = operating_point.bindings(bild, flags, [])
    assert bound["generate.Settings.draft_len"] is None and bound["generate.Settings.alpha"] == 2.0


def test_limits_need_a_file_and_the_file_its_pair(tmp_path, capsys):
    flags = ["--pair=pair", "--input=in.jsonl"]
    assert "give --operating_point=FILE as well" in refused(capsys, "infer", *flags, "--latency_budget=0.5")
    assert "there are no operating points nowhere" in refused(capsys, "infer", *flags, "--operating_point=nowhere")
    point = points(tmp_path, rule="token_v3", alpha=0.3)
    offered = json.loads(Path("points.json").read_text())
    Path("points.json").write_text(json.dumps({**offered, "pair": "another"}))
    assert "were measured with another pair: run `sweep`" in refused(capsys, "infer", *flags, point)
    Path("points.json").write_text(json.dumps({**offered, "weights": "sha256 of others"}))
    assert "were measured with another pair: run `sweep`" in refused(capsys, "infer", *flags, point)


@pytest.mark.slow
def test_a_sweep_with_all_baselines_and_what_follows(capsys):
    flags = ["--input=in.jsonl", "--gin.PAIR='pair'", "--methods=token_v3", "--alpha_points=2", "--refine=1", *SHAPE]
    short = ["--gin.sweep.sweep.timing_items=2", "--gin.sweep.sweep.timing_repeats=1", "--seeds=0"]
    assert cli.main(["sweep", "--output_dir=out", *flags, *short, "--temperatures=1,0"]) == 0
    out, err = capsys.readouterr()
    assert "speed-up at the verifier's quality" in out and "wrote out/report.html" in out
    assert "about" in err and "Traceback" not in err
    arms = {json.loads(line)["arm"] for line in Path("out/cells.jsonl").read_text("utf-8").splitlines()}
    assert arms == {*grid.BASELINES, "token_v3", "min_p"}
    assert "were not measured" not in Path("out/report.md").read_text("utf-8")
    assert "temperature 0" in Path("out/report.md").read_text("utf-8")
    found = ["infer", "--pair=pair", "--input=in.jsonl", "--operating_point=out", *SHAPE]
    assert cli.main([*found, "--output_dir=at", "--latency_budget=1000"]) == 0
    assert cli.main(["sweep", "--output_dir=found", *flags, "--calibrate=verifier_calls_per_token=0.5"]) == 0
    assert "token_v3: alpha " in capsys.readouterr().out
