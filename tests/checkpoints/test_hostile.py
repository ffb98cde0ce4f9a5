"""Checkpoints made to do harm: sizes that are not there, links that lead out, values no schema has."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import zipfile

import jax
import numpy as np
import pytest
import tensorstore

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import (
    architecture,
    bundle,
    deferral_files,
    describe,
    flat_params,
    folders,
    ngram_files,
    npz,
    orbax_tree,
)
from speccascade_t5x.checkpoints.export import export
from speccascade_t5x.drafting import build_table
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models.parameters import param_shapes

from .test_bundle import edit, save
from .test_huggingface import write as write_huggingface
from .tiny import TINY, make_model, write_native, write_npz

MOST = 32 * 2**20  # bytes a reader may take to refuse one of the folders below, each far smaller


def refused(read, message):
    """The error, which comes before anything large is made."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A bundle with a trigram table."""
    folder = save(tmp_path_factory.mktemp("plain") / "pair")
    table = build_table([[5, 6, 7, 1], [5, 6, 8, 1]], 384, order=3)
    return bundle.store_table(folder, folder.parent / "with", table, {})


@pytest.fixture
def pair(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "pair")


def zeros(path, **shapes):
    """An npz of zeros that were never in memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, (shape, dtype) in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                left = int(np.prod(shape)) * np.dtype(dtype).itemsize
                while left > 0:
                    left -= file.write(bytes(min(left, 2**22)))


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_extra_ids_are_bounded(pair):
    edit(pair, lambda m: m["vocabulary"].update(extra_ids=3 * 10**7))
    refused(
        lambda: checkpoints.load_bundle(pair, verify=False), "vocabulary.extra_ids must be a whole number from 0 to"
    )


@pytest.mark.parametrize("claims", ["more", "other"])
def test_a_packed_table_is_refused_by_its_headers(pair, claims):
    width = {"more": 16, "other": 10**5}[claims]
    shapes = {"unigram": ((384,), "f4"), "successors": ((384, width), "i4"), "shares": ((384, 16), "f4")}
    zeros(pair / ngram_files.FILE, **(shapes if claims == "other" else shapes | {"more": ((384, 10**5), "f4")}))
    message = "claims .* bytes of arrays but has" if claims == "other" else "claims|its arrays are"
    refused(lambda: checkpoints.load_bundle(pair, verify=False), message)


def test_packed_heads_are_refused_by_their_headers(tmp_path):
    zeros(tmp_path / deferral_files.FILE, **{"head/prefix/x": ((200, 10**5), "f4")})
    described = {"heads": {}, "calibrations": {}, "drafter": "", "verifier": "", "vocabulary": "", "about": {}}
    refused(lambda: deferral_files.read(tmp_path, {"deferral": described}, ""), "claims 80,000,000 bytes of arrays")


def test_parameters_packed_to_nothing_are_refused(tmp_path):
    config = {"vocab_size": 2**19, "emb_dim": 64, "num_heads": 1, "num_encoder_layers": 1, "num_decoder_layers": 1}
    config |= {"head_dim": 2, "mlp_dim": 2}
    shapes = flat_params.flatten(architecture.shapes(architecture.from_fields(config, "x")))
    zeros(tmp_path / npz.PARAMS_FILE, **{name: (leaf.shape, "f4") for name, leaf in shapes.items()})
    (tmp_path / npz.CONFIG_FILE).write_text(json.dumps(config))
    refused(lambda: checkpoints.load(tmp_path), "claims .* bytes of arrays but has")


def test_an_npy_header_of_gigabytes_is_not_unpacked(tmp_path):
    write_npz(tmp_path, make_model())
    with zipfile.ZipFile(tmp_path / npz.PARAMS_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", np.lib.format.magic(2, 0) + (10**8).to_bytes(4, "little") + b" " * 10**8)
    refused(lambda: checkpoints.load(tmp_path), r"'a' is not a numpy array: array format version \(2, 0\)")


@pytest.fixture
def hollow(tmp_path):
    """An Orbax checkpoint that says zeros were left out, and left out all of them."""
    params = jax.tree.map(np.zeros_like, jax.tree.map(np.asarray, make_model().params))
    orbax_tree.save(tmp_path / "hollow", params)
    path = tmp_path / "hollow" / orbax_tree.METADATA_FILE
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"store_array_data_equal_to_fill_value": False}))
    return tmp_path / "hollow"


def test_chunks_that_are_not_there_are_no_parameters(hollow):
    """The switch in the metadata, which makes tensorstore give zeros for what is missing, is not followed."""
    name = "token_embedder.embedding"
    base = {"driver": "file", "path": f"{hollow}/"}
    kvstore = tensorstore.KvStore.open({"driver": "ocdbt", "base": base, "path": f"{name}/"}).result()
    chunks = [key for key in kvstore.list().result() if key.startswith(b"c")]
    assert chunks
    for key in chunks:
        kvstore.delete_range(tensorstore.KvStore.KeyRange(key, key + b"\0")).result()
    with pytest.raises(UserError, match="'token_embedder/embedding' cannot be read"):
        checkpoints.load(hollow)


def test_an_orbax_checkpoint_of_claims_is_refused(hollow, monkeypatch):
    monkeypatch.setattr("speccascade_t5x.checkpoints.tensors.ROOM", 1000)
    monkeypatch.setattr("speccascade_t5x.checkpoints.tensors.RATIO", 0.01)
    refused(lambda: checkpoints.load(hollow), "claims .* bytes of arrays but has .* on disk")


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        architecture.from_fields({**vars(TINY), "relative_position_tables": "per_layer", "num_encoder_layers": 3}, "x"),
        architecture.from_fields({**vars(TINY), "num_layers": 3}, "x", "decoder_only"),
    ],
)
def test_shapes_of_many_layers_follow_from_one(config):
    assert architecture.shapes(config) == param_shapes(config)


def test_many_layers_are_claimed_at_no_cost(tmp_path):
    write_npz(tmp_path, make_model(), num_encoder_layers=1000, num_decoder_layers=1000)
    refused(lambda: checkpoints.load(tmp_path), "'decoder/layers_10/.* is missing.* and [0-9]+ more")


def test_an_index_nested_without_end_is_refused(tmp_path):
    raw = b"\x81\xa1a" * 900 + b"\x80"
    (tmp_path / "checkpoint").write_bytes(b"\x81\xa9optimizer\x81\xa6target" + raw)
    refused(lambda: checkpoints.load(tmp_path), "nested more than|is damaged")


# Links ---------------------------------------------------------------------------------------------------------------


def copies(tmp_path):
    """One folder of each kind."""
    write_npz(tmp_path / "npz", make_model())
    write_native(tmp_path / "t5x" / "checkpoint_3", make_model())
    orbax_tree.save(tmp_path / "orbax", make_model().params)
    write_huggingface(tmp_path / "huggingface", make_model())
    save(tmp_path / "bundle", drafter=None)
    return [tmp_path / name for name in ("npz", "t5x/checkpoint_3", "orbax", "huggingface", "bundle")]


def test_a_file_that_is_a_link_out_is_refused_in_every_format(tmp_path):
    for folder in copies(tmp_path):
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            outside = tmp_path / "outside"
            file.rename(outside)
            file.symlink_to(outside)
            for read in (checkpoints.load, describe.describe):
                with pytest.raises(UserError, match="is a link that leads out of its checkpoint"):
                    read(folder)
            file.unlink()
            outside.rename(file)


def test_a_top_folder_may_be_a_link_and_links_may_stay_inside(tmp_path):
    for folder in copies(tmp_path):
        link = tmp_path / "link"
        link.symlink_to(folder)
        checkpoints.open_model(link)
        link.unlink()
    native = tmp_path / "t5x" / "checkpoint_3"
    (native / "target.token_embedder.embedding" / "0.0").rename(native / "kept")
    (native / "target.token_embedder.embedding" / "0.0").symlink_to("../kept")
    checkpoints.load(native)


def test_a_cache_of_the_hub_is_read_on_purpose(tmp_path):
    cache = tmp_path / "hub" / "models--google--t5"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_huggingface(tmp_path / "hf", make_model())
    for i, file in enumerate(sorted((tmp_path / "hf").iterdir())):
        file.rename(blobs / f"hash{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{i}")
    checkpoints.load(snapshot)
    (tmp_path / "top").symlink_to(snapshot)
    checkpoints.load(tmp_path / "top")
    # Only its own blobs: not what lies beside them, nor the blobs of another model.
    other = tmp_path / "hub" / "models--other" / "blobs"
    other.mkdir(parents=True)
    for target in (cache / "elsewhere", other / "hash"):
        (snapshot / "config.json").resolve().replace(target)
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        with pytest.raises(UserError, match="is a link that leads out of its checkpoint"):
            checkpoints.load(snapshot)


def test_configuration_beside_a_checkpoint_is_no_link_out(tmp_path):
    folder = write_native(tmp_path / "run" / "checkpoint_3", make_model())
    (tmp_path / "config.gin").write_text("T5Config.emb_dim = 8\n")
    (tmp_path / "run" / "config.gin").symlink_to(tmp_path / "config.gin")
    with pytest.raises(UserError, match="config.gin is a link that leads out"):
        checkpoints.load(folder)


def test_pipes_and_circles_do_not_keep_a_reader_waiting(tmp_path):
    folder = write_native(tmp_path / "checkpoint_3", make_model())
    chunk = folder / "target.token_embedder.embedding" / "0.0"
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        checkpoints.load(folder)
    chunk.unlink()
    chunk.symlink_to("0.0")
    with pytest.raises(UserError, match="cannot look into|is missing"):
        checkpoints.load(folder)


def test_shards_lie_beside_their_index(tmp_path):
    write_huggingface(tmp_path, make_model())
    index = {"weight_map": {"shared.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names the unsafe file '\.\./model.safetensors'"):
        checkpoints.load(tmp_path)


def test_writers_follow_no_planted_link(tmp_path):
    write_npz(tmp_path / "source", make_model())
    write_huggingface(tmp_path / "kept", make_model())
    before = folders.checksums(tmp_path / "kept")
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    with pytest.raises(UserError, match="out is a link, which is not written through"):
        export(tmp_path / "source", tmp_path / "out", "orbax", overwrite=True)
    assert folders.checksums(tmp_path / "kept") == before and (tmp_path / "out").is_symlink()


# Values --------------------------------------------------------------------------------------------------------------

HUGE = 10**30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["feature_lengths"].update(inputs=HUGE), "feature_lengths.inputs must be a whole number from 1 to"),
        (lambda m: m["feature_lengths"].update(inputs="80"), "feature_lengths.inputs must be"),
        (lambda m: m.update(feature_lengths=[80]), "feature_lengths must be an object"),
        (lambda m: m["decode"].update(eos_id=-1), "decode.eos_id must be a whole number from 0"),
        (lambda m: m["decode"].update(start_id=384), "decode.start_id = 384, but the verifier has 384 ids"),
        (lambda m: m["decode"].update(prompt_eos="no"), "decode.prompt_eos must be true or false"),
        (lambda m: m["vocabulary"].update(kind=["byte"]), "vocabulary.kind must be a text"),
        (lambda m: m["vocabulary"].update(extra_ids=True), "vocabulary.extra_ids must be"),
        (lambda m: m.update(members=["verifier"]), "members must be an object"),
        (lambda m: m["members"].update(verifier=None), "members.verifier must be an object"),
        (lambda m: m["members"]["verifier"]["config"].update(dtype=7), "says dtype = 7; it must be one of float32"),
        (lambda m: m["members"]["verifier"]["config"].update(dtype="int8"), "says dtype = 'int8'"),
        (lambda m: m["members"]["verifier"]["config"].update(emb_dim=HUGE), "says emb_dim = 10"),
        (lambda m: m["members"]["verifier"]["config"].update(dropout_rate="0.1"), "says dropout_rate = '0.1'"),
        (lambda m: m["members"]["verifier"]["config"].update(mlp_activations=[]), "says mlp_activations = a list of 0"),
        (lambda m: m["members"]["verifier"]["config"].update(logits_via_embedding=1), "says logits_via_embedding = 1"),
        (lambda m: m["ngrams"].update(vocabulary=3), "ngrams.vocabulary must be a text"),
        (lambda m: m.update(deferral=[]), "deferral must be an object"),
        (lambda m: m.update(deferral={"heads": 3}), "deferral.npz is damaged"),
        (lambda m: m.update(description={"a": 1}), "description must be a text"),
        (lambda m: m.update(version=HUGE), "format version 10+ but this release"),
    ],
)
def test_manifests_are_checked_member_by_member(pair, change, message):
    edit(pair, change)
    refused(lambda: checkpoints.load_bundle(pair, verify=False), message)


@pytest.mark.parametrize(
    "raw", ['{"emb_dim": ' + "9" * 5000, "[" * 10**5, '{"a": "\\ud800"}', "\ufeff{}", '{"a": NaN}']
)
@pytest.mark.parametrize("kind", [0, 3, 4])
def test_json_that_breaks_a_parser_names_the_file(tmp_path, raw, kind):
    folder = copies(tmp_path)[kind]
    (folder / ("bundle.json" if kind == 4 else "config.json")).write_text(raw)
    refused(lambda: checkpoints.load(folder), r"(config|bundle)\.json (is not|begins)")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_streams_numpy_never_writes_are_not_unpacked(tmp_path, method):
    write_npz(tmp_path, make_model())
    path = tmp_path / npz.PARAMS_FILE
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, raw in entries.items():
            archive.writestr(name, raw)
    raw = bytearray(path.read_bytes())
    raw[60:80] = bytes(20)
    path.write_bytes(raw)
    refused(lambda: checkpoints.load(tmp_path), "params.npz is damaged or not an npz file: .* numpy does not use")


def test_a_table_whose_levels_keep_different_numbers_of_successors_is_read(pair):
    table = build_table([[5, 6, 7, 1], [5, 6, 8, 1], [9, 6, 10, 1], [9, 6, 11, 1]], 384, order=3)
    assert table.successors.shape[1] != table.pair_successors.shape[1]
    bundle.store_table(pair, pair, table, {})
    assert checkpoints.load_bundle(pair).table.pair_successors.shape == table.pair_successors.shape


def rewrite(pair, **changes):
    path = pair / ngram_files.FILE
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unigram": lambda x: x[:-1]}, "successors has shape|unigram has shape|shares has shape"),
        ({"shares": lambda x: x[:, :1]}, "shares has shape"),
        ({"starts": lambda x: x[:-1]}, "starts has shape"),
        ({"starts": lambda x: None}, "its arrays are"),
        ({"successors": lambda x: x.astype(np.float32)}, "successors has shape .* of float32"),
        ({"shares": lambda x: np.where(x > 0, np.nan, x)}, "'shares' holds NaN"),
        ({"shares": lambda x: -x}, "shares is not part of a distribution"),
        ({"shares": lambda x: x * 3}, "shares is not part of a distribution"),
        ({"unigram": lambda x: -x}, "unigram is not a distribution"),
        ({"unigram": lambda x: x * 2}, "unigram is not a distribution"),
        ({"successors": lambda x: x + 10**6}, "successors holds ids outside its 384"),
        ({"seconds": lambda x: x - 10**6}, "starts and seconds do not fit"),
        ({"starts": lambda x: x[::-1]}, "starts and seconds do not fit"),
    ],
)
def test_tables_that_are_none_are_refused(pair, changes, message):
    rewrite(pair, **changes)
    refused(lambda: checkpoints.load_bundle(pair, verify=False), f"ngrams.npz is damaged .*({message})")


def test_gin_text_of_brackets_is_read_in_one_pass(tmp_path):
    """Lines were joined anew for every open bracket, which took time of the square of their number."""
    (tmp_path / "config.gin").write_text("T5Config.emb_dim = (\n" + "(\n" * 300_000)
    assert architecture.read_gin_fields(tmp_path / "config.gin") == {}
