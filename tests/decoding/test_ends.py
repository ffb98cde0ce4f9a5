"""Where rows end and what is counted, on scripted tables whose every token is known beforehand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from decoding.tables import EOS, inputs, outputs
from speccascade_t5x import decoding
from speccascade_t5x.core import accounting, rules
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import bigram

VOCAB = 12
GREEDY = decoding.Sampling(temperature=0.0)


def script(*tokens: int, **exceptions: int) -> np.ndarray:
    """A bigram table whose argmax follows 0 -> tokens[0] -> tokens[1] ...; after_4=7 changes what follows 4."""
    follows = dict(zip((0, *tokens), tokens, strict=False))
    follows.update({int(name.removeprefix("after_")): token for name, token in exceptions.items()})
    table = np.zeros((VOCAB, VOCAB), np.float32)
    for last, token in follows.items():
        table[last, token] = 8.0
    return table


def decode(drafter, verifier, rule=None, rows=1, **options) -> decoding.Output:
    return decoding.speculative(
        drafter=bigram(drafter),
        verifier=bigram(verifier),
        rule=rule or rules.Lossless(),
        inputs=inputs(rows),
        config=decoding.DecodeConfig(**options),
        sampling=GREEDY,
        key=jax.random.key(0),
        example_ids=np.arange(rows),
    )


def row(output: decoding.Output, index: int = 0) -> dict[str, int]:
    counts = jax.device_get(output.counts)
    return counts.row(index)


def source(output: decoding.Output, index: int = 0) -> list[int]:
    return np.asarray(output.source)[index, : int(output.lengths[index])].tolist()


PATH = script(2, 3, 4, 5, 6, 7, EOS)


@pytest.mark.parametrize("verification", ["token", "block"])
def test_counters_and_sources_of_a_whole_decode(verification):
    """Round 1: 2 3 4 accepted, 9 rejected, 5 in its place. Round 2: 6 7 EOS accepted, the rest cut."""
    drafter = script(2, 3, 4, 5, 6, 7, EOS, after_4=9)
    output = decode(drafter, PATH, max_len=10, draft_len=4, verification=verification)
    assert outputs(output) == [(2, 3, 4, 5, 6, 7, EOS)]
    np.testing.assert_array_equal(output.tokens[0], [2, 3, 4, 5, 6, 7, EOS, 0, 0, 0])
    np.testing.assert_array_equal(output.source[0], [1, 1, 1, 2, 1, 1, 1, 0, 0, 0])
    assert row(output) == {
        "rounds": 2,
        "drafter_calls": 8,
        "verifier_calls": 2,
        "drafted": 8,
        "accepted": 6,
        "examined": 7,
        "committed": 7,
        "scored": 10,
        "deferred": 7.0,
    }


def test_a_wholly_accepted_draft_is_followed_by_a_bonus_token():
    output = decode(PATH, PATH, max_len=10, draft_len=3)
    assert source(output) == [1, 1, 1, 3, 1, 1, 1]
    counts = row(output)
    assert (counts["rounds"], counts["accepted"], counts["examined"]) == (2, 6, 6)
    assert (counts["drafter_calls"], counts["scored"]) == (6, 8)


def test_a_rule_that_reads_the_drafter_costs_one_more_call_and_defers_less():
    drafter = script(2, 3, 4, 5, 6, 7, EOS, after_4=9, after_9=5)
    kept = decode(drafter, PATH, rules.by_name("diff", 1.0), max_len=10, draft_len=4)
    assert outputs(kept) == [(2, 3, 4, 9, 5, 6, 7, EOS)]  # the drafter alone
    counts = row(kept)
    assert (counts["rounds"], counts["drafter_calls"], counts["deferred"]) == (2, 10, 0.0)
    assert (counts["accepted"], counts["examined"]) == (7, 7)
    assert source(kept) == [1, 1, 1, 1, 3, 1, 1, 1]
    deferred = decode(drafter, PATH, rules.by_name("diff", -1.0), max_len=10, draft_len=4)
    assert outputs(deferred) == outputs(decode(drafter, PATH, max_len=10, draft_len=4))
    assert row(deferred)["deferred"] == 7.0


def test_single_models_name_who_wrote():
    """A drafter that runs alone pays for no verifier."""
    for role, code, calls in (("verifier", 4, (0, 7, 7)), ("drafter", 5, (7, 0, 0))):
        output = decoding.autoregressive(
            model=bigram(PATH),
            inputs=inputs(2),
            config=decoding.DecodeConfig(max_len=10, draft_len=3),
            sampling=GREEDY,
            key=jax.random.key(0),
            example_ids=np.arange(2),
            role=role,
        )
        assert outputs(output) == [(2, 3, 4, 5, 6, 7, EOS)] * 2
        assert source(output, 1) == [code] * 7
        counts = row(output)
        assert (counts["rounds"], counts["drafted"], counts["committed"]) == (7, 0, 7)
        assert (counts["drafter_calls"], counts["verifier_calls"], counts["scored"]) == calls
    with pytest.raises(UserError, match="role='judge'"):
        decoding.autoregressive_program(bigram(PATH), decoding.DecodeConfig(3), role="judge")


def rounds_of(length: int, draft_len: int) -> int:
    """Rounds that always commit draft_len + 1 tokens."""
    return -(-length // (draft_len + 1))


@pytest.mark.parametrize("verification", ["token", "block"])
def test_eos_at_every_position_of_a_block(verification):
    """One program, many tables: the row ends at EOS, nothing stands after it, nothing after it counts."""
    for size in range(1, 10):
        path = (*range(2, size + 1), EOS)
        table = script(*path, after_1=11)  # both models would go on after EOS
        output = decode(table, table, max_len=10, draft_len=3, verification=verification)
        assert outputs(output) == [path]
        assert not np.asarray(output.tokens)[0, size:].any()
        assert not np.asarray(output.source)[0, size:].any()
        counts = row(output)
        assert counts["rounds"] == rounds_of(size, 3)
        assert counts["committed"] == size
        assert counts["accepted"] == counts["examined"] == source(output).count(1)
        assert counts["scored"] == 4 * counts["rounds"]


def test_eos_as_residual_token_at_every_position():
    """The drafter never writes EOS: it comes from the residual, or as the bonus token."""
    for size in range(1, 10):
        path = (*range(2, size + 1), EOS)
        verifier = script(*path)
        drafter = script(*path[:-1], **{f"after_{([0, *path])[-2]}": 11})
        output = decode(drafter, verifier, max_len=10, draft_len=3)
        assert outputs(output) == [path]
        last = 3 if size % 4 == 0 else 2
        assert source(output)[-1] == last
        counts = row(output)
        assert counts["examined"] - counts["accepted"] == (last == 2)
        assert counts["accepted"] == source(output).count(1)


@pytest.mark.parametrize("max_len", [1, 10])
def test_length_limit_at_every_position_of_a_block(max_len):
    """The drafter's mistakes move the beginning of the last round, so the limit falls everywhere in it."""
    path = tuple(range(2, 12))
    verifier = script(*path)
    for mistake in range(4, 12):
        drafter = script(*path, **{f"after_{mistake}": 2})
        output = decode(drafter, verifier, max_len=max_len, draft_len=3)
        assert outputs(output) == [path[:max_len]]
        counts = row(output)
        assert counts["committed"] == max_len
        assert counts["accepted"] == source(output).count(1)
        assert counts["examined"] - counts["accepted"] == source(output).count(2)


