"""Cleaning of user-interface strings: what a pair of texts loses, and when it is dropped.

The rules follow one another as the README that `build_corpus` writes beside a corpus lists them. Standard library only.
"""

from __future__ import annotations

import dataclasses
import html.entities
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# printf and its kin: %s, %1$d, %(name)s, %-5.2f, Qt's %1, {name}, $name, $(NAME), %PRODUCTNAME.
SPECIFIER = re.compile(
    r"%[A-Z]{2,}|\$\(?\w+(?:\.\w+)*\)?|%(?:\(\w+\))?(?:\d+\$)?[-+#0']*(?:\d+|\*)?(?:\.(?:\d+|\*))?"
    r"(?:hh|h|ll|l|j|z|t|L|q)?[a-zA-Z]|%%|%\d+|\{\w*\}"
)
_HTML_TAGS = (
    "a abbr b big blockquote body br center code dd div dl dt em font h1 h2 h3 h4 h5 h6 head hr html i img kbd li nobr "
    " ol p pre qt s small span strike strong sub sup table tbody td th thead tr tt u ul var"
)
# Markup of some toolkits whose names could as well be placeholders: tags only where one is closed.
_CLOSED_TAGS = (
    "application bcode command emphasis email filename icode interface link message note para shortcut title warning"
)
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)((?:\s[^<>]*)?/?)>")
_VOID = {"br", "hr", "img"}
_ALWAYS, _CLOSED = set(_HTML_TAGS.split()), set(_CLOSED_TAGS.split())
_WORD = re.compile(r"\W*[^\W\d_]+(?:[-/’'][^\W\d_]+)*\W*")
_INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
# Joiners spell words in Arabic and Indic scripts and are left there.
_JOINERS = re.compile("(?<![\u0600-\u109f\u1780-\u17ff])[\u200c\u200d]")
_ENTITY = re.compile(r"&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|([A-Za-z][A-Za-z0-9]*));")
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_KEYWORDS = re.compile(r"^[^;]+;(?:[^;\s][^;]*;)+$")
_MOJIBAKE = re.compile("\ufffd|Ã[\u0080-\u00bf]|â€")
_CREDITS = re.compile(
    r"translators?[ _-]?credits?|credits?[ _](?:for|of)[ _]translators?|(?:names?|e-?mails?|roles?) of translators?"
    r"|^your (?:names?|e-?mails?)$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a pair must keep to.

    Attributes:
      min_words: fewest source words: whitespace tokens with a letter, specifiers and tags not counted.
      max_tokens: most whitespace tokens of the source.
      max_chars: most characters of the source.
      min_ratio, max_ratio: characters of the target for one of the source.
      min_letters: smallest share of letters on either side.
    """

    min_words: int = 2
    max_tokens: int = 60
    max_chars: int = 600
    min_ratio: float = 0.4
    max_ratio: float = 2.5
    min_letters: float = 0.45


def is_credits(key: str) -> bool:
    """Whether a msgid (its context included) asks translators for their names."""
    return any(_CREDITS.search(part.strip()) for part in key.split("\x04"))


def strip_context(source: str, target: str, domain: str) -> tuple[str, str]:
    """Removes contexts that programs keep inside their strings."""
    if domain.startswith("wesnoth"):
        source, target = (re.sub(r"^[^\^\n]*\^", "", text) for text in (source, target))
    elif domain.startswith("freeciv"):
        source, target = (re.sub(r"^\?[^:\n]+:", "", text) for text in (source, target))
    elif domain.startswith("gnupg"):
        source, target = (re.sub(r"^\|[^|\n]*\|!?", "", text) for text in (source, target))
    elif domain.startswith("lyx"):
        source, target = (re.sub(r"\[\[.*?\]\]", "", text) for text in (source, target))
        source, target = (re.sub(r"\|\S$", "", text) for text in (source, target))
    elif "|" not in target and (match := re.match(r"[^|\s]{1,40}\|(?=\S)", source)) and source.count("|") == 1:
        source = source[match.end() :]
    return source, target


def accelerator_votes(source: str, target: str) -> list[str]:
    """Which of "_" and "&" seem to mark a keyboard accelerator in a pair.

    Each side has the marker once, before a letter; the marked words differ; and "_" stands at the start of a word in
    the source, for inside one it may belong to a name.
    """
    found = []
    for marker in "_&":
        pattern = re.compile(rf"(?<!{marker}){marker}(?=[^\W\d_])")
        here, there = list(pattern.finditer(source)), list(pattern.finditer(target))
        if len(here) != 1 or len(there) != 1 or _ENTITY.search(source) or _ENTITY.search(target):
            continue
        at = here[0].start()
        words = [re.findall(rf"\S*{marker}\S*", text) for text in (source, target)]
        inside = at > 0 and source[at - 1].isalnum()
        if words[0] != words[1] and not (marker == "_" and inside):
            found.append(marker)
    return found


def strip_accelerators(source: str, target: str, markers: str) -> tuple[str, str]:
    """Removes the accelerator markers of a toolkit, and shortcuts behind a tab.

    Identifiers (a marker inside a token that stands on both sides), entities and URLs are left alone.
    """
    source, target = (re.sub(r"\t\S{1,24}$", "", text) for text in (source, target))
    for marker in markers:
        shared = _shared_token(source, target, marker)
        source, target = (_without(text, marker, shared) for text in (source, target))
        if marker == "&":  # doubled, it is shown as itself
            source, target = (text.replace("&&", "&") for text in (source, target))
    return source, target


def _shared_token(source: str, target: str, marker: str) -> str | None:
    """A token with the marker inside that both sides have: an identifier."""
    inside = [token for token in source.split() if re.search(rf"\w{re.escape(marker)}\w", token)]
    return next((token for token in inside if token in target.split()), None)


def _without(text: str, marker: str, shared: str | None) -> str:
    mark = re.escape(marker)
    text = re.sub(rf"\s?\({mark}\w\)", "", text)  # scripts without case put the Latin key in brackets
    found = [m.start() for m in re.finditer(rf"(?<!{mark}){mark}(?=\w)(?!\w*;)", text)]
    if len(found) != 1:
        return text
    at = found[0]
    start = text.rfind(" ", 0, at) + 1
    token = text[start:].split(" ", 1)[0]
    inside = at > start and text[at - 1].isalnum()
    if token == shared or "://" in token or "=" in token or (inside and token.count("_") > 1):
        return text
    if inside and (token.isupper() or not _WORD.fullmatch(token.replace(marker, ""))):
        return text
    return text[:at] + text[at + 1 :]


def tags_of(text: str) -> list[re.Match[str]]:
    """The markup tags of a text; placeholders such as `<file>` are none."""
    closed = {match[2].lower() for match in _TAG.finditer(text) if match[1]}
    return [
        match
        for match in _TAG.finditer(text)
        if match[2].lower() in _ALWAYS or (match[2].lower() in _CLOSED and match[2].lower() in closed)
    ]


def strip_tags(source: str, target: str) -> tuple[str, str]:
    """Removes tags around the whole of both sides, and all tags where they are unbalanced or differ."""
    while (inner := _unwrapped(source)) and (other := _unwrapped(target)) and inner[0] == other[0]:
        source, target = inner[1], other[1]
    names = [Counter((m[1], m[2].lower()) for m in tags_of(text)) for text in (source, target)]
    if names[0] != names[1] or not (_balanced(source) and _balanced(target)):
        source, target = without_tags(source, ""), without_tags(target, "")
    return source, target


def without_tags(text: str, instead: str = " ") -> str:
    """The text with `instead` in place of every tag; a line break is always a space."""
    for match in reversed(tags_of(text)):
        text = text[: match.start()] + (" " if match[2].lower() in ("br", "p") else instead) + text[match.end() :]
    return text


def _unwrapped(text: str) -> tuple[str, str] | None:
    """(tag, what is inside), where one pair of tags holds the whole text."""
    text = text.strip()
    tags = tags_of(text)
    if len(tags) < 2 or tags[0].start() or tags[-1].end() != len(text) or tags[0][1] or not tags[-1][1]:
        return None
    name, depth = tags[0][2].lower(), 0
    for match in tags:
        if match[2].lower() == name and not match[3].endswith("/"):
            depth += -1 if match[1] else 1
            if depth == 0 and match is not tags[-1]:
                return None
    return (name, text[tags[0].end() : tags[-1].start()]) if depth == 0 else None


def _balanced(text: str) -> bool:
    open_tags: list[str] = []
    for match in tags_of(text):
        name = match[2].lower()
        if name in _VOID or match[3].endswith("/"):
            continue
        if not match[1]:
            open_tags.append(name)
        elif not open_tags or open_tags.pop() != name:
            return False
    return not open_tags


def decode_entities(text: str) -> str:
    """Numeric and named character references as characters; those of <, > and & stay."""

    def character(match: re.Match[str]) -> str:
        decimal, hexadecimal, name = match.groups()
        code = html.entities.name2codepoint.get(name, 39 if name == "apos" else 0) if name else 0
        code = code or int(decimal or hexadecimal or "0", 10 if decimal else 16)
        if code < 32 or code > 0x10FFFF or 0xD800 <= code < 0xE000 or chr(code) in "<>&":
            return match[0]
        return chr(code)

    return _ENTITY.sub(character, text)


def normalise(text: str) -> str:
    """Unicode NFC, no invisible characters, one space for every run of white space."""
    text = _JOINERS.sub("", _INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    return " ".join(text.split())


def clean(source: str, target: str, domain: str, markers: str) -> tuple[str, str]:
    """All that a pair loses: contexts, accelerators, tags, entities, odd characters and spaces."""
    source, target = strip_context(source, target, domain)
    source, target = strip_accelerators(source, target, markers)
    source, target = strip_tags(source, target)
    return normalise(decode_entities(source)), normalise(decode_entities(target))


def has_control(text: str) -> bool:
    """Whether a text as it was read holds control characters beside white space, or wrongly decoded bytes."""
    return bool(_MOJIBAKE.search(text)) or any(unicodedata.category(c) == "Cc" and c not in "\t\n\r\v\f" for c in text)


def why_dropped(source: str, target: str, limits: Limits) -> str | None:
    """Why a cleaned pair is dropped; None keeps it."""
    if not source or not target:
        return "empty after cleaning"
    words = [token for token in SPECIFIER.sub(" ", without_tags(source)).split() if any(map(str.isalpha, token))]
    if len(words) < limits.min_words:
        return f"fewer than {limits.min_words} source words"
    if len(source.split()) > limits.max_tokens:
        return f"more than {limits.max_tokens} source words"
    if len(source) > limits.max_chars:
        return f"more than {limits.max_chars} source characters"
    if not limits.min_ratio <= len(target) / len(source) <= limits.max_ratio:
        return f"character length ratio outside {limits.min_ratio:g}..{limits.max_ratio:g}"
    if min(_letters(source), _letters(target)) < limits.min_letters:
        return f"fewer than {100 * limits.min_letters:g}% letters"
    if _bare(source) == _bare(target):
        return "target identical to source"
    if _MAIL.search(source) or _MAIL.search(target):
        return "contains an e-mail address"
    if any(_KEYWORDS.search(_ENTITY.sub("", text)) for text in (source, target)):
        return "keyword list"
    return None


def _letters(text: str) -> float:
    """Share of letters (with their combining marks) among the characters that are no space."""
    shown = [c for c in text if not c.isspace()]
    return sum(unicodedata.category(c)[0] in "LM" for c in shown) / max(len(shown), 1)


def _bare(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def script(letter: str) -> str:
    """The script of a letter, as the first word of its Unicode name: LATIN, CYRILLIC, CJK, ..."""
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def other_script(text: str, expected: str) -> bool:
    """Whether a text holds letters that are neither Latin nor of the expected script; signs like µ do not count."""
    known = {"LATIN", expected, "MICRO", "FEMININE", "MASCULINE", "MODIFIER", "OHM", "KELVIN", "ANGSTROM"}
    return any(c.isalpha() and ord(c) > 127 and script(c) not in known for c in text)


def words_of(text: str) -> list[str]:
    """Words in lower case, apostrophes left out."""
    return re.findall(r"[^\W\d_]+", re.sub("['’‘]", "", without_tags(text).lower()))


class FunctionWords:
    """The commonest words of either side that the other side hardly uses, learnt from the pairs themselves.

    Args:
      pairs: cleaned (source, target).
      most: how many of the commonest words of a side are looked at.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], most: int = 100):
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for pair in pairs:
            for count, text in zip(counts, pair, strict=True):
                count.update(words_of(text))
        totals = [max(count.total(), 1) for count in counts]
        self.source, self.target = (
            {
                word
                for word, seen in counts[side].most_common(most)
                if seen >= 5 and len(word) > 1 and seen / totals[side] > 10 * counts[1 - side][word] / totals[1 - side]
            }
            for side in (0, 1)
        )

    def looks_like_source(self, target: str) -> bool:
        """Whether a target has two or more of the source's function words, a fifth of all, and none of its own."""
        words = words_of(target)
        foreign = sum(word in self.source for word in words)
        return foreign >= max(2, len(words) / 5) and not any(word in self.target for word in words)


def split_key(source: str) -> str:
    """What may stand in one split only: the set of a source's words, in order.

    Tags and format specifiers are left out, case and accents folded, apostrophes dropped, runs of digits become 0,
    and words need a letter; so "Unknown host" and "Host Unknown" share a key, and "E27: x" and "E28: x".
    """
    text = unicodedata.normalize("NFKD", SPECIFIER.sub(" ", without_tags(source)).lower())
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"\d+", "0", re.sub("['’‘]", "", text))
    return " ".join(sorted({word for word in re.findall(r"[^\W_]+", text) if any(map(str.isalpha, word))}))
