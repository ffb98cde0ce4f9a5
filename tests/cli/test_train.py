"""`speccascade train`: flags to bindings, what it prints, and bad flags in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import gin
import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.cli import train
from speccascade_t5x.cli.__main__ import run_verb
from speccascade_t5x.common import paths
from speccascade_t5x.data import shards
from speccascade_t5x.text.vocabulary import ByteVocabulary
from training.training import quick_compiles

SMALL = """
from __gin__ import dynamic_registration
from speccascade_t5x.models import t5
t5.T5Config:
  vocab_size = 384
  emb_dim = 8
  num_heads = 2
  num_encoder_layers = 1
  num_decoder_layers = 1
  head_dim = 4
  mlp_dim = 16
"""


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder, spoken = tmp_path_factory.mktemp("corpora"), ByteVocabulary(extra_ids=125)
    ids = [np.array([*spoken.encode(text), 1]) for text in ("Größe", "Menü schließen", "über", "Öl", "Straße")]
    for split in ("train", "validation"):
        shards.write(folder / split, [(i, i) for i in ids * 4], name="copy", split=split, spoken=spoken)
    return folder


@pytest.fixture
def flags(corpora, tmp_path):
    (tmp_path / "small.gin").write_text(SMALL)
    return [
        *("--gin_file=runs/train.gin", f"--gin_file={tmp_path / 'small.gin'}"),
        *(f"--cached={corpora / 'train'}", f"--eval_cached={corpora / 'validation'}"),
        *(f"--output_dir={tmp_path / 'run'}", "--steps=4", "--log_every=2", "--checkpoint_every=2"),
        *("--inputs_len=32", "--targets_len=32", "--batch_size=4", "--gin.train.train.devices=1"),
    ]


def run(argv, capsys):
    code = run_verb(train.main, argv, "speccascade train")
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_and_its_continuation(flags, tmp_path, capsys):
    code, out, err = run([*flags, "--no_tensorboard"], capsys)
    assert code == 0, err
    assert "step 2/4  loss " in err and " tokens/s " in err and "min left" in err and "after step 0: " in err
    assert "padding_share" in out and "nll" in out and f"wrote {tmp_path / 'run' / 'train-summary.md'}" in out
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert checkpoints.load(tmp_path / "run").model.config.emb_dim == 8
    # The configuration left behind repeats the run, and continues it.
    again = [f"--gin_file={tmp_path / 'run' / 'config.gin'}", "--steps=6", "--no_tensorboard"]
    code, out, err = run(again, capsys)
    assert code == 0, err
    assert "continues after step 4" in err
    summary = json.loads((tmp_path / "run" / "train-summary.json").read_text())
    assert (summary["steps"], summary["resumed_from"]) == (6, 4)
    code, out, err = run([*flags, "--seed=3", "--no_tensorboard"], capsys)
    assert code == 2 and "belongs to another run" in err and len(err.strip().splitlines()) == 1


def test_tensorboard_files_or_a_word_about_them(flags, tmp_path, capsys):
    code, _, err = run(flags, capsys)
    assert code == 0, err
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert err.count("no TensorBoard files are written: tensorboard is not installed") == 1
        return
    for kind in ("train", "eval"):
        (file,) = (tmp_path / "run" / "tensorboard" / kind).iterdir()
        assert b"tokens_per_s" in file.read_bytes() if kind == "train" else b"nll" in file.read_bytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the configuration needs OUTPUT_DIR: set --gin.OUTPUT_DIR=VALUE"),
        (["--output_dir=out", "--steps=2", "--cached=x"], "name an architecture with --model, one of "),
        (["--output_dir=out", "--steps=2", "--model=restore_de_drafter"], "name either tokenised shards or a task"),
        (["--output_dir=out", "--steps=2", "--model=nothing"], "models/nothing.gin was not found"),
        (["--step=2"], "unknown flag '--step=2': did you mean '--steps'?"),
        (["--output_dir=out", "--steps=2", "--model=restore_de_drafter", "--cached=nowhere"], "nowhere does not exist"),
        (["--gin_file=runs/infer.gin"], "no gin file binds train.train.data: begin with a run file"),
        (["--output_dir=o", "--steps=0", "--model=restore_de_drafter", "--cached=x"], "steps=0 is outside its range"),
    ],
)
def test_bad_flags(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(argv, capsys)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("role", ["verifier", "drafter"])
def test_the_recipe_of_the_packaged_pair_names_its_models(role):
    """The two run files configure the architectures of the packaged pair."""
    from speccascade_t5x.cli import gin_flags
    from speccascade_t5x.models import t5
    from speccascade_t5x.training import train_loop

    given = [f"{name} = 'somewhere'" for name in ("OUTPUT_DIR", "CACHED", "TEACHER")[: 3 if role == "drafter" else 2]]
    gin_flags.load([f"runs/train_restore_de_{role}.gin"], given)
    packaged = checkpoints.load_bundle(paths.pretrained_dir() / "restore_de_pair")
    assert gin.get_configurable(t5.T5Config)() == getattr(packaged, role).model.config
    distill = gin.get_configurable(train_loop.TrainConfig)().distill
    assert (distill is not None) == (role == "drafter")


def test_the_loop_needs_no_edge_library():
    """Training from shards loads none of TensorFlow, seqio, gin and clu."""
    code = (
        "import sys; from speccascade_t5x.training import train, train_loop; from speccascade_t5x.data import packing\n"
        "print([n for n in ('tensorflow', 'seqio', 'gin', 'clu', 'sentencepiece') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.checkout_dir())
    assert done.stdout.strip() == "[]", done.stderr
