"""The `cache` job: seqio tasks, mixtures and recorded outputs as shards that read back as they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from corpora import train_sentencepiece
from speccascade_t5x.common import storage
from speccascade_t5x.data import cache as cache_module
from speccascade_t5x.data import mixing, seqio_tasks, shards
from speccascade_t5x.data.cache import cache
from speccascade_t5x.data.seqio_tasks import seqio, tf
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary

BYTES = ByteVocabulary()
TEXTS = {
    "train": [{"inputs": f"eins {i}", "targets": f"one {i}" * (1 + i % 3)} for i in range(11)],
    "validation": [{"inputs": "zwei", "targets": "two"}],
}


def register(name: str, texts=None, features: dict | None = None, preprocessors=()) -> None:
    texts = TEXTS if texts is None else texts

    def source(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        rows = texts[split]
        return tf.data.Dataset.from_tensor_slices({k: tf.constant([row[k] for row in rows]) for k in rows[0]})

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(source, splits=list(texts)),
        output_features=features
        or {k: seqio.Feature(seqio.ByteVocabulary()) for k in ("inputs", "targets") if k in texts["train"][0]},
        preprocessors=[*preprocessors, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )


@pytest.fixture
def tasks(tmp_path) -> Iterator[None]:
    register("numbers")
    register("words", {"train": [{"inputs": f"a{i}", "targets": f"b{i}"} for i in range(5)]})
    register("no_targets", {"train": [{"inputs": "a"}]})
    spoken = seqio.SentencePieceVocabulary(str(train_sentencepiece(tmp_path)))
    byte = seqio.ByteVocabulary()
    register("two_tongues", features={"inputs": seqio.Feature(byte), "targets": seqio.Feature(spoken)})
    register("pieces", features={k: seqio.Feature(spoken) for k in ("inputs", "targets")})
    seqio.MixtureRegistry.add("blend", [("numbers", 3.0), ("words", 1)])
    seqio.MixtureRegistry.add("babel", [("numbers", 1.0), ("pieces", 1.0)])
    yield
    for name in ("numbers", "words", "no_targets", "two_tongues", "pieces", "shaped"):
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
    for name in ("blend", "babel"):
        seqio.MixtureRegistry.remove(name)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(corpus) -> list[tuple[str, str]]:
    decode = corpus.vocabulary.decode
    return [(decode(corpus.inputs(i)), decode(corpus.targets(i))) for i in range(len(corpus))]


def test_a_task_comes_back_as_seqio_gives_it(tasks, tmp_path):
    found = cache(tmp_path / "out", "numbers", examples_per_shard=4)
    assert [(cached.folder, cached.kept) for cached in found] == [
        (tmp_path / "out" / split, False) for split in ("train", "validation")
    ]
    for split, rows in TEXTS.items():
        corpus = mixing.read(tmp_path / "out" / split, BYTES)
        assert texts_of(corpus) == [(row["inputs"], row["targets"]) for row in rows]
        wanted = seqio_tasks.examples("numbers", split, {"inputs": 99})
        for i, example in enumerate(wanted):
            np.testing.assert_array_equal(corpus.inputs(i), example.inputs)
            np.testing.assert_array_equal(corpus.targets(i), example.targets)
        assert (corpus.manifest["name"], corpus.manifest["split"]) == ("numbers", split)


def test_lengths_limit_and_one_split(tasks, tmp_path):
    (found,) = cache(tmp_path, "numbers", "train", inputs_len=5, targets_len=8, limit=6)
    corpus = shards.read(tmp_path / "train")
    wanted = seqio_tasks.examples("numbers", "train", {"inputs": 5, "targets": 8}, limit=6, truncate=True)
    assert len(corpus) == 6
    for i, example in enumerate(wanted):
        np.testing.assert_array_equal(corpus.inputs(i), example.inputs)
        np.testing.assert_array_equal(corpus.targets(i), example.targets)
    assert found.manifest["cut_share"] == 1.0
    assert found.manifest["features"]["targets"]["cut"] == sum(len(row["targets"]) > 7 for row in TEXTS["train"][:6])


def test_progress_names_what_is_read(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_EVERY", 4)
    seen: list[tuple[str, int]] = []
    cache(tmp_path, "numbers", progress=lambda *what: seen.append(what))
    assert seen == [("numbers train", 4), ("numbers train", 8), ("numbers train", 11), ("numbers validation", 1)]


def test_a_mixture_keeps_its_tasks_and_rates(tasks, tmp_path):
    found = cache(tmp_path, "blend", "train")
    assert [cached.folder for cached in found] == [tmp_path / "train" / name for name in ("numbers", "words")]
    assert seqio_tasks.parts("blend") == [("numbers", 3.0), ("words", 1.0)]
    source = mixing.read(tmp_path / "train")
    assert len(source) == 16
    epoch = source.epoch(0, 0)
    assert [(epoch < 11).sum(), (epoch >= 11).sum()] == [12, 4]
    with pytest.raises(UserError, match="task 'words' has no split 'validation'"):
        cache(tmp_path, "blend", ("train", "validation"))
    before = contents(tmp_path)
    assert all(cached.kept for cached in cache(tmp_path, "blend", "train"))
    assert contents(tmp_path) == before


def test_a_mixture_file_that_is_none(tasks, tmp_path):
    cache(tmp_path, "blend", "train")
    file = tmp_path / "train" / "mixture.json"
    content = json.loads(file.read_text())
    for change, message in (({"version": 2}, "format version 2"), ({"format": "x"}, "is not a mixture")):
        file.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            mixing.read(tmp_path / "train")
    outside = {"parts": [{"folder": "../numbers", "rate": 1.0}]}
    file.write_text(json.dumps(content | outside))
    with pytest.raises(UserError, match="must be a plain file name"):
        mixing.read(tmp_path / "train")
    file.write_text("[]")
    with pytest.raises(UserError, match="where an object is expected"):
        mixing.read(tmp_path / "train")


def test_a_second_run_keeps_what_is_whole_and_adds_the_rest(tasks, tmp_path):
    cache(tmp_path / "whole", "numbers", config_text="A = 1\nOUTPUT_DIR = 'x'\n")
    cache(tmp_path / "part", "numbers", "train", config_text="A = 1\n# note\nSPLITS = 'train'\n")
    before = contents(tmp_path / "part")
    found = cache(tmp_path / "part", "numbers", config_text="A = 1\n")
    assert [cached.kept for cached in found] == [True, False]
    assert {name: content for name, content in contents(tmp_path / "part").items() if name in before} == before
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def test_a_run_that_died_gives_the_same_files_when_started_again(tasks, tmp_path):
    def die(what: str, examples: int) -> None:
        if what == "numbers validation":
            raise Killed

    with pytest.raises(Killed):
        cache(tmp_path / "a", "numbers", examples_per_shard=3, progress=die)
    assert (tmp_path / "a" / "train" / "manifest.json").is_file()
    assert not (tmp_path / "a" / "validation" / "manifest.json").exists()
    for folder in "ab":
        cache(tmp_path / folder, "numbers", examples_per_shard=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 2}, "made with limit None, not 2"),
        ({"targets_len": 9}, "made with targets_len None, not 9"),
        ({"config_text": "A = 2\nB = 1"}, "made with settings A = 1, not A = 2: choose another output folder"),
        ({"task": "words"}, "made with task numbers, not words"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(tasks, tmp_path, options, message):
    cache(tmp_path, "numbers", "train", config_text="A = 1\nB = 1")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        cache(tmp_path, **{"task": "numbers", "splits": "train", "config_text": "A = 1\nB = 1"} | options)
    assert contents(tmp_path) == before


def double(dataset: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
    room = sequence_length["targets"]
    return dataset.map(lambda row: {"inputs": row["inputs"], "targets": tf.strings.substr(row["targets"], 0, room)})


def test_a_task_that_needs_its_lengths(tasks, tmp_path):
    register("shaped", preprocessors=[double])
    with pytest.raises(UserError, match="failed without feature lengths"):
        cache(tmp_path, "shaped", "train")
    with pytest.raises(UserError, match="needs both feature lengths"):
        cache(tmp_path, "shaped", "train", targets_len=3, task_lengths=True)
    cache(tmp_path, "shaped", "train", inputs_len=9, targets_len=3, task_lengths=True)
    assert {target for _, target in texts_of(shards.read(tmp_path / "train"))} == {"one"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "numbres"}, "no task or mixture 'numbres': did you mean 'numbers'"),
        ({"task": None}, r"name a task or a mixture to cache \(TASK\)"),
        ({"splits": "dev"}, "no split 'dev': use one of train, validation"),
        ({"splits": ()}, "must name one split or several"),
        ({"splits": ("train", "train")}, "must name one split or several"),
        ({"task": "no_targets"}, "no feature 'targets', so there is nothing to train on"),
        ({"task": "two_tongues"}, "feature 'inputs' of task 'two_tongues' has a vocabulary of 259"),
        ({"task": "babel"}, "task 'numbers' has a vocabulary of 259"),
        ({"inputs_len": 0}, "inputs_len=0"),
        ({"limit": True}, "limit=True"),
        ({"examples_per_shard": 0}, "examples_per_shard=0"),
    ],
)
def test_what_cannot_be_cached_is_said_before_anything_is_written(tasks, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        cache(tmp_path / "out", **{"task": "numbers", "splits": "train"} | options)
    assert not (tmp_path / "out").exists()


# ---- records of an `infer` job


def record(text: str, output: str, ended: bool = True, **more) -> dict:
    return {"inputs": text, "prediction": output, "tokens": [*BYTES.encode(output), *([1] if ended else [])], **more}


RECORDS = [
    record("eins", "one"),
    record("zwei", "two"),
    record("drei", "thrrrrrr", ended=False),
    record("vier", "four"),
]


def write_records(
    folder: Path, found=RECORDS, stem: str = "numbers", parts: int = 2, config: str | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    size = -(-len(found) // parts)
    for part in range(parts):
        lines = "".join(storage.to_json(each) + "\n" for each in found[part * size : (part + 1) * size])
        (folder / f"{stem}-predict.jsonl-{part:05d}-of-{parts:05d}").write_text(lines)
    if config is not None:
        (folder / f"{stem}-predict.config.txt").write_text(config)
    return folder


def distil(tmp_path: Path, **options):
    options = {"splits": "train", "spoken": BYTES, "records_dir": tmp_path / "decoded"} | options
    (cached,) = cache(tmp_path / "out", **options)
    return cached, texts_of(shards.read(cached.folder, BYTES))


def test_outputs_become_targets(tmp_path):
    write_records(tmp_path / "decoded", config="TASK = 'numbers'\nSPLIT = 'train'\n")
    cached, texts = distil(tmp_path)
    assert texts == [("eins", "one"), ("zwei", "two"), ("vier", "four")]
    corpus = shards.read(cached.folder)
    assert corpus.inputs(0).tolist() == [*BYTES.encode("eins"), 1]
    assert corpus.targets(1).tolist() == [*BYTES.encode("two"), 1]
    assert (cached.manifest["name"], cached.manifest["split"]) == ("numbers", "train")
    assert cached.manifest["source"]["kind"] == "records"
    assert cached.manifest["source"]["unfinished_outputs"] == 1


def test_unfinished_outputs_are_kept_on_request(tmp_path):
    write_records(tmp_path / "decoded")
    cached, texts = distil(tmp_path, unfinished=True)
    assert texts[2] == ("drei", "thrrrrrr")
    assert shards.read(cached.folder).targets(2).tolist() == BYTES.encode("thrrrrrr")


def test_several_samples_become_several_examples(tmp_path):
    outputs = [[*BYTES.encode(text), 1] for text in ("one", "ein")]
    write_records(tmp_path / "decoded", [{"inputs": "eins", "prediction": ["one", "ein"], "tokens": outputs}], parts=1)
    assert distil(tmp_path)[1] == [("eins", "one"), ("eins", "ein")]


def test_records_take_the_tasks_vocabulary(tasks, tmp_path):
    write_records(tmp_path / "decoded", stem="a_numbers")
    write_records(tmp_path / "decoded")
    with pytest.raises(UserError, match=r"holds the records of a_numbers, numbers: name one of them \(TASK\)"):
        distil(tmp_path)
    assert len(distil(tmp_path, task="numbers", spoken=None)[1]) == 3


def test_records_that_changed_are_no_kept_corpus(tmp_path):
    write_records(tmp_path / "decoded")
    assert not distil(tmp_path)[0].kept and distil(tmp_path)[0].kept
    write_records(tmp_path / "decoded", RECORDS[:2])
    with pytest.raises(UserError, match="made with sha256"):
        distil(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ("train", "validation")}, "records are of one split"),
        ({"splits": "test"}, "are of split 'train', not 'test'"),
        ({"spoken": None}, "records need a vocabulary"),
        ({"task": "words"}, "no finished records of 'words': it holds those of numbers"),
        ({"records_dir": "nowhere"}, "no finished records: an `infer` job writes them there"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, options, message):
    write_records(tmp_path / "decoded", config="TASK = 'numbers'\nSPLIT = 'train'\n")
    with pytest.raises(UserError, match=message):
        distil(tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_an_input_file_has_no_split(tmp_path):
    write_records(tmp_path / "decoded", config="INPUT = 'numbers.txt'\nSPLIT = 'test'\nTASK = None\n")
    assert len(distil(tmp_path, splits="train")[1]) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not a JSON record"),
        ('{"inputs": "a"}', 'line 3 has no text under "inputs" or no ids under "tokens"'),
        ('{"inputs": 1, "tokens": []}', "line 3 has no text"),
        ('{"inputs": "a", "tokens": [1.5]}', 'line 3 has a value under "tokens" that is not ids'),
        ('{"inputs": "a", "tokens": [999, 1]}', "id 999 among its targets"),
    ],
)
def test_a_bad_record_is_named(tmp_path, line, message):
    folder = write_records(tmp_path / "decoded")
    with open(folder / "numbers-predict.jsonl-00001-of-00002", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        distil(tmp_path)
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_a_missing_part_is_noticed(tmp_path):
    folder = write_records(tmp_path / "decoded")
    (folder / "numbers-predict.jsonl-00000-of-00002").unlink()
    with pytest.raises(UserError, match="part 0 of 2 of the records of 'numbers' is missing"):
        distil(tmp_path)


def test_the_vocabulary_of_a_pair():
    assert cache_module.pair_vocabulary() is None
    assert cache_module.pair_vocabulary("restore_de_pair").kind == "byte"
    with pytest.raises(UserError, match="restore_de_pair"):
        cache_module.pair_vocabulary("restore_de_pear")
