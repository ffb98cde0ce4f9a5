"""Builds a localisation corpus from the gettext catalogs (.mo) of a Linux machine.

    python examples/restore_de/build_corpus.py --pair=en-de --output=corpora/l10n_en_de

    <output>/train.tsv.gz, validation.tsv.gz, test.tsv.gz   source, target, package; no header, no quoting
    <output>/test_nearest.tsv.gz                            similarity, source, target of the nearest train item
    <output>/README.md                                      rules, counts, packages

The same catalogs give the same bytes. Standard library and numpy only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import io
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

import l10n_catalogs
import l10n_cleaning
import l10n_report
from speccascade_t5x.common import checks, storage
from speccascade_t5x.interfaces import UserError

SALT = "l10n-v1"
SPLITS = ("train", "validation", "test")
_FEWEST_TRAIN_SHARE = 0.8

Pair = tuple[str, str, str]  # source, target, package


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus before it is written.

    Attributes:
      splits: split -> its pairs, in their order.
      nearest: for each test pair (similarity, train source, train target).
      counts: of each stage of the cleaning, in order.
      dropped: reason -> entries.
      packages: package -> [catalogs, entries, entries that pass, pairs of each split].
      conflicts: sources that had several targets.
    """

    splits: Mapping[str, list[Pair]]
    nearest: list[tuple[float, str, str]]
    counts: Mapping[str, int]
    dropped: Mapping[str, int]
    packages: Mapping[str, list[int]]
    conflicts: int


def build(
    catalogs: Sequence[l10n_catalogs.Catalog],
    test_pairs: int = 2000,
    validation_pairs: int = 2000,
    limits: l10n_cleaning.Limits | None = None,
) -> Corpus:
    """Cleans, dedupes and splits.

    Args:
      catalogs: in the order that decides which package a pair is counted for.
      test_pairs: at least so many pairs are test; whole groups of pairs with one split key.
      validation_pairs: likewise.
      limits: what a pair must keep to.

    Raises:
      UserError: nothing is left, or too little for splits of this size.
    """
    kept, dropped, packages = _cleaned(catalogs, limits or l10n_cleaning.Limits())
    entries = sum(len(catalog.entries) for catalog in catalogs)
    pairs, conflicts = _deduped(kept)
    wanted = {"test": test_pairs, "validation": validation_pairs}
    splits = _split(pairs, wanted)
    for split in SPLITS:
        for _, _, package in splits[split]:
            packages[package][3 + SPLITS.index(split)] += 1
    counts = {
        "catalog entries": entries,
        "after the filters": len(kept),
        "distinct pairs": len({(source, target) for source, target, _, _ in kept}),
        "distinct sources (the corpus)": len(pairs),
    }
    return Corpus(splits, _nearest(splits["test"], splits["train"]), counts, dropped, packages, conflicts)


def _cleaned(
    catalogs: Sequence[l10n_catalogs.Catalog], limits: l10n_cleaning.Limits
) -> tuple[list[tuple[str, str, str, int]], Counter[str], dict[str, list[int]]]:
    """((source, target, package, number of the catalog) of what is kept, reasons of the rest, counts by package)."""
    dropped: Counter[str] = Counter()
    packages: dict[str, list[int]] = defaultdict(lambda: [0] * (3 + len(SPLITS)))
    passed = []
    for number, catalog in enumerate(catalogs):
        packages[catalog.source][0] += 1
        packages[catalog.source][1] += len(catalog.entries)
        for key, raw_source, raw_target in catalog.entries:
            reason = None
            if l10n_cleaning.is_credits(key):
                reason = "translator credits"
            elif not raw_target.strip() or not raw_source.strip():
                reason = "untranslated / empty"
            elif l10n_cleaning.has_control(raw_source) or l10n_cleaning.has_control(raw_target):
                reason = "control characters or mojibake"
            else:
                source, target = l10n_cleaning.clean(raw_source, raw_target, catalog.domain, catalog.markers)
                reason = l10n_cleaning.why_dropped(source, target, limits)
            if reason:
                dropped[reason] += 1
            else:
                passed.append((source, target, catalog.source, number))
    # These two ask what is usual in the languages at hand.
    scripts = Counter(l10n_cleaning.script(c) for source, *_ in passed for c in source if c.isalpha())
    usual = scripts.most_common(1)[0][0] if scripts else "LATIN"
    words = l10n_cleaning.FunctionWords((source, target) for source, target, *_ in passed)
    kept = []
    for source, target, package, number in passed:
        if l10n_cleaning.other_script(source, usual):
            dropped["source side in another script"] += 1
        elif words.looks_like_source(target):
            dropped["target side looks like the source language"] += 1
        else:
            kept.append((source, target, package, number))
            packages[package][2] += 1
    return kept, dropped, dict(packages)


