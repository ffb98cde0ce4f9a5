"""`jax.jit` for programs that run longer than they compile: `conftest` has all others compiled in a hurry."""

from __future__ import annotations

import functools
import os

import jax

_HURRIED = "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]
_OPTIONS = {"xla_backend_optimization_level": 1} if _HURRIED else None
optimized_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
