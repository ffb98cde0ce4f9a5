"""The jobs of these tests, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

from hosts.commands import alone
from inference import small_pair
from speccascade_t5x import checkpoints
from speccascade_t5x.data import shards
from speccascade_t5x.text.vocabulary import ByteVocabulary

LINES = [f"zeile {i}" for i in range(240)]
CHUNKS = 60
INFER = ("infer", "--pair=pair", "--input=lines.txt", "--batch_size=2", "--gin.infer.infer.batches_per_chunk=2")
_RECORDS = "lines-predict.jsonl-00000-of-00001"

EVERY = 10  # steps between checkpoints
TRAINING = (  # on whatever data is named
    *("train", "--gin_file=runs/train.gin", "--gin_file=small.gin", "--no_tensorboard", "--batch_size=4"),
    *(f"--checkpoint_every={EVERY}", f"--log_every={EVERY}", "--gin.train_loop.TrainConfig.keep=2"),
)
TRAIN = (*TRAINING, "--cached=corpus", "--inputs_len=16", "--targets_len=16")
_SMALL = """
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


def for_decoding(folder: Path) -> Path:
    """A pair, lines, and in `one` what one host makes of them."""
    small_pair.write(folder / "pair", table=False)
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n", "utf-8")
    alone(folder, *INFER, "--output_dir=one")
    return folder


def chunks(folder: Path) -> dict[str, int]:
    """Finished chunks and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob(f"*-of-{CHUNKS:05d}.jsonl")}


def check_records(folder: Path, other: Path) -> None:
    """The files of two runs are the same, and nothing else is left."""
    for name in (_RECORDS, "lines-metrics.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert not list(folder.rglob("*chunks*"))


def for_training(folder: Path) -> Path:
    """A corpus and a model."""
    spoken = ByteVocabulary(extra_ids=125)
    ids = [np.array([*spoken.encode(text), 1]) for text in ("Größe", "Menü", "schließen", "über", "Öl", "Straße")]
    shards.write(folder / "corpus", [(i, i) for i in ids * 4], name="copy", split="train", spoken=spoken)
    (folder / "small.gin").write_text(_SMALL)
    return folder


def newest(folder: Path) -> int:
    """Step of the newest whole checkpoint."""
    names = [path.name.partition("_")[2] for path in folder.glob("checkpoint_*")]
    return max([int(name) for name in names if name.isdigit()], default=0)


def check_parameters(folder: Path, other: Path) -> None:
    """The newest checkpoints of two runs hold the same step and the same bits."""
    assert newest(folder) == newest(other) > 0
    found = dict(jax.tree.leaves_with_path(checkpoints.load(folder).params))
    for name, leaf in jax.tree.leaves_with_path(checkpoints.load(other).params):
        np.testing.assert_array_equal(leaf, found[name])


def losses(folder: Path) -> dict[int, float]:
    """The curve of training; no step is reported twice."""
    lines = (folder / "train-metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["loss"] for row in rows}
