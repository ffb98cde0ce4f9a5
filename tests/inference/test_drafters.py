"""Drafters by name on a tiny pair: none changes what the rule emits; what cannot be combined is refused."""

from __future__ import annotations

import dataclasses

import pytest

from inference import small_pair
from speccascade_t5x.inference import drafters, generate, methods
from speccascade_t5x.inference.generate import LoadedPair
from speccascade_t5x.inference.settings import Settings, make_settings
from speccascade_t5x.interfaces import UserError

SHAPE = {"max_input_len": 32, "max_len": 12, "draft_len": 3, "batch_size": 3, "temperature": 0.0}
TEXTS = small_pair.TEXTS


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> LoadedPair:
    return generate.load(small_pair.write(tmp_path_factory.mktemp("pair") / "bundle"))


def tokens(pair, **options) -> list[list[int]]:
    return [record["tokens"] for record in pair.generate(TEXTS, **SHAPE | options)]


# Options, and how many models are counted by level (None: not told apart).
CHOICES = {
    "max_gram": ({"drafter": "max_gram"}, None),
    "ngram": ({"drafter": "ngram"}, None),
    "cascade": ({"drafter": "cascade", "k_matrix": [[2, 1], [0, 2]]}, 1),
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_every_drafter_writes_what_the_verifier_writes(pair, name):
    options, levels = CHOICES[name]
    generation = pair.run(TEXTS, make_settings(**SHAPE | options))
    assert [record["tokens"] for record in generation.records] == tokens(pair, method="verifier")
    totals = generation.totals
    assert totals["drafted"] > 0
    assert (totals["drafter_calls"] == 0) == (name == "max_gram")
    if levels is None:
        assert not any("level_calls" in record["counts"] for record in generation.records)
        return
    assert [len(record["counts"]["level_calls"]) for record in generation.records] == [levels] * len(TEXTS)
    assert sum(totals["level_calls"]) == totals["drafter_calls"] > 0
    per_token = totals["drafter_calls"] / totals["committed"]
    assert generation.rates["level_calls_per_token"] == [pytest.approx(per_token)]


def test_a_cascade_under_a_rule_that_reads_the_drafter(pair):
    """q is the law of the pair's drafter, whoever wrote the draft: the greedy output is the plain drafter's."""
    rule = {"rule": "token_v3", "alpha": 0.5}
    assert tokens(pair, drafter="cascade", k_matrix=[[2, 1], [0, 2]], **rule) == tokens(pair, **rule)


@pytest.mark.slow
def test_more_models_than_two(pair):
    """A third model joins the cascade, with a rule and without on the edge between the drafters."""
    three = dataclasses.replace(pair_bundle(pair), drafter=pair.drafter)
    wider = LoadedPair(three, smaller=[small_pair.model(2, near=pair.drafter)])
    options = {"drafter": "cascade", "k_matrix": [[2, 0], [0, 2]], "edge_rules": [["token_v3", 0.3], None]}
    generation = wider.run(TEXTS, make_settings(**SHAPE | options))
    assert [record["tokens"] for record in generation.records] == tokens(pair, method="verifier")
    assert len(generation.totals["level_calls"]) == 2 and min(generation.totals["level_calls"]) > 0


def pair_bundle(pair: LoadedPair):
    """The bundle a pair was loaded from, as far as decoding goes."""
    from speccascade_t5x.checkpoints import Bundle

    lengths, decode = pair.feature_lengths, pair.decode_defaults
    return Bundle(None, pair.verifier, pair.drafter, pair.vocabulary, lengths, decode, "", pair.table)


def test_nothing_drafted_needs_no_drafter(tmp_path):
    alone = generate.load(small_pair.write(tmp_path / "alone", table=False, drafter=False))
    wanted = tokens(alone, method="verifier")
    assert tokens(alone, drafter="max_gram", draft_len=0) == wanted
    with pytest.raises(UserError, match="needs a drafter, but this bundle .* alone: use drafter=max_gram"):
        tokens(alone)
    with pytest.raises(UserError, match="drafter='ngram' needs an n-gram table, .* with `speccascade tables`"):
        tokens(alone, drafter="ngram")
    with pytest.raises(UserError, match="ngram_fill='sample' needs an n-gram table"):
        tokens(alone, drafter="max_gram", ngram_fill="sample")


def test_prompt_lookup_is_max_gram_with_short_matches_and_no_table(pair):
    settings = make_settings(drafter="prompt_lookup", **SHAPE)
    found = generate.Runner(pair, settings).program.drafter
    assert (found.model.max_ngram, found.model.min_ngram, found.params["table"]) == (3, 1, None)
    assert found.model.prompt == "encoder_input_tokens"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "eagle"}, "drafter='eagle' is unknown: use one of model, max_gram, prompt_lookup, ngram, cascade"),
        ({"k_matrix": [[3]]}, "drafter='model' does not read k_matrix: leave it out, or use cascade"),
        (
            {"drafter": "ngram", "max_ngram": 2},
            "'ngram' does not read max_ngram: .* max_gram or prompt_lookup or",
        ),
        ({"drafter": "cascade", "draft_stop": "entropy"}, "'cascade' does not read draft_stop: .* model or ngram"),
        ({"method": "bild", "drafter": "max_gram"}, "'bild' does not read drafter: .* one of speculative"),
        (
            {"drafter": "max_gram", "rule": "token_v3", "alpha": 0.3},
            "'token_v3' reads the distribution q of a drafter model, but .* use lossless or min_p",
        ),
        ({"drafter": "cascade", "k_matrix": [[1] * 3] * 3}, "k_matrix has 3 rows, but this pair has 1 drafter"),
        ({"drafter": "cascade", "k_matrix": [[1, 1], [1, 1]]}, r"K\[1\]\[0\]=1 lies below the diagonal"),
        ({"drafter": "cascade", "lenience": 0.5}, "lenience=0.5 is outside its range"),
        ({"drafter": "cascade", "edge_rules": [["token_v3"]]}, "must hold 2 entries, and has 1"),
        (
            {"drafter": "cascade", "edge_rules": [["token_v3", 0.3]]},
            "TokenV3 reads the distribution of the model below model 0",
        ),
        ({"drafter": "max_gram", "max_ngram": 1, "min_ngram": 2}, "min_ngram must be 1 or more, and max_ngram no less"),
        ({"drafter": "max_gram", "ngram_fill": "beam"}, "fill='beam' is unknown: use 'argmax' or 'sample'"),
        ({"draft_len": "auto"}, "draft_len='auto' follows a plan, but none is named: run `speccascade plan"),
        ({"draft_len": "long"}, "draft_len='long' is unknown: use a whole number, or 'auto'"),
        ({"drafter": 3}, "drafter=3 is not a text"),
        ({"k_matrix": "5;3"}, "k_matrix='5;3' is not a list"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(pair, options, message):
    with pytest.raises(UserError, match=message) as refused:
        generate.Runner(pair, make_settings(**SHAPE | options))
    assert "\n" not in str(refused.value)


def test_the_lists_agree():
    fields = {field.name for field in dataclasses.fields(Settings)}
    named = {name for kind in drafters.DRAFTERS.values() for name in kind.reads}
    assert named <= fields and named <= set(methods.METHODS["speculative"].reads)


@pytest.mark.parametrize("models", [1, 2, 3])
def test_the_default_k_matrix_is_one(models):
    from speccascade_t5x.drafting import k_matrix

    assert k_matrix(drafters.default_k_matrix(5, models), models, True).length(0) == 5
