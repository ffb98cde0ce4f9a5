"""What Transformers reads beside the weights, and which flag means what for which writer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import huggingface_sidecars
from speccascade_t5x.checkpoints.export import export
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary

from .test_huggingface import TIED, set_fields, tensors_of, write
from .tiny import make_model


def pieces(path, sentinels=0, mark="\u2581"):
    """A model of four pieces, with sentinels in the file as mT5's has them."""
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = pb2.ModelProto()
    named = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), ("\u2581a", 1)]
    for piece, kind in named + [(f"{mark}<extra_id_{i}>", 4) for i in reversed(range(sentinels))]:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    spec = model.trainer_spec
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
    path.write_bytes(model.SerializeToString())


MT5 = {"model_type": "mt5", "scale_decoder_outputs": None}
V5, V4 = {"transformers_version": "5.24.0"}, {"transformers_version": "4.57.6"}


@pytest.mark.parametrize(
    ("head", "fields", "scaled"),
    [
        # T5: the flag of Transformers 5 before the one it replaced, whose value is always true there.
        (True, {"tie_word_embeddings": False}, False),
        (True, {"tie_word_embeddings": True, "scale_decoder_outputs": False, **V5}, False),
        (False, {"tie_word_embeddings": True, "scale_decoder_outputs": True, **V5}, True),
        (False, {"tie_word_embeddings": True, **V4}, True),
        # mT5: never scaled by Transformers 5, scaled where tied by Transformers 4.
        (True, {**MT5, "tie_word_embeddings": False, **V4}, False),
        (True, {**MT5, "tie_word_embeddings": True, **V5}, False),
        (False, {**MT5, "tie_word_embeddings": True, **V5}, False),
        (False, {**MT5, "tie_word_embeddings": True, **V4}, True),
        (True, {**MT5, "tie_word_embeddings": True}, False),
        (True, {**MT5}, False),
    ],
)
def test_whether_logits_are_scaled_follows_model_type_and_writer(tmp_path, head, fields, scaled):
    """The head that is read against the one stored: 1 / sqrt(8) of it where the output is scaled."""
    model = make_model() if head else make_model(TIED)
    folder = write(tmp_path / "hf", model, **{"scale_decoder_outputs": None, **fields})
    stored = tensors_of(folder)["lm_head.weight" if head else "shared.weight"]
    found = checkpoints.load(folder)
    if found.model.config.logits_via_embedding:
        assert scaled and not head  # tied, and T5X scales what it ties
        return
    kernel = np.asarray(found.params["decoder"]["logits_dense"]["kernel"])
    np.testing.assert_allclose(kernel, stored.T * (8**-0.5 if scaled else 1), rtol=1e-6)


def test_a_flag_nobody_reads_is_refused(tmp_path):
    with pytest.raises(UserError, match="which Transformers does not read for an mT5"):
        checkpoints.load(write(tmp_path / "hf", make_model(), model_type="mt5", scale_decoder_outputs=True))


@pytest.fixture
def folder(tmp_path):
    folder = write(tmp_path / "hf", make_model())
    pieces(folder / "spiece.model")
    return folder


def put(folder, name, facts):
    (folder / name).write_text(json.dumps(facts))


def bundled(folder, tmp_path, **options):
    export(folder, tmp_path / "pair", "bundle", **options)
    return checkpoints.load_bundle(tmp_path / "pair")


@pytest.mark.parametrize("mark", ["\u2581", ""])
def test_sentinels_in_the_file_are_recognised(folder, tmp_path, mark):
    pieces(folder / "spiece.model", 10, mark)
    assert bundled(folder, tmp_path).vocabulary.vocab_size == 14
    assert SentencePieceVocabulary(folder / "spiece.model", 10).vocab_size == 14
    with pytest.raises(UserError, match="holds 10 sentinels itself, so 100 cannot be added: give extra_ids=0"):
        export(folder, tmp_path / "x", "bundle", extra_ids=100)


def test_sentinels_that_are_not_in_the_file_are_added(folder, tmp_path):
    assert bundled(folder, tmp_path).vocabulary.vocab_size == 104


def test_the_tokenizer_says_how_many(folder, tmp_path):
    put(folder, "tokenizer_config.json", {"extra_ids": 7, "model_max_length": 10**30})
    assert bundled(folder, tmp_path).vocabulary.vocab_size == 11


ADDED = {
    "added_tokens.json": {"<word>": 4},
    "tokenizer_config.json": {"added_tokens_decoder": {"4": {"content": "<word>"}}},
    "tokenizer.json": {"added_tokens": [{"id": 4, "content": "<word>"}]},
}


@pytest.mark.parametrize("name", ADDED)
def test_added_tokens_are_not_left_out_in_silence(folder, tmp_path, name):
    put(folder, name, ADDED[name])
    with pytest.raises(UserError, match=r"adds tokens to its vocabulary \('<word>'\) which spiece.model does not have"):
        export(folder, tmp_path / "x", "bundle")


def test_tokens_the_vocabulary_has_anyway_are_no_addition(folder, tmp_path):
    put(folder, "added_tokens.json", {f"<extra_id_{i}>": 6 - i for i in range(3)})
    put(folder, "tokenizer.json", {"added_tokens": [{"id": 1, "content": "</s>"}, {"id": 0, "content": "<pad>"}]})
    assert bundled(folder, tmp_path).vocabulary.vocab_size == 7


def test_a_vocabulary_only_transformers_can_read_is_named(folder, tmp_path):
    (folder / "spiece.model").unlink()
    put(folder, "tokenizer.json", {"model": {"type": "Unigram"}})
    with pytest.raises(UserError, match="its vocabulary in tokenizer.json alone, which is not read: copy the spiece"):
        export(folder, tmp_path / "x", "bundle")
    assert bundled(folder, tmp_path, vocabulary="bytes").vocabulary.vocab_size == 384


def test_generation_config_goes_before_config(folder, tmp_path):
    set_fields(folder, decoder_start_token_id=0, eos_token_id=1)
    put(folder, "generation_config.json", {"decoder_start_token_id": 5, "eos_token_id": [3], "pad_token_id": 2})
    decode = bundled(folder, tmp_path).decode
    assert (decode["start_id"], decode["eos_id"], decode["pad_id"]) == (5, 3, 2)
    assert checkpoints.load(folder).model.start_id == 5


def test_several_ends_are_refused_where_only_one_can_be_kept(folder, tmp_path):
    put(folder, "generation_config.json", {"eos_token_id": [1, 3]})
    assert checkpoints.load(folder).model.start_id == 0
    with pytest.raises(UserError, match="ends an output at any of the ids 1, 3; a bundle has one"):
        export(folder, tmp_path / "x", "bundle")


@pytest.mark.parametrize("value", ["1", -1, 384, True, [1, 384], {"a": 1}, 10**30])
def test_ids_that_are_none(folder, value):
    put(folder, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(UserError, match="generation_config.json says eos_token_id = .*must be an id of the vocabulary"):
        checkpoints.load(folder)


def test_damaged_sidecars_are_named(folder):
    for name, facts, message in [
        ("added_tokens.json", {"<word>": "4"}, "added_tokens.json: <word> must be a whole number"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "has a name that is not an id"),
        ("tokenizer_config.json", {"extra_ids": 3 * 10**7}, "extra_ids must be a whole number from 0 to 100000"),
        ("tokenizer.json", {"added_tokens": [{"id": 4}]}, r"added_tokens\[0\] has no member 'content'"),
    ]:
        put(folder, name, facts)
        with pytest.raises(UserError, match=message):
            huggingface_sidecars.vocabulary(folder)
        (folder / name).unlink()