def test_eos_in_the_last_place_and_beyond_it():
    path = (*range(2, 11), EOS)
    output = decode(script(*path), script(*path), max_len=10, draft_len=3)
    assert outputs(output) == [path]
    longer = (*range(2, 12), EOS)
    cut = decode(script(*longer), script(*longer), max_len=10, draft_len=3)
    assert outputs(cut) == [longer[:10]]


def decode_to_a_stop(path: tuple[int, ...]) -> decoding.Output:
    """Both models write `path`, until a stop sequence stands."""
    table = script(*path)
    return decode(table, table, max_len=10, draft_len=3, stop_sequences=((8, 9), (8, 11, 9), (10,)))


@pytest.mark.parametrize("size", range(7))
def test_stop_sequence_at_every_offset(size):
    """8 9 stands inside one round or across two; it stays in the output and nothing follows it."""
    path = (*range(2, 2 + size), 8, 9, 11, 10)
    output = decode_to_a_stop(path)
    assert outputs(output) == [path[: size + 2]]
    assert row(output)["committed"] == size + 2
    assert row(output)["accepted"] == source(output).count(1)


def test_the_first_stop_sequence_to_stand_whole_ends_the_row():
    path = (2, 3, 10, 8, 9, EOS)
    output = decode_to_a_stop(path)
    assert outputs(output) == [(2, 3, 10)]


def test_no_stop_sequence_stands_where_there_is_none():
    """The start token is no output; tokens of a sequence that stand apart do not end a row."""
    output = decode(PATH, PATH, max_len=10, draft_len=3, stop_sequences=((0, 2), (0, 0, 2), (3, 5), (4, 3)))
    assert outputs(output) == [(2, 3, 4, 5, 6, 7, EOS)]


def test_rows_that_end_early_wait_unchanged():
    """Row 0 ends at once, row 1 goes on for long: full-batch rounds must not touch what row 0 has."""
    table = np.zeros((VOCAB,) * 2, np.float32)
    for last in range(2, VOCAB):
        table[last, 2 + (last - 1) % (VOCAB - 2)] = 8.0
    table[0, [EOS, 2]] = 4.0
    table[0, 3:] = table[0, 0] = -30.0
    output = decoding.speculative(
        drafter=bigram(table),
        verifier=bigram(table),
        rule=rules.Lossless(),
        inputs=inputs(40),
        config=decoding.DecodeConfig(max_len=20, draft_len=2),
        sampling=decoding.Sampling(temperature=0.3),
        key=jax.random.key(0),
        example_ids=np.arange(40),
    )
    lengths = np.asarray(output.lengths)
    assert {1, 20} <= set(lengths.tolist())
    counts = jax.device_get(output.counts)
    for index in np.flatnonzero(lengths == 1):
        assert outputs(output)[index] == (EOS,)
        assert (counts.rounds[index], counts.scored[index]) == (1, 3)
        assert np.asarray(output.source)[index].tolist() == [1] + [0] * 19
    np.testing.assert_array_equal(counts.committed, lengths)


def test_rates_of_a_decode_and_of_no_rounds_at_all():
    empty = accounting.totals(accounting.Counts.zeros(3))
    assert set(accounting.rates(empty).values()) == {0.0}
    output = decode(PATH, PATH, max_len=10, draft_len=3)
    total = accounting.totals(output.counts)
    rates = accounting.rates(total)
    assert total["committed"] == 7
    assert (rates["acceptance"], rates["block_efficiency"]) == (1.0, 3.5)
    assert rates["verifier_calls_per_token"] == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_len": 0}, "max_len=0"),
        ({"max_len": 3, "draft_len": -1}, "draft_len=-1"),
        ({"max_len": 3, "num_samples": 0}, "num_samples=0"),
        ({"max_len": 3, "verification": "tree"}, "'tree'.*'token' or 'block'"),
        ({"max_len": 3, "stop_sequences": ((),)}, "stop sequence"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        decoding.DecodeConfig(**options)
