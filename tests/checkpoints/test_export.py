"""Exports: every format read back, by ourselves and by the libraries they are for, whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import bundle, describe, flat_params, t5x_native, tensors
from speccascade_t5x.checkpoints.bundle import TABLE_FILE, read_manifest, store_table
from speccascade_t5x.checkpoints.export import FORMATS, export
from speccascade_t5x.core.ngram import build_table
from speccascade_t5x.interfaces import UserError

from .tiny import TINY, assert_same, make_model, write_native, write_npz

BYTES = {"vocabulary": "bytes"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("source") / "checkpoint_3", make_model())


OF_ONE = [form for form in FORMATS if form != "t5x_pair"]  # which has tests of its own


def more(form):
    return BYTES if form == "bundle" else {}


@pytest.mark.parametrize("form", OF_ONE)
def test_every_format_reads_back_exactly(source, tmp_path, form):
    report = export(source, tmp_path / "out", form, verify=True, **more(form))
    assert report.drift == 0 and report.parameters == flat_params.count(make_model().params)
    assert report.step == (3 if form in ("orbax", "t5x") else None)
    assert_same(checkpoints.load(tmp_path / "out"), make_model())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    found = describe.describe(tmp_path / "out", verify=True)
    assert found["step"] == report.step
    assert [model["parameters"] for model in found["models"].values()] == [report.parameters]


@pytest.mark.parametrize("name", ["t5x_native/checkpoint_3", "t5x_orbax", "t5x_v1_0/checkpoint_3"])
def test_round_trip_through_every_format_is_exact(fixtures, tmp_path, name):
    """T5X -> bundle -> Hugging Face -> T5X -> Orbax."""
    place = start = fixtures / name
    for i, form in enumerate(("bundle", "huggingface", "t5x", "orbax")):
        export(place, tmp_path / str(i), form, **more(form) | ({"extra_ids": 0, "max_len": 9} if not i else {}))
        place = tmp_path / str(i)
    assert_same(checkpoints.load(place), checkpoints.load(start))


def test_a_table_travels_from_bundle_to_bundle(source, tmp_path, monkeypatch):
    export(source, tmp_path / "plain", "bundle", **BYTES)
    table = build_table([[5, 6, 7], [6, 7, 8]], checkpoints.load_bundle(tmp_path / "plain").verifier.model.vocab_size)
    with_table = store_table(tmp_path / "plain", tmp_path / "with", table, {"order": 2, "source": "by hand"})
    export(with_table, tmp_path / "out", "bundle", dtype="bfloat16", verify=True)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load_bundle(tmp_path / "out").table, table)
    assert (tmp_path / "out" / TABLE_FILE).read_bytes() == (with_table / TABLE_FILE).read_bytes()
    before, after = (read_manifest(place)["ngrams"] for place in (with_table, tmp_path / "out"))
    assert before == after and after["source"] == "by hand"
    (tmp_path / "out" / TABLE_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match=TABLE_FILE):
        checkpoints.load_bundle(tmp_path / "out")
    other = build_table([[5, 7]], table.vocab_size)
    real = bundle.load_bundle
    changed = lambda place: dataclasses.replace(real(place), **({} if place == with_table else {"table": other}))  # noqa: E731
    monkeypatch.setattr(bundle, "load_bundle", changed)
    with pytest.raises(UserError, match="n-gram table reads back with other values"):
        export(with_table, tmp_path / "other", "bundle", verify=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("form", ["orbax", "t5x", "huggingface", "t5x_pair"])
def test_a_table_is_not_left_behind_in_silence(source, tmp_path, form):
    export(source, tmp_path / "plain", "bundle", **BYTES)
    table = build_table([[5, 6, 7]], checkpoints.load_bundle(tmp_path / "plain").verifier.model.vocab_size)
    with_table = store_table(tmp_path / "plain", tmp_path / "with", table, {})
    with pytest.raises(UserError, match=f"n-gram table, for which the format '{form}' has no room: use 'bundle'"):
        export(with_table, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_bytes(monkeypatch):
    """The fixtures have 128 logits, fewer than there are bytes; the vocabulary is not what is tested with them."""
    from speccascade_t5x.text.vocabulary import ByteVocabulary

    monkeypatch.setattr(ByteVocabulary, "vocab_size", 128)


test_round_trip_through_every_format_is_exact = pytest.mark.usefixtures("small_bytes")(
    test_round_trip_through_every_format_is_exact
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", OF_ONE)
def test_half_precision(source, tmp_path, form, dtype):
    report = export(source, tmp_path / "out", form, dtype=dtype, verify=True, **more(form))
    assert report.drift > 0
    found = flat_params.flatten(checkpoints.load(tmp_path / "out").params)
    for name, leaf in flat_params.flatten(make_model().params).items():
        np.testing.assert_array_equal(found[name], leaf.astype(dtype).astype(jnp.float32))
    (model,) = describe.describe(tmp_path / "out")["models"].values()
    assert model["dtypes"] == {dtype: model["tensors"]}


def test_values_beyond_the_range_are_refused(tmp_path):
    model = make_model()
    model.params["token_embedder"]["embedding"] *= 1e5
    write_npz(tmp_path / "in", model)
    with pytest.raises(UserError, match="'token_embedder/embedding' has values beyond the range of float16"):
        export(tmp_path / "in", tmp_path / "out", "t5x", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_optimizer_state_travels(fixtures, tmp_path):
    start = fixtures / "t5x_native" / "checkpoint_3"
    first = export(start, tmp_path / "orbax", "orbax", optimizer_state=True)
    again = export(tmp_path / "orbax", tmp_path / "checkpoint_3", "t5x", optimizer_state=True)
    assert first.optimizer_tensors == again.optimizer_tensors == 208 and again.step == 3
    ours, theirs = checkpoints.open_model(tmp_path / "checkpoint_3"), checkpoints.open_model(start)
    assert set(ours.state) == set(theirs.state)
    for name in theirs.state:
        values = [tensors.to_host(name, o.state[name], "", o.state[name].dtype) for o in (ours, theirs)]
        np.testing.assert_array_equal(*values, err_msg=name)
    assert_same(ours.load(), theirs.load())
    with pytest.raises(UserError, match="has no room for an optimizer state"):
        export(start, tmp_path / "x", "huggingface", optimizer_state=True)
    with pytest.raises(UserError, match="no optimizer state to take along"):
        export(fixtures / "hf_t5", tmp_path / "x", "t5x", optimizer_state=True)


def test_index_is_that_of_t5x(fixtures, tmp_path):
    """Spec by spec the index T5X itself wrote, but for the order of keys."""
    start = fixtures / "t5x_native" / "checkpoint_3"
    export(start, tmp_path / "checkpoint_3", "t5x", optimizer_state=True)
    ours, theirs = (t5x_native._read_index(place / "checkpoint") for place in (tmp_path / "checkpoint_3", start))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert type(a) is type(b) and np.array_equal(a, b) and getattr(a, "dtype", 0) == getattr(b, "dtype", 0)
    header = json.loads((tmp_path / "checkpoint_3" / "target.decoder.logits_dense.kernel" / ".zarray").read_text())
    assert header == json.loads((start / "target.decoder.logits_dense.kernel" / ".zarray").read_text())


def test_plain_orbax_reads_it(source, tmp_path):
    export(source, tmp_path / "out", "orbax")
    restored = ocp.StandardCheckpointer().restore(tmp_path / "out")
    for name, leaf in flat_params.flatten(make_model().params).items():
        np.testing.assert_array_equal(flat_params.flatten(restored)[name], leaf)


def test_no_file_is_larger_than_asked(tmp_path):
    wide = make_model(dataclasses.replace(TINY, emb_dim=64, mlp_dim=256))  # 700 kB; its largest tensor has 98 kB
    source = write_native(tmp_path / "checkpoint_3", wide)
    for form, size in (("t5x", 0.05), ("orbax", 0.1), ("huggingface", 0.1), ("bundle", 0.1)):
        report = export(source, tmp_path / form, form, max_file_mb=size, verify=True, **more(form))
        assert report.largest[0] <= size * 1e6
        assert report.files > 6
    with pytest.raises(UserError, match=r"would have 0.10 MB, more than the 0.09 MB of max_file_mb"):
        export(source, tmp_path / "x", "huggingface", max_file_mb=0.09)
    assert not (tmp_path / "x").exists()


def test_pair_becomes_a_bundle(source, tmp_path):
    write_npz(tmp_path / "small", make_model(seed=2))
    report = export(source, tmp_path / "pair", "bundle", drafter=tmp_path / "small", description="two", **BYTES)
    bundle = checkpoints.load_bundle(tmp_path / "pair")
    assert_same(bundle.drafter, make_model(seed=2))
    assert bundle.feature_lengths == {"inputs": 256, "targets": 128} and bundle.description == "two"
    assert report.parameters == 2 * flat_params.count(make_model().params)
    export(tmp_path / "pair", tmp_path / "again", "bundle", dtype="bfloat16", verify=True)
    assert checkpoints.load_bundle(tmp_path / "again").description == "two"
    export(tmp_path / "pair" / "drafter", tmp_path / "alone", "bundle")
    assert_same(checkpoints.load(tmp_path / "alone"), make_model(seed=2))
    with pytest.raises(UserError, match="bundle of two models; name one"):
        export(tmp_path / "pair", tmp_path / "x", "t5x")
    with pytest.raises(UserError, match="has its own members and vocabulary"):
        export(tmp_path / "pair", tmp_path / "x", "bundle", **BYTES)
    with pytest.raises(UserError, match="comes without a vocabulary"):
        export(source, tmp_path / "x", "bundle")


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("pickle", {}, "no format 'pickle': use one of bundle"),
        ("t5x", {"dtype": "int8"}, "cannot be written as 'int8'"),
        ("t5x", {"max_file_mb": 0}, "max_file_mb=0 is outside"),
        ("huggingface", {"step": 3}, "step = 3 is not usable"),
        ("t5x", {"step": -1}, "step=-1 is outside"),
        ("t5x", BYTES, "a vocabulary goes into a bundle"),
        ("t5x", {"drafter": "x"}, "the format 't5x' holds one model"),
        ("t5x_pair", BYTES, "the format 't5x_pair' has no room for it"),
        ("t5x_pair", {"optimizer_state": True}, "no room for an optimizer state: use orbax or t5x"),
    ],
)
def test_bad_options(source, tmp_path, form, options, message):
    with pytest.raises(UserError, match=message):
        export(source, tmp_path / "out", form, **options)
    assert list(tmp_path.iterdir()) == []


def test_only_checkpoints_are_overwritten(source, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export(source, tmp_path / "notes", "t5x")
    with pytest.raises(UserError, match="holds no checkpoint"):
        export(source, tmp_path / "notes", "t5x", overwrite=True)
    export(source, tmp_path / "out", "t5x")
    export(source, tmp_path / "out", "huggingface", overwrite=True)
    assert checkpoints.detect(tmp_path / "out") == "huggingface"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "out"]


def test_checksums_find_every_change(source, tmp_path):
    export(source, tmp_path / "out", "huggingface")
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="content of model.safetensors has changed; copy it again"):
        checkpoints.load(tmp_path / "out")
    sums = tmp_path / "out" / "checksums.json"
    sums.write_text(sums.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(UserError, match="format version 9 .* reads up to 1; upgrade"):
        checkpoints.load(tmp_path / "out")


@pytest.mark.parametrize("form", FORMATS)
def test_what_reads_back_otherwise_is_not_kept(source, tmp_path, monkeypatch, form):
    """A reader that returns other values stands in for a disk that does."""
    place = tensors._place
    read = 2 if form == "t5x_pair" else 1  # models read before the export reads what it wrote
    calls, first = itertools.count(), read * len(flat_params.flatten(make_model().params))

    def faulty(value, sharding):
        return place(value + (next(calls) >= first), sharding)

    monkeypatch.setattr(tensors, "_place", faulty)
    with pytest.raises(UserError, match="reads back with other values; it was not kept"):
        options = {"drafter": source} if form == "t5x_pair" else more(form)
        export(source, tmp_path / "out", form, verify=True, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_full_disk_leaves_nothing(source, tmp_path, form):
    """A file size limit stands in for a full disk: the kernel refuses the write half-way."""
    program = textwrap.dedent("""
        import resource, signal, sys
        from speccascade_t5x.checkpoints.export import export
        from speccascade_t5x.interfaces import UserError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            more = {"bundle": {"vocabulary": "bytes"}, "t5x_pair": {"drafter": sys.argv[1]}}.get(sys.argv[3], {})
            export(sys.argv[1], sys.argv[2], sys.argv[3], **more)
        except UserError as error:
            print("refused:", error)
    """)
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out"), form]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: cannot write"), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_remote_addresses_go_through_epath(source, tmp_path, monkeypatch):
    """A folder stands in for the bucket; the paths are epath's own."""
    from etils import epath

    from speccascade_t5x.checkpoints import remote

    def in_folder(address):
        return epath.Path(tmp_path / "bucket" / str(address).removeprefix("gs://"))

    monkeypatch.setattr(remote, "_remote_path", in_folder)
    export(source, "gs://b/checkpoint_3", "t5x")
    assert (tmp_path / "bucket" / "b" / "checkpoint_3" / "checkpoint").is_file()
    assert_same(checkpoints.load("gs://b/checkpoint_3"), make_model())
    assert describe.describe("gs://b/checkpoint_3")["kind"] == "t5x_native"
    export("gs://b/checkpoint_3", tmp_path / "hf", "huggingface")
    assert_same(checkpoints.load(tmp_path / "hf"), make_model())
    with pytest.raises(UserError, match="gs://b/checkpoint_3 already exists"):
        export(source, "gs://b/checkpoint_3", "t5x")
    with pytest.raises(UserError, match="gs://b/none does not exist"):
        checkpoints.load("gs://b/none")


