"""Keeps JAX from loading libtpu on a machine without a TPU, where it would log errors and lock out other processes."""

from __future__ import annotations

import glob
import importlib.util
import os
from pathlib import Path

_GOOGLE = "0x1ae0"  # vendor of TPU chips on the PCI bus
_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")


def settle() -> None:
    """Tells JAX to use the CPU if libtpu is installed only for its compiler and JAX_PLATFORMS is not set.

    Has no effect once JAX has looked for devices.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None or has_accelerator():
        return
    import jax

    if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # JAX adds its options as it loads
        jax.config.update("jax_platforms", "cpu")


def has_accelerator() -> bool:
    """Whether this machine has a TPU chip or an NVIDIA GPU; any other device must be named in JAX_PLATFORMS."""
    if any(os.path.exists(path) for path in _NVIDIA):
        return True
    vendors = (Path(path).read_text("ascii").strip() for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    return any(vendor == _GOOGLE for vendor in vendors)
