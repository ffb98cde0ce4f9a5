"""Probes the real round with scripted uniforms: its whole law is confirmed without sampling.

A round is a function of (draft, accept uniforms, residual uniform) that is constant on boxes: each
test compares one uniform with one threshold, and the next token compares one uniform with the
cumulative law of its branch. `rows_of` sets uniforms just below and just above every such boundary
(which the oracle states), in every combination of passed and failed tests, and `errors` lists the
rows whose outcome is not the oracle's. If none is, the round's law is the oracle's up to the
stretch of uniforms between the probes; `Rows.blur` is the total probability of that stretch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np

from oracles import verify as oracle

BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))
MARGIN = 5e-6  # distance of a probe from its boundary; float32 rounding in the round is ~ 5e-7
ROUNDING = 1e-6  # what float32 may do to sums and products in block verification
CHUNK = 4096  # rows per call: one shape, so that eager operations compile once


@dataclasses.dataclass(frozen=True)
class Case:
    """One draft of n tokens, the tables it meets, and the probability of drafting it."""

    draft: tuple[int, ...]
    laws: np.ndarray  # [n, V] d
    targets: np.ndarray  # [n + 1, V] pi
    other: np.ndarray  # [n + 1, V] a law for mutants to go wrong with
    chance: float


@dataclasses.dataclass(frozen=True)
class Rows:
    """Probes as arrays. `inputs` are the six arguments of a round; `blur` is explained above."""

    inputs: tuple[np.ndarray, ...]
    other: np.ndarray  # [B, G + 1, V]
    accepted: np.ndarray  # [B] expected
    allowed: np.ndarray  # [B, V] bool: tokens the probe may draw
    blur: float


def scales(case: Case) -> list[float]:
    """The joint ratios p_0 .. p_n of block verification."""
    found = [1.0]
    for i, x in enumerate(case.draft):
        found.append(min(1.0, found[-1] * float(case.targets[i][x]) / float(case.laws[i][x])))
    return found


def intervals(case: Case, how: str) -> list[tuple[float, float]]:
    """Where each test's threshold may lie: a point for token verification, else a short stretch."""
    branches = oracle.BRANCHES[how](case.draft, case.laws, case.targets)
    if how == "token":
        return [(t, t) for t in branches.thresholds]
    found = []
    for i, scale in enumerate(scales(case)[1:]):
        if scale in (0.0, 1.0):
            found.append((scale, scale))
        elif i == len(case.draft) - 1:
            found.append((scale * (1 - ROUNDING), scale * (1 + ROUNDING)))
        else:
            spare = math.fsum(oracle.positive_part(case.targets[i + 1], case.laws[i + 1], scale))
            low, high = max(0.0, spare - ROUNDING), spare + ROUNDING
            gap = 1.0 - scale
            found.append((low / (low + gap + ROUNDING), min(1.0, high / (high + max(0.0, gap - ROUNDING)))))
    return found


def uniforms_for(bounds: list[tuple[float, float]], passed: tuple[bool, ...]) -> list[float] | None:
    """A uniform per test, beside its threshold on the wanted side; None if one is out of reach."""
    chosen = []
    for (low, high), wanted in zip(bounds, passed, strict=True):
        u = low * (1 - MARGIN) if wanted else high * (1 + MARGIN)
        if (wanted and low <= 0.0) or (not wanted and u >= 1.0):
            return None
        chosen.append(min(u, BELOW_ONE))
    return chosen


def extreme(bounds: list[tuple[float, float]], u: float) -> tuple[bool, ...] | None:
    """Which tests pass when every uniform is `u`; None where rounding decides one of them."""
    passed = []
    for low, high in bounds:
        if low == high and low in (0.0, 1.0):  # no rounding here: 0 never passes, 1 always does
            passed.append(low == 1.0)
        elif u < low * (1 - MARGIN):
            passed.append(True)
        elif u > high * (1 + MARGIN):
            passed.append(False)
        else:
            return None
    return tuple(passed)


def kept(passed: tuple[bool, ...], how: str) -> int:
    """How many drafted tokens stand, from which tests pass."""
    if how == "token":
        return passed.index(False) if False in passed else len(passed)
    return max((i + 1 for i, ok in enumerate(passed) if ok), default=0)


def draws_for(case: Case, stop: int, how: str, next_law: np.ndarray) -> tuple[list, float]:
    """Both sides of each boundary of the law after `stop` kept tokens.

    Returns ([(residual uniform, [V] tokens it may draw)], blur of this branch).
    """
    margin, impossible = MARGIN, next_law <= 0
    if how == "block" and stop < len(case.draft):
        scale = scales(case)[stop]
        difference = scale * np.asarray(case.targets[stop], float) - np.asarray(case.laws[stop], float)
        margin += ROUNDING / max(difference.clip(0).sum(), 1e-30)
        if 0.0 < scale < 1.0:  # scale * pi is rounded before d is taken from it
            impossible = difference < -ROUNDING
    upper = np.cumsum(next_law)
    lower = upper - next_law
    boundaries = sorted({b for b in upper if 0 < b < 1})
    points = {0.0, BELOW_ONE}
    for boundary in boundaries:
        points |= {min(max(boundary + side * margin, 0.0), BELOW_ONE) for side in (-1, 1)}
    half = margin / 2
    draws = [(w, (lower - half <= w) & (w <= upper + half) & ~impossible) for w in sorted(points)]
    return draws, min(1.0, 2 * margin * len(boundaries))


