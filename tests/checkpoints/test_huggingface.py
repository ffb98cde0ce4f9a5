"""Hugging Face folders: parity with the library itself, its spellings of one model, and damage."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from speccascade_t5x import checkpoints, decoding
from speccascade_t5x.checkpoints import flat_params, huggingface, safetensors_files
from speccascade_t5x.interfaces import UserError

from .tiny import TINY, assert_same, make_model

TIED = dataclasses.replace(TINY, mlp_activations=("relu",), logits_via_embedding=True)


def write(folder, model, **changes):
    """A folder; `changes` replace fields of config.json, None removes one."""
    folder.mkdir(exist_ok=True)
    flat = flat_params.flatten(model.params)
    huggingface.write(folder, model.model, lambda name: np.asarray(flat[name]))
    set_fields(folder, **changes)
    return folder


def set_fields(folder, **changes):
    fields = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def tensors_of(folder):
    """Plain numpy reading of one file, apart from the code."""
    raw = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header.pop("__metadata__", None)
    spans = {name: slice(*(end + at for at in entry["data_offsets"])) for name, entry in header.items()}
    return {name: np.frombuffer(raw[spans[name]], "<f4").reshape(header[name]["shape"]) for name in header}


def put_tensors(folder, found):
    shapes = {name: value.shape for name, value in found.items()}
    dtype = next(iter(found.values())).dtype
    safetensors_files.write(folder, shapes, found.__getitem__, dtype, 10**9)


@pytest.mark.parametrize("name", ["hf_t5", "hf_t5_v1_0"])
def test_logits_and_greedy_ids_of_transformers(fixtures, name):
    folder = fixtures / name
    assert checkpoints.detect(folder) == "huggingface"
    bound = checkpoints.load(folder)
    with np.load(folder / "expected.npz") as stored:
        inputs = stored["input_ids"] * stored["attention_mask"]
        starts, logits, long_ids = stored["decoder_input_ids"], stored["logits"], stored["greedy_ids"]
    found = bound.model.module.apply({"params": bound.params}, inputs, starts, np.ones_like(starts))
    np.testing.assert_allclose(found, logits, atol=1e-4, rtol=0)
    output = decoding.autoregressive(
        model=bound,
        inputs={"encoder_input_tokens": inputs},
        config=decoding.DecodeConfig(max_len=16),
        sampling=decoding.Sampling(temperature=0.0),
        key=jax.random.key(0),
        example_ids=np.arange(len(inputs)),
    )
    np.testing.assert_array_equal(np.asarray(output.tokens)[:, : long_ids.shape[1] - 1], long_ids[:, 1:])


def test_both_spellings_of_the_configuration(fixtures, tmp_path):
    """`save_pretrained` of version 5 writes scale_decoder_outputs; the hub's files say tie_word_embeddings."""
    folder = shutil.copytree(fixtures / "hf_t5", tmp_path / "hub")
    expected = checkpoints.load(folder)
    assert not expected.model.config.logits_via_embedding
    shutil.copy(folder / "config.hub_style.json", folder / "config.json")
    assert_same(checkpoints.load(folder), expected)


@pytest.mark.parametrize("config", [TINY, TIED])
def test_round_trip(tmp_path, config):
    model = make_model(config)
    assert_same(checkpoints.load(write(tmp_path / "hf", model)), model)


def test_names_and_transposes_are_those_of_the_published_table(tmp_path):
    model = make_model()
    flat = flat_params.flatten(model.params)
    found = tensors_of(write(tmp_path / "hf", model))
    cross = "decoder/layers_1/encoder_decoder_attention/out/kernel"
    for theirs, ours, turned in (
        ("shared.weight", "token_embedder/embedding", False),
        ("decoder.block.1.layer.1.EncDecAttention.o.weight", cross, True),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "encoder/layers_0/mlp/wi_0/kernel", True),
        ("decoder.block.0.layer.2.layer_norm.weight", "decoder/layers_0/pre_mlp_layer_norm/scale", False),
        (
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder/relpos_bias/rel_embedding",
            True,
        ),
        ("lm_head.weight", "decoder/logits_dense/kernel", True),
    ):
        value = np.asarray(flat[ours])
        np.testing.assert_array_equal(found[theirs], value.T if turned else value, err_msg=theirs)
    assert len(found) == len(flat)


def test_tied_without_scale_gets_logits_of_its_own(tmp_path):
    """Tied logits that are not scaled, as an mT5 configuration without lm_head asks for."""
    model = make_model(TIED)
    found = checkpoints.load(write(tmp_path / "hf", model, scale_decoder_outputs=False))
    assert not found.model.config.logits_via_embedding
    embedding = np.asarray(model.params["token_embedder"]["embedding"])
    np.testing.assert_array_equal(found.params["decoder"]["logits_dense"]["kernel"], embedding.T)


def test_own_logits_with_scale_carry_it_in_the_kernel(tmp_path):
    model = make_model()
    found = checkpoints.load(write(tmp_path / "hf", model, tie_word_embeddings=True))
    kernel = np.asarray(model.params["decoder"]["logits_dense"]["kernel"])
    np.testing.assert_allclose(found.params["decoder"]["logits_dense"]["kernel"], kernel / np.sqrt(8), rtol=1e-6)


def test_a_head_that_repeats_the_embedding_is_tied(tmp_path):
    model = make_model(TIED)
    folder = write(tmp_path / "hf", model)
    found = tensors_of(folder)
    copies = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    put_tensors(folder, found | dict.fromkeys(copies, found["shared.weight"]))
    assert_same(checkpoints.load(folder), model)
    put_tensors(folder, found | {"encoder.embed_tokens.weight": found["shared.weight"] + 1})
    with pytest.raises(UserError, match=r"'encoder.embed_tokens.weight' differs from 'shared.weight'"):
        checkpoints.load(folder)