def test_arrays_go_where_they_are_told(source, devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("model",))
    named = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731

    def placement(name, shape):
        return named("model") if name == "token_embedder/embedding" else named()

    found = checkpoints.load(source, placement=placement)
    embedding = found.params["token_embedder"]["embedding"]
    assert embedding.sharding == named("model") and embedding.addressable_shards[3].data.shape == (48, 8)
    assert_same(found, make_model())


def test_transformers_computes_the_same(fixtures, tmp_path):
    """Skipped where Transformers and PyTorch are not installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in ("t5x_native", "t5x_v1_0"):
        folder = fixtures / name
        export(folder / "checkpoint_3", tmp_path / name, "huggingface", max_shard_mb=0.05)
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        with np.load(folder / "expected.npz") as stored, torch.no_grad():
            inputs, starts = (torch.tensor(stored[k]).long() for k in ("encoder_input_tokens", "decoder_input_tokens"))
            logits = model(input_ids=inputs, attention_mask=(inputs > 0).long(), decoder_input_ids=starts).logits
            np.testing.assert_allclose(logits.numpy(), stored["logits_targets_all_ones"], atol=1e-4, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("t5x") is None, reason="needs T5X, which is not installed")
def test_t5x_reads_it(fixtures, tmp_path):
    library = importlib.import_module("t5x.checkpoints")
    start = fixtures / "t5x_native" / "checkpoint_3"
    export(start, tmp_path / "checkpoint_3", "t5x", optimizer_state=True, max_file_mb=0.05)
    ours, theirs = (library.load_t5x_checkpoint(str(place)) for place in (tmp_path / "checkpoint_3", start))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
