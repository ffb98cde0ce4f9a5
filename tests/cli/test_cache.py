"""`speccascade cache` as a user meets it: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gin
import pytest

from corpora import ROWS, train_sentencepiece, write_split
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.common import paths
from speccascade_t5x.data import mixing, shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory of its own, and no configuration left behind."""
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def texts_of(folder: str) -> list[tuple[str, str]]:
    corpus = mixing.read(folder)
    decode = corpus.vocabulary.decode
    return [(decode(corpus.inputs(i)), decode(corpus.targets(i))) for i in range(len(corpus))]


def test_a_packaged_task(corpus, capsys):
    assert cli.main(["cache", "--task=restore_de", "--output_dir=out"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [german for _, german, _ in ROWS]
    ids = sum(len(german.encode()) + 1 for german in rows)
    line = rf"wrote out/train: 4 examples, \d+ inputs ids \(mean .*\), {ids} targets ids \(mean .*\), 0.00 % cut"
    assert re.match(line, out)
    assert [target for _, target in texts_of("out/train")] == rows == [t for _, t in texts_of("out/validation")]
    assert texts_of("out/train")[0][0] == "offnen sie die datei"
    assert not Path("out/test").exists()


def test_flags_win_and_the_config_repeats_the_run(corpus, capsys):
    flags = ["--splits=train,test", "--inputs_len=9", "--targets_len=7", "--limit=3"]
    argv = ["cache", "--task=restore_de", "--output_dir=out", "--gin.LIMIT=1", *flags]
    assert cli.main(argv) == 0
    assert "3 examples" in capsys.readouterr().out
    first = contents("out")
    assert {name.partition("/")[0] for name in first} == {"train", "test", "config.gin"}
    assert json.loads(first["train/manifest.json"])["features"]["targets"]["longest"] == 7
    os.rename("out", "first")
    assert cli.main(["cache", "--gin_file=first/config.gin"]) == 0
    assert contents("out") == first
    capsys.readouterr()
    assert cli.main(argv) == 0  # once more: nothing to do
    assert capsys.readouterr().out.startswith("kept out/train: 3 examples")
    assert contents("out") == first


def test_a_filter_that_changed_is_noticed(corpus, capsys):
    argv = ["cache", "--task=restore_de", "--output_dir=out", "--splits=train"]
    assert cli.main(argv) == 0
    capsys.readouterr()
    assert cli.main([*argv, "--gin.l10n.restore_de_rows.max_target_bytes=20"]) == 2
    err = capsys.readouterr().err
    assert "made with settings l10n.restore_de_rows.max_target_bytes = 79, not l10n.restore_de_rows" in err
    assert err.count("\n") == 1


def test_a_task_with_a_vocabulary_file(corpus, tmp_path, capsys):
    model = train_sentencepiece(tmp_path)
    argv = ["cache", "--task=l10n_en_de", "--output_dir=out", "--splits=train"]
    assert cli.main(argv) == 2
    assert "needs VOCABULARY: set --gin.VOCABULARY=VALUE" in capsys.readouterr().err
    assert cli.main([*argv, f"--gin.VOCABULARY='{model}'"]) == 0
    model.unlink()
    assert texts_of("out/train")[3] == ("Yes", "Ja")


def test_outputs_of_infer_become_targets(corpus, capsys):
    shape = ["--max_input_len=32", "--max_len=32", "--batch_size=2", "--temperature=0", "--method=drafter"]
    assert cli.main(["infer", "--task=restore_de", "--split=train", "--output_dir=decoded", "--limit=2", *shape]) == 0
    argv = ["cache", "--records=decoded", "--output_dir=out"]
    capsys.readouterr()
    assert cli.main([*argv, "--task=restore_de"]) == 2
    assert "records are of one split" in capsys.readouterr().err
    assert cli.main([*argv, "--splits=test", "--pair=restore_de_pair"]) == 2
    assert "are of split 'train', not 'test'" in capsys.readouterr().err
    assert cli.main([*argv, "--splits=train", "--pair=restore_de_pair"]) == 0
    with open("decoded/restore_de-predict.jsonl-00000-of-00001", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    assert texts_of("out/train") == [(record["inputs"], record["prediction"]) for record in found]
    distilled = shards.read("out/train")
    assert [distilled.targets(i).tolist() for i in range(2)] == [record["tokens"] for record in found]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir=out"], "name a task or a mixture to cache (TASK), or a folder of records (RECORDS)"),
        (["--task=restore_de"], "the configuration needs OUTPUT_DIR: set --gin.OUTPUT_DIR=VALUE"),
        (["--task=restore_de", "--output_dir=out", "--splits=dev"], "no split 'dev'"),
        (["--task=restore", "--output_dir=out"], "restore"),
        (["--tsk=restore_de"], "unknown flag '--tsk=restore_de': did you mean '--task'?"),
        (["--task=restore_de", "--output_dir=out", "--limit=x"], "--limit"),
        (["--task=restore_de", "--gin_file=runs/infer_restore_de.gin", "--output_dir=out"], "begin with a run file"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(corpus, capsys, flags, message):
    assert cli.main(["cache", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and err.startswith("speccascade cache: ")
    assert not Path("out").exists()


def test_a_full_disk_leaves_no_corpus(corpus, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["cache", "--task=restore_de", "--output_dir=out"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not [name for name in contents("out") if not name.endswith("config.gin")]


def test_the_help_names_every_macro_and_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["cache", "--help"])
    shown = capsys.readouterr().out
    for macro in re.findall(r"^([A-Z_]+) = ", (paths.gin_configs_dir() / "runs/cache.gin").read_text(), re.MULTILINE):
        assert macro in shown
    for option in ("task_lengths", "unfinished", "seed", "examples_per_shard"):
        assert f"cache.cache.{option}" in shown


def test_a_killed_run_started_again_gives_the_same_files(tmp_path, monkeypatch):
    """Killed by SIGKILL while shards appear, at whatever point that is."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "validation"):
        write_split(folder, split, [(f"{en} {i}", f"{de} {i}", name) for i in range(500) for en, de, name in ROWS])
    command = [sys.executable, "-m", "speccascade_t5x.cli", "cache", "--task=restore_de"]
    command += ["--gin.cache.cache.examples_per_shard=50"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPECCASCADE_L10N_DIR": str(folder)}
    process = subprocess.Popen([*command, "--output_dir=killed"], env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(Path("killed").rglob("00010.npz")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path("killed/validation/manifest.json").exists()
    monkeypatch.setenv("SPECCASCADE_L10N_DIR", str(folder))
    for name in ("killed", "whole"):
        assert cli.main([*command[3:], f"--output_dir={name}"]) == 0
    killed, whole = contents("killed"), contents("whole")
    assert killed.pop("config.gin") and whole.pop("config.gin") and killed == whole
    assert len(killed) == 2 * (40 + 1)