def test_an_unused_table_of_early_conversions_is_left_out(tmp_path):
    folder = write(tmp_path / "hf", make_model())
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    put_tensors(folder, tensors_of(folder) | {name: np.zeros((32, 2), np.float32)})
    assert_same(checkpoints.load(folder), make_model())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(tmp_path, dtype):
    model = make_model()
    flat = flat_params.flatten(model.params)
    huggingface.write(tmp_path, model.model, lambda name: np.asarray(flat[name]), dtype=jax.numpy.dtype(dtype))
    found = flat_params.flatten(checkpoints.load(tmp_path).params)
    for name, leaf in flat.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], leaf.astype(dtype).astype(np.float32))


def test_the_reference_library_reads_what_is_written_and_the_reverse(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    model = make_model()
    folder = write(tmp_path / "hf", model)
    theirs = library.load_file(folder / "model.safetensors")
    ours = tensors_of(folder)
    assert set(theirs) == set(ours)
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)
    library.save_file(theirs, folder / "model.safetensors")
    assert_same(checkpoints.load(folder), model)


def test_shards(tmp_path):
    model = make_model()
    flat = flat_params.flatten(model.params)
    huggingface.write(tmp_path, model.model, lambda name: np.asarray(flat[name]), shard_bytes=14_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size <= 14_000 for file in files)
    assert_same(checkpoints.load(tmp_path), model)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["shared.weight"] = "../away.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"unsafe file '\.\./away.safetensors'"):
        checkpoints.load(tmp_path)
    listed["weight_map"]["shared.weight"] = files[0].name
    del listed["weight_map"]["encoder.final_layer_norm.weight"]
    index.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="'encoder.final_layer_norm.weight' is not in model.safetensors.index.json"):
        checkpoints.load(tmp_path)
    files[1].unlink()
    with pytest.raises(UserError, match=f"the shard {files[1].name} is missing"):
        checkpoints.load(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match="holds several models"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "a 'umt5' model; .*only T5 and mT5"),
        ({"model_type": None}, "a None model"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj = 'gelu'"),
        ({"relative_attention_num_buckets": 64}, "relative_attention_num_buckets = 64"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon = 1e-05"),
        ({"d_model": 16}, r"k.weight' has shape \(6, 8\) but the architecture asks for \(6, 16\)"),
        ({"vocab_size": 400}, r"'shared.weight' has shape \(384, 8\) but .* \(400, 8\)"),
        ({"num_layers": 2}, r"'encoder.block.1.layer.0.SelfAttention.k.weight' of shape \(6, 8\) is missing"),
        ({"num_decoder_layers": 1}, "'decoder.block.1.layer.* is not part of the architecture"),
        ({"d_kv": None}, "does not say 'head_dim'"),
        ({"decoder_start_token_id": 384}, "decoder_start_token_id = 384"),
        ({"dropout_rate": "x"}, "dropout_rate = 'x'"),
        ({"scale_decoder_outputs": "no"}, "scale_decoder_outputs = 'no'"),
    ],
)
def test_configurations_that_are_another_model(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        checkpoints.load(write(tmp_path / "hf", make_model(), **changes))


def test_decoder_only_models_are_refused_by_name(fixtures):
    with pytest.raises(UserError, match="gemma"):
        checkpoints.load(fixtures / "hf_gemma2")


def change_header(folder, change):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["shared.weight"].update(shape=[2**40, 2**20]), "'shared.weight', F32 of shape"),
        (lambda h: h["shared.weight"].update(shape=[-384, -8]), r"'shared.weight'.shape\[0\] must be"),
        (lambda h: h["shared.weight"].update(dtype="F8_E4M3"), "'shared.weight' holds 'F8_E4M3'"),
        (lambda h: h["shared.weight"].update(dtype="I32"), "'shared.weight' holds int32 instead of floats"),
        (lambda h: h["shared.weight"].update(data_offsets=[0, 2**50]), "said to be at"),
        (lambda h: h["shared.weight"].update(data_offsets=[4, 12292]), "expected 0|begins at byte 4"),
        (lambda h: h.pop("lm_head.weight"), "begins at byte|its header describes"),
        (lambda h: h.update({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "'x' is not part"),
    ],
)
def test_headers_are_not_believed(tmp_path, change, message):
    folder = write(tmp_path / "hf", make_model())
    change_header(folder, change)
    with pytest.raises(UserError, match=message):
        checkpoints.load(folder)


@pytest.mark.parametrize("raw", [b"", b"\x08", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[]", b"\x01" + b"\0" * 7 + b"{"])
def test_files_that_are_none(tmp_path, raw):
    folder = write(tmp_path / "hf", make_model())
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        checkpoints.load(folder)


def test_truncated_and_not_finite(tmp_path):
    folder = write(tmp_path / "hf", make_model())
    found = tensors_of(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"it has \d+ bytes but its header describes \d+; copy it again"):
        checkpoints.load(folder)
    put_tensors(folder, found | {"lm_head.weight": np.full((384, 8), np.nan, np.float32)})
    with pytest.raises(UserError, match="'decoder/logits_dense/kernel' holds NaN"):
        checkpoints.load(folder)


def test_pickles_are_never_opened(tmp_path):
    write(tmp_path / "hf", make_model())
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin, which may run code .* save the model as safetensors"):
        checkpoints.load(tmp_path / "hf")
