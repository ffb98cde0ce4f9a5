"""Laws on given texts against an oracle that steps token by token, and reliability by hand."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference import small_pair
from oracles import rules as oracle
from oracles import sampler
from speccascade_t5x.evaluation import teacher_forced, trace_page
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import SOURCE_ACCEPTED, Bound, UserError

BASE = Settings(batch_size=2, buckets=(32,), max_len=6)
TARGETS = ["abc", "zyxwvut", "a"]  # the second is cut to 6 ids, EOS included
RULES = {
    "token_v3": Settings(rule="token_v3", alpha=0.9),
    "token_v3 again": Settings(rule="token_v3", alpha=0.4),
    "min_p": Settings(rule="min_p", alpha=0.9),
    "lossy": Settings(rule="lossy_sd", alpha=0.3, temperature=0.7, top_p=0.8),
    "verifier": Settings(method="verifier"),
    "drafter": Settings(method="drafter"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> generate.LoadedPair:
    return generate.load(small_pair.write(tmp_path_factory.mktemp("forced") / "pair", table=True))


@pytest.fixture(scope="module")
def scored(pair):
    """(texts, figures by name)."""
    runner = generate.Runner(pair, dataclasses.replace(BASE, method="verifier"))
    prompts = [runner.prompt_form.encode(i, text, "text") for i, text in enumerate(small_pair.TEXTS)]
    texts = teacher_forced.references(pair, runner.batches(prompts), TARGETS, 6)
    shape = {"batch_size": 2, "buckets": (32,), "max_len": 6}
    settings = [dataclasses.replace(one, **shape) for one in RULES.values()]
    return texts, dict(zip(RULES, teacher_forced.TeacherForced(pair, 6).score(texts, settings), strict=True))


def stepwise(bound: Bound, text: str, ids: list[int], pair: generate.LoadedPair) -> np.ndarray:
    """[T, V] logits, one token at a time."""
    tokens = [*pair.vocabulary.encode(text), 1]
    padded = jnp.asarray([tokens + [0] * (32 - len(tokens))])
    cache = bound.model.start(bound.params, bound.model.inputs(padded), 1, 8)
    step = jax.jit(bound.model.extend)
    found, last = [], 0
    for place, token in enumerate(ids):
        logits, cache = step(bound.params, cache, jnp.array([[last]]), jnp.array([place]))
        found.append(np.asarray(logits[0, 0]))
        last = token
    return np.stack(found)


def test_every_law_is_the_oracles(pair, scored):
    texts, figures = scored
    assert texts.ids[1] == [*pair.vocabulary.encode("zyxwv"), 1]
    size = pair.vocabulary.vocab_size
    for index in (0, 1):
        ids = texts.ids[index]
        q, p = (stepwise(bound, small_pair.TEXTS[index], ids, pair) for bound in (pair.drafter, pair.verifier))
        for name, settings in RULES.items():
            for place, token in enumerate(ids):
                shape = (settings.temperature, 0, settings.top_p, 0.0)
                if settings.method == "speculative":
                    d, pi = law(settings, q[place], p[place], size)
                else:
                    logits = q if settings.method == "drafter" else p
                    pi = sampler.truncate(sampler.tempered(logits[place], shape[0], size), *shape[1:])
                    d = sampler.tempered(q[place], 1.0, size)
                got = {key: float(values[index, place]) for key, values in figures[name].items()}
                assert got["prob"] == pytest.approx(pi[token], abs=2e-5), (name, place)
                assert got["overlap"] == pytest.approx(np.minimum(pi, d).sum(), abs=2e-4), (name, place)
                if settings.method == "speculative":  # at temperature 0.7 and top-p 0.8 that is not q
                    assert got["drafted"] == pytest.approx(d[token], abs=2e-5), (name, place)
                assert got["q"] == pytest.approx(sampler.tempered(q[place], 1.0, size)[token], abs=2e-5)
                assert got["right_p"] == (np.argmax(p[place][:size]) == token)
        assert np.isnan(figures["lossy"]["prob"][index, len(ids) :]).all()


def law(settings: Settings, q: np.ndarray, p: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(d, pi) of the oracle."""
    cut = {"top_p": settings.top_p}
    return oracle.draft_and_target(settings.rule, q[:size], p[:size], settings.alpha, settings.temperature, cut)


