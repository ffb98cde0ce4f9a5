"""Bundles: written whole, read back to the bit, and never believed when damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import bundle as bundles
from speccascade_t5x.checkpoints import flat_params, orbax_tree, tensors
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary, SentencePieceVocabulary

from .tiny import TINY, assert_same, make_model

LENGTHS = {"inputs": 80, "targets": 96}
SMALL = dataclasses.replace(TINY, num_decoder_layers=1, mlp_dim=4)


def save(path, **changes):
    arguments = {
        "verifier": make_model(),
        "drafter": make_model(SMALL, seed=1),
        "vocabulary": ByteVocabulary(),
        "feature_lengths": LENGTHS,
        "description": "Größe stimmt.",
    }
    return checkpoints.save_bundle(path, **{**arguments, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bundle") / "pair")


@pytest.fixture
def copy(saved, tmp_path):
    """A bundle to damage."""
    return shutil.copytree(saved, tmp_path / "pair")


def edit(folder, change):
    path = folder / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def sentencepiece_model(path, word):
    """A model of four pieces."""
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = pb2.ModelProto()
    for piece, kind in (("<pad>", 3), ("</s>", 3), ("<unk>", 2), (word, 1)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    spec = model.trainer_spec
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
    path.write_bytes(model.SerializeToString())
    return SentencePieceVocabulary(path, extra_ids=2)


def test_round_trip(saved):
    assert checkpoints.detect(saved) == "bundle"
    bundle = checkpoints.load_bundle(saved)
    assert_same(bundle.verifier, make_model())
    assert_same(bundle.drafter, make_model(SMALL, seed=1))
    assert bundle.vocabulary.fingerprint() == ByteVocabulary().fingerprint()
    assert bundle.feature_lengths == LENGTHS
    assert bundle.decode == {"draft_len": 5, "start_id": 0, "eos_id": 1, "pad_id": 0}
    assert bundle.description == "Größe stimmt."
    assert sorted(p.name for p in saved.parent.iterdir()) == ["pair"]


def test_no_file_remembers_where_it_was_written(saved, tmp_path):
    for file in saved.rglob("*"):
        assert not file.is_file() or str(saved.parent).encode() not in file.read_bytes(), file
    moved = shutil.copytree(saved, tmp_path / "moved")
    away = saved.rename(saved.with_name("away"))
    try:
        assert_same(checkpoints.load_bundle(moved).verifier, make_model())
    finally:
        away.rename(saved)


def test_members_load_alone(saved):
    assert checkpoints.detect(saved / "drafter") == "member"
    assert_same(checkpoints.load(saved / "drafter"), make_model(SMALL, seed=1))
    with pytest.raises(UserError, match="bundle of two models; name one"):
        checkpoints.load(saved)


def test_bundle_of_one_model(tmp_path):
    path = save(tmp_path / "one", drafter=None, decode={"start_id": 7})
    assert checkpoints.load_bundle(path).drafter is None
    model = checkpoints.load(path)
    assert model.model.start_id == 7
    with pytest.raises(UserError, match="no member 'drafter'; it has verifier"):
        bundles.open_member(path, "drafter")


def test_plain_orbax_reads_the_members(saved):
    restored = ocp.StandardCheckpointer().restore(saved / "verifier")
    expected = flat_params.flatten(make_model().params)
    for name, value in flat_params.flatten(restored).items():
        np.testing.assert_array_equal(value, expected[name])


def test_large_tensors_are_split_over_files(tmp_path):
    params = {
        "a": jnp.arange(9 * 2**20, dtype=jnp.float32).reshape(-1, 1024),
        "b": jnp.ones((3 * 2**20,)),
    }
    orbax_tree.save(tmp_path / "large", params)
    sizes = [file.stat().st_size for file in (tmp_path / "large").rglob("*") if file.is_file()]
    assert max(sizes) < 14 * 10**6 and sum(sizes) > 20 * 2**20
    restored = tensors.to_devices(orbax_tree.open_tensors(tmp_path / "large"), "large", None)
    assert all((restored[name] == params[name]).all() for name in params)


def test_sentencepiece_vocabulary_travels(tmp_path):
    vocabulary = sentencepiece_model(tmp_path / "spm", "alpha")
    path = save(tmp_path / "pair", vocabulary=vocabulary)
    (tmp_path / "spm").unlink()
    assert checkpoints.load_bundle(path).vocabulary.pieces == vocabulary.pieces
    sentencepiece_model(path / "vocabulary.model", "other")
    with pytest.raises(UserError, match="content of vocabulary.model has changed|vocabulary.model has"):
        checkpoints.load_bundle(path)
    with pytest.raises(UserError, match="fingerprints differ"):
        checkpoints.load_bundle(path, verify=False)


def test_logits_of_the_members_must_cover_the_vocabulary(tmp_path):
    narrow = make_model(dataclasses.replace(SMALL, vocab_size=128))
    with pytest.raises(UserError, match="has 259 pieces but the verifier 384 and the drafter 128 logits"):
        save(tmp_path / "pair", drafter=narrow)
    assert not (tmp_path / "pair").exists()


def test_models_that_do_not_fit_their_configuration(tmp_path):
    with pytest.raises(UserError, match=r"the drafter does not fit .*'decoder/layers_0/mlp/wi_0/kernel'"):
        save(tmp_path / "pair", drafter=Bound(make_model(SMALL).model, make_model().params))
    broken = make_model(SMALL)
    broken.params["decoder"]["decoder_norm"]["scale"] *= jnp.nan
    with pytest.raises(UserError, match="'decoder/decoder_norm/scale' holds NaN"):
        save(tmp_path / "pair", drafter=broken)
    with pytest.raises(UserError, match="feature length 'targets'"):
        save(tmp_path / "pair", feature_lengths={"inputs": 80})


def test_what_is_there_is_not_overwritten_unasked(saved, copy):
    with pytest.raises(UserError, match="already exists"):
        save(copy)
    (copy.parent / "other").mkdir()
    with pytest.raises(UserError, match="already exists"):
        save(copy.parent / "other", overwrite=True)  # not a bundle
    save(copy, overwrite=True, drafter=None)
    assert checkpoints.load_bundle(copy).drafter is None
    assert sorted(p.name for p in copy.parent.iterdir()) == ["other", "pair"]


def data_file(folder):
    return max(
        (folder / "verifier").rglob("*"),
        key=lambda file: file.stat().st_size if file.is_file() else 0,
    )


def test_damage_names_the_file(copy):
    file = data_file(copy)
    name = file.relative_to(copy).as_posix()
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(raw) - 1} of {len(raw)} bytes"):
        checkpoints.load_bundle(copy)
    file.write_bytes(raw[:500] + bytes([raw[500] ^ 1]) + raw[501:])
    with pytest.raises(UserError, match=f"content of {name} has changed"):
        checkpoints.load(copy / "verifier")
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        checkpoints.load_bundle(copy)
    with pytest.raises(UserError, match="verifier"):
        checkpoints.load_bundle(copy, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2 .* reads up to 1; upgrade"),
        (lambda m: m.update(format="zip"), "not a bundle of this package, or damaged .format 'zip'"),
        (lambda m: m.pop("vocabulary"), "bundle.json has no member 'vocabulary'"),
        (lambda m: m["members"].pop("verifier"), "names no verifier"),
        (lambda m: m["members"].update(judge={}), "no member 'judge'"),
        (
            lambda m: m["members"]["verifier"].update(network="gemma"),
            "'gemma' is not known to this release",
        ),
        (lambda m: m["members"]["verifier"]["config"].update(experts=8), "'experts' is not known"),
        (
            lambda m: m["members"]["verifier"]["config"].update(emb_dim=16),
            r"\(8,\) but the architecture asks for \(16,",
        ),
        (lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}}), "unsafe file name"),
        (lambda m: m["files"].update({"bundle.json": "x"}), "files.bundle.json must be an object, found 'x'"),
    ],
)
def test_bad_manifests(copy, change, message):
    edit(copy, change)
    with pytest.raises(UserError, match=message):
        checkpoints.load_bundle(copy)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="does not exist; a checkpoint is a bundle"):
        checkpoints.load(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint; looked for a bundle"):
        checkpoints.load(tmp_path)
    with pytest.raises(UserError, match="none does not exist; a checkpoint is a bundle"):
        checkpoints.load_bundle(tmp_path / "none")
    with pytest.raises(UserError, match="remote address"):
        checkpoints.detect("gs://bucket/checkpoint_1")
    with pytest.raises(UserError, match="cannot look into .*: File name too long"):
        checkpoints.load(tmp_path / ("x" * 300))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="pytorch_model.bin, which may run code when opened"):
        checkpoints.load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs an ordinary user: root may read and write everything")
def test_no_permission_names_the_file(copy, tmp_path):
    (copy / "bundle.json").chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*bundle.json: Permission denied"):
        checkpoints.load_bundle(copy)
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write the bundle .*Permission denied"):
        save(tmp_path / "new")
    tmp_path.chmod(0o700)


def test_full_disk_leaves_nothing(saved, tmp_path):
    """A file size limit stands in for a full disk: the kernel refuses the write half-way."""
    program = textwrap.dedent("""
        import resource, signal, sys
        from speccascade_t5x import checkpoints
        from speccascade_t5x.interfaces import UserError
        bundle = checkpoints.load_bundle(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            checkpoints.save_bundle(
                sys.argv[2], verifier=bundle.verifier, vocabulary=bundle.vocabulary,
                feature_lengths=bundle.feature_lengths,
            )
        except UserError as error:
            print("refused:", error)
    """)
    target = tmp_path / "pair"
    command = [sys.executable, "-c", program, str(saved), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: cannot write")
    assert list(tmp_path.iterdir()) == []


def test_importing_needs_no_tensorflow_seqio_or_gin():
    program = textwrap.dedent("""
        import sys
        import speccascade_t5x.checkpoints, speccascade_t5x.text.vocabulary
        import speccascade_t5x.inference.records, speccascade_t5x.data.batching
        edges = ("tensorflow", "seqio", "gin", "clu", "sentencepiece")
        print([name for name in edges if name in sys.modules])
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_killed_while_saving_leaves_no_bundle(saved, tmp_path):
    """It dies with one member written: nothing has the bundle's name, and a retry works."""
    program = textwrap.dedent("""
        import os, signal, sys
        from speccascade_t5x import checkpoints
        from speccascade_t5x.checkpoints import orbax_tree
        bundle = checkpoints.load_bundle(sys.argv[1])
        save = orbax_tree.save

        def save_and_die(path, params, **more):
            save(path, params, **more)
            os.kill(os.getpid(), signal.SIGKILL)

        orbax_tree.save = save_and_die
        checkpoints.save_bundle(
            sys.argv[2], verifier=bundle.verifier, drafter=bundle.drafter,
            vocabulary=bundle.vocabulary, feature_lengths=bundle.feature_lengths,
        )
    """)
    target = tmp_path / "pair"
    command = [sys.executable, "-c", program, str(saved), str(target)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
    assert_same(checkpoints.load_bundle(save(target)).verifier, make_model())
