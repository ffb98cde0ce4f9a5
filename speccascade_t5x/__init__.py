"""Speculative decoding and speculative cascades for T5X models, in JAX.

    pair = speccascade_t5x.load(bundle)
    pair.generate(["a text"], rule="token_v3", alpha=0.3)

The rooms, from the inside out: `core` (rules, verification), `text`, `models`, `drafting`, `deferral`, `decoding`
(the one loop), `checkpoints`, `distributed`, `data`, `inference`, `training`, `tpu`, `planning`, `evaluation`, `cli`.
Importing this package loads none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from speccascade_t5x import moved as _moved
from speccascade_t5x.common import paths as _paths

if TYPE_CHECKING:
    from speccascade_t5x.inference.generate import LoadedPair

__version__ = "0.2.0"
__all__ = ["load"]

_paths.install_checkout_finder()
_moved.install()


def load(path: Any) -> LoadedPair:
    """Loads a bundle for decoding; see `inference.generate.load`."""
    from speccascade_t5x.inference import generate

    return generate.load(path)