def _deduped(kept: Iterable[tuple[str, str, str, int]]) -> tuple[list[Pair], int]:
    """One target for each source, and how many sources had several.

    The target of most catalogs wins; then the one that matches the source's initial capital and final punctuation;
    then the first by alphabet.
    """
    catalogs: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    package: dict[tuple[str, str], str] = {}
    for source, target, name, number in kept:
        catalogs[source][target].add(number)
        package.setdefault((source, target), name)
    pairs = []
    for source in sorted(catalogs):
        rivals = catalogs[source]
        best = min(rivals, key=lambda target: (-len(rivals[target]), -_alike(source, target), target))
        pairs.append((source, best, package[source, best]))
    return pairs, sum(len(rivals) > 1 for rivals in catalogs.values())


def _alike(source: str, target: str) -> bool:
    """Whether initial capital and final punctuation agree."""
    ends = [text[-1] if not text[-1].isalnum() else "" for text in (source, target)]
    return source[0].isupper() == target[0].isupper() and ends[0] == ends[1]


def _digest(text: str) -> str:
    return hashlib.sha256((SALT + text).encode()).hexdigest()


def _split(pairs: Sequence[Pair], wanted: Mapping[str, int]) -> dict[str, list[Pair]]:
    """Whole groups of pairs with one key, in the order of their hashes: first test, then validation, then train."""
    if not pairs:
        raise UserError("no pair is left after the cleaning: install more programs with their translations")
    held_out = sum(wanted.values())
    if held_out > (1 - _FEWEST_TRAIN_SHARE) * len(pairs):
        raise UserError(
            f"the catalogs give {len(pairs)} pairs, too few for {held_out} held-out ones: set --test_pairs and "
            f"--validation_pairs to {max(len(pairs) // 20, 1)} or fewer each, or install more programs"
        )
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[l10n_cleaning.split_key(pair[0])].append(pair)
    splits: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for key in sorted(groups, key=_digest):
        split = next((name for name, count in wanted.items() if len(splits[name]) < count), "train")
        splits[split] += groups[key]
    keys = {split: {l10n_cleaning.split_key(source) for source, _, _ in found} for split, found in splits.items()}
    for split, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        if not keys[split].isdisjoint(keys[other]):
            raise AssertionError(f"a split key stands in {split} and {other}")
    return {split: sorted(found, key=lambda pair: _digest("\t".join(pair))) for split, found in splits.items()}


def _nearest(test: Sequence[Pair], train: Sequence[Pair]) -> list[tuple[float, str, str]]:
    """The train pair nearest to each test pair, by the Jaccard index of their key's words; the first of equals."""
    sets = [l10n_cleaning.split_key(source).split() for source, _, _ in train]
    sizes = np.array([len(words) for words in sets])
    lists: dict[str, list[int]] = defaultdict(list)
    for index, words in enumerate(sets):
        for word in words:
            lists[word].append(index)
    holding = {word: np.array(found) for word, found in lists.items()}
    nearest = []
    for source, _, _ in test:
        words = l10n_cleaning.split_key(source).split()
        found = [holding[word] for word in words if word in holding]
        shared = np.bincount(np.concatenate(found), minlength=len(train)) if found else np.zeros(len(train))
        similarity = shared / np.maximum(sizes + len(words) - shared, 1)
        best = int(similarity.argmax())
        nearest.append((float(similarity[best]), *train[best][:2]))
    return nearest


