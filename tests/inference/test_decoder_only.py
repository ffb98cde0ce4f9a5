"""A bundle of decoder-only models, from the reference checkpoint to records and to `speccascade infer`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from corpora import train_sentencepiece
from speccascade_t5x import checkpoints, decoding
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.generate import LoadedPair, Settings
from speccascade_t5x.inference.infer import infer
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models import DecoderOnly
from speccascade_t5x.text.vocabulary import SentencePieceVocabulary
from speccascade_t5x.training import train

TEXTS = ["Open the file", "Yes", "Schließen Sie"]
SHAPE = {"max_input_len": 16, "max_len": 12, "draft_len": 3, "batch_size": 4}
GREEDY = SHAPE | {"temperature": 0.0}


@pytest.fixture(scope="module")
def bundle(fixtures, tmp_path_factory) -> Path:
    """The reference model as verifier, read as a prefix LM, and one of its own making as drafter."""
    source = fixtures / "t5x_decoder_only"
    folder = tmp_path_factory.mktemp("decoder_only")
    found = checkpoints.load(source / "checkpoint_3")
    verifier = Bound(
        DecoderOnly(dataclasses.replace(found.model.config, inputs_bidirectional_attention=True)), found.params
    )
    rng = np.random.default_rng(0)
    shake = lambda x: x + 0.2 * jnp.std(x) * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return checkpoints.save_bundle(
        folder / "pair",
        verifier=verifier,
        drafter=Bound(verifier.model, jax.tree.map(shake, verifier.params)),
        vocabulary=SentencePieceVocabulary(train_sentencepiece(folder), 0),
        feature_lengths={"inputs": 16, "targets": 12},
    )


@pytest.fixture(scope="module")
def pair(bundle) -> LoadedPair:
    return generate.load(bundle)


def directly(pair: LoadedPair, ids: list[list[int]]) -> list[list[int]]:
    """The verifier's greedy decode of prompts in ids, without the runtime."""
    tokens = np.zeros((len(ids), 1 + max(map(len, ids))), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[1 : 1 + len(prompt)] = prompt
    output = decoding.autoregressive(
        model=pair.verifier,
        inputs={"decoder_input_tokens": tokens},
        config=decoding.DecodeConfig(SHAPE["max_len"], vocab_size=pair.vocabulary.vocab_size),
        sampling=decoding.Sampling(temperature=0.0),
        key=jax.random.key(0),
        example_ids=np.arange(len(ids)),
    )
    return [row[:n].tolist() for row, n in zip(np.asarray(output.tokens), output.lengths, strict=True)]


def test_records_hold_what_follows_the_prompt(pair):
    """Each text with its EOS, as T5X's own features have it; the loss-free cascade writes what the verifier does."""
    ids = [[*pair.vocabulary.encode(text), 1] for text in TEXTS]
    assert len({len(prompt) for prompt in ids}) == 3
    wanted = directly(pair, ids)
    for options in ({"method": "verifier"}, {"rule": "lossless"}):
        records = pair.generate(TEXTS, **GREEDY, **options)
        assert [record["tokens"] for record in records] == wanted
    assert sum(record["counts"]["accepted"] for record in records) > 0


def test_a_prompt_without_eos_is_continued(pair, bundle):
    found = checkpoints.load_bundle(bundle)
    plain = LoadedPair(dataclasses.replace(found, decode={**found.decode, "prompt_eos": False}))
    ids = [pair.vocabulary.encode(text) for text in TEXTS]
    records = plain.generate(TEXTS, **GREEDY, method="verifier")
    assert [record["tokens"] for record in records] == directly(pair, ids)
    length = len(ids[0])
    runner = generate.Runner(plain, Settings(**{**SHAPE, "max_input_len": length}))
    assert runner.prompt_form.encode(0, TEXTS[0], "").inputs.tolist() == ids[0]
    runner = generate.Runner(plain, Settings(**{**SHAPE, "max_input_len": length - 1}))
    with pytest.raises(UserError, match=rf"text 0 has {length} tokens, more than the feature length {length - 1}"):
        runner.prompt_form.encode(0, TEXTS[0], "text 0")


@pytest.mark.slow
def test_samples_do_not_depend_on_their_batch(pair):
    sampled = SHAPE | {"num_samples": 2, "temperature": 1.0, "rule": "token_v3", "alpha": 0.3}
    together = pair.generate(TEXTS, range(len(TEXTS)), **sampled)
    apart = pair.generate(TEXTS, range(len(TEXTS)), **sampled | {"batch_size": 1})
    assert [record["tokens"] for record in together] == [record["tokens"] for record in apart]
    assert any(record["tokens"][0] != record["tokens"][1] for record in together)


def test_infer_leaves_records(pair, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS) + "\n", "utf-8")
    result = infer(pair, Settings(**GREEDY), tmp_path / "out", input=str(lines))
    stored = [json.loads(line) for line in result.predictions.open(encoding="utf-8")]
    wanted = pair.generate(TEXTS, **GREEDY)
    assert [record["tokens"] for record in stored] == [record["tokens"] for record in wanted]
    assert [record["inputs"] for record in stored] == TEXTS


def test_training_refuses_it(bundle):
    with pytest.raises(UserError, match=r"pair is a decoder-only model, which can be decoded with but not trained"):
        train.load_model(bundle)


def test_the_command_prints_predictions(pair, bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("\n".join(TEXTS) + "\n", "utf-8")
    flags = ["--max_input_len=16", "--max_len=12", "--draft_len=3", "--batch_size=4", "--temperature=0"]
    try:
        assert cli.main(["infer", "--input=lines.txt", f"--pair={bundle}", *flags]) == 0
    finally:
        gin.clear_config()
    printed = capsys.readouterr()
    assert printed.err == ""
    wanted = [record["prediction"] for record in pair.generate(TEXTS, **GREEDY)]
    assert printed.out.splitlines() == [" ".join(text.split("\n")) for text in wanted]
