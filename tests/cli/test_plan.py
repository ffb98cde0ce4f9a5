"""`speccascade plan` as a user meets it, and the short flags of drafters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gin
import pytest

from inference import small_pair
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import gin_flags, settings_flags


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def test_figures_are_ranked(capsys):
    assert cli.main(["plan", "--acceptance=0.8,0.5;0.6", "--costs=0.2", "--output_dir=out"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["rank", "how", "predicted", "gain", "tokens/round", "calls/token"]
    assert lines[1].startswith("1     cascade, K ")
    assert any("no speculation" in line and "1.00x" in line for line in lines)
    assert "use cascade, K " in out and "--draft_len=auto --plan=out/plan.json" in out
    plan = json.loads(Path("out/plan.json").read_text("utf-8"))
    assert plan["speculate"] is True and plan["pair"] is None
    assert "ACCEPTANCE = ((0.8, 0.5), (0.6,))" in Path("out/config.gin").read_text("utf-8")


def test_it_can_say_no(capsys):
    assert cli.main(["plan", "--acceptance=0.1", "--costs=0.9"]) == 0
    assert "do not speculate: nothing is expected to be faster" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name either a task or an input file to measure on"),
        (["--acceptance=high", "--costs=0.1"], "--acceptance: invalid rows value: 'high'"),
        (["--acceptance=0.5"], "acceptance and costs belong together"),
        (["--k_matrix=5,0"], "unknown flag '--k_matrix=5,0'"),
    ],
)
def test_a_mistake_is_one_sentence(flags, message, capsys):
    assert cli.main(["plan", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("speccascade plan: ") and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "text", ["5,14,10;0,1,10;0,0,10", "[[5,14,10],[0,1,10],[0,0,10]]", "5, 14, 10 ; 0,1,10;0,0,10"]
)
def test_a_k_matrix_on_the_command_line(text):
    assert settings_flags.k_matrix(text) == ((5, 14, 10), (0, 1, 10), (0, 0, 10))


def test_short_flags_become_settings():
    from speccascade_t5x.inference import generate

    parser = argparse.ArgumentParser()
    settings_flags.add_flags(parser)
    given = ["--drafter=cascade", "--k_matrix=3,2;0,4", "--lenience=2", "--draft_len=auto", "--plan=p", "--max_ngram=4"]
    flags, bindings = gin_flags.split(parser, given)
    shorts = {name: value for name, value in settings_flags.bindings(flags).items() if value is not None}
    gin_flags.load(["runs/infer.gin"], [*bindings, *gin_flags.literal(shorts)])
    settings = gin.get_configurable(generate.Settings)()
    assert (settings.drafter, settings.k_matrix, settings.lenience) == ("cascade", ((3, 2), (0, 4)), 2.0)
    assert (settings.draft_len, settings.plan, settings.max_ngram) == ("auto", "p", 4)


def test_a_cascade_in_infer_reports_calls_and_both_conventions(capsys):
    small_pair.write(Path("pair"))
    Path("lines.txt").write_text("\n".join(small_pair.TEXTS), "utf-8")
    flags = ["--pair=pair", "--input=lines.txt", "--output_dir=out", "--drafter=cascade", "--k_matrix=2,1;0,2"]
    assert (
        cli.main(["infer", *flags, "--temperature=0", "--batch_size=3", "--gin.generate.Settings.buckets=(32,)"]) == 0
    )
    assert "level_calls_per_token" in capsys.readouterr().out
    metrics, timing = (json.loads(Path(f"out/lines-{name}.json").read_text("utf-8")) for name in ("metrics", "timing"))
    improvement = timing["standardised_walltime_improvement"]
    assert set(improvement) == {"by_parameters", "by_step"} and timing["decode_s"] > 0
    # Verifier and drafter have the same size, so a call of either costs 1.
    calls = metrics["verifier_calls_per_token"] + metrics["level_calls_per_token"][0]
    assert improvement["by_parameters"] == pytest.approx(1 / calls, abs=1e-3)
    summary = Path("out/lines-summary.md").read_text("utf-8")
    assert "counts calls; decode_s and tokens_per_s are real time" in summary
