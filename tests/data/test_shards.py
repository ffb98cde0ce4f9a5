"""Tokenised shards: what is written is what is read, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corpora import train_sentencepiece
from speccascade_t5x.data import shards
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary, SentencePieceVocabulary

ROOT = Path(__file__).resolve().parents[2]
BYTES = ByteVocabulary(125)
ABOUT = {"name": "tiny", "split": "train", "spoken": BYTES}


def made_up(count: int, seed: int = 0, longest: int = 9) -> list[tuple[np.ndarray, np.ndarray]]:
    """Byte-level examples that end in EOS."""
    rng = np.random.default_rng(seed)
    return [tuple(np.append(rng.integers(3, 259, rng.integers(longest)), 1) for _ in "it") for _ in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_holds(corpus: shards.Corpus, wanted: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert len(corpus) == len(wanted)
    for index, (inputs, targets) in enumerate(wanted):
        np.testing.assert_array_equal(corpus.inputs(index), inputs)
        np.testing.assert_array_equal(corpus.targets(index), targets)
    assert corpus.input_lengths.tolist() == [len(inputs) for inputs, _ in wanted]
    assert corpus.target_lengths.tolist() == [len(targets) for _, targets in wanted]


@pytest.mark.parametrize(("per_shard", "files"), [(4, 3), (5, 2), (10, 1), (100, 1)])
def test_examples_come_back_whatever_the_shards(tmp_path, per_shard, files):
    wanted = made_up(10)
    manifest = shards.write(tmp_path, iter(wanted), examples_per_shard=per_shard, source={"kind": "test"}, **ABOUT)
    names = [f"shard-{i:05d}-of-{files:05d}.npz" for i in range(files)]
    assert sorted(contents(tmp_path)) == ["manifest.json", *names]
    assert [shard["file"] for shard in manifest["shards"]] == names
    corpus = shards.read(tmp_path, BYTES)
    assert_holds(corpus, wanted)
    assert corpus.ids["inputs"].dtype == np.uint16  # 384 ids
    assert (corpus.eos_id, corpus.manifest) == (1, manifest)
    assert manifest["examples"] == 10 and manifest["source"] == {"kind": "test"}
    assert manifest["features"]["inputs"]["tokens"] == sum(len(inputs) for inputs, _ in wanted)
    assert manifest["features"]["targets"]["longest"] == max(len(targets) for _, targets in wanted)


def test_a_vocabulary_that_fits_one_byte_is_kept_in_one():
    class Small(ByteVocabulary):
        vocab_size = 256

    corpus = shards.from_examples([(np.array([255, 1]), np.array([1]))], Small())
    assert corpus.ids["inputs"].dtype == np.uint8


def test_long_examples_are_cut_and_counted(tmp_path):
    wanted = [
        (np.array([5, 6, 7, 1]), np.array([8, 1])),
        (np.array([5, 6, 1]), np.array([8, 9, 10])),  # no EOS to keep
        (np.array([5, 1]), np.array([8, 1])),
    ]
    lengths = {"inputs": 3, "targets": 2}
    manifest = shards.write(tmp_path, wanted, lengths=lengths, **ABOUT)
    corpus = shards.read(tmp_path)
    assert [corpus.inputs(i).tolist() for i in range(3)] == [[5, 6, 1], [5, 6, 1], [5, 1]]
    assert [corpus.targets(i).tolist() for i in range(3)] == [[8, 1], [8, 9], [8, 1]]
    assert (manifest["cut_examples"], manifest["cut_share"]) == (2, 0.666667)
    assert [manifest["features"][name]["cut"] for name in shards.FEATURES] == [1, 1]
    assert wanted[0][0].tolist() == [5, 6, 7, 1]  # what was given is left alone


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        shards.write(tmp_path / name, made_up(7), examples_per_shard=3, **ABOUT)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    a, b = (shards.read(tmp_path / name) for name in "ab")
    assert a.fingerprint == b.fingerprint
    shards.write(tmp_path / "c", made_up(7, seed=1), examples_per_shard=3, **ABOUT)
    assert shards.read(tmp_path / "c").fingerprint != a.fingerprint


# Writes shards and dies by SIGKILL in the middle: after the third shard, or between rename and manifest.
KILLED = """
import os, signal, sys
import numpy as np
from speccascade_t5x.common import storage
from speccascade_t5x.data import shards
from speccascade_t5x.text.vocabulary import ByteVocabulary

def examples():
    for i in range(20):
        if i == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield np.array([3 + i, 1]), np.array([4 + i, 1])

if int(sys.argv[2]) > 20:
    storage.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
