"""A tiny model, batches to train it on, and an observer that remembers; shared by the training tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from speccascade_t5x.models.t5 import T5Config
from speccascade_t5x.training import train_loop
from speccascade_t5x.training.optimizers import Adafactor, Schedule

MODEL = T5Config(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=32,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.1,
)
FAST = Adafactor(Schedule("constant", base=0.03, warmup_steps=0))


@contextlib.contextmanager
def quick_compiles(folder: Path) -> Iterator[None]:
    """Compiles without most optimizations, and what was compiled before not again: the models here run for moments."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_disable_most_optimizations": True,
    }
    before = {name: getattr(jax.config, name, False) for name in settings}  # the last has no attribute
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


class Copying:
    """Batches of ids to be copied, as wide as `widths` say in turn; a pure function of the step."""

    padding_share = 0.0

    def __init__(self, rows: int = 8, seed: int = 0, widths: tuple[int, ...] = (8,), broken_from: int | None = None):
        self.rows, self.seed, self.widths, self.broken_from = rows, seed, widths, broken_from
        self.fingerprint = f"copying {rows} {seed} {widths}"
        self.asked: list[int] = []

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        self.asked.append(step)
        random = np.random.default_rng([self.seed, step])
        width = self.widths[step % len(self.widths)]
        ids = random.integers(2, 12, (self.rows, width)).astype(np.int32)
        lengths = random.integers(width // 2, width + 1, self.rows)
        ids[np.arange(width) >= lengths[:, None]] = 0
        weights = (ids > 0).astype(np.float32)
        if self.broken_from is not None and step >= self.broken_from:
            weights[0, 0] = np.nan
        return {
            "encoder_input_tokens": ids,
            "decoder_input_tokens": np.pad(ids, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": ids,
            "decoder_loss_weights": weights,
        }


class Remembering(train_loop.Observer):
    """Keeps what it is told as (event, step, metrics)."""

    def __init__(self):
        self.events: list[tuple] = []

    def started(self, step, steps, output_dir):
        self.events.append(("started", step, steps))

    def logged(self, step, metrics):
        self.events.append(("logged", step, metrics))

    def evaluated(self, step, metrics):
        self.events.append(("evaluated", step, metrics))

    def saved(self, step, path):
        self.events.append(("saved", step, path))

    def steps(self, event):
        return [found[1] for found in self.events if found[0] == event]
