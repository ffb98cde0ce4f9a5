"""Speculative decoding and speculative cascades for T5X models, in JAX.

    pair = speccascade_t5x.load(bundle)
    pair.generate(["a text"], rule="token_v3", alpha=0.3)

The layers, from the inside out: `core` (rules, verification), `models`, `drafting`, `decoding` (the one
loop), `runtime` and `checkpoints`, `cli`. Importing this package loads none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from speccascade_t5x.runtime import paths as _paths

if TYPE_CHECKING:
    from speccascade_t5x.runtime.generate import LoadedPair

__version__ = "0.1.0"
__all__ = ["load"]

_paths.install_checkout_finder()


def load(path: Any) -> LoadedPair:
    """Loads a bundle for decoding; see `runtime.generate.load`."""
    from speccascade_t5x.runtime import generate

    return generate.load(path)
