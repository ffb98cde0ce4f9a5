"""T5X checkpoints, native and Orbax: as written by T5X, by an attacker, and by a full disk."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import http.server
import json
import shutil
import threading

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import architecture, flat_params, t5x_native
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models.t5 import T5

from .tiny import TINY, assert_same, make_model, spec_of, write_index, write_native

EMBEDDING = "token_embedder/embedding"


@pytest.fixture
def native(tmp_path):
    return write_native(tmp_path / "model" / "checkpoint_3", make_model())


def edited(tmp_path, **changes):
    """A checkpoint whose embedding has another index entry."""
    edit = lambda specs: specs[EMBEDDING].update(changes)  # noqa: E731
    return write_native(tmp_path / "checkpoint_1", make_model(), edit=edit)


def test_native_round_trip_from_shapes_alone(native):
    assert checkpoints.detect(native) == "t5x_native"
    assert_same(checkpoints.load(native), make_model())


@pytest.mark.parametrize("tied", [True, False])
def test_ungated_and_tied_are_seen_in_the_shapes(tmp_path, tied):
    model = make_model(dataclasses.replace(TINY, mlp_activations=("relu",), logits_via_embedding=tied))
    assert_same(checkpoints.load(write_native(tmp_path / "checkpoint_0", model)), model)


def test_many_chunks(tmp_path):
    assert_same(
        checkpoints.load(write_native(tmp_path / "checkpoint_1", make_model(), chunks=(5, 3))),
        make_model(),
    )


def test_index_from_cloud_storage_reads_the_files_beside_it(tmp_path):
    folder = write_native(tmp_path / "checkpoint_1", make_model(), driver="gcs", bucket="t5x-dummy-bucket")
    assert_same(checkpoints.load(folder), make_model())


def test_path_at_the_top_of_an_old_spec(tmp_path):
    path = spec_of(EMBEDDING, np.zeros(1))["kvstore"]["path"]
    assert_same(checkpoints.load(edited(tmp_path, kvstore={"driver": "file"}, path=path)), make_model())


def test_tensors_inside_the_index(tmp_path):
    """T5X keeps tensors without partitioning axes in the msgpack itself, packed by Flax."""
    flat = {name: np.asarray(leaf) for name, leaf in flat_params.flatten(make_model().params).items()}
    (tmp_path / "checkpoint").write_bytes(
        flax.serialization.msgpack_serialize({"version": 3, "optimizer": {"target": flat_params.nest(flat)}})
    )
    assert_same(checkpoints.load(tmp_path), make_model())


def test_bfloat16_becomes_float32(tmp_path):
    folder = write_native(tmp_path / "checkpoint_1", make_model())
    path = folder / "target.token_embedder.embedding"
    shutil.rmtree(path)
    value = np.asarray(make_model().params["token_embedder"]["embedding"]).astype(ml_dtypes.bfloat16)
    metadata = {
        "shape": value.shape,
        "chunks": value.shape,
        "dtype": "bfloat16",
        "compressor": None,
    }
    store = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": metadata,
    }
    tensorstore.open(store, create=True).result().write(value).result()
    found = checkpoints.load(folder).params["token_embedder"]["embedding"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, value.astype(np.float32))


def test_newest_step_is_taken(native):
    write_native(native.parent / "checkpoint_20", make_model(seed=1))
    (native.parent / "checkpoint_30.orbax-checkpoint-tmp-1").mkdir()
    (native.parent / "tmp_1_checkpoint_40").mkdir()
    assert checkpoints.detect(native.parent) == "t5x_steps"
    assert_same(checkpoints.load(native.parent), make_model(seed=1))
    (native.parent / "checkpoint_50").mkdir()
    with pytest.raises(UserError, match="checkpoint_50 holds no checkpoint"):
        checkpoints.load(native.parent)


def test_config_file_gives_what_shapes_cannot(native):
    config = dataclasses.replace(TINY, mlp_activations=("silu", "linear"), dropout_rate=0.1, dtype="bfloat16")
    (native.parent / "config.json").write_text(json.dumps({"config": dataclasses.asdict(config)}))
    assert checkpoints.load(native).model == T5(config)
    (native / "config.gin").write_text(
        "from t5x.examples.t5 import network\nRATE = 0.2\nnetwork.T5Config:\n  dropout_rate = "
        "%RATE  # a macro\n"
        "  emb_dim = @other()\n  mlp_activations = ('silu',\n    'linear')\nOTHER.emb_dim = 9\n"
        "network.T5Config.dtype = \\\n    'bfloat16'\n"
    )
    assert checkpoints.load(native).model.config == dataclasses.replace(config, dropout_rate=0.2)


def test_config_that_disagrees_names_the_tensor(native):
    (native.parent / "config.gin").write_text("network.T5Config.emb_dim = 16\n")
    with pytest.raises(UserError, match=r"checkpoint_3 does not .* \(8,\) but the architecture asks for \(16,\)"):
        checkpoints.load(native)


def test_foreign_config_files_beside_are_left_alone(native):
    (native.parent / "config.json").write_text('{"learning_rate": 1}')
    assert_same(checkpoints.load(native), make_model())


@pytest.mark.parametrize("path", ["/etc/", "../../secret/", "a/../../b/", "..\\b/", "", "/"])
def test_paths_out_of_the_folder_are_refused(tmp_path, path):
    with pytest.raises(UserError, match=r"token_embedder/embedding' has the unsafe path|gives no path"):
        checkpoints.load(edited(tmp_path, kvstore={"driver": "file", "path": path}))


def test_links_out_of_the_folder_are_refused(native, tmp_path):
    array = native / "target.token_embedder.embedding"
    array.rename(tmp_path / "elsewhere")
    array.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link that leads out of its checkpoint"):
        checkpoints.load(native)


@pytest.mark.parametrize(
    "kvstore",
    [
        {"driver": "http", "base_url": "http://127.0.0.1", "path": "x/"},
        {"driver": "gcs", "bucket": "someone-else", "path": "x/"},
        {"driver": "s3", "bucket": "t5x-dummy-bucket", "path": "x/"},
        {"path": "x/"},
    ],
)
def test_other_storage_is_refused(tmp_path, kvstore):
    with pytest.raises(UserError, match="only files in the folder are read"):
        checkpoints.load(edited(tmp_path, kvstore=kvstore))


@pytest.mark.parametrize("changes", [{"driver": "n5"}, {"driver": "json"}, {"kvstore": "file:///etc/passwd"}])
def test_other_array_drivers_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match="only zarr is read"):
        checkpoints.load(edited(tmp_path, **changes))


@pytest.fixture
def elsewhere(tmp_path):
    """(index folder, folder of the arrays): a checkpoint whose arrays were left where they are."""
    arrays = write_native(tmp_path / "arrays", make_model())
    folder = tmp_path / "checkpoint_3"
    folder.mkdir()

    def point(**kvstore):
        index = msgpack.unpackb((arrays / "checkpoint").read_bytes())
        for spec in leaves(index["optimizer"]["target"]):
            spec["kvstore"] = {"path": spec["kvstore"]["path"], **kvstore}
            if kvstore["driver"] == "file":
                spec["kvstore"]["path"] = f"{arrays}/{spec['kvstore']['path']}"
        (folder / "checkpoint").write_bytes(msgpack.packb(index))
        return folder

    return point, arrays


def leaves(node):
    if "driver" in node:
        return [node]
    return [leaf for child in node.values() for leaf in leaves(child)]


def test_arrays_elsewhere_are_read_where_the_user_names_the_driver(elsewhere):
    point, arrays = elsewhere
    folder = point(driver="file")
    with pytest.raises(UserError, match=r"unsafe path .*; if you trust its origin, allow drivers by name"):
        checkpoints.load(folder)
    assert_same(checkpoints.load(folder, allow_drivers=["file"]), make_model())
    with pytest.raises(UserError, match="stored with driver 'file', not one of those you allow: gcs, s3"):
        checkpoints.load(folder, allow_drivers=("s3", "gcs"))
    (arrays / "target.decoder.logits_dense.kernel" / "0.0").unlink()
    with pytest.raises(UserError, match="decoder/logits_dense/kernel"):
        checkpoints.load(folder, allow_drivers=["file"])


def test_arrays_on_a_server(elsewhere):
    point, arrays = elsewhere
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=arrays)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = point(driver="http", base_url=f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(UserError, match="driver 'http'; only files in the folder are read"):
            checkpoints.load(folder)
        assert_same(checkpoints.load(folder, allow_drivers=["http"]), make_model())
        server.shutdown()


@pytest.mark.parametrize(
    "spec",
    [
        {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": "/nowhere/"}}},
        {"driver": "downsample", "base": {"driver": "zarr", "kvstore": {"driver": "memory"}}},
        {"driver": "zarr", "kvstore": "file:///nowhere/"},
        {"driver": "n5", "kvstore": {"driver": "http", "base_url": "http://127.0.0.1:9"}},
    ],
)
def test_a_named_driver_allows_no_other(tmp_path, spec):
    with pytest.raises(UserError, match="not one of those you allow: http|names no driver"):
        checkpoints.load(edited(tmp_path, **spec), allow_drivers=["http"])


def test_missing_chunk_is_not_read_as_zeros(native):
    (native / "target.decoder.logits_dense.kernel" / "0.0").unlink()
    with pytest.raises(UserError, match="chunk '0.0' of tensor 'decoder/logits_dense/kernel' is missing"):
        checkpoints.load(native)


def test_truncated_chunk_names_the_tensor(native):
    chunk = native / "target.decoder.logits_dense.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-50])
    with pytest.raises(UserError, match="'decoder/logits_dense/kernel' cannot be read"):
        checkpoints.load(native)


def change_zarray(folder, **changes):
    path = folder / "target.token_embedder.embedding" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2**40, 8], "chunks": [2**40, 8]}, "too short to hold"),
        ({"shape": [2**40, 8]}, "fewer are here"),
        ({"chunks": [2**40, 8]}, "do not fit"),
        ({"shape": [0, 2**60], "chunks": [1, 1]}, r"\(384, 8\) in the index but \(0, "),
        ({"shape": [384, -8]}, r"shape\[1\] must be a whole number"),
        ({"chunks": [0, 8]}, r"chunks\[0\] must be a whole number from 1"),
        ({"chunks": [384]}, "do not fit"),
        ({"shape": "384"}, "shape must be a list, found '384'"),
        ({"dtype": "|O"}, "only <f4"),
        ({"dtype": ["<f4"]}, "only <f4"),
        ({"compressor": {"id": "blosc"}}, "compressed in a way"),
        ({"compressor": None}, "too short to hold"),
    ],
)
def test_array_headers_are_not_believed(tmp_path, changes, message):
    folder = write_native(tmp_path / "checkpoint_1", make_model())
    value = np.zeros((384, 8), np.float32)
    (folder / "target.token_embedder.embedding" / "0.0").write_bytes(gzip.compress(value.tobytes()))
    change_zarray(folder, **changes)
    with pytest.raises(UserError, match=message):
        checkpoints.load(folder)


def test_index_and_disk_must_agree_on_the_shape(tmp_path):
    with pytest.raises(UserError, match=r"shape \(9, 9\) in the index but \(384, 8\) on disk"):
        checkpoints.load(edited(tmp_path, metadata={"shape": [9, 9]}))


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x80", b"\x81\xa9optimizer\x01", b"\x91" * 2000])
def test_broken_indexes(tmp_path, raw):
    (tmp_path / "checkpoint").write_bytes(raw)
    with pytest.raises(UserError, match=r"checkpoint index .* (is damaged|names no parameters)"):
        checkpoints.load(tmp_path)


def test_inline_arrays_are_checked(tmp_path):
    write_index(tmp_path, {"a": {"driver": 1, "b": [1, 2]}})
    with pytest.raises(UserError, match="holds a int for 'a/driver'"):
        checkpoints.load(tmp_path)
    for shape, dtype in (([2**40], "float32"), ([1], "O"), ([1], "no such")):
        with pytest.raises((ValueError, TypeError)):
            t5x_native._inline_array(1, flax.serialization.msgpack.packb((shape, dtype, b"1234")))


def test_other_networks_are_refused_by_name(tmp_path):
    model = make_model()
    flat = flat_params.flatten(model.params)
    (tmp_path / "a").mkdir()
    decoder = {f"decoder/{k}" if k == EMBEDDING else k: v for k, v in flat.items() if not k.startswith("encoder/")}
    write_native(tmp_path / "a" / "checkpoint_1", Bound(model.model, flat_params.nest(decoder)))
    with pytest.raises(UserError, match="encoder_decoder_attention/key/kernel' is not part of the architecture"):
        checkpoints.load(tmp_path / "a")  # a decoder-only network has no cross-attention
    write_native(
        tmp_path / "c" / "checkpoint_1",
        Bound(model.model, {"Dense_0": {"kernel": flat[EMBEDDING]}}),
    )
    with pytest.raises(UserError, match="not a T5 checkpoint: it has no tensor 'token_embedder"):
        checkpoints.load(tmp_path / "c")


def test_an_extra_or_lost_layer_is_named(tmp_path):
    model = make_model()
    flat = flat_params.flatten(model.params)
    del flat["decoder/layers_1/mlp/wo/kernel"]
    folder = write_native(tmp_path / "checkpoint_1", Bound(model.model, flat_params.nest(flat)))
    with pytest.raises(UserError, match=r"'decoder/layers_1/mlp/wo/kernel' of shape \(16, 8\) is missing"):
        checkpoints.load(folder)


@pytest.mark.parametrize("name", ["t5x_native/checkpoint_3", "t5x_orbax", "t5x_v1_0/checkpoint_3"])
def test_reference_checkpoints(fixtures, name):
    folder = fixtures / name
    model = checkpoints.load(folder)
    source = "t5x_v1_0" if "v1_0" in name else "t5x_native"
    assert_same(model, checkpoints.load(fixtures / source))


def test_damaged_orbax_checkpoint(fixtures, tmp_path):
    folder = tmp_path / "checkpoint_3"
    shutil.copytree(fixtures / "t5x_orbax" / "checkpoint_3", folder)
    (folder / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint_3/state"):
        checkpoints.load(folder)


def test_a_trained_native_checkpoint_equals_its_npz(fixtures):
    folder = fixtures / "restore_de_drafter"
    native = next(folder.glob("checkpoint_*"))
    fields = architecture.read_gin_fields(folder / "config.gin")
    ours = {"relative_position_tables": "shared"}  # no word of T5X's
    assert fields | ours == dataclasses.asdict(checkpoints.load(folder).model.config)
    assert_same(checkpoints.load(native), checkpoints.load(folder))