def blur_of(case: Case, how: str, bounds: list[tuple[float, float]], weights, next_laws) -> float:
    """Probability, within one draft, of uniforms that lie between the two probes of a boundary."""
    total = 0.0
    for i, (low, high) in enumerate(bounds):
        decided = bounds[:i] if how == "token" else bounds[i + 1 :]
        reached = math.prod(b if how == "token" else 1 - a for a, b in decided)
        total += reached * (high * (1 + MARGIN) - low * (1 - MARGIN))
    for stop, weight in enumerate(weights):
        total += weight * draws_for(case, stop, how, next_laws[stop])[1]
    return total


def probes_of(case: Case, how: str):
    """Yields (accept uniforms, residual uniform, expected accepted, allowed tokens)."""
    bounds = intervals(case, how)
    branches = oracle.BRANCHES[how](case.draft, case.laws, case.targets)
    seen = set()
    scripts = [
        (uniforms_for(bounds, passed), passed) for passed in itertools.product((True, False), repeat=len(bounds))
    ]
    scripts += [([u] * len(bounds), extreme(bounds, u)) for u in (0.0, BELOW_ONE)]
    for uniforms, passed in scripts:
        if uniforms is None or passed is None:
            continue
        stop = kept(passed, how)
        draws, _ = draws_for(case, stop, how, branches.next_laws[stop])
        # All boundaries of a branch once; elsewhere one draw, for there the tests are probed.
        for w, allowed in draws[len(draws) // 2 :][:1] if stop in seen else draws:
            yield uniforms, w, stop, allowed
        seen.add(stop)
    missed = [i for i, weight in enumerate(branches.weights) if weight > 1e-3 and i not in seen]
    assert not missed, f"no probe reaches the branches {missed} of {case}"


def rows_of(cases: list[Case], how: str, size: int, seed: int = 0) -> Rows:
    """All probes of all cases as one batch of draft width `size`; shorter drafts get junk after."""
    rng = np.random.default_rng(seed)
    vocab = cases[0].targets.shape[-1]
    columns: list[list] = [[] for _ in range(9)]
    blur = 0.0
    for case in cases:
        n = len(case.draft)
        draft = np.concatenate([case.draft, rng.integers(0, vocab, size - n)]).astype(np.int32)
        # Padding that must not be read: drafts of zero probability or not, targets that are no laws.
        # Zero laws alone would hide a block test that reads one: its threshold is then right by chance.
        junk = np.full((size - n, vocab), rng.choice([0.0, 0.3]))
        law = np.concatenate([case.laws.reshape(n, vocab), junk])
        target = np.concatenate([case.targets, np.full((size - n, vocab), 0.9)])
        other = np.concatenate([case.other, np.full((size - n, vocab), 0.9)])
        for uniforms, w, stop, allowed in probes_of(case, how):
            row = (draft, n, law, target, uniforms + [0.0] * (size - n), w, other, stop, allowed)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
        branches = oracle.BRANCHES[how](case.draft, case.laws, case.targets)
        blur += case.chance * blur_of(case, how, intervals(case, how), branches.weights, branches.next_laws)
    columns[5] = [(w, w) for w in columns[5]]  # the vocabulary is one chunk: only the second decides
    kinds = [np.int32, np.int32] + [np.float32] * 5 + [np.int32, bool]
    arrays = [np.array(column, dtype=kind) for column, kind in zip(columns, kinds, strict=True)]
    return Rows(tuple(arrays[:6]), arrays[6], arrays[7], arrays[8], blur)


def outcome(round_, rows: Rows, with_other: bool = False) -> tuple[np.ndarray, ...]:
    """(accepted, token, bonus) of every row, in calls of one fixed shape.

    A mutant (`with_other`) also gets `rows.other`, to go wrong with.
    """
    arrays = [*rows.inputs, *([rows.other] if with_other else [])]
    count = len(rows.accepted)
    parts = []
    for start in range(0, count, CHUNK):
        index = np.minimum(np.arange(start, start + CHUNK), count - 1)
        out = round_(*(jnp.asarray(array[index]) for array in arrays))
        parts.append([np.asarray(x) for x in (out.accepted, out.token, out.bonus)])
    return tuple(np.concatenate(column)[:count] for column in zip(*parts, strict=True))


def errors(round_, rows: Rows, with_other: bool = False) -> list[str]:
    """One line per probe whose outcome is not the oracle's."""
    accepted, token, bonus = outcome(round_, rows, with_other)
    draft, lengths, _, _, accept_noise, residual_noise = rows.inputs
    bad = (
        (accepted != rows.accepted)
        | ~rows.allowed[np.arange(len(token)), token]
        | (bonus != (rows.accepted == lengths))
    )
    return [
        f"draft {draft[b][: lengths[b]].tolist()} uniforms {accept_noise[b].tolist()}, "
        f"{residual_noise[b, 1]}: got {accepted[b]} accepted, token {token[b]}, bonus {bonus[b]}; "
        f"wanted {rows.accepted[b]} accepted, "
        f"token in {np.flatnonzero(rows.allowed[b]).tolist()}"
        for b in np.flatnonzero(bad)
    ]
