"""The published algorithm on an example small enough to work out by hand, the K matrix, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from decoding.tables import random_tables
from speccascade_t5x import decoding, drafting
from speccascade_t5x.core import rules
from speccascade_t5x.core.probs import Sampling
from speccascade_t5x.interfaces import Drafter, UserError
from speccascade_t5x.models import bigram

GREEDY = Sampling(np.float32(0), np.int32(0), np.float32(1), np.float32(0))
V = 5


def law_after(**rows: tuple[float, ...]) -> np.ndarray:
    """Logits of a bigram model from its laws after the tokens that occur; elsewhere token 0 is certain."""
    laws = np.full((V, V), 1e-6)
    laws[:, 0] = 1.0
    for token, law in rows.items():
        laws[int(token[1:])] = law
    return np.log(laws).astype(np.float32)


def test_greedy_acceptance_by_hand():
    """One drafter A above Max-Gram, K = [[3, 4], [0, 2]], lenience 3, greedy; the prompt is 1 3 4 2 3.

    1. The output holds the start token only, which the prompt does not. Max-Gram fills from its table: 1 follows
       the start in two of three lines, 2 follows 1 in both of its lines. It proposes 1 2.
       A after the start says 2 at .45, but 1 at .40 > 1/3: 1 stands by lenience. A after 1 says 3 at .50, and 2
       at .30 < 1/3: 2 falls, A's 3 takes its place. The draft is 1 3, shorter than A's share of 3.
    2. The output ends in 1 3, as the prompt begins; 4 2 followed. A after 3 says 4 at .60: it stands as A's own
       choice. A after 4 says 1 at .40, but 2 at .34 > 1/3: it stands. A goes on after 2 with its choice 4.
       The draft is 1 3 4 2 4: A's share is written, with 2 tokens to spare.
    3. Max-Gram writes what is left of 3 + 4. The output ends in 2 4, which is nowhere else; 4 alone first stands
       in the prompt, and 2 3 followed. The draft is 1 3 4 2 4 2 3.
    4. The verifier agrees on 1, 3 and 4. After 4 it says 1 at .50 and 2 at .45: with lenience 2 would stand,
       but the last review is exact, so 1 takes its place. Committed: 1 3 4 1.
    """
    larger = law_after(
        _0=(0.05, 0.40, 0.45, 0.05, 0.05),
        _1=(0.05, 0.05, 0.30, 0.50, 0.10),
        _2=(0.05, 0.05, 0.10, 0.20, 0.60),
        _3=(0.10, 0.10, 0.10, 0.10, 0.60),
        _4=(0.06, 0.40, 0.34, 0.10, 0.10),
    )
    verifier = law_after(
        _0=(0.05, 0.80, 0.05, 0.05, 0.05),
        _1=(0.05, 0.05, 0.30, 0.50, 0.10),
        _3=(0.10, 0.10, 0.10, 0.10, 0.60),
        _4=(0.01, 0.50, 0.45, 0.02, 0.02),
    )
    table = drafting.build_table([[1, 2, 4], [1, 2, 4], [3, 4]], V)
    bound = drafting.cascade(
        [bigram(larger)],
        [[3, 4], [0, 2]],
        copier=drafting.max_gram(2, V, table),
        lenience=3.0,
        sampling=GREEDY,
    )
    config = decoding.DecodeConfig(max_len=8, draft_len=7, eos_id=0)
    program = decoding.speculative_program(bound, bigram(verifier), rules.Lossless(), config, GREEDY)
    prompt = {"encoder_input_tokens": np.array([[1, 3, 4, 2, 3]], np.int32)}

    state = decoding.start(program, prompt, jax.random.key(0), np.arange(1))
    state = decoding.run(program, state, 1)
    assert state.drafter_state["history"][0, :8].tolist() == [0, 1, 3, 4, 2, 4, 2, 3]
    assert state.drafter_state["level_calls"].tolist() == [[2]]
    assert int(state.counts.drafted[0]) == 7
    assert state.tokens[0, 2:6].tolist() == [1, 3, 4, 1]
    assert int(state.committed[0]) == 4
    assert int(state.counts.accepted[0]) == 3


def models(count: int) -> list:
    return [bigram(random_tables(seed, V, 1)[0]) for seed in range(count)]


def test_the_published_settings_are_read_as_published():
    """FLAN-T5-XXL with base, small and Max-Gram; LLaMA-7B with 160M and Max-Gram."""
    flan = drafting.k_matrix([[5, 14, 10], [0, 1, 10], [0, 0, 10]], models=2, copies=True)
    assert [flan.length(row) for row in range(4)] == [29, 11, 10, 0]
    llama = drafting.k_matrix([[13, 10], [0, 10]], models=1, copies=True)
    assert [llama.length(row) for row in range(2)] == [23, 10]
    # By hand: each of 13 reviews may test 10 tokens, draw one and sample 10 fills; then 10 fills of the top row. A draw
    # or fill takes two uniforms, a test one.
    assert llama.draft_noise(0) == 13 * (2 * 10 + 10 + 2) + 2 * 10


COPY = drafting.max_gram(1, V)
ONE_RULE = [rules.by_name("token_v3", 0.3), None]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: drafting.cascade([], [[1]], copier=COPY), "needs a language model"),
        (lambda: drafting.cascade(models(2), [[1]]), "2 rows of 2 numbers, but it is 1x1"),
        (lambda: drafting.cascade(models(2), [[1, -1], [0, 1]]), r"K\[0\]\[1\]=-1"),
        (lambda: drafting.cascade(models(2), [[1, 1.5], [0, 1]]), r"K\[0\]\[1\]=1.5"),
        (lambda: drafting.cascade(models(2), [[1, 1], [1, 1]]), "below the diagonal"),
        (lambda: drafting.cascade(models(2), [[0, 0], [0, 1]]), "nothing would be drafted"),
        (lambda: drafting.cascade(models(2), [[2, 0], [0, 0]]), "never lets drafter 1 write"),
        (lambda: drafting.cascade(models(2), [[2, 0], [0, 2]], lenience=2.0, rules=ONE_RULE), "same edge"),
        (lambda: drafting.cascade(models(2), [[2, 0], [0, 2]], lenience=[2.0, None], rules=ONE_RULE), "same edge"),
        (lambda: drafting.cascade(models(2), [[2, 0], [0, 2]], lenience=0.5), "1 or more"),
        (lambda: drafting.cascade(models(2), [[2, 0], [0, 2]], lenience=[2.0]), "lenience has 1 entries for 2"),
        (lambda: drafting.cascade(models(1), [[2, 1], [0, 2]], copier=COPY, rules=ONE_RULE[:1]), "by copying"),
        (lambda: drafting.cascade(models(2), [[2, 1], [0, 2]], rules=ONE_RULE[::-1]), "reviews no draft"),
        (lambda: drafting.cascade(models(2), [[2, 0], [0, 2]], reads=2), "reads=2 names no model"),
        (lambda: drafting.cascade(models(1), [[2, 1], [0, 2]], copier=models(1)[0]), "only a MaxGram copies"),
    ],
)
def test_what_has_no_law_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_rule_needs_to_be_told_whose_law_it_reads():
    verifier = bigram(random_tables(0, V, 1)[1])
    config = decoding.DecodeConfig(max_len=10, draft_len=2)
    rule = rules.by_name("token_v3", 0.3)
    with pytest.raises(UserError, match="reads=<the model"):
        decoding.speculative_program(drafting.cascade(models(2), [[2, 0], [0, 2]]), verifier, rule, config)
    for options, words in (
        ({"sampling": GREEDY}, r"temperature=0\.0, but the decode has 1\.0"),
        ({"vocab_size": 4}, "vocab_size=4, but the decode has None"),
    ):
        other = drafting.cascade(models(2), [[2, 0], [0, 2]], reads=0, **options)
        with pytest.raises(UserError, match=words):
            decoding.speculative_program(other, verifier, rule, config)
        assert decoding.speculative_program(other, verifier, rules.Lossless(), config)
    with pytest.raises(UserError, match="drafts 2 tokens, but draft_len=3"):
        config = decoding.DecodeConfig(max_len=10, draft_len=3)
        decoding.speculative_program(drafting.cascade(models(2), [[2, 0], [0, 2]], reads=0), verifier, rule, config)


def test_lenience_beside_a_rule_on_another_edge_is_no_clash():
    bound = drafting.cascade(
        models(2), [[2, 1, 0], [0, 2, 1], [0, 0, 2]], copier=COPY, lenience=[None, 2.0], rules=ONE_RULE
    )
    assert bound.model.lenience == (None, 2.0)


def test_every_drafter_says_what_it_runs():
    """The fields of the Protocol that decides what may be combined; every model must begin where the decode does."""
    config = decoding.DecodeConfig(max_len=10, draft_len=2)
    verifier, (larger, smaller) = bigram(random_tables(0, V, 1)[1]), models(2)
    plain = decoding.speculative_program(larger, verifier, rules.Lossless(), config).drafter.model
    cascade = drafting.cascade([larger, smaller], [[2, 0], [0, 2]], reads=0).model
    copies = COPY.model
    assert all(isinstance(drafter, Drafter) for drafter in (plain, cascade, copies))
    assert (plain.models, cascade.models, copies.models) == ((larger.model,), (larger.model, smaller.model), ())
    assert (plain.score_bonus, cascade.score_bonus, copies.score_bonus) == (False, True, False)
    elsewhere = bigram(random_tables(1, V, 1)[0], start_id=3)
    bound = drafting.cascade([larger, elsewhere], [[2, 0], [0, 2]])
    with pytest.raises(UserError, match="a model starts with token 3, but start_id=0"):
        decoding.speculative_program(bound, verifier, rules.Lossless(), config)
