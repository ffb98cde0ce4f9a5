"""The README that `build_corpus` writes beside a corpus: rules, counts, similarity, packages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import build_corpus
    import l10n_catalogs
    import l10n_cleaning

_SPLITS = ("train", "validation", "test")
_BINS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def readme(
    corpus: build_corpus.Corpus,
    found: l10n_catalogs.Found,
    source: str,
    target: str,
    limits: l10n_cleaning.Limits,
) -> str:
    """The whole text; it names no place and no time, so the same catalogs give the same bytes."""
    pairs = sum(len(corpus.splits[split]) for split in _SPLITS)
    sizes = ", ".join(f"{split} {len(corpus.splits[split]):,}" for split in _SPLITS)
    parts = [
        f"# Software localisation corpus, {source} to {target}",
        f"Read from the gettext catalogs (.mo) of {len(corpus.packages)} packages. **{pairs:,} pairs**: {sizes}.",
        "Train, validation and test: `<split>.tsv.gz`, UTF-8, one pair per line, the tab-separated columns source, "
        "target and package, without header or quoting. `test_nearest.tsv.gz` goes line by line with the test split: "
        "the highest similarity to a train item, that item's source, its target.",
        "The texts belong to their authors and translators and carry the licences of their packages; read those "
        "before sharing any part.",
        "## Cleaning",
        _numbered(_rules(limits)),
        _table(("stage", "count"), ((name, f"{count:,}") for name, count in corpus.counts.items())),
        _table(
            ("dropped because", "entries"),
            (
                (why, f"{count:,}")
                for why, count in sorted(corpus.dropped.items(), key=lambda item: (-item[1], item[0]))
            ),
        ),
        f"{corpus.conflicts:,} sources had more than one target before they were deduped.",
        "## Statistics",
        _table(("split", "side", "tokens", "mean", "median", "longest", "mean characters"), _lengths(corpus)),
        "Test items by their similarity to the nearest train item (Jaccard index of the word sets of the split keys; "
        "1 cannot occur):",
        _table(("similarity", "test items"), _bins([similarity for similarity, _, _ in corpus.nearest])),
        "## Packages",
        _table(
            ("package", "catalogs", "entries", "pass filters", "train", "validation", "test"),
            ((name, *(f"{count:,}" for count in counts)) for name, counts in sorted(corpus.packages.items())),
        ),
    ]
    if found.unreadable:
        parts.append("Not readable: " + ", ".join(sorted(path.name for path, _ in found.unreadable)) + ".")
    return "\n\n".join(parts) + "\n"


def _rules(limits: l10n_cleaning.Limits) -> list[str]:
    return [
        "Only entries with a translation; of plurals the first forms; no translators' credits, no control characters.",
        "Contexts inside strings removed (`ctx^text`, `?ctx:`, `|ARG|`, `[[...]]`, `ctx|text`), by program.",
        "Accelerator markers removed, as each catalog declares or shows them; shortcuts behind a tab cut.",
        "A pair of tags around both sides removed; all known tags removed where they are unbalanced or differ between "
        "the sides. Character references decoded, but for those of <, > and &.",
        "Unicode NFC, no invisible characters, one space for every run of white space. Format specifiers stay.",
        f"Kept: {limits.min_words} or more source words, at most {limits.max_tokens} tokens and {limits.max_chars} "
        f"characters, {limits.min_ratio:g} to {limits.max_ratio:g} target characters for a source one, "
        f"{100 * limits.min_letters:g}% letters or more on both sides.",
        "Dropped: targets equal to their source but for case, punctuation and spaces, or visibly in the source "
        "language; e-mail addresses; keyword lists; sources with letters of another script.",
        "One target for each source: that of most catalogs, then the one with the source's initial capital and final "
        "punctuation, then the first by alphabet.",
        "Split by key: the set of the source's words without tags, specifiers, case, accents and punctuation, digits "
        "as 0. Keys are ordered by sha256 and go whole to test, then validation, then train; no key is in two splits.",
    ]


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _lengths(corpus: build_corpus.Corpus) -> list[tuple[str, ...]]:
    rows = []
    for split in _SPLITS:
        for side, name in enumerate(("source", "target")):
            texts = [pair[side] for pair in corpus.splits[split]]
            tokens = np.array([len(text.split()) for text in texts])
            shown = (f"{tokens.sum():,}", f"{tokens.mean():.2f}", f"{np.median(tokens):g}", f"{tokens.max()}")
            rows.append((split, name, *shown, f"{np.mean([len(text) for text in texts]):.1f}"))
    return rows


def _bins(similarities: Sequence[float]) -> list[tuple[str, str]]:
    counts, _ = np.histogram(similarities, bins=_BINS)
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(_BINS)]
    return [
        (name, f"{count} ({100 * count / len(similarities):.1f}%)") for name, count in zip(names, counts, strict=True)
    ]
