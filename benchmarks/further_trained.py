"""Members of a pair trained a little further on purpose, so that what they are sure of is no longer what they know.

For `benchmarks/deferral.py`: a drafter that has seen one slice of the domain only, and a verifier that was taught wrong
letters. Trained on the corpus's train split with the train loop; a run that was killed continues.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from speccascade_t5x.data import packing, shards
from speccascade_t5x.inference.generate import LoadedPair
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.tasks import folding, l10n
from speccascade_t5x.text.vocabulary import Vocabulary
from speccascade_t5x.training import losses, optimizers, train_loop

# Packages of the corpus whose names begin so.
GAMES = ("freedroidrpg", "freeciv", "lordsawar", "warzone2100", "wesnoth", "widelands")
_MAX_BYTES = 79  # of the longest text, as the pairs were trained
_LENGTH = 128  # of a packed row


class _Observer(train_loop.Observer):
    def logged(self, step: int, metrics: dict[str, float]) -> None:
        print(f"    step {step}  loss {metrics['loss']:.4f}", file=sys.stderr, flush=True)


def slice_drafter(pair: LoadedPair, folder: Path, steps: int) -> Bound:
    """The drafter after `steps` more updates on texts of games alone."""
    texts = german("train", lambda source: source.startswith(GAMES))
    return _trained(pair.drafter, corpus(pair.vocabulary, texts), folder, steps, rate=1e-3)


def noisy_verifier(pair: LoadedPair, folder: Path, steps: int, share: float = 0.15) -> Bound:
    """The verifier after `steps` more updates on targets of which a share of the tokens is wrong.

    A wrong token is another one of the same corpus, drawn by its frequency: what is learnt is doubt, more of it than
    the real data deserve.
    """
    clean, draw = corpus(pair.vocabulary, german("train")), np.random.default_rng(0)
    targets = np.array(clean.ids["targets"])
    inside = targets != clean.eos_id
    wrong, others = (draw.random(len(targets)) < share) & inside, targets[inside]
    targets[wrong] = others[draw.integers(0, len(others), int(wrong.sum()))]
    ends = clean.offsets["targets"]
    noisy = ((clean.inputs(i), targets[ends[i] : ends[i + 1]]) for i in range(len(clean)))
    return _trained(pair.verifier, shards.from_examples(noisy, pair.vocabulary), folder, steps, rate=3e-4)


def german(split: str, wanted: Callable[[str], bool] = lambda source: True) -> list[str]:
    """German texts of a split of the corpus, as long as pairs for restore_de were trained on, by source package."""
    rows = l10n.read_rows(l10n.corpus_dir() / f"{split}.tsv.gz")
    return [row.de for row in rows if wanted(row.source) and len(row.de.encode()) <= _MAX_BYTES]


def ids(spoken: Vocabulary, text: str) -> list[int]:
    """Token ids with EOS."""
    return [*spoken.encode(text), spoken.eos_id]


def corpus(spoken: Vocabulary, texts: Iterable[str]) -> shards.Corpus:
    """Texts with their folded forms as inputs."""
    encode = lambda text: np.array(ids(spoken, text), np.int32)  # noqa: E731
    return shards.from_examples(((encode(folding.fold(text)), encode(text)) for text in texts), spoken)


def _trained(bound: Bound, data: shards.Corpus, folder: Path, steps: int, rate: float) -> Bound:
    config = train_loop.TrainConfig(
        steps=steps,
        optimizer=optimizers.AdamW(optimizers.Schedule("cosine", base=rate, warmup_steps=10)),
        loss=losses.LossConfig(normalizer="real_tokens"),
        checkpoint_every=100,
        log_every=50,
    )
    batches = packing.Packed(data, 16, _LENGTH, _LENGTH)
    result = train_loop.train_loop(
        bound.model.config, batches, config, output_dir=folder, start_from=bound.params, observer=_Observer()
    )
    about = {"steps": result.step, "examples": len(data), "tokens": result.tokens, "learning_rate": rate}
    (folder / "about.json").write_text(json.dumps(about) + "\n")
    return Bound(bound.model, result.bound.params)
