"""npz folders, whole and damaged."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.interfaces import Bound, UserError

from .tiny import TINY, assert_same, make_model, write_npz


def test_round_trip(tmp_path):
    model = make_model()
    write_npz(tmp_path, model)
    assert checkpoints.detect(tmp_path) == "npz"
    assert_same(checkpoints.load(tmp_path), model)


def test_fields_may_stand_below_config_with_others_around(tmp_path):
    model = make_model()
    write_npz(tmp_path, model, step=7)
    inner = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"network": "t5", "config": inner}))
    assert_same(checkpoints.load(tmp_path), model)


def test_another_shape_names_tensor_and_both_shapes(tmp_path):
    write_npz(tmp_path, make_model(), mlp_dim=12)
    tensor = "'decoder/layers_0/mlp/wi_0/kernel'"
    message = rf"params.npz does not .*{tensor} has shape \(8, 16\) but .* asks for \(8, 12\)"
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": None}, "config.json does not say 'emb_dim'"),
        ({"emb_dim": "8"}, "emb_dim = '8'"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"num_decoder_layers": 10**9}, "num_decoder_layers = 1000000000; it must be a whole number from 1 to 1000"),
        ({"mlp_activations": ["swoosh"]}, "swoosh"),
        ({"mlp_activations": "gelu"}, "list of names"),
        ({"dtype": "float33"}, "float33"),
        ({"scan_layers": True}, "scanned layers"),
    ],
)
def test_bad_configurations(tmp_path, changes, message):
    write_npz(tmp_path, make_model(), **changes)
    with pytest.raises(UserError, match=message):
        checkpoints.load(tmp_path)


def test_missing_or_broken_config(tmp_path):
    write_npz(tmp_path, make_model())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        checkpoints.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: No such file"):
        checkpoints.load(tmp_path)


def test_truncated_file(tmp_path):
    write_npz(tmp_path, make_model())
    path = tmp_path / "params.npz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="params.npz is damaged"):
        checkpoints.load(tmp_path)


def test_flipped_byte_is_noticed(tmp_path):
    model = make_model()
    write_npz(tmp_path, model)
    raw = bytearray((tmp_path / "params.npz").read_bytes())
    kernel = np.asarray(flat_params.flatten(model.params)["token_embedder/embedding"]).tobytes()
    raw[raw.index(kernel) + 100] ^= 1
    (tmp_path / "params.npz").write_bytes(raw)
    with pytest.raises(UserError, match="params.npz is damaged.*CRC"):
        checkpoints.load(tmp_path)


def test_not_a_number(tmp_path):
    model = make_model()
    flat = flat_params.flatten(model.params)
    flat["decoder/decoder_norm/scale"] = flat["decoder/decoder_norm/scale"].at[2].set(np.nan)
    write_npz(tmp_path, Bound(model.model, flat_params.nest(flat)))
    with pytest.raises(UserError, match="'decoder/decoder_norm/scale' holds NaN"):
        checkpoints.load(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    write_npz(tmp_path, make_model())
    bomb = np.array([print], dtype=object)
    np.savez(tmp_path / "params.npz", **{"token_embedder/embedding": bomb})
    with pytest.raises(UserError, match="Python objects"):
        checkpoints.load(tmp_path)


def test_header_that_promises_more_than_the_file_holds(tmp_path):
    """No allocation of a petabyte: the header is compared with the file first."""
    write_npz(tmp_path, make_model())
    huge = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 256)}
    with (
        zipfile.ZipFile(tmp_path / "params.npz", "w") as archive,
        archive.open("a.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, huge)
        file.write(b"1234")
    with pytest.raises(UserError, match="'a' is damaged: 4 bytes"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "text", [b"{'shape': (8, 8", b"{'shape': 8}", b"\xff", b"(" * 900, b"{'descr': 1, 'a': 2, 'b': 3}"]
)
def test_headers_that_are_no_python(tmp_path, text):
    write_npz(tmp_path, make_model())
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("a.npy", np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text)
    with pytest.raises(UserError, match="'a' is not a numpy array"):
        checkpoints.load(tmp_path)


def test_a_damaged_archive_is_told_in_a_short_line(tmp_path):
    """zipfile quotes the names it compares, whatever their length."""
    write_npz(tmp_path, make_model())
    raw = bytearray((tmp_path / "params.npz").read_bytes())
    raw[26:28] = b"\xff\x0f"  # the length of the first member's name
    (tmp_path / "params.npz").write_bytes(raw)
    with pytest.raises(UserError, match="params.npz is damaged or not an npz file") as caught:
        checkpoints.load(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["t5x_native", "t5x_v1_0"])
def test_reference_models(fixtures, name):
    folder = fixtures / name
    model = checkpoints.load(folder)
    with np.load(folder / "params.npz") as archive:
        for key, value in flat_params.flatten(model.params).items():
            np.testing.assert_array_equal(value, archive[key])
    assert model.model.config.mlp_activations == (("relu",) if name == "t5x_v1_0" else TINY.mlp_activations)
