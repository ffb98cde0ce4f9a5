"""Small scripted scenes of one round: who is accepted, what is drawn next, at every edge."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speccascade_t5x.core import verify

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
A, B, C = 0, 1, 2  # the vocabulary
BOTH = pytest.mark.parametrize("how", ["token", "block"])


def play(how, draft, law, target, accept, draw, lengths=None, jit=False):
    """One or several rows through the round; returns [(accepted, token, bonus), ...]."""
    draft = np.asarray(draft, np.int32)
    rows, size = draft.shape
    lengths = np.full(rows, size) if lengths is None else lengths
    arguments = (
        draft,
        np.asarray(lengths, np.int32),
        np.asarray(law, np.float32).reshape(rows, size, -1),
        np.asarray(target, np.float32).reshape(rows, size + 1, -1),
        np.asarray(accept, np.float32).reshape(rows, size),
        np.stack([np.zeros(rows), draw], axis=-1).astype(np.float32),  # one chunk: the second decides
    )
    function = {"token": verify.token, "block": verify.block}[how]
    out = (jax.jit(function) if jit else function)(*map(jnp.asarray, arguments))
    assert out.bonus.dtype == bool
    return list(zip(out.accepted.tolist(), out.token.tolist(), out.bonus.tolist(), strict=True))


@pytest.mark.parametrize("jit", [False, True])
@BOTH
def test_draft_of_one(how, jit):
    """d = (.5, .5, 0), pi = (.2, .3, .5): A stands with .4, B with .6; the residual is all C."""
    law, target = [[0.5, 0.5, 0]], [[0.2, 0.3, 0.5], [0, 0.25, 0.75]]
    for x, chance in ((A, 0.4), (B, 0.6)):
        scenes = {
            (chance - 1e-4, 0.2): (1, B, True),
            (chance - 1e-4, 0.3): (1, C, True),
            (chance + 1e-4, 0.0): (0, C, False),
            (BELOW_ONE, BELOW_ONE): (0, C, False),
        }
        for (u, w), wanted in scenes.items():
            assert play(how, [[x]], law, target, [u], [w], jit=jit) == [wanted]


@BOTH
def test_full_acceptance_draws_the_bonus_from_the_last_target(how):
    law = [[0.5, 0.3, 0.2]] * 3
    target = [[0.5, 0.3, 0.2]] * 3 + [[0.1, 0.2, 0.7]]
    for w, wanted in ((0.05, A), (0.25, B), (0.95, C)):
        assert play(how, [[A, B, C]], law, target, [0.99] * 3, [w]) == [(3, wanted, True)]


@BOTH
def test_rejection_at_the_last_position(how):
    """Two sure acceptances, then pi / d = .5 at A: u = .6 rejects and the residual is all B."""
    law = [[0.4, 0.4, 0.2], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1]]
    target = [[0.4, 0.4, 0.2], [0.1, 0.8, 0.1], [0.4, 0.5, 0.1], [1, 0, 0]]
    assert play(how, [[A, B, A]], law, target, [0.9, 0.9, 0.6], [0.5]) == [(2, B, False)]
    assert play(how, [[A, B, A]], law, target, [0.9, 0.9, 0.4], [0.5]) == [(3, A, True)]


def test_token_verification_stops_at_the_first_rejection():
    law = [[0.5, 0.5, 0]] * 3
    target = [[0.25, 0.25, 0.5]] * 4  # every token stands with 1/2
    for accept, wanted in [
        ((0.6, 0.1, 0.1), (0, C, False)),
        ((0.1, 0.6, 0.1), (1, C, False)),
        ((0.1, 0.1, 0.6), (2, C, False)),
        ((0.1, 0.1, 0.1), (3, C, True)),
    ]:
        assert play("token", [[A, A, A]], law, target, accept, [0.7]) == [wanted]


def test_block_verification_keeps_the_last_success():
    """p_1 = 1/2, then pi / d = 2 at A lifts p_2 back to 1: a bad first test is forgiven.

    S_1 = max(0, .5 * .8 - .4) + max(0, .5 * .2 - .6) = 0, hence h_1 = 0; h_2 = p_2 = 1.
    """
    law, target = [[0.8, 0.2, 0], [0.4, 0.6, 0]], [[0.4, 0.2, 0.4], [0.8, 0.2, 0], [0, 1, 0]]
    assert play("block", [[A, A]], law, target, [0.99, BELOW_ONE], [0.5]) == [(2, B, True)]
    assert play("token", [[A, A]], law, target, [0.99, 0], [0.5]) == [(0, C, False)]


def test_block_residual_is_scaled_by_the_joint_ratio():
    """p_1 = 1/2, second token fails: h_1 = .15 / (.15 + .5) = 3/13 and the residual is all C.

    max(0, .5 * (.2, .2, .6) - (.6, .25, .15)) = (0, 0, .15). The second scene has a residual that
    would hold B as well if it were not scaled.
    """
    law, target = [[0.8, 0.2, 0], [0.6, 0.25, 0.15]], [[0.4, 0.2, 0.4], [0.2, 0.2, 0.6], [1, 0, 0]]
    p_2 = 0.5 * 0.2 / 0.6
    for u, wanted in ((3 / 13 - 1e-3, (1, C, False)), (3 / 13 + 1e-3, (0, C, False))):
        assert play("block", [[A, A]], law, target, [u, p_2 + 1e-3], [0.0]) == [wanted]
    assert play("block", [[A, A]], law, target, [0.99, p_2 - 1e-3], [0.0]) == [(2, A, True)]
    law, target = [[0.8, 0.2, 0], [0.6, 0.1, 0.3]], [[0.4, 0.2, 0.4], [0.1, 0.18, 0.72], [1, 0, 0]]
    # Unscaled: (0, .08, .42), so w = 0 would give B. Scaled by 1/2: (0, 0, .06).
    assert play("block", [[A, A]], law, target, [0.0, 0.99], [0.0]) == [(1, C, False)]


@BOTH
def test_rows_of_different_length_share_a_batch(how):
    """Row b drafts b tokens; what follows its draft in the arrays must not matter."""
    law = np.full((4, 3, 3), [0.5, 0.5, 0.0])
    target = np.full((4, 4, 3), [0.25, 0.25, 0.5])
    for b in range(4):
        law[b, b:] = [0, 0, 1]
        target[b, :b] = [0.5, 0.5, 0]  # the draft is sure to stand
        target[b, b] = [0, 1, 0]  # the bonus is sure to be B
        target[b, b + 1 :] = [1, 0, 0]
    got = play(how, [[A] * 3] * 4, law, target, np.zeros((4, 3)), [0.5] * 4, lengths=[0, 1, 2, 3])
    assert got == [(0, B, True), (1, B, True), (2, B, True), (3, B, True)]


@BOTH
def test_a_row_of_length_zero_only_draws_its_bonus(how):
    law, target = [[[0.5, 0.5, 0]]] * 2, [[[0, 0, 1], [1, 0, 0]]] * 2
    got = play(how, [[A], [A]], law, target, [[0.0], [0.0]], [0.3, 0.3], lengths=[0, 1])
    assert got[0] == (0, C, True)
    assert got[1] == (0, C, False)  # pi gives A nothing, and u = 0 must not accept it


@BOTH
def test_a_draft_of_width_zero_is_one_step_of_pi(how):
    target = jnp.asarray([[[0.2, 0.3, 0.5]]] * 3)
    empty = jnp.zeros((3, 0), jnp.int32), jnp.zeros(3, jnp.int32), jnp.zeros((3, 0, 3)), target
    out = verify.BY_NAME[how](*empty, jnp.zeros((3, 0)), jnp.asarray([[0.9, 0.1], [0.0, 0.4], [0.5, 0.6]]))
    assert out.accepted.tolist() == [0, 0, 0] and out.bonus.tolist() == [True] * 3
    assert out.token.tolist() == [A, B, C]


@BOTH
def test_a_uniform_of_zero_accepts_nothing_impossible(how):
    law, target = [[0.5, 0.5, 0]] * 2, [[0, 0.4, 0.6]] * 3
    assert play(how, [[A, A]], law, target, [0, 0], [0.0]) == [(0, C, False)]
    assert play(how, [[B, A]], law, target, [0, 0], [0.0]) == [(1, C, False)]


@pytest.mark.parametrize("jit", [False, True])
@BOTH
def test_equal_laws_never_reject(how, jit):
    rng = np.random.default_rng(0)
    rows, size, vocab = 2000, 4, 5
    target = rng.dirichlet(np.full(vocab, 0.5), (rows, size + 1)).astype(np.float32)
    law = target[:, :size]
    draft = rng.integers(0, vocab, (rows, size))
    possible = np.take_along_axis(law, draft[..., None], -1)[..., 0] > 1e-30
    draft = np.where(possible, draft, law.argmax(-1))
    for u in (0.0, 0.5, BELOW_ONE):
        got = play(how, draft, law, target, np.full((rows, size), u), np.full(rows, 0.5), jit=jit)
        assert all(accepted == size and bonus for accepted, _, bonus in got), u


@BOTH
def test_zero_residual_falls_back_to_pi(how):
    """pi is nowhere above d (rounding can leave them so): nothing is left to draw.

    The test fails, and the token still has to come from pi: B or C, never A by default.
    """
    law, target = [[0.25, 0.5, 0.25]], [[0, 0.5, 0.25], [1, 0, 0]]
    for w, wanted in ((0.0, B), (0.6, B), (0.7, C), (BELOW_ONE, C)):
        assert play(how, [[A]], law, target, [0.5], [w]) == [(0, wanted, False)]


@BOTH
def test_jit_and_eager_agree(how):
    rng = np.random.default_rng(1)
    rows, size, vocab = 500, 3, 4
    law = rng.dirichlet(np.ones(vocab), (rows, size))
    target = rng.dirichlet(np.ones(vocab), (rows, size + 1))
    draft = rng.integers(0, vocab, (rows, size))
    noise = rng.random((rows, size)), rng.random(rows)
    lengths = rng.integers(0, size + 1, rows)
    eager = play(how, draft, law, target, *noise, lengths=lengths)
    assert play(how, draft, law, target, *noise, lengths=lengths, jit=True) == eager
    assert len({accepted for accepted, _, _ in eager}) == size + 1
