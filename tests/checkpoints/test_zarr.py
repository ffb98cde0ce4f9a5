"""zarr arrays of every chunking, and files that hold more or less than their header says."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import tensorstore

from speccascade_t5x.checkpoints import stores, tensors, zarr
from speccascade_t5x.interfaces import UserError


def stored(path, values, chunks, compressor, separator="."):
    metadata = {
        "shape": values.shape,
        "chunks": chunks,
        "dtype": "<f4",
        "compressor": compressor,
        "dimension_separator": separator,
    }
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(values).result()
    return zarr.open_array(path, "a")


@pytest.mark.parametrize("compressor", [None, {"id": "gzip", "level": 1}, {"id": "zlib", "level": 9}])
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((), ()), ((7,), (3,)), ((7, 5), (3, 5)), ((7, 5), (2, 3)), ((4, 3, 5), (3, 2, 2)), ((0, 3), (1, 3))],
)
@pytest.mark.parametrize("block", [8, 2**20])
def test_any_chunking(tmp_path, monkeypatch, shape, chunks, compressor, block):
    monkeypatch.setattr(stores, "BLOCK_BYTES", block)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = tensors.to_host("a", stored(tmp_path / "a", values, chunks, compressor, "/" if compressor else "."), "x")
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_tensorstore_reads_what_is_written(tmp_path, dtype):
    values = np.arange(60).reshape(20, 3).astype(np.dtype(tensorstore.dtype(dtype).numpy_dtype))
    metadata = zarr.write_array(tmp_path / "a", values, 4 * 3 * 7)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), values)
    assert metadata["shape"] == [20, 3] and metadata["chunks"][0] * 3 * values.itemsize <= 4 * 3 * 7
    tensor = zarr.open_array(tmp_path / "a", "a")
    np.testing.assert_array_equal(tensors.to_host("a", tensor, "x", values.dtype), values)


def test_zeros_are_written(tmp_path):
    zarr.write_array(tmp_path / "a", np.zeros((4, 2), np.float32), 8)
    assert (tensors.to_host("a", zarr.open_array(tmp_path / "a", "a"), "x") == 0).all()


def test_a_chunk_that_unpacks_to_more_is_refused(tmp_path):
    tensor = stored(tmp_path / "a", np.ones((4, 2), np.float32), (4, 2), {"id": "gzip", "level": 1})
    (tmp_path / "a" / "0.0").write_bytes(gzip.compress(np.ones(9, np.float32).tobytes()))
    with pytest.raises(UserError, match=r"'a' cannot be read: .*End of data expected"):
        tensors.to_host("a", tensor, "x")
    (tmp_path / "a" / "0.0").write_bytes(gzip.compress(np.ones(7, np.float32).tobytes()))
    with pytest.raises(UserError, match=r"'a' cannot be read: .*[Nn]ot enough data"):
        tensors.to_host("a", tensor, "x")
