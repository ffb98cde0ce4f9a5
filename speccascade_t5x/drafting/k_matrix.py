"""The K matrix of "Cascade Speculative Drafting", in the convention of its published code, and what it implies.

Drafters are numbered from the largest. Row 0 says how the draft for the verifier is written, row i + 1 how the
draft that drafter i reviews is: K[r][i] more tokens by drafter i, larger ones first (the horizontal cascade).
Entries below the diagonal are 0. In the paper's letters K[0][0] = k11 and K[0][1] = k12 - k11: lengths are added.

A drafter reviews whole inner drafts, so it may write more than its share, and the next one's share shrinks by as
much; here a row never writes more than the sum of its entries, which makes every shape static.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from speccascade_t5x.core.probs import DRAW
from speccascade_t5x.interfaces import UserError


@dataclasses.dataclass(frozen=True)
class KMatrix:
    """Checked entries. Hashable: static under jit.

    Attributes:
      rows: the entries.
      copies: whether the last drafter copies or looks up instead of running a model.
    """

    rows: tuple[tuple[int, ...], ...]
    copies: bool

    @property
    def models(self) -> int:
        """How many drafters are language models."""
        return len(self.rows) - self.copies

    def length(self, row: int) -> int:
        """Most tokens of the draft that row `row` describes; 0 below the last row."""
        return sum(self.rows[row]) if row < len(self.rows) else 0

    @property
    def longest(self) -> int:
        """The longest draft of any row."""
        return max(self.length(row) for row in range(len(self.rows)))

    def block(self, drafter: int) -> int:
        """Tokens a review by `drafter` scores. Without a draft it may lack a bonus token besides the current one."""
        return self.length(drafter + 1) + 1 if self.length(drafter + 1) else 2

    def widest(self, row: int) -> int:
        """Most tokens that one step of a draft of row `row` writes."""
        if row >= len(self.rows):
            return 0
        entries = enumerate(self.rows[row])
        return max(count if self.copies and i == self.models else self.length(i + 1) + 1 for i, count in entries)

    def review_noise(self, drafter: int) -> int:
        """Uniforms that one review of drafter `drafter` takes: its inner draft's, one per test, and one draw's."""
        return self.draft_noise(drafter + 1) + self.length(drafter + 1) + DRAW

    def draft_noise(self, row: int) -> int:
        """Uniforms that a draft of row `row` takes; every one of them is used at most once."""
        if row >= len(self.rows):
            return 0
        draw = lambda i: DRAW if self.copies and i == self.models else self.review_noise(i)  # noqa: E731
        return sum(count * draw(i) for i, count in enumerate(self.rows[row]) if count)


def k_matrix(rows: Sequence[Sequence[int]], models: int, copies: bool) -> KMatrix:
    """Checks a K matrix.

    Args:
      rows: n rows of n entries.
      models: how many drafters are language models.
      copies: whether a copying drafter is last.

    Raises:
      UserError: wrong shape, a negative or fractional entry, one below the diagonal, an empty first row, or a
        drafter that nothing uses.

    The drafter writes 8 tokens and a copying drafter 4 more; while the drafter writes, 5 copies are reviewed at a time:

    >>> k = k_matrix([[8, 4], [0, 5]], models=1, copies=True)
    >>> k.length(0), k.length(1)
    (12, 5)
    """
    size = models + copies
    rows = [list(row) for row in rows]
    if len(rows) != size or any(len(row) != size for row in rows):
        shape = "x".join(map(str, (len(rows), *sorted({len(row) for row in rows}))))
        raise UserError(f"a K matrix for {size} drafters needs {size} rows of {size} numbers, but it is {shape}")
    for r, row in enumerate(rows):
        for i, value in enumerate(row):
            if int(value) != value or value < 0:
                raise UserError(f"K[{r}][{i}]={value} is not a number of tokens: use 0, 1, 2, ...")
            if i < r and value:
                raise UserError(f"K[{r}][{i}]={value} lies below the diagonal: put 0 there")
    if not sum(rows[0]):
        raise UserError("row 0 of the K matrix is all 0, so nothing would be drafted: give it a positive entry")
    used = {0}
    for r, row in enumerate(rows):
        if r in used:
            used |= {i + 1 for i, value in enumerate(row) if value}
    for i in range(size):
        if i + 1 not in used:
            raise UserError(f"the K matrix never lets drafter {i} write: leave it out, or give its column an entry")
    return KMatrix(tuple(tuple(int(value) for value in row) for row in rows), copies)
