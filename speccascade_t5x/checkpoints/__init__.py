"""Checkpoints in, bundles and exports out. The kind of a folder and the architecture in it are detected.

checkpoints.identify(path) -> Found         what a folder or a packaged name is
checkpoints.load(path) -> Bound             one model
checkpoints.load_bundle(path) -> Bundle     a pair with its vocabulary and settings
checkpoints.save_bundle(path, ...)
checkpoints.describe.describe(path)         what a folder holds, without reading a tensor
checkpoints.export.export(source, target)   from any kind to bundles, Orbax, T5X and Hugging Face
"""

from speccascade_t5x.checkpoints.bundle import Bundle, save_bundle
from speccascade_t5x.checkpoints.kinds import Found, identify
from speccascade_t5x.checkpoints.loading import bundle_folder, detect, load, load_bundle, open_model

__all__ = [
    "Bundle",
    "Found",
    "bundle_folder",
    "detect",
    "identify",
    "load",
    "load_bundle",
    "open_model",
    "save_bundle",
]