def test_sums_per_text(scored):
    texts, figures = scored
    sums = teacher_forced.per_example(figures["min_p"])
    for index, ids in texts.ids.items():
        probs = figures["min_p"]["prob"][index, : len(ids)].astype(float)
        floored = [max(float(prob), teacher_forced.FLOOR) for prob in probs]
        assert sums["nll"][index] == pytest.approx(-sum(map(math.log, floored)), rel=1e-4)
        assert sums["unreachable"][index] == sum(prob < teacher_forced.FLOOR for prob in probs)
        assert sums["tokens"][index] == len(ids)
    assert sum(sums["unreachable"]) > 0  # MinP leaves tokens without a chance; the floor keeps their NLL finite


@pytest.mark.parametrize("who", ["drafter", "verifier"])
def test_nan_fails_instead_of_shortening_a_text(tmp_path, who):
    """One text alone meets the NaN: what follows "z" is broken, in what a rule does not emit as well."""
    pair = generate.load(small_pair.write(tmp_path / "pair", table=False))
    bound = getattr(pair, who)
    embedding = bound.params["token_embedder"]["embedding"]
    params = {
        **bound.params,
        "token_embedder": {"embedding": embedding.at[pair.vocabulary.encode("z")[0]].set(jnp.nan)},
    }
    setattr(pair, who, Bound(bound.model, params))
    settings = dataclasses.replace(BASE, rule="min_p", alpha=0.9)
    runner = generate.Runner(pair, settings)
    batches = runner.batches([runner.prompt_form.encode(i, "abc", "text") for i in range(2)])
    forced = teacher_forced.TeacherForced(pair, 6)
    fine = forced.score(teacher_forced.references(pair, batches, ["abc", "a"], 6), [settings])[0]
    assert teacher_forced.per_example(fine)["tokens"] == [4, 2]
    with pytest.raises(UserError, match="a model produced NaN on the text of example 1: check its checkpoint"):
        forced.score(teacher_forced.references(pair, batches, ["abc", "azb"], 6), [settings])


def test_what_has_no_law_of_the_next_token_says_why(pair):
    reasons = {
        "once per output": Settings(method="sequence_cascade", alpha=-1.0),
        "on its own drafts only": Settings(rule="token_v3", alpha=0.3, drafter="ngram"),
    }
    assert "once per output" in teacher_forced.why_not(pair, reasons["once per output"])
    assert "on its own drafts only" in teacher_forced.why_not(pair, reasons["on its own drafts only"])
    assert all(teacher_forced.why_not(pair, settings) is None for settings in RULES.values())
    assert teacher_forced.why_not(pair, Settings(drafter="max_gram")) is None


def test_a_trace_says_with_which_chance_a_draft_stands():
    each = {"q": [0.5], "p": [0.1], "prob": [0.2], "deferral": [0.0]}
    drafted = trace_page._span("a", SOURCE_ACCEPTED, 0, each | {"drafted": [0.8]})
    assert "a draft of it is accepted with probability 0.25" in drafted  # pi / d; q is of temperature 1
    assert "stands" not in trace_page._span("a", SOURCE_ACCEPTED, 0, each)
    assert "&lt;b&gt;&quot;" in trace_page._span('<b>"', SOURCE_ACCEPTED, 0, {})  # whatever a model writes


def test_reliability_by_hand():
    confidence = np.array([[0.05, 0.55, 0.55, np.nan], [0.95, 1.0, 0.95, np.nan]])
    right = np.array([[0, 1, 0, 9], [1, 1, 0, 9]])
    found = teacher_forced.reliability(confidence, right)
    assert [entry["tokens"] for entry in found["bins"]] == [1, 2, 3]
    assert [entry["accuracy"] for entry in found["bins"]] == pytest.approx([0, 0.5, 2 / 3])
    gaps = [0.05, 2 * 0.05, 3 * abs((0.95 + 1 + 0.95) / 3 - 2 / 3)]
    assert found["ece"] == pytest.approx(sum(gaps) / 6)