shards.write(sys.argv[1], examples(), name="t", split="s", spoken=ByteVocabulary(125), examples_per_shard=3)
"""


@pytest.mark.parametrize("at", [10, 21])
def test_a_killed_writer_leaves_no_corpus_and_the_next_one_the_same_bytes(tmp_path, at):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a"), str(at)], cwd=ROOT, timeout=120)
    assert killed.returncode == -9
    assert (tmp_path / "a").is_dir()
    with pytest.raises(UserError, match="holds no complete tokenised corpus"):
        shards.read(tmp_path / "a")
    wanted = [(np.array([3 + i, 1]), np.array([4 + i, 1])) for i in range(20)]
    for name in "ab":
        shards.write(tmp_path / name, wanted, name="t", split="s", spoken=BYTES, examples_per_shard=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_whole_corpus_is_never_written_over(tmp_path):
    shards.write(tmp_path, made_up(3), **ABOUT)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds a tokenised corpus"):
        shards.write(tmp_path, made_up(4), **ABOUT)
    assert contents(tmp_path) == before


def test_bad_examples_write_nothing_a_reader_would_take(tmp_path):
    with pytest.raises(UserError, match="'tiny' has no example in split 'train'"):
        shards.write(tmp_path / "none", [], **ABOUT)
    for ids, shown in (([3, 384], "384"), ([-1], "-1")):
        with pytest.raises(UserError, match=f"id {shown} among its targets, outside the vocabulary of 384"):
            shards.write(tmp_path / "far", [(np.array([1]), np.array(ids))], **ABOUT)
    assert not list(tmp_path.rglob("manifest.json"))
    with pytest.raises(UserError, match="no example to make a corpus of"):
        shards.from_examples([], BYTES)


@pytest.fixture
def folder(tmp_path) -> Path:
    shards.write(tmp_path / "corpus", made_up(6), examples_per_shard=2, **ABOUT)
    return tmp_path / "corpus"


SECOND = "shard-00001-of-00003.npz"


def test_a_missing_or_damaged_shard_is_named(folder):
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{SECOND} is damaged \({len(data) - 1} bytes instead of {len(data)}\)"):
        shards.read(folder)
    (folder / SECOND).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{SECOND} is damaged \(its bytes changed\)"):
        shards.read(folder)
    (folder / SECOND).unlink()
    with pytest.raises(UserError, match=f"{SECOND} is missing"):
        shards.read(folder)


def test_a_shard_that_would_run_code_is_not_loaded(folder):
    import hashlib

    with open(folder / SECOND, "wb") as file:
        np.savez(file, inputs=np.array([{}], dtype=object))
    entry = {"sha256": hashlib.sha256((folder / SECOND).read_bytes()).hexdigest()}
    edit(folder, lambda manifest: manifest["shards"][1].update(entry))
    with pytest.raises(UserError, match="is not an npz file of arrays"):
        shards.read(folder)


def edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "format version 2 but this release"),
        (lambda m: m.update(format="else"), "is not the manifest of a tokenised corpus"),
        (lambda m: m.update(shards=[]), "is empty"),
        (lambda m: m.update(examples=0), "is empty"),
        (lambda m: m.update(vocabulary={}), "has no usable vocabulary"),
        (lambda m: m.pop("shards"), "has no member 'shards'"),
        (lambda m: m["shards"][0].update(file="../other.npz"), r"shards\[0\].file must be a plain file name"),
    ],
)
def test_a_manifest_of_another_kind(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        shards.read(folder)


def test_the_folder_above_names_the_splits(tmp_path):
    for split in ("validation", "train"):
        shards.write(tmp_path / split, made_up(2), **ABOUT)
    with pytest.raises(UserError, match="holds the corpora train, validation: name one of them"):
        shards.read(tmp_path)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="does not exist: write it with `speccascade cache`"):
        shards.read(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        shards.read(tmp_path)


def test_another_vocabulary_is_refused_with_both_fingerprints(folder, tmp_path):
    shards.read(folder, ByteVocabulary(0))  # extra ids stand for no text
    spoken = SentencePieceVocabulary(train_sentencepiece(tmp_path))
    with pytest.raises(UserError) as error:
        shards.read(folder, spoken)
    assert BYTES.fingerprint()[:16] in str(error.value) and spoken.fingerprint()[:16] in str(error.value)
    assert str(error.value).count("\n") == 0


def test_a_sentencepiece_model_travels_with_its_ids(tmp_path):
    file = train_sentencepiece(tmp_path)
    spoken = SentencePieceVocabulary(file, 4)
    ids = np.array([*spoken.encode("Open the file"), 1])
    shards.write(tmp_path / "corpus", [(ids, ids)], name="t", split="s", spoken=spoken)
    file.unlink()
    corpus = shards.read(tmp_path / "corpus")
    assert corpus.vocabulary.decode(corpus.inputs(0)) == "Open the file"
    assert corpus.vocabulary.fingerprint() == spoken.fingerprint()
    assert corpus.ids["inputs"].dtype == np.uint8
    (tmp_path / "corpus" / "vocabulary.model").write_bytes(b"")
    with pytest.raises(UserError, match="has no usable vocabulary"):
        shards.read(tmp_path / "corpus")


def test_selecting_examples():
    wanted = made_up(8)
    corpus = shards.from_examples(wanted, BYTES)
    assert_holds(corpus.select(np.array([5, 0])), [wanted[5], wanted[0]])
    mask = corpus.target_lengths < 5
    assert_holds(corpus.select(mask), [example for example, kept in zip(wanted, mask, strict=True) if kept])
    assert corpus.select(np.arange(8)).fingerprint == corpus.fingerprint
    with pytest.raises(UserError, match="no example"):
        corpus.select(np.zeros(8, bool))


def test_permutations_are_fixed_by_their_key_for_good():
    """Literal values: a run must continue in the same order under a later numpy."""
    assert sorted(shards.permutation(100, 3, 1).tolist()) == list(range(100))
    assert shards.permutation(8, 0, 0).tolist() == PERMUTED[0]
    assert shards.permutation(8, 0, 1).tolist() == PERMUTED[1]


PERMUTED = [[3, 2, 1, 6, 0, 7, 4, 5], [7, 4, 5, 1, 6, 2, 0, 3]]


def test_reading_needs_no_tensorflow():
    code = (
        "import sys; from speccascade_t5x.data import shards, packing, mixing;"
        " print([m for m in ('tensorflow', 'seqio', 'gin', 'clu') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
