"""A trained drafter and verifier on real text: greedy equality, and acceptance as computed."""

from __future__ import annotations

import gzip
import math

import jax
import numpy as np
import pytest

from speccascade_t5x import checkpoints, decoding
from speccascade_t5x.common import paths
from speccascade_t5x.core import rules
from speccascade_t5x.drafting.stop import Confidence
from speccascade_t5x.interfaces import SOURCE_ACCEPTED, SOURCE_RESIDUAL
from speccascade_t5x.tasks.folding import fold

LENGTH, MAX_LEN = 80, 96
BUNDLE = paths.pretrained_dir() / "restore_de_pair"
pytestmark = pytest.mark.skipif(
    not (BUNDLE / "bundle.json").is_file(), reason="needs the packaged pair restore_de_pair, which this checkout lacks"
)


@pytest.fixture(scope="module")
def pair() -> checkpoints.Bundle:
    return checkpoints.load_bundle(BUNDLE)


def prompts(texts: list[str]) -> np.ndarray:
    """Folded texts as byte ids with EOS, [rows, LENGTH]."""
    rows = [[b + 3 for b in fold(text).encode()][: LENGTH - 1] + [1] for text in texts]
    return np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)


def corpus_rows(shared, split: str) -> list[str]:
    with gzip.open(shared / "data" / "l10n_en_de" / f"{split}.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        texts = [line.split("\t")[1] for line in file]
    return [text for text in texts if len(text.encode()) < LENGTH]


def options(pair, rows: np.ndarray, temperature: float, **config) -> dict:
    return {
        "inputs": {"encoder_input_tokens": rows},
        "config": decoding.DecodeConfig(MAX_LEN, vocab_size=pair.vocabulary.vocab_size, **config),
        "sampling": decoding.Sampling(temperature=np.float32(temperature)),
        "key": jax.random.key(0),
        "example_ids": np.arange(len(rows)),
    }


def demo_rows() -> np.ndarray:
    lines = (paths.pretrained_dir() / "demo_de.tsv").read_text(encoding="utf-8").splitlines()
    return prompts([line.split("\t")[1] for line in lines if not line.startswith("#")])


@pytest.fixture(scope="module")
def alone(pair) -> decoding.Output:
    """The verifier's greedy decode of the demo's texts."""
    return decoding.autoregressive(model=pair.verifier, **options(pair, demo_rows(), 0.0))


@pytest.mark.parametrize("draft_len", [3, 7])
def test_greedy_lossless_is_the_verifiers_own_output(pair, alone, draft_len):
    chosen = options(pair, demo_rows(), 0.0, draft_len=draft_len)
    both = decoding.speculative(drafter=pair.drafter, verifier=pair.verifier, rule=rules.Lossless(), **chosen)
    np.testing.assert_array_equal(both.tokens, alone.tokens)
    np.testing.assert_allclose(both.log_probs, alone.log_probs, atol=1e-3)
    counts = jax.device_get(both.counts)
    assert counts.accepted.sum() > 0.95 * counts.examined.sum()
    assert counts.rounds.sum() < counts.committed.sum() / (0.7 * draft_len)


def test_greedy_lossless_with_dynamic_drafts(pair, alone):
    """The verifier's greedy output, whatever the drafter's confidence does to the draft lengths."""
    chosen = options(pair, demo_rows(), 0.0, draft_len=5) | {"draft_stop": Confidence(0.9)}
    both = decoding.speculative(drafter=pair.drafter, verifier=pair.verifier, rule=rules.Lossless(), **chosen)
    np.testing.assert_array_equal(both.tokens, alone.tokens)
    counts = jax.device_get(both.counts)
    assert counts.rounds.sum() < counts.drafted.sum() < 5 * counts.rounds.sum()  # some drafts were cut, not all


@pytest.mark.slow
def test_greedy_lossless_is_the_verifiers_own_output_on_the_whole_test_split(pair, shared):
    texts = corpus_rows(shared, "test")
    assert len(texts) > 500
    for start in range(0, len(texts), 128):
        rows = prompts((texts[start : start + 128] + texts[:128])[:128])  # the last batch filled up
        alone = decoding.autoregressive(model=pair.verifier, **options(pair, rows, 0.0))
        both = decoding.speculative(
            drafter=pair.drafter, verifier=pair.verifier, rule=rules.Lossless(), **options(pair, rows, 0.0)
        )
        np.testing.assert_array_equal(both.tokens, alone.tokens)


@pytest.mark.parametrize("rule", [rules.Lossless(), rules.Opt(alpha=np.float32(0.1))], ids=["lossless", "opt"])
def test_measured_acceptance_is_the_computed_one(pair, rule):
    """Rejections against the sum of r D_TV(p, q) over the examined positions, within 5 standard deviations.

    A drafted token is rejected with that probability whatever came before, so the difference is a martingale.
    """
    rows = demo_rows()
    output = decoding.speculative(
        drafter=pair.drafter, verifier=pair.verifier, rule=rule, **options(pair, rows, 1.0, trace=True, num_samples=4)
    )
    examined = np.isin(output.source, (SOURCE_ACCEPTED, SOURCE_RESIDUAL))
    accepted = (np.asarray(output.source) == SOURCE_ACCEPTED).sum()
    assert accepted == output.counts.accepted.sum()
    assert examined.sum() == output.counts.examined.sum() > 2000
    rejection = np.asarray(output.trace.deferral * output.trace.total_variation)[examined]
    assert rejection.max() > 0.3  # the two models do differ
    noise = math.sqrt((rejection * (1 - rejection)).sum())
    assert 5 * noise < 0.5 * rejection.sum()  # half as many, or twice, would be seen
    assert abs(examined.sum() - accepted - rejection.sum()) < 5 * noise
