"""Decoder-only checkpoints: recognised by tensors, config.json or config.gin, and kept by every format that can."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import describe, export
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from speccascade_t5x.text.vocabulary import ByteVocabulary

from .tiny import TINY, assert_same, make_model, write_native, write_npz

PREFIX = DecoderOnlyConfig(
    vocab_size=384,
    emb_dim=8,
    num_heads=2,
    num_layers=2,
    head_dim=3,
    mlp_dim=16,
    mlp_activations=("gelu", "linear"),
    inputs_bidirectional_attention=True,
)
CAUSAL = dataclasses.replace(PREFIX, inputs_bidirectional_attention=False)
LENGTHS = {"inputs": 8, "targets": 8}


@pytest.mark.parametrize("config", [CAUSAL, dataclasses.replace(PREFIX, logits_via_embedding=True)])
def test_npz_round_trip(tmp_path, config):
    model = make_model(config)
    write_npz(tmp_path, model)
    assert_same(checkpoints.load(tmp_path), model)


def test_tensors_alone_are_a_causal_model_and_gin_files_tell_more(tmp_path):
    folder = write_native(tmp_path / "run" / "checkpoint_3", make_model(CAUSAL))
    assert_same(checkpoints.load(folder), make_model(CAUSAL))
    gin = "network.TransformerConfig:\n  dropout_rate = 0.1\n  num_layers = 2\n"
    gin += "models.DecoderOnlyModel.inputs_bidirectional_attention = True\n"
    (tmp_path / "run" / "config.gin").write_text(gin)
    wanted = dataclasses.replace(PREFIX, dropout_rate=0.1)
    assert checkpoints.load(folder).model == DecoderOnly(wanted)
    (tmp_path / "run" / "config.gin").write_text(gin.replace("num_layers = 2", "num_layers = 3"))
    with pytest.raises(UserError, match="decoder/layers_2/"):
        checkpoints.load(folder)


def test_bundle_round_trip_and_what_it_refuses(tmp_path):
    small = dataclasses.replace(PREFIX, num_layers=1)
    members = {"verifier": make_model(PREFIX), "drafter": make_model(small, seed=1)}
    arguments = {"vocabulary": ByteVocabulary(), "feature_lengths": LENGTHS}
    checkpoints.save_bundle(tmp_path / "pair", **members, **arguments, decode={"prompt_eos": False})
    found = checkpoints.load_bundle(tmp_path / "pair")
    assert_same(found.verifier, members["verifier"])
    assert_same(found.drafter, members["drafter"])
    assert found.decode["prompt_eos"] is False
    with pytest.raises(UserError, match="one member of the bundle is an encoder-decoder"):
        checkpoints.save_bundle(tmp_path / "mix", verifier=members["verifier"], drafter=make_model(TINY), **arguments)
    manifest = json.loads((tmp_path / "pair" / "bundle.json").read_text())
    manifest["members"]["verifier"]["network"] = "t5"
    (tmp_path / "pair" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not known to this release"):
        checkpoints.load_bundle(tmp_path / "pair")


def test_exports(tmp_path):
    """npz -> T5X -> Orbax -> bundle; Hugging Face's T5 has no such model."""
    write_npz(tmp_path / "npz", make_model(PREFIX))
    place = tmp_path / "npz"
    for form in ("t5x", "orbax", "bundle"):
        more = {"vocabulary": "bytes"} if form == "bundle" else {}
        report = export.export(place, tmp_path / form, form, verify=True, **more)
        assert report.drift == 0
        place = tmp_path / form
    assert_same(checkpoints.load(place), make_model(PREFIX))
    with pytest.raises(UserError, match="Hugging Face's T5 has no decoder-only model"):
        export.export(place / "verifier", tmp_path / "hf", "huggingface")
    assert not (tmp_path / "hf").exists()
    assert "decoder-only T5X, prefix LM (gelu x linear MLP, own logits)" in describe.in_words(describe.describe(place))


def test_reference(fixtures, tmp_path):
    """What T5X wrote, with and without the config.json beside it; equal to the arrays it held."""
    folder = fixtures / "t5x_decoder_only"
    shutil.copytree(folder / "checkpoint_3", tmp_path / "checkpoint_3")
    npz = checkpoints.load(folder)
    for place in (folder / "checkpoint_3", tmp_path / "checkpoint_3"):
        assert_same(checkpoints.load(place), npz)
    assert not npz.model.config.inputs_bidirectional_attention
    logits = npz.model.module.apply({"params": npz.params}, *reference_tokens(folder))
    with np.load(folder / "expected.npz") as expected:
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)


def reference_tokens(folder):
    with np.load(folder / "expected.npz") as expected:
        return [expected[f"decoder_{side}_tokens"] for side in ("input", "target")]
