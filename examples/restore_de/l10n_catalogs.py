"""Pairs of user-interface strings from the gettext catalogs (.mo) of a Linux machine. Standard library only."""

from __future__ import annotations

import dataclasses
import gettext
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import l10n_cleaning
from speccascade_t5x.interfaces import UserError

DEFAULT_ROOTS = ("/usr/share/locale", "/usr/share/locale-langpack", "/usr/local/share/locale")
PACKAGE_LISTS = "/var/lib/dpkg/info"
# Share of a program's strings with an accelerator, from which on its marker is believed.
_FEWEST_MARKED = 0.01
MSGID = "en"  # the language that msgids are written in


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The texts of one program in the two languages of a pair.

    Attributes:
      source: the package its files belong to, or its domain where no package manager says.
      domain: the file's name without .mo.
      path: of the catalog, the target's where there are two.
      entries: (msgid with its context before \\x04, source text, target text); for a plural the first forms.
      markers: characters that mark accelerators in this program's strings.
    """

    source: str
    domain: str
    path: Path
    entries: list[tuple[str, str, str]]
    markers: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found: catalogs in a fixed order, and files that cannot be read, with the reason."""

    catalogs: list[Catalog]
    unreadable: list[tuple[Path, str]]


def languages(roots: Sequence[Path]) -> Counter[str]:
    """How many catalogs there are of each language."""
    return Counter(language for language, _ in _files(roots))


def find(roots: Sequence[Path], source: str, target: str, package_lists: Path = Path(PACKAGE_LISTS)) -> Found:
    """Reads all catalogs of a language pair below some folders.

    A side in English is the msgid; a pair without English joins two catalogs of one domain and folder.

    Args:
      roots: searched for `<language>/LC_MESSAGES/<domain>.mo` at any depth.
      source: language of the source side, as folders are named: "en", "de", "pt_BR".
      target: of the target side.
      package_lists: Debian's file lists; ignored where there are none.

    Raises:
      UserError: a folder that does not exist, no catalogs at all, or none of a language.
    """
    for root in roots:
        if not root.is_dir():
            raise UserError(f"the folder {root} does not exist: name folders that hold catalogs with --root")
    wanted = [language for language in (source, target) if language != MSGID]
    by_language: dict[str, dict[tuple[Path, str], Path]] = {language: {} for language in wanted}
    known: Counter[str] = Counter()
    for language, path in _files(roots):
        known[language] += 1
        for name in wanted:
            if language in (name, f"{name}_{name.upper()}"):
                # <place>/<language>/LC_MESSAGES/<domain>.mo; the plain name wins over de_DE.
                by_language[name].setdefault((path.parents[2], path.stem), path)
    where = ", ".join(map(str, roots))
    if not known:
        raise UserError(f"there is no gettext catalog (.mo) below {where}: install programs with their translations")
    for name in wanted:
        if not by_language[name]:
            most = ", ".join(language for language, _ in known.most_common(12))
            raise UserError(f"there is no catalog of language {name!r} below {where}: most are of {most}")
    places = set.intersection(*(set(files) for files in by_language.values()))
    packages = _packages(package_lists)
    catalogs, unreadable = [], []
    for place in sorted(places):
        files = {name: by_language[name][place] for name in wanted}
        try:
            texts = {name: _read(path) for name, path in files.items()}
        except (OSError, ValueError, LookupError, struct.error, SyntaxError) as error:
            unreadable.append((files[wanted[-1]], str(error) or type(error).__name__))
            continue
        path = files[wanted[-1]]
        entries = _joined(texts, source, target)
        markers = _markers(place[1], texts[wanted[-1]], entries)
        catalogs.append(Catalog(packages.get(str(path), place[1]), place[1], path, entries, markers))
    if not catalogs:
        said = f"; {unreadable[0][0]} cannot be read ({unreadable[0][1]})" if unreadable else ""
        raise UserError(f"no program below {where} has catalogs of both languages of {source}-{target}{said}")
    catalogs.sort(key=lambda catalog: (catalog.source, catalog.domain, str(catalog.path)))
    return Found(catalogs, unreadable)


def _files(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """(language, path) of every catalog, each file once, in a fixed order."""
    seen: set[Path] = set()
    for root in roots:
        for folder, inner, names in os.walk(root, followlinks=False):
            inner.sort()
            if Path(folder).name != "LC_MESSAGES":
                continue
            for name in sorted(names):
                path = Path(folder, name)
                if name.endswith(".mo") and path.resolve() not in seen:
                    seen.add(path.resolve())
                    yield path.parents[1].name, path


@dataclasses.dataclass(frozen=True)
class _Texts:
    """One catalog as gettext reads it: key -> text, and its header."""

    texts: dict[str, str]
    header: Mapping[str, str]


def _read(path: Path) -> _Texts:
    with path.open("rb") as file:
        read = gettext.GNUTranslations(file)
    texts: dict[str, str] = {}
    for key, text in read._catalog.items():  # gettext offers no other way to list what a catalog holds
        if isinstance(key, tuple):  # (msgid, number of the plural form)
            if key[1] == 0:
                texts[key[0]] = text
        elif key:
            texts[key] = text
    return _Texts(texts, read.info())


def _joined(texts: Mapping[str, _Texts], source: str, target: str) -> list[tuple[str, str, str]]:
    """(key, source text, target text) of every entry both sides have, in the order of the keys."""
    keys = set.intersection(*(set(side.texts) for side in texts.values()))
    plain = {key: key.rpartition("\x04")[2] for key in keys}
    sides = [plain if language == MSGID else texts[language].texts for language in (source, target)]
    return [(key, sides[0][key], sides[1][key]) for key in sorted(keys)]


def _markers(domain: str, texts: _Texts, entries: Iterable[tuple[str, str, str]]) -> str:
    """The accelerator markers of a program: what its catalog declares, or what its strings have in common."""
    declared = texts.header.get("x-accelerator-marker", "").strip()
    if declared == "~":
        return "_~"  # LibreOffice has both
    if len(declared) == 1:
        return declared
    if domain.startswith("aptitude"):
        return "^"
    votes = Counter(
        marker for _, source, target in entries for marker in l10n_cleaning.accelerator_votes(source, target)
    )
    (marker, count), *_ = [*votes.most_common(1), ("", 0)]
    return marker if count >= max(1 if marker == "&" else 2, _FEWEST_MARKED * len(texts.texts)) else ""


def _packages(folder: Path) -> dict[str, str]:
    """Catalog -> the Debian package that owns it."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.list")) if folder.is_dir() else []:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        for line in lines:
            if line.endswith(".mo"):
                found.setdefault(line, path.stem.partition(":")[0])
    return found
