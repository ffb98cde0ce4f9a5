"""`speccascade train_deferral` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import gin
import pytest

from inference import small_pair
from speccascade_t5x.cli import __main__ as cli


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def test_a_packaged_task_into_a_bundle_that_infer_reads(corpus, capsys):
    small_pair.write(Path("pair"), table=False)
    flags = ["--task=restore_de", "--pair=pair", "--output_dir=out", "--loss=log", "--steps=2", "--batch_size=2"]
    flags += ["--gin.train_deferral.Data.shares={'fit': 0.5, 'held_out': 0.25, 'test': 0.25}"]
    # Steps this large lose on the folds left out, whatever the tiny pair says: nothing is learnt, and that is said.
    flags += ["--gin.train_deferral.HeadOptions.width=4", "--gin.fitting.FitConfig.learning_rate=30.0"]
    flags += ["--gin.train_deferral.train_deferral.calibrations=('temperature',)"]
    assert cli.main(["train_deferral", *flags]) == 0
    out, err = capsys.readouterr()
    assert "seed 0: left-out loss" in out and "learned gap" in out and "wrote out/bundle" in out
    assert "nothing was learnt: the kept head is the one the fit began with" in out
    assert "lossless at alpha < 0 and the drafter alone at alpha >= 0; collect more examples" in out
    assert "**Nothing was learnt:** the kept head is the one" in Path("out/deferral-report.md").read_text()
    assert "collected fit: 2 examples" in err and "Traceback" not in err and "note:" not in err
    assert "SPLIT = 'validation'" in Path("out/config.gin").read_text()
    report = json.loads(Path("out/deferral-report.json").read_text())
    assert len(report["alphas"]) == 10 and "label oracle (unreachable)" in report["curves"]
    assert {"config.gin", "deferral-report.md", "deferral-summary.json", "deferral-metrics.jsonl", "tensorboard"} <= {
        path.name for path in Path("out").iterdir()
    }
    Path("lines.txt").write_text("abc\n")
    assert cli.main(["infer", "--pair=out/bundle", "--input=lines.txt", "--rule=learned_gap", "--alpha=0.1"]) == 0
    gin.clear_config()
    capsys.readouterr()
    assert cli.main(["infer", "--pair=pair", "--input=lines.txt", "--rule=learned_gap", "--alpha=0.1"]) == 2
    assert "needs a fitted head or calibration, which this bundle does not hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir=new"], "name either tokenised shards or a task to collect on"),
        (["--task=restore_de"], "the configuration needs OUTPUT_DIR: set --gin.OUTPUT_DIR=VALUE"),
        (["--cached=nowhere", "--output_dir=new", "--objective=best"], "objective='best' is unknown"),
        (["--tsk=x"], "unknown flag '--tsk=x': did you mean '--task'?"),
    ],
)
def test_a_mistake_is_one_sentence(flags, message, capsys):
    assert cli.main(["train_deferral", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("speccascade train_deferral: ") and message in err and "Traceback" not in err
