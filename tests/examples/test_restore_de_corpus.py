"""The corpus builder, on catalogs written here byte by byte, and its rules against the corpus beside the checkout."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

import build_corpus
import l10n_catalogs
import l10n_cleaning
from speccascade_t5x.interfaces import UserError

LIMITS = l10n_cleaning.Limits()
HEADER = "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"


def write_mo(path: Path, texts: Mapping[str, str], header: str = HEADER, encoding: str = "utf-8") -> None:
    """Writes a catalog in the format of the GNU gettext manual, "The Format of GNU MO Files"."""
    entries = sorted((key.encode(encoding), value.encode(encoding)) for key, value in {"": header, **texts}.items())
    count = len(entries)
    at = 28 + 16 * count
    tables, data = b"", b""
    for column in (0, 1):
        for entry in entries:
            tables += struct.pack("<2I", len(entry[column]), at + len(data))
            data += entry[column] + b"\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, at) + tables + data)


def catalog(root: Path, domain: str, texts: Mapping[str, str], language: str = "de", **more) -> None:
    write_mo(root / language / "LC_MESSAGES" / f"{domain}.mo", texts, **more)


ADJECTIVES = {
    "red": "rote", "green": "grüne", "small": "kleine", "large": "große", "quick": "schnelle",
    "silent": "stille", "broken": "defekte", "empty": "leere", "hidden": "verborgene", "narrow": "schmale",
}  # fmt: skip
NOUNS = {
    "window": "Maske", "button": "Taste", "server": "Maschine", "folder": "Mappe", "colour": "Farbe",
    "picture": "Grafik", "printer": "Presse", "network": "Leitung",
}  # fmt: skip
VERBS = {"Open": "Öffnet", "Close": "Schließt"}
SENTENCES = {
    f"{verb} the {adjective} {noun}": f"{VERBS[verb]} die {ADJECTIVES[adjective]} {NOUNS[noun]}"
    for verb, adjective, noun in itertools.product(VERBS, ADJECTIVES, NOUNS)
}


def rows(folder: Path, name: str) -> list[list[str]]:
    with gzip.open(folder / f"{name}.tsv.gz", "rt", encoding="utf-8", newline="\n") as lines:
        return [line.rstrip("\n").split("\t") for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def root(tmp_path) -> Path:
    """Two programs; the second holds a translation of its own for one sentence of the first."""
    catalog(tmp_path / "share", "alpha", SENTENCES)
    catalog(
        tmp_path / "share", "beta", {"Open the red window": "Öffnet die rote Maske", "Save all files": "Alles sichern"}
    )
    return tmp_path / "share"


def build(root: Path, output: Path, *flags: str) -> int:
    sizes = ["--test_pairs=10", "--validation_pairs=8"]
    return build_corpus.main([f"--root={root}", f"--output={output}", *sizes, *flags])


def test_a_corpus_and_its_files(root, tmp_path, capsys):
    assert build(root, tmp_path / "out") == 0
    assert set(contents(tmp_path / "out")) == {
        "README.md", "test.tsv.gz", "test_nearest.tsv.gz", "train.tsv.gz", "validation.tsv.gz"}  # fmt: skip
    found = {split: rows(tmp_path / "out", split) for split in build_corpus.SPLITS}
    together = [row for split in found.values() for row in split]
    assert {(source, target) for source, target, _ in together} == {
        *SENTENCES.items(),
        ("Save all files", "Alles sichern"),
    }
    assert {len(row) for row in together} == {3} and len(together) == 161
    assert [package for source, _, package in together if source == "Save all files"] == ["beta"]
    assert 10 <= len(found["test"]) <= 12 and 8 <= len(found["validation"]) <= 10
    out = capsys.readouterr().out
    assert f"train{len(found['train']):>37}" in out and "wrote" in out
    readme = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "**161 pairs**" in readme and "| alpha | 1 | 160 | 160 |" in readme and "| catalog entries | 162 |" in readme
    assert str(tmp_path) not in readme
    # The shape that the seqio tasks read.
    from speccascade_t5x.tasks import l10n

    assert len(l10n.read_rows(tmp_path / "out" / "train.tsv.gz")) == len(found["train"])


def test_no_key_is_in_two_splits_and_hashes_decide(root, tmp_path):
    build(root, tmp_path / "out")
    keys = {s: {l10n_cleaning.split_key(row[0]) for row in rows(tmp_path / "out", s)} for s in build_corpus.SPLITS}
    for one, other in itertools.combinations(keys.values(), 2):
        assert one.isdisjoint(other)
    hashed = {s: [hashlib.sha256(f"l10n-v1{key}".encode()).hexdigest() for key in found] for s, found in keys.items()}
    assert max(hashed["test"]) < min(hashed["validation"]) and max(hashed["validation"]) < min(hashed["train"])


def test_sources_with_one_key_stay_together(tmp_path):
    twins = {f"{noun} is {adjective}": f"{NOUNS[noun]} ist {ADJECTIVES[adjective]}"
             for noun, adjective in itertools.product(NOUNS, ADJECTIVES)}  # fmt: skip
    turned = {f"{adjective.title()} is <b>{noun}</b>!": f"{ADJECTIVES[adjective].title()} ist <b>{NOUNS[noun]}</b>!"
              for noun, adjective in itertools.product(NOUNS, ADJECTIVES)}  # fmt: skip
    catalog(tmp_path / "share", "alpha", twins | turned)
    build(tmp_path / "share", tmp_path / "out")
    for split in build_corpus.SPLITS:
        seen = [l10n_cleaning.split_key(row[0]) for row in rows(tmp_path / "out", split)]
        assert len(seen) == 2 * len(set(seen)) > 0


def test_the_nearest_train_item(root, tmp_path):
    build(root, tmp_path / "out")
    train = [(set(l10n_cleaning.split_key(row[0]).split()), row) for row in rows(tmp_path / "out", "train")]
    nearest = rows(tmp_path / "out", "test_nearest")
    test = rows(tmp_path / "out", "test")
    assert len(nearest) == len(test)
    for (source, _, _), (similarity, near, near_target) in zip(test, nearest, strict=True):
        words = set(l10n_cleaning.split_key(source).split())
        best = max(len(words & others) / len(words | others) for others, _ in train)
        assert float(similarity) == pytest.approx(best, abs=5e-5) and best < 1
        ((others, _),) = [(w, row) for w, row in train if row[:2] == [near, near_target]]
        assert len(words & others) / len(words | others) == best


def test_twice_the_same_bytes(root, tmp_path):
    for name in ("a", "b"):
        assert build(root, tmp_path / name) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["train.tsv.gz"][4:8] == bytes(4)  # gzip's time


def test_two_catalogs_of_a_program_make_a_pair_without_english(root, tmp_path):
    french = {f"{verb} the {adjective} {noun}": f"{verb}ez la {noun}e {adjective}"
              for verb, adjective, noun in itertools.product(VERBS, ADJECTIVES, NOUNS)}  # fmt: skip
    catalog(root, "alpha", french, "fr")
    catalog(root, "gamma", {"Only in French": "Seulement en français"}, "fr")
    assert build(root, tmp_path / "fr-de", "--pair=fr-de") == 0
    found = [row for split in build_corpus.SPLITS for row in rows(tmp_path / "fr-de", split)]
    assert {(row[0], row[1]) for row in found} == {(french[key], SENTENCES[key]) for key in SENTENCES}
    assert build(root, tmp_path / "de-en", "--pair=de-en") == 0
    back = [row for split in build_corpus.SPLITS for row in rows(tmp_path / "de-en", split)]
    assert ("Öffnet die rote Maske", "Open the red window") in {(row[0], row[1]) for row in back}


def test_the_target_of_most_catalogs_wins_then_likeness_then_the_alphabet(tmp_path):
    sources = [f"{word} the window {word}" for word in ("Move", "Turn", "Push")]
    targets = [("Alpha Maske", "Zeta Maske", "Zeta Maske"), ("alpha Maske", "Beta Maske.", "Beta Maske"),
               ("Gamma Maske", "Beta Maske", "Delta Maske")]  # fmt: skip
    for number, domain in enumerate(("one", "two", "three")):
        texts = {source: target[number] for source, target in zip(sources, targets, strict=True)}
        catalog(tmp_path, domain, texts)
    found = l10n_catalogs.find([tmp_path], "en", "de", tmp_path / "none")
    kept, _, _ = build_corpus._cleaned(found.catalogs, LIMITS)
    pairs, conflicts = build_corpus._deduped(kept)
    assert {source: target for source, target, _ in pairs} == dict(
        zip(sources, ("Zeta Maske", "Beta Maske", "Beta Maske"), strict=True)
    )
    assert conflicts == 3


def cleaned(source: str, target: str, domain: str = "alpha", markers: str = "") -> tuple[str, str]:
    return l10n_cleaning.clean(source, target, domain, markers)


@pytest.mark.parametrize(
    ("source", "target", "domain", "markers", "wanted"),
    [
        # contexts inside strings
        ("female^Elvish Archer", "Elfische Schützin", "wesnoth-units", "", ("Elvish Archer", "Elfische Schützin")),
        ("?city:Old Town", "?city:Alte Stadt", "freeciv-core", "", ("Old Town", "Alte Stadt")),
        ("?team name:Lime Green", "Limettengrün", "freeciv-core", "", ("Lime Green", "Limettengrün")),
        ("|FILE|read from FILE", "|DATEI|DATEI lesen", "gnupg2", "", ("read from FILE", "DATEI lesen")),
        ("Close File[[menu]]|F", "Datei schließen|D", "lyx", "", ("Close File", "Datei schließen")),
        ("menu|Close file", "Datei schließen", "alpha", "", ("Close file", "Datei schließen")),
        ("read a|b now", "lies a|b jetzt", "alpha", "", ("read a|b now", "lies a|b jetzt")),
        # accelerators and shortcuts
        ("_Open file", "Datei ö_ffnen", "alpha", "_", ("Open file", "Datei öffnen")),
        ("E_xit all", "Alle _beenden", "alpha", "_", ("Exit all", "Alle beenden")),
        ("set my_name first", "my_name zuerst setzen", "alpha", "_", ("set my_name first", "my_name zuerst setzen")),
        ("_Open file", "_Datei auf", "alpha", "", ("_Open file", "_Datei auf")),
        ("Copy && &Paste all", "Kopieren && alles &einfügen", "alpha", "&",
         ("Copy & Paste all", "Kopieren & alles einfügen")),
        ("see http://a.b/?c=1&d=2 now", "siehe http://a.b/?c=1&d=2 dort", "alpha", "&",
         ("see http://a.b/?c=1&d=2 now", "siehe http://a.b/?c=1&d=2 dort")),
        ("Save ~As here", "~Hier speichern", "lo", "_~", ("Save As here", "Hier speichern")),
        ("Use li_ne-spacing", "Zeilena_bstand", "alpha", "_", ("Use line-spacing", "Zeilenabstand")),
        ("set WARN_DAYS now", "setze WARN_TAGE", "alpha", "_", ("set WARN_DAYS now", "setze WARN_TAGE")),
        ("A&vailable actions:", "&Verfügbare Aktionen:", "alpha", "&", ("Available actions:", "Verfügbare Aktionen:")),
        ("^Quit it all", "Alles ^beenden", "aptitude", "^", ("Quit it all", "Alles beenden")),
        ("_Open file", "ファイルを開く(_O)", "alpha", "_", ("Open file", "ファイルを開く")),
        ("Save it\tCtrl+S", "Sichern\tStrg+S", "alpha", "", ("Save it", "Sichern")),
        # tags
        ("<b>Bold <i>text</i></b>", "<b>Fetter <i>Text</i></b>", "alpha", "",
         ("Bold <i>text</i>", "Fetter <i>Text</i>")),
        ("<b>One</b> and <b>two</b>", "<b>Eins</b> und <b>zwei</b>", "alpha", "",
         ("<b>One</b> and <b>two</b>", "<b>Eins</b> und <b>zwei</b>")),
        ("An <b>open text", "Ein <b>offener Text", "alpha", "", ("An open text", "Ein offener Text")),
        ("A <b>bold</b> text", "Ein fetter Text", "alpha", "", ("A bold text", "Ein fetter Text")),
        ("one<br>two", "eins zwei", "alpha", "", ("one two", "eins zwei")),
        ("read <file> now", "lies <Datei> jetzt", "alpha", "", ("read <file> now", "lies <Datei> jetzt")),
        # entities, characters, spaces
        ("caf&eacute; &#8220;x&#x201d; &lt;a&gt; &amp; &#60;", "Caf&eacute;", "alpha", "",
         ("café “x” &lt;a&gt; &amp; &#60;", "Café")),
        ("e\u0301 so\u00adft\u200b \u00a0 a\n\tb ", "é\u202f\u2009weich\ufeff", "alpha", "", ("é soft a b", "é weich")),
    ],
)  # fmt: skip
def test_what_a_pair_loses(source, target, domain, markers, wanted):
    assert cleaned(source, target, domain, markers) == wanted


def test_which_marker_a_program_uses(tmp_path):
    few = {f"Plain text {i}": f"Klartext {i}" for i in range(9)}
    gtk = {"_Open file": "Datei ö_ffnen", "_Close file": "Datei _schließen"}
    names = {
        "set WARN_DAYS now": "WARN_TAGE jetzt setzen",
        "set MY_PATH now": "MEIN_PFAD jetzt setzen",
        "a &amp; b": "&amp;",
    }
    catalog(tmp_path, "gtk", few | gtk)
    catalog(tmp_path, "qt", few | {key.replace("_", "&"): text.replace("_", "&") for key, text in gtk.items()})
    catalog(tmp_path, "names", few | names)
    catalog(tmp_path, "office", few, header=HEADER + "X-Accelerator-Marker: ~\n")
    catalog(tmp_path, "kde", few, header=HEADER + "X-Accelerator-Marker: &\n")
    catalog(tmp_path, "aptitude", few)
    found = l10n_catalogs.find([tmp_path], "en", "de", tmp_path / "none")
    markers = {each.domain: each.markers for each in found.catalogs}
    assert markers == {"aptitude": "^", "gtk": "_", "kde": "&", "names": "", "office": "_~", "qt": "&"}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("Open file", "Datei öffnen", None),
        ("Open %s", "%s öffnen", "fewer than 2 source words"),
        ("Open <b>5</b>", "<b>5</b> öffnen", "fewer than 2 source words"),
        ("Open", "Datei öffnen", "fewer than 2 source words"),
        ("word " * 60 + "word", "Wort " * 61, "more than 60 source words"),
        ("word " * 59 + "word", "Wort " * 60, None),
        ("a" * 300 + " " + "b" * 300, "c" * 500, "more than 600 source characters"),
        ("Open the file", "Auf", "character length ratio"),
        ("Open it", "Dies ist viel zu lang geraten", "character length ratio"),
        ("one two 1234567890", "eins zwei 1234567890", "fewer than 45% letters"),
        ("Open File!", "open  file", "target identical to source"),
        ("write to me@example.org", "an me@example.org schreiben", "e-mail"),
        ("text editor;write;note;", "Texteditor;schreiben;Notiz;", "keyword list"),
        ("Open it; then close it;", "Öffnen; dann schließen;", None),
        ("", "leer", "empty after cleaning"),
    ],
)
def test_why_a_pair_is_dropped(source, target, reason):
    found = l10n_cleaning.why_dropped(source.strip(), target.strip(), LIMITS)
    assert found is None if reason is None else reason in found


def test_entries_are_dropped_and_counted(tmp_path):
    texts = SENTENCES | {
        "translator-credits": "Erika Mustermann und andere",
        "NAME OF TRANSLATORS\x04Your names": "Erika Mustermann und andere",
        "Not yet translated": "",
        "A \x01 control sign": "Ein Steuerzeichen \x01 hier",
        "Wrongly decoded text": "Falsch dekodierter ErlÃ¶s",
        "Русский text here": "Russischer Text hier",
        "Delete the old printer": "Remove the old printer and the network",
        "menu\x04Delete the folder": "Löscht die Mappe",
        "%d file deleted\0%d files deleted": "%d Datei gelöscht\0%d Dateien gelöscht",
    }
    catalog(tmp_path, "alpha", texts)
    found = l10n_catalogs.find([tmp_path], "en", "de", tmp_path / "none")
    corpus = build_corpus.build(found.catalogs, 10, 10)
    assert corpus.dropped == {
        "translator credits": 2,
        "untranslated / empty": 1,
        "control characters or mojibake": 2,
        "source side in another script": 1,
        "target side looks like the source language": 1,
    }
    pairs = {(source, target) for split in corpus.splits.values() for source, target, _ in split}
    added = {("Delete the folder", "Löscht die Mappe"), ("%d file deleted", "%d Datei gelöscht")}
    assert pairs == {*SENTENCES.items()} | added
    assert corpus.counts["catalog entries"] == len(texts) and corpus.counts["after the filters"] == len(pairs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Unknown host", "Host <b>Unknown</b>!"),
        ("E27: Can’t open %s", "can't OPEN e28"),
        ("Café %(name)s 12 time", "cafe {0} time"),
    ],
)
def test_texts_that_share_a_key(one, other):
    assert l10n_cleaning.split_key(one) == l10n_cleaning.split_key(other) != ""


def test_packages_name_the_source_and_unreadable_files_are_told(root, tmp_path, capsys):
    lists = tmp_path / "info"
    lists.mkdir()
    (lists / "alpha-data:amd64.list").write_text(f"/.\n{root}/de/LC_MESSAGES/alpha.mo\n")
    (root / "de" / "LC_MESSAGES" / "broken.mo").write_bytes(b"no catalog")
    catalog(root, "odd", {"Open it": "Öffnen"}, header="Content-Type: text/plain; charset=nonsense\n")
    found = l10n_catalogs.find([root], "en", "de", lists)
    assert [each.source for each in found.catalogs] == ["alpha-data", "beta"]
    assert [path.name for path, _ in found.unreadable] == ["broken.mo", "odd.mo"]
    assert build(root, tmp_path / "out") == 0
    assert "2 unreadable" in capsys.readouterr().err
    assert "Not readable: broken.mo, odd.mo." in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_a_regional_folder_stands_in_and_a_link_counts_once(tmp_path):
    catalog(tmp_path / "a", "alpha", SENTENCES, "de_DE")
    (tmp_path / "a" / "b").symlink_to(tmp_path / "a" / "de_DE", target_is_directory=True)
    assert l10n_catalogs.languages([tmp_path / "a"]) == {"de_DE": 1}
    assert len(l10n_catalogs.find([tmp_path], "en", "de", tmp_path / "none").catalogs[0].entries) == 160


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pair=en-xx"], "no catalog of language 'xx' below"),
        (["--pair=de"], "names no two languages"),
        (["--pair=de-de"], "names no two languages"),
        (["--root=nowhere"], "the folder nowhere does not exist"),
        (["--test_pairs=0"], "test_pairs=0"),
        (["--test_pairs=500"], "too few for 508 held-out ones: set --test_pairs and --validation_pairs to 8 or fewer"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(root, tmp_path, capsys, flags, message):
    assert build(root, tmp_path / "out", *flags) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1] and err[-1].startswith("build_corpus: ")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


def test_no_catalogs_and_no_common_program(tmp_path, capsys):
    (tmp_path / "share").mkdir()
    assert build(tmp_path / "share", tmp_path / "out") == 2
    assert "no gettext catalog (.mo) below" in capsys.readouterr().err
    catalog(tmp_path / "share", "alpha", SENTENCES)
    catalog(tmp_path / "share", "beta", SENTENCES, "fr")
    with pytest.raises(UserError, match="no program below .* has catalogs of both languages of fr-de"):
        l10n_catalogs.find([tmp_path / "share"], "fr", "de", tmp_path / "none")


def test_an_output_that_exists_is_left_alone(root, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert build(root, tmp_path / "out") == 0  # an empty folder is free
    before = contents(tmp_path / "out")
    assert build(root, tmp_path / "out") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_the_rules_agree_with_the_corpus(fixtures):
    """Its README describes the rules; its rows show what they keep, and their order where they were cut."""
    folder = fixtures / "l10n_en_de"
    found = {name: rows(folder, name) for name in build_corpus.SPLITS}
    sample = found["train"][:5000] + found["validation"] + found["test"]
    assert sum(l10n_cleaning.why_dropped(en, de, LIMITS) is not None for en, de, _ in sample) <= 0.001 * len(sample)
    assert sum(cleaned(en, de) != (en, de) for en, de, _ in sample) <= 0.002 * len(sample)
    assert not any(l10n_cleaning.other_script(en, "LATIN") for en, _, _ in sample)

    def place(en: str) -> float:
        return int(hashlib.sha256(f"l10n-v1{l10n_cleaning.split_key(en)}".encode()).hexdigest()[:8], 16) / 2**32

    # 2,000 of 204,288 pairs are test and as many validation; a key computed otherwise falls anywhere.
    share = 2000 / 204288
    bounds = {"test": (0, 1.05 * share), "validation": (0.95 * share, 2.05 * share), "train": (1.95 * share, 1)}
    for split, (low, high) in bounds.items():
        inside = [low <= place(row[0]) < high for row in found[split][:5000]]
        assert sum(inside) > 0.97 * len(inside), split


@pytest.mark.slow
def test_the_nearest_items_of_the_corpus_beside_the_checkout(shared):
    folder = shared / "data" / "l10n_en_de"
    train, test = ([tuple(row) for row in rows(folder, name)] for name in ("train", "test"))
    nearest = build_corpus._nearest(test, train)
    known = rows(folder, "test_nearest")
    same = [abs(mine[0] - float(theirs[0])) < 0.01 for mine, theirs in zip(nearest, known, strict=True)]
    assert sum(same) > 0.95 * len(same)
