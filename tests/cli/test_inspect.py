"""`speccascade inspect` on every kind of checkpoint, and on what is none."""

from __future__ import annotations

import json
import shutil

import pytest

from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.common import paths


def run(capsys, *argv):
    code = cli.main(["inspect", *map(str, argv)])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "kind", "step", "family"),
    [
        ("t5x_native/checkpoint_3", "native T5X checkpoint", "3", "T5 1.1 (gelu x linear MLP, own logits)"),
        ("t5x_orbax", "T5X checkpoint written by Orbax", "3", "T5 1.1 (gelu x linear MLP, own logits)"),
        ("hf_t5_v1_0", "Hugging Face folder", "not recorded", "T5 1.0 (relu MLP, tied logits)"),
        ("t5x_v1_0", "npz folder", "not recorded", "T5 1.0 (relu MLP, tied logits)"),
    ],
)
def test_it_tells_the_essentials(fixtures, capsys, name, kind, step, family):
    code, out, err = run(capsys, fixtures / name)
    assert code == 0 and err == ""
    lines = {line[:14].strip(): line[14:] for line in out.splitlines()}
    assert (lines["kind"], lines["step"], lines["model"]) == (kind, step, family)
    assert lines["parameters"].startswith("57,984 " if "1.1" in family else "68,288 ")
    assert lines["stored as"].startswith("float32 (") and lines["logits"] == "128"
    assert lines["vocabulary"] == "not stored with the checkpoint"


def test_the_packaged_bundle_as_json(capsys):
    code, out, err = run(capsys, "restore_de_pair", "--json", "--verify")
    assert code == 0 and err == ""
    found = json.loads(out)
    assert found["kind"] == "bundle" and list(found["models"]) == ["verifier", "drafter"]
    assert found["models"]["verifier"]["parameters"] == 5_509_888
    assert found["models"]["drafter"]["architecture"]["emb_dim"] == 64
    assert found["vocabulary"]["kind"] == "byte" and found["feature_lengths"] == {"inputs": 80, "targets": 96}


def test_what_a_bundle_says_of_itself_forges_no_line(tmp_path, capsys):
    shutil.copytree(paths.pretrained_dir() / "restore_de_pair", tmp_path / "pair")
    manifest = json.loads((tmp_path / "pair" / "bundle.json").read_text("utf-8"))
    manifest["description"] = "safe\nstep          9\tand\rmore"
    (tmp_path / "pair" / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    code, out, _ = run(capsys, tmp_path / "pair")
    assert code == 0
    assert "description   safe\\nstep          9\\tand\\rmore" in out.splitlines()


def test_mistakes_are_one_line(tmp_path, capsys):
    for argv, message in (
        ([tmp_path / "none"], "does not exist; a checkpoint is a bundle"),
        ([tmp_path], "holds no checkpoint; looked for a bundle"),
        ([tmp_path, "--jsn"], "unknown flag '--jsn': did you mean '--json'?"),
        ([], "required: PATH"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and out == "" and message in err and err.count("\n") == 1
