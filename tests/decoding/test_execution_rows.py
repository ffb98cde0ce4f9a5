"""What a row's output may depend on, in every execution, and which combinations are refused."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest

from decoding.executions import TABLES, VOCAB, bild, cascade, config_of, decode, dynamic, rule_of, sampling_of, sequence
from decoding.tables import inputs
from speccascade_t5x import decoding
from speccascade_t5x.core import rules
from speccascade_t5x.decoding import loop
from speccascade_t5x.drafting import Confidence, ModelDrafter
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models import bigram

FEW = 4
KNOBS = np.array([0.4, 0.55, 0.6, 0.75], np.float32)
# (program of (config, knob), a knob per input)
EXECUTIONS = {
    "confidence": (lambda config, knob: dynamic("confidence", config=config, threshold=knob), KNOBS),
    "entropy": (lambda config, knob: dynamic("entropy", "chow", config, threshold=knob), KNOBS + 0.3),
    "bild": (lambda config, knob: bild(config, rollback=knob), 2 * KNOBS),
    "token_cascade": (lambda config, knob: cascade("chow", config, alpha=knob), 1 - KNOBS),
    "oracle": (lambda config, knob: cascade("diff", config, oracle=True, alpha=knob), KNOBS - 0.55),
    "sequence_cascade": (lambda config, knob: sequence(knob, config), KNOBS - 1.4),
}
# The others run through the same code as these: one of each kind is enough for every day.
DAILY = ("confidence", "token_cascade", "sequence_cascade")
EXECUTION = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DAILY else pytest.mark.slow) for n in EXECUTIONS]
)


def fields(output: decoding.Output) -> list[tuple]:
    """Everything of each row but the float log-probabilities."""
    counts = [np.asarray(leaf) for leaf in jax.tree.leaves(output.counts)]
    columns = [output.tokens, output.source, *(count[:, None] for count in counts)]
    return [tuple(line) for line in np.concatenate(columns, axis=1).tolist()]


@EXECUTION
def test_a_knob_per_input_and_samples(name):
    """A knob belongs to an input and all its samples; sample 0 does not depend on how many there are."""
    make, knobs = EXECUTIONS[name]
    two = config_of(num_samples=2)
    differs, samples_differ = 0, 0
    for seed in range(4):
        together = fields(decode(make(two, knobs), FEW, seed))
        each = [fields(decode(make(two, knob), FEW, seed)) for knob in knobs]
        for i in range(FEW):
            assert together[2 * i : 2 * i + 2] == each[i][2 * i : 2 * i + 2]
        assert fields(decode(make(config_of(), knobs[0]), FEW, seed)) == each[0][::2]
        differs += together != each[0]
        samples_differ += each[0][::2] != each[0][1::2]
    assert differs and samples_differ


@EXECUTION
def test_a_row_does_not_depend_on_its_batch_or_on_the_loop(name):
    make, knobs = EXECUTIONS[name]
    program, key = make(config_of(), knobs[1]), jax.random.key(3)
    ids = np.array([5, 900, 3, 77])
    wanted = fields(decoding.decode(program, inputs(FEW), key, ids))
    order = np.array([2, 0, 3, 1])
    assert fields(decoding.decode(program, inputs(FEW), key, ids[order])) == [wanted[i] for i in order]
    mixed = fields(decoding.decode(program, inputs(FEW), key, np.array([1, 77, 6, 900])))
    assert (mixed[1], mixed[3]) == (wanted[3], wanted[1])
    assert len(set(wanted)) > 1
    state = decoding.start(program, inputs(FEW), key, ids)
    # Without jit, or every branch of every round is compiled anew; JAX then knows no scan of length 0, the oracle's.
    with contextlib.nullcontext() if name == "oracle" else jax.disable_jit():
        eager = loop.run(program, state, program.max_rounds, loop="python")
    assert fields(decoding.finish(program.config, eager)) == wanted


# Combinations that make no sense


def test_refused_combinations_say_what_to_use_instead():
    config = config_of()
    models = [*map(bigram, TABLES)]
    with pytest.raises(UserError, match=r"whole positions, which TokenV3 does not: use chow or chow_log, or run"):
        decoding.token_cascade_program(*models, rule_of("token_v3"), config)
    with pytest.raises(UserError, match=r"test of Diff reads the verifier.*use chow or chow_log, the oracle, or run"):
        decoding.token_cascade_program(*models, rule_of("diff"), config)
    sampling = sampling_of()
    ready = ModelDrafter(sampling, models[0].model, 3, VOCAB, None, False)
    with pytest.raises(UserError, match=r"draft_stop needs a language model.*decides its lengths itself"):
        decoding.speculative_program(
            Bound(ready, models[0].params), models[1], rules.Lossless(), config, sampling, Confidence(0.5)
        )
    with pytest.raises(UserError, match=r"confidence='median' is unknown: use 'sum', 'mean' or 'quantile'"):
        decoding.sequence_cascade_program(*models, config, confidence="median")


def test_a_knob_of_another_number_of_rows_is_refused():
    for name, program in (
        ("threshold", dynamic("confidence", threshold=KNOBS)),
        ("alpha", bild(rollback=KNOBS)),
        ("alpha", cascade("chow", alpha=KNOBS)),
        ("threshold", sequence(KNOBS)),
    ):
        with pytest.raises(UserError, match=f"{name} has 4 rows, but there are 3 inputs"):
            decode(program, rows=3)
