"""Text in, records out, with the packaged pair.

All tests share few shapes, because each costs a compile: prompts of 32 ids, outputs of 32, draft length 3.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import speccascade_t5x
from corpora import train_sentencepiece
from speccascade_t5x.common import paths
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.generate import LoadedPair, Settings
from speccascade_t5x.interfaces import SOURCE_DRAFTER, SOURCE_VERIFIER, Bound, UserError

TEXTS = ["grusse aus munchen", "schliessen", "uber die grosse", "offnen sie die datei"]
IDS = range(len(TEXTS))
SHAPE = {"max_input_len": 32, "max_len": 32, "draft_len": 3, "batch_size": 2}
RECORD = ("inputs", "prediction", "log_prob", "tokens", "counts", "source")


@pytest.fixture(scope="module")
def pair() -> LoadedPair:
    return speccascade_t5x.load("restore_de_pair")


@pytest.fixture
def new_pair(pair) -> LoadedPair:
    """The same pair before its first text; what is compiled is shared."""
    return with_models(pair, pair.verifier, pair.drafter, _numbered=0)


def outputs(records):
    return [(record["prediction"], record["tokens"], record["source"]) for record in records]


def test_records_say_what_was_decoded(pair):
    records = pair.generate(TEXTS, **SHAPE)
    assert [record["inputs"] for record in records] == TEXTS
    for record in records:
        assert tuple(record) == RECORD
        assert record["tokens"][-1] == pair.vocabulary.eos_id
        assert record["prediction"] == pair.vocabulary.decode(record["tokens"])
        assert len(record["source"]) == len(record["tokens"]) == record["counts"]["committed"]
        assert record["log_prob"] < 0
        assert record["counts"]["accepted"] == record["source"].count(1)
    restored = sum(a["prediction"] != a["inputs"] for a in records)
    assert restored == len(TEXTS)  # every text here loses a capital when folded


def test_seed_decides_the_output(pair):
    hot = SHAPE | {"temperature": 2.0}
    first, again = (pair.generate(TEXTS, IDS, seed=1, **hot) for _ in range(2))
    assert first == again
    assert outputs(pair.generate(TEXTS, IDS, seed=2, **hot)) != outputs(first)


def test_texts_are_numbered_on_through_a_pairs_life(new_pair):
    """A loop over single texts samples each of them anew; ids say which number a text has, wherever it stands."""
    hot = SHAPE | {"temperature": 2.0, "method": "verifier"}
    text = TEXTS[0]
    one_by_one = [new_pair.generate([text], **hot)[0]["tokens"] for _ in range(4)]
    assert len(set(map(tuple, one_by_one))) == 4
    for order in (range(4), [2, 0, 3, 1]):
        together = new_pair.generate([text] * 4, order, **hot)
        assert [record["tokens"] for record in together] == [one_by_one[i] for i in order]
    later = new_pair.generate([text], **hot)[0]["tokens"]  # ids that are given do not count
    assert later == new_pair.generate([text], [4], **hot)[0]["tokens"]
    assert new_pair.generate([text] * 2, [2**31 - 1] * 2, **hot)[0]["tokens"] not in [*one_by_one, later]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1], "1 ids for 2 texts"),
        ([0, -1], "the id -1 must"),
        ([0, 2**31], "the id 2147483648"),
        ([0, 1.5], "the id 1.5"),
    ],
)
def test_ids_that_are_no_numbers_of_the_texts(pair, ids, words):
    with pytest.raises(UserError, match=words):
        pair.generate(TEXTS[:2], ids, **SHAPE)


def test_a_record_does_not_depend_on_its_batch(pair):
    alone = pair.generate(TEXTS, IDS, **SHAPE)
    wider = pair.generate(TEXTS, IDS, **SHAPE | {"batch_size": 3})
    others = pair.generate([TEXTS[0], "ja", "nein", TEXTS[3]], IDS, **SHAPE)
    assert outputs(wider) == outputs(alone)
    assert outputs([others[0], others[3]]) == outputs([alone[0], alone[3]])
    np.testing.assert_allclose([r["log_prob"] for r in wider], [r["log_prob"] for r in alone], atol=1e-4)


def test_single_models_and_greedy_lossless(pair):
    greedy = SHAPE | {"temperature": 0.0}
    cascade = pair.generate(TEXTS, rule="lossless", **greedy)
    verifier = pair.generate(TEXTS, method="verifier", **greedy)
    drafter = pair.generate(TEXTS, method="drafter", **greedy)
    assert [r["tokens"] for r in cascade] == [r["tokens"] for r in verifier]
    for records, source in ((verifier, SOURCE_VERIFIER), (drafter, SOURCE_DRAFTER)):
        assert {s for record in records for s in record["source"]} == {source}
    assert sum(r["counts"]["verifier_calls"] for r in cascade) < sum(r["counts"]["verifier_calls"] for r in verifier)
    # Token V3 at alpha = 1 rules nothing out, so the law is the drafter's alone.
    handed_over = pair.generate(TEXTS, rule="token_v3", alpha=1.0, **greedy)
    assert [r["tokens"] for r in handed_over] == [r["tokens"] for r in drafter]


def test_values_of_traced_options_compile_nothing(pair):
    first = pair.run(TEXTS, Settings(rule="token_v3", alpha=0.3, **SHAPE))
    programs = len(pair._compiled)
    for change in ({"alpha": 0.7}, {"temperature": 0.5}, {"temperature": 0}, {"seed": 5}, {"top_p": 0.9, "top_k": 7}):
        again = pair.run(TEXTS, Settings(**{"rule": "token_v3", "alpha": 0.3, **SHAPE, **change}))
        assert again.timing.compile_s == 0 and again.timing.compiled_shapes == 0, change
        assert again.timing.decode_s > 0
    assert len(pair._compiled) == programs
    assert first.totals["committed"] == sum(len(record["tokens"]) for record in first.records)
    assert first.rates["acceptance"] == first.totals["accepted"] / first.totals["examined"]


def test_samples_and_stop_sequences(pair):
    records = pair.generate(TEXTS[:3], num_samples=2, temperature=2.0, stop_sequences=["r", "ü"], **SHAPE)
    for record in records:
        assert record["inputs"] in TEXTS
        assert all(len(record[name]) == 2 for name in RECORD[1:])
        for text, tokens in zip(record["prediction"], record["tokens"], strict=True):
            stopped = text.endswith(("r", "ü"))
            assert stopped or tokens[-1] == 1 or len(tokens) == SHAPE["max_len"]
            assert not {"r", "ü"} & set(text[:-1] if stopped else text)  # nothing after the first stop
    assert any(record["prediction"][0].endswith(("r", "ü")) for record in records)
    assert any(record["tokens"][0] != record["tokens"][1] for record in records)


def test_a_long_prompt_is_refused_or_cut(pair):
    long = "a" * 32  # 33 ids with the EOS
    with pytest.raises(UserError, match=r"text 1 has 33 tokens.*feature length 32.*truncate"):
        pair.generate(["kurz", long], **SHAPE)
    cut, whole = pair.generate([long, "a" * 31], truncate=True, **SHAPE)
    runner = generate.Runner(pair, Settings(truncate=True, **SHAPE))
    assert runner.prompt_form.encode(0, long, "").inputs.tolist() == [ord("a") + 3] * 31 + [1]  # the EOS stays
    assert cut["inputs"] == long
    assert whole["inputs"] == "a" * 31


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 .*from 0 to 2"),
        ({"temperature": 2.5}, r"temperature=2.5 .*from 0 to 2"),
        ({"temperature": float("nan")}, r"temperature=nan .*from 0 to 2"),
        ({"temperature": "hot"}, r"temperature='hot' .*from 0 to 2"),
        ({"top_p": 0}, r"top_p=0 would keep no token"),
        ({"top_p": 1.1}, r"top_p=1.1 .*from 0 to 1"),
        ({"min_p": -1}, r"min_p=-1 .*from 0 to 1"),
        ({"top_k": -1}, r"top_k=-1 .*0 or more"),
        ({"top_k": 1.5}, r"top_k=1.5 .*whole number"),
        ({"method": "cascade"}, r"method='cascade' is unknown: use one of speculative, verifier, drafter"),
        ({"rule": "token_v4", "alpha": 0.1}, r"no rule named 'token_v4': did you mean 'token_v3'\?"),
        ({"rule": "chow"}, r"'chow' needs an alpha \(from 0 to 1"),
        ({"rule": "chow", "alpha": 1.5}, r"alpha=1.5 .*'chow': from 0 to 1"),
        ({"rule": "chow", "alpha": "big"}, r"alpha='big' .*a number"),
        ({"rule": "lossless", "alpha": 0.5}, r"'lossless' takes no alpha"),
        ({"rule_options": ["residual"]}, r"rule_options=\['residual'\] is not a dictionary"),
        ({"rule_options": {"residual": 1}}, r"'lossless' has no option 'residual'"),
        ({"verification": "bloc"}, r"verification='bloc' is unknown: use 'token' or 'block'"),
        ({"draft_len": -1}, r"draft_len=-1 .*0 or more"),
        ({"max_len": 0}, r"max_len=0 .*1 or more"),
        ({"max_input_len": 0}, r"max_input_len=0 .*1 or more"),
        ({"num_samples": 0}, r"num_samples=0 .*1 or more"),
        ({"batch_size": 0}, r"batch_size=0 .*1 or more"),
        ({"seed": -1}, r"seed=-1 .*from 0 to 4294967295"),
        ({"seed": 2**32}, r"seed=4294967296 .*from 0 to 4294967295"),
        ({"truncate": "no"}, r"truncate='no' is neither True nor False"),
        ({"stop_sequences": "ende"}, r"stop_sequences='ende' is not a list"),
        ({"stop_sequences": [""]}, r"the stop sequence '' has no ids"),
        ({"buckets": (16, 24)}, r"buckets \(16, 24\) must increase and end with the feature length 32"),
        ({"num_beams": 4}, r"num_beams is not supported"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty is not supported"),
        ({"logit_bias": {}}, r"logit_bias is not supported"),
        ({"temprature": 1}, r"no option 'temprature': did you mean 'temperature'\?"),
    ],
)
def test_bad_settings_name_the_option_and_its_range(pair, options, message):
    with pytest.raises(UserError, match=message):
        pair.generate(["text"], **SHAPE | options)


def test_bad_texts(pair):
    with pytest.raises(UserError, match="put it in brackets"):
        pair.generate("one text", **SHAPE)
    with pytest.raises(UserError, match="text 1 is not a text but int"):
        pair.generate(["a", 3], **SHAPE)
    with pytest.raises(UserError, match="nothing to decode"):
        pair.generate([], **SHAPE)


def with_models(pair: LoadedPair, verifier: Bound, drafter: Bound | None, **others) -> LoadedPair:
    """The same pair with other models."""
    changed = object.__new__(LoadedPair)
    changed.__dict__.update(pair.__dict__, verifier=verifier, drafter=drafter, **others)
    return changed


def test_nan_names_the_example(pair):
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), pair.verifier.params)
    poisoned = with_models(pair, Bound(pair.verifier.model, broken), pair.drafter)
    with pytest.raises(UserError, match="NaN while decoding example 0"):
        poisoned.generate(TEXTS[:2], **SHAPE)


def test_a_verifier_alone_has_no_drafter(pair):
    alone = with_models(pair, pair.verifier, None)
    with pytest.raises(UserError, match=r"method='speculative' needs a drafter"):
        alone.generate(["text"], **SHAPE)


def test_loading_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        speccascade_t5x.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"restore_de_pari does not exist.*did you mean 'restore_de_pair'\?"):
        speccascade_t5x.load("restore_de_pari")
    with pytest.raises(UserError, match=r"bundle\.json"):
        speccascade_t5x.load(tmp_path)


def test_checkpoints_give_what_the_bundle_gives(pair):
    folder = paths.pretrained_dir() / "restore_de_pair"
    lengths = {"max_input_len": 32, "max_len": 32}
    models = {"verifier": folder / "verifier", "drafter": folder / "drafter"}
    other = generate.from_checkpoints(**models, extra_ids=0, draft_len=3, **lengths)
    assert other.generate(TEXTS, IDS, batch_size=SHAPE["batch_size"]) == pair.generate(TEXTS, IDS, **SHAPE)


def test_a_vocabulary_wider_than_the_logits_is_refused(fixtures: Path, tmp_path):
    lengths = {"max_input_len": 32, "max_len": 32}
    with pytest.raises(UserError, match=r"the verifier has 384 logits but the vocabulary 459 pieces"):
        generate.from_checkpoints(verifier=fixtures / "restore_de_drafter", extra_ids=200, **lengths)
    model = train_sentencepiece(tmp_path)
    with pytest.raises(UserError, match=r"384 logits but the vocabulary 4\d\d pieces"):
        generate.from_checkpoints(verifier=fixtures / "restore_de_drafter", vocabulary=model, extra_ids=380, **lengths)


def test_settings_keep_what_they_were_given():
    settings = Settings(stop_sequences=["a"], buckets=[8, 16])
    assert (settings.stop_sequences, settings.buckets) == (("a",), (8, 16))
    assert dataclasses.replace(settings, temperature=0).temperature == 0
