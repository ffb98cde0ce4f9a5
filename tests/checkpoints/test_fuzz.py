"""Bits flipped and ends cut off in real checkpoints: a clear error, or the very same model."""

from __future__ import annotations

import contextlib
import shutil

import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.checkpoints.export import export
from speccascade_t5x.interfaces import UserError

KINDS = {
    "native": "t5x_native/checkpoint_3",
    "orbax": "t5x_orbax/checkpoint_3",
    "huggingface": "hf_t5_v1_0",
    "npz": "t5x_v1_0",
}


def files_of(folder, kind):
    """The files a reader of this kind looks at."""
    if kind == "npz":
        return [folder / "params.npz", folder / "config.json"]
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if kind == "native":  # the optimizer's arrays are not opened
        files = [file for file in files if not file.parent.name.startswith("state.")]
    if kind == "huggingface":
        files = [file for file in files if file.name in ("config.json", "model.safetensors")]
    return files


def damage(raw, draw):
    """One flipped bit, or an end cut off."""
    if draw.random() < 0.25:
        return raw[: draw.integers(len(raw))]
    at, bit = draw.integers(len(raw)), draw.integers(8)
    return raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :]


def may_differ(kind, file, raw, changed):
    """Whether the change is in plain values of one tensor, for which the format has no checksum.

    safetensors has none at all; Orbax compresses with zstd, which keeps what it cannot compress as it is.
    """
    if len(raw) != len(changed):
        return False
    at = next(i for i in range(len(raw)) if raw[i] != changed[i])
    if kind == "huggingface" and file.suffix == ".safetensors":
        return at >= 8 + int.from_bytes(raw[:8], "little")
    return kind == "orbax" and file.parent.name == "d"


def run(folder, kind, seed, rounds):
    """Damages one file after another, loads, and puts it right again. Returns how often an error was raised."""
    expected = flat_params.flatten(checkpoints.load(folder).params)
    model = checkpoints.open_model(folder).model
    draw = np.random.default_rng(seed)
    files = files_of(folder, kind)
    refused = 0
    for _ in range(rounds):
        file = files[draw.integers(len(files))]
        raw = file.read_bytes()
        if not raw:
            continue
        changed = damage(raw, draw)
        file.write_bytes(changed)
        try:
            found = checkpoints.load(folder)
        except UserError as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
        else:
            values = flat_params.flatten(found.params)
            assert set(values) == set(expected), file
            different = [name for name in expected if not np.array_equal(values[name], expected[name])]
            assert len(different) <= may_differ(kind, file, raw, changed), (file, different)
            # What a configuration says beyond the shapes has no second witness.
            assert found.model == model or file.name in ("config.json", "config.gin"), file
        finally:
            file.write_bytes(raw)
    return refused


@pytest.fixture(params=[*KINDS, "bundle"])
def case(request, fixtures, tmp_path):
    kind = request.param
    if kind == "bundle":
        export(fixtures / "restore_de_drafter", tmp_path / "copy", "bundle", vocabulary="bytes")
        return tmp_path / "copy", kind
    folder = shutil.copytree(fixtures / KINDS[kind], tmp_path / "checkpoint_3", ignore=_bulk)
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            file.chmod(0o755 if file.is_dir() else 0o644)
    return folder, kind


def _bulk(folder, names):
    return [name for name in names if name.startswith(("checkpoint_", "expected", "train_continue"))]


def test_damage(case):
    assert run(*case, seed=1, rounds=12) > 2


@pytest.mark.slow
def test_200_damages(case):
    assert run(*case, seed=2, rounds=200) > 20