def write(corpus: Corpus, output: Path, readme: str) -> dict[str, Path]:
    """Writes all files into a folder that appears whole.

    Raises:
      UserError: the folder holds something already, or cannot be written.
    """
    _check_free(output)
    partial = output.with_name(f".{output.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        for split in SPLITS:
            storage.write_bytes(partial / f"{split}.tsv.gz", [_tsv(corpus.splits[split])])
        rows = [(f"{similarity:.4f}", source, target) for similarity, source, target in corpus.nearest]
        storage.write_bytes(partial / "test_nearest.tsv.gz", [_tsv(rows)])
        storage.write_text(partial / "README.md", readme)
        if output.is_dir():
            output.rmdir()  # it is empty
        partial.replace(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {path.name: path for path in sorted(output.iterdir())}


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output folder {output} exists and is not empty: choose another one, or remove it")


def _tsv(rows: Iterable[Sequence[str]]) -> bytes:
    """Rows as a gzip file that holds no time and no name."""
    content = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=content, compresslevel=9, mtime=0) as file:
        for row in rows:
            file.write(("\t".join(row) + "\n").encode())
    return content.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and builds. Returns the exit code."""
    flags = _parser().parse_args(argv)
    try:
        return _run(flags)
    except UserError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2


def _run(flags: argparse.Namespace) -> int:
    source, _, target = flags.pair.partition("-")
    if not source or not target or source == target:
        raise UserError(f"--pair={flags.pair} names no two languages: write for example en-de, or fr-de")
    for name in ("test_pairs", "validation_pairs"):
        checks.whole(name, getattr(flags, name), 1)
    output = Path(flags.output).expanduser()
    _check_free(output)
    defaults = [Path(root) for root in l10n_catalogs.DEFAULT_ROOTS if Path(root).is_dir()]
    roots = [Path(root).expanduser() for root in flags.root] or defaults
    if not roots:
        raise UserError("this machine has none of the usual catalog folders: name others with --root")
    limits = l10n_cleaning.Limits(min_ratio=flags.min_ratio, max_ratio=flags.max_ratio)
    found = l10n_catalogs.find(roots, source, target)
    print(f"read {len(found.catalogs)} catalogs, {len(found.unreadable)} unreadable; cleaning ...", file=sys.stderr)
    corpus = build(found.catalogs, flags.test_pairs, flags.validation_pairs, limits)
    readme = l10n_report.readme(corpus, found, source, target, limits)
    write(corpus, output, readme)
    for name, count in corpus.counts.items():
        print(f"{name:<32} {count:>9,}")
    for split in SPLITS:
        print(f"{split:<32} {len(corpus.splits[split]):>9,}")
    print(f"wrote {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_corpus",
        description="Builds a parallel corpus from the gettext catalogs (.mo) on this machine.",
        epilog="English is what msgids are written in; a pair without it joins two catalogs of each program. The texts "
        "belong to their authors and translators: read the licences of the packages before sharing any.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new or empty folder for the corpus")
    parser.add_argument("--pair", default="en-de", metavar="SOURCE-TARGET", help="languages (default: en-de)")
    parser.add_argument(
        "--root",
        action="append",
        default=[],
        metavar="FOLDER",
        help="searched at any depth for <language>/LC_MESSAGES/*.mo; may be repeated "
        f"(default: {', '.join(l10n_catalogs.DEFAULT_ROOTS)})",
    )
    parser.add_argument("--test_pairs", type=int, default=2000, help="at least so many test pairs (default: 2000)")
    parser.add_argument("--validation_pairs", type=int, default=2000, help="likewise (default: 2000)")
    parser.add_argument("--min_ratio", type=float, default=0.4, help="target characters for a source one, at least")
    parser.add_argument("--max_ratio", type=float, default=2.5, help="likewise, at most (defaults: 0.4 and 2.5)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
