"""The pair that travels with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import speccascade_t5x
from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.core import probs
from speccascade_t5x.tasks.folding import fold
from speccascade_t5x.training.deferral.pair_scores import scored_logits

PAIR = Path(speccascade_t5x.__file__).parent / "pretrained" / "restore_de_pair"
MEGABYTE = 10**6


def test_it_is_whole_and_small():
    bundle = checkpoints.load_bundle(PAIR)
    assert flat_params.count(bundle.verifier.params) == 5_509_888
    assert flat_params.count(bundle.drafter.params) == 225_984
    assert bundle.feature_lengths == {"inputs": 80, "targets": 96}
    assert bundle.decode == {"draft_len": 5, "start_id": 0, "eos_id": 1, "pad_id": 0}
    assert bundle.vocabulary.kind == "byte"
    assert "T5X" in bundle.description
    sizes = [file.stat().st_size for file in PAIR.rglob("*") if file.is_file()]
    assert sum(sizes) <= 30 * MEGABYTE and max(sizes) < 15 * MEGABYTE


def test_it_knows_the_text_it_restores():
    """Likelihood of the demo's references, teacher-forced; 5.5 nats a byte is what an untrained model gives."""
    bundle = checkpoints.load_bundle(PAIR)
    lines = (PAIR.parent / "demo_de.tsv").read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[1] for line in lines if not line.startswith("#")]
    inputs, targets = (padded(bundle.vocabulary, some) for some in ([fold(text) for text in texts], texts))
    nats = {}
    for name in ("drafter", "verifier"):
        logits, _ = scored_logits(getattr(bundle, name), inputs, targets)
        laws = np.asarray(probs.raw(logits, bundle.vocabulary.vocab_size))
        own = np.take_along_axis(laws, targets[..., None], axis=-1)[..., 0]
        nats[name] = -np.log(own[targets > 0]).mean()
    assert nats["verifier"] < nats["drafter"] < 0.25


def padded(vocabulary, texts: list[str]) -> np.ndarray:
    """Ids with EOS, [texts, longest]."""
    rows = [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]
    return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], np.int32)
