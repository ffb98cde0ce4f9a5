"""`speccascade export`: flags, gin files, what is printed, and mistakes."""

from __future__ import annotations

import dataclasses

import gin
import numpy as np
import pytest

from checkpoints.tiny import assert_same, make_model, write_npz
from speccascade_t5x import checkpoints
from speccascade_t5x.cli import __main__ as cli


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


@pytest.fixture
def source(tmp_path):
    write_npz(tmp_path / "in", make_model())
    return tmp_path / "in"


def run(capsys, *argv):
    code = cli.main(["export", *argv])
    return code, *capsys.readouterr()


def test_flags(source, tmp_path, capsys):
    target = tmp_path / "checkpoint_9"
    flags = ["--format=t5x", "--step=9", "--max_file_mb=0.02", "--verify", "--dtype=bfloat16"]
    code, out, err = run(capsys, f"--source={source}", f"--target={target}", *flags)
    assert code == 0 and err == ""
    assert "t5x, step 9" in out and "parameters read back as written" in out and out.endswith(f"wrote {target}\n")
    opened = checkpoints.open_model(target)
    assert opened.step == 9 and {leaf.dtype.name for leaf in opened.leaves.values()} == {"bfloat16"}


def test_gin_file_and_bindings(source, tmp_path, capsys):
    (tmp_path / "mine.gin").write_text(
        f"include 'runs/export.gin'\nSOURCE = '{source}'\nFORMAT = 'bundle'\nexport.export.vocabulary = 'bytes'\n"
    )
    code, _, err = run(
        capsys, f"--gin_file={tmp_path}/mine.gin", f"--target={tmp_path}/pair", "--gin.export.export.max_len=7"
    )
    assert code == 0, err
    bundle = checkpoints.load_bundle(tmp_path / "pair")
    assert bundle.feature_lengths["targets"] == 7 and bundle.vocabulary.vocab_size == 384
    assert_same(bundle.verifier, make_model())


def test_mistakes_are_one_line(source, tmp_path, capsys):
    good = [f"--source={source}", f"--target={tmp_path}/out", "--format=orbax"]
    for argv, message in (
        (good[:2], "needs FORMAT"),
        ([*good[:2], "--format=zip"], "no format 'zip': use one of bundle, orbax, t5x, huggingface"),
        ([*good, "--optimiser_state"], "did you mean '--optimizer_state'?"),
        ([*good, "--optimizer_state"], "has no optimizer state to take along"),
        ([*good, "--gin.export.export.dtpe='float16'"], "did you mean 'dtype'?"),
        ([f"--source={tmp_path}/none", *good[1:]], "does not exist; a checkpoint is"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and out == "" and message in err, err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_pair_whose_vocabularies_do_not_fit(source, tmp_path, capsys):
    narrow = make_model(dataclasses.replace(make_model().model.config, vocab_size=200))
    write_npz(tmp_path / "small", narrow)
    flags = [f"--drafter={tmp_path}/small", "--vocabulary=bytes", "--format=bundle"]
    code, _, err = run(capsys, f"--source={source}", f"--target={tmp_path}/pair", *flags)
    assert code == 2 and "has 384 pieces but the verifier 384 and the drafter 200 logits" in err
    assert not (tmp_path / "pair").exists()
    assert np.asarray(narrow.params["token_embedder"]["embedding"]).shape[0] == 200
