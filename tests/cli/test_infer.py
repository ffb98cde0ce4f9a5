"""`speccascade infer` as a user meets it: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gin
import pytest

from corpora import ROWS, train_sentencepiece, write_split
from inference import small_pair
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.common import paths

ROOT = Path(__file__).resolve().parents[2]
# One shape for the whole file, because each costs a compile.
SHAPE = ["--max_input_len=32", "--max_len=32", "--draft_len=3", "--batch_size=2", "--temperature=0"]
LINES = ["offnen sie die datei", "schliessen", "grosse der flache"]
RESTORED = ["Öffnen Sie die Datei", "Schließen", "Größe der Fläche"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory of its own, and no configuration left behind."""
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


@pytest.fixture
def lines(tmp_path) -> str:
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n", "utf-8")
    return "lines.txt"


def infer(*flags: str) -> int:
    return cli.main(["infer", *flags, *SHAPE])


def files(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_predictions_go_to_stdout_and_nothing_else(lines, capsys):
    assert infer("--input", lines) == 0
    assert capsys.readouterr() == ("\n".join(RESTORED) + "\n", "")
    assert os.listdir() == [lines]


def test_samples_stand_side_by_side_and_lines_stay_lines(lines, capsys):
    assert infer("--input", lines, "--num_samples=2", "--method=verifier") == 0
    assert capsys.readouterr().out == "".join(f"{text}\t{text}\n" for text in RESTORED)


def test_files_and_a_config_that_repeats_the_run(lines, capsys):
    flags = ["--rule=token_v3", "--alpha=0.3", "--temperature=1", "--seed=3"]
    assert cli.main(["infer", "--input", lines, "--output_dir=out", *SHAPE, *flags]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "wrote out/lines-predict.jsonl-00000-of-00001\n" in out
    assert set(files()) == {
        "config.gin",
        "lines-predict.jsonl-00000-of-00001",
        "lines-predict.config.txt",
        "lines-metrics.json",
        "lines-timing.json",
        "lines-summary.md",
    }
    shutil.move("out", "first")
    assert cli.main(["infer", "--gin_file=first/config.gin"]) == 0
    again, first = files("out"), files("first")
    same = [name for name in first if "timing" not in name and "summary" not in name]
    assert {name: again[name] for name in same} == {name: first[name] for name in same}
    # Short flags win over bindings and both over the file; another folder is the same run elsewhere.
    assert cli.main(["infer", "--gin_file=first/config.gin", "--gin.OUTPUT_DIR='x'", "--output_dir=elsewhere"]) == 0
    name = "lines-predict.jsonl-00000-of-00001"
    assert files("elsewhere")[name] == first[name]


def test_every_short_flag_is_in_the_config(lines, capsys):
    from speccascade_t5x.cli import gin_flags
    from speccascade_t5x.inference import generate

    flags = {
        "method": "speculative", "rule": "chow", "alpha": 0.25, "draft_len": 2, "verification": "block",
        "draft_stop": "confidence", "stop_threshold": 0.5,
        "temperature": 0.5, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "max_input_len": 32, "max_len": 8,
        "num_samples": 1, "batch_size": 3, "seed": 4,
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in flags.items()]
    assert cli.main(["infer", f"--input={lines}", "--output_dir=out", "--limit=1", "--truncate", *argv]) == 0
    capsys.readouterr()
    gin_flags.load([str(Path("out/config.gin").resolve())], [])
    assert gin.get_configurable(generate.Settings)() == generate.Settings(**flags, truncate=True)
    assert "LIMIT = 1" in files()["config.gin"].decode()


def test_a_task_by_its_name(corpus, capsys):
    assert infer("--task=restore_de", "--output_dir=out", "--limit=3") == 0
    out, err = capsys.readouterr()
    assert err == ""
    records = [json.loads(line) for line in files()["restore_de-predict.jsonl-00000-of-00001"].splitlines()]
    assert [record["targets"] for record in records] == [german for _, german, _ in ROWS[:3]]
    metrics = json.loads(files()["restore_de-metrics.json"])
    assert metrics["examples"] == 3
    assert f"exact_match                {metrics['exact_match']:.4g}\n" in out
    assert "from speccascade_t5x.tasks import l10n" in files()["config.gin"].decode()


def run(*argv: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "speccascade_t5x.cli", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def test_standard_input_in_a_process_of_its_own():
    done = run("infer", "--input", "-", *SHAPE, stdin="\n".join(LINES) + "\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n".join(RESTORED) + "\n", "")


def test_a_task_in_a_process_of_its_own(corpus):
    write_split(corpus, "test", [("One", "Eins", "a"), ("Two", "Zwei")])  # the second line lacks a column
    done = run("infer", "--task=restore_de", "--output_dir=out", *SHAPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"speccascade infer: .*test\.tsv\.gz, line 2 has 2 tab-separated columns.*\n", done.stderr)
    assert not Path("out").exists()


def test_standard_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(LINES).encode())))
    assert infer("--input=-", "--output_dir=out") == 0
    assert "stdin-predict.jsonl-00000-of-00001" in files()


def refused(capsys, *argv: str) -> str:
    """Runs a command that must fail with one sentence, and returns it. Nothing may have been written."""
    before = sorted(os.listdir())
    assert cli.main(["infer", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("speccascade infer: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert sorted(os.listdir()) == before
    return err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temprature=1"], "unknown flag '--temprature=1': did you mean '--temperature'?"),
        (["--batch_size=many"], "invalid int value: 'many'"),
        (["--num_beams=4"], "num_beams is not supported"),
        (["--gin.generate.Settings.logit_bias=1"], "logit_bias is not supported"),
        (["--gin_file=runs/nothing.gin"], "the gin file runs/nothing.gin was not found in"),
        (["--gin_file=rules/chow.gin"], "begin with a run file"),
        (["--gin.generate.Settings.tempature=1"], "did you mean 'temperature'?"),
        (["--gin.generate.Setings.temperature=1"], "did you mean 'generate.Settings'?"),
        (["--gin.LIMITS=1"], "did you mean 'LIMIT'?"),
        (["--gin.LIMIT=[1"], "a bracket or a quote is not closed"),
        (["--alpha=inf"], "give a finite number"),
        (["--limit=0"], "limit=0 is outside its range"),
        (["--allow_code_execution"], "sets ALLOW_CODE_EXECUTION, which no gin file reads"),
        (["--rule=chow", "--alpha=1.5"], "alpha=1.5 is outside the range of the rule 'chow': from 0 to 1"),
        (["--rule=token_v9", "--alpha=0.1"], "there is no rule named 'token_v9': did you mean 'token_v"),
        (["--temperature=3"], "temperature=3.0 is outside its range: it must be a number from 0 to 2"),
        (["--pair=nowhere"], "nowhere does not exist; a checkpoint is a bundle"),
        (["--max_input_len=8"], "lines.txt, line 1 has 21 tokens"),
        (["--task=restore_de"], "name either a task or an input file to decode (TASK or INPUT), and not both"),
    ],
)
def test_bad_flags_and_bindings(lines, capsys, flags, message):
    assert message in refused(capsys, f"--input={lines}", "--output_dir=out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rule=token_v33"], "there is no rule named 'token_v33'"),
        (["--rule=token_v3", "--alpha=2"], "alpha=2.0 is outside the range"),
        (["--drafter=nobody"], "drafter='nobody' is unknown"),
        (["--method=token_cascade", "--verification=block", "--rule=chow"], "the rule 'chow' needs an alpha"),
        (["--task=restore_dee", "--gin_file=runs/infer_restore_de.gin"], "there is no task 'restore_dee'"),
        (["--input=nowhere.txt"], "the input nowhere.txt cannot be read"),
    ],
)
def test_what_flags_tell_is_refused_before_a_weight_is_read(lines, capsys, flags, message):
    data = [] if any(flag.startswith(("--task", "--input")) for flag in flags) else [f"--input={lines}"]
    assert message in refused(capsys, "--pair=nowhere", "--output_dir=out", *data, *flags)


def test_a_prompt_that_is_too_long_can_be_cut(capsys):
    Path("long.txt").write_text("schliessen\n" + "a" * 40)
    assert "long.txt, line 2 has 41 tokens" in refused(capsys, "--input=long.txt", *SHAPE)
    assert infer("--input=long.txt", "--truncate") == 0
    assert capsys.readouterr().out.splitlines()[0] == "Schließen"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "the input missing.txt cannot be read: No such file"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("latin.txt", "gut\nGröße".encode("latin-1"), "latin.txt, line 2 is not UTF-8"),
        ("bad.jsonl", b'{"inputs": "a"}\n{"inputs"', "bad.jsonl, line 2 is not JSON"),
    ],
)
def test_bad_input_files(capsys, name, content, message):
    if content is not None:
        Path(name).write_bytes(content)
    assert message in refused(capsys, f"--input={name}", "--output_dir=out")


def test_nothing_to_decode(capsys):
    assert "name either a task or an input file" in refused(capsys)
    assert "needs an output folder" in refused(capsys, "--task=restore_de")


def test_bad_data(corpus, capsys, monkeypatch):
    task = ["--task=restore_de", "--output_dir=out", *SHAPE]
    assert "has no split 'tset'" in refused(capsys, *task, "--split=tset")
    write_split(corpus, "test", [("One", "Eins", "a"), ("Two", "", "a")])
    assert "test.tsv.gz, line 2 has an empty column 'de'" in refused(capsys, *task)
    write_split(corpus, "test", [("x", "Zu lang für diese Länge, " * 2, "a")])
    assert "example 0 ('zu lang fur diese lange, zu" in refused(capsys, *task)
    nowhere = "--gin.l10n.data_dir.path='nowhere'"
    assert "the corpus folder nowhere does not exist" in refused(capsys, *task, nowhere)
    monkeypatch.delenv("SPECCASCADE_L10N_DIR")
    assert "no corpus folder is set" in refused(capsys, *task)
    assert "there is no task 'restore_en'" in refused(capsys, "--task=restore_en", "--output_dir=out")


def test_code_runs_only_where_the_flag_says_so(tmp_path, capsys):
    """The flag reaches the task of programs, and its config.gin; without it pass@1 is left out, with the reason."""
    Path("mbpp.jsonl").write_text(
        json.dumps({"task_id": 11, "text": "One.", "code": "a = 1", "test_list": ["assert a"], "test_setup_code": ""})
    )
    begin = ["--task=mbpp", "--gin.DATA='mbpp.jsonl'", "--pair=restore_de_pair", *SHAPE, "--truncate"]
    assert infer(*begin, "--output_dir=without") == 0
    assert "pass_at_1" not in json.loads(Path("without/mbpp-metrics.json").read_text())
    assert infer(*begin, "--output_dir=with", "--allow_code_execution") == 0
    assert json.loads(Path("with/mbpp-metrics.json").read_text())["pass_at_1"] == 0
    assert "ALLOW_CODE_EXECUTION = True" in Path("with/config.gin").read_text()


def test_a_damaged_bundle(lines, capsys):
    shutil.copytree(paths.pretrained_dir() / "restore_de_pair", "bundle")
    largest = max(Path("bundle/verifier").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    command = [f"--input={lines}", "--output_dir=out", "--pair=bundle"]
    assert f"the content of {largest.relative_to('bundle')} has changed" in refused(capsys, *command)
    largest.unlink()
    assert f"{largest.relative_to('bundle')} is missing" in refused(capsys, *command)
    Path("bundle/bundle.json").write_text("{")
    assert "bundle/bundle.json" in refused(capsys, *command)


def test_models_that_do_not_fit_each_other_or_their_vocabulary(lines, capsys, tmp_path, fixtures):
    trained = fixtures / "restore_de_drafter"
    command = [f"--input={lines}", "--output_dir=out", "--gin_file=runs/infer.gin"]
    command += ["--gin_file=pairs/from_checkpoints.gin", f"--gin.VERIFIER='{trained}'"]
    assert "needs DRAFTER, VOCABULARY: set --gin.DRAFTER=VALUE" in refused(capsys, *command)
    good = [*command, f"--gin.DRAFTER='{trained}'"]
    wide = [*good, "--gin.VOCABULARY='bytes'", "--gin.generate.from_checkpoints.extra_ids=200"]
    assert "the verifier has 384 logits but the vocabulary 459 pieces" in refused(capsys, *wide)
    assert "nowhere.model" in refused(capsys, *good, "--gin.VOCABULARY='nowhere.model'")
    missing = [*command, "--gin.DRAFTER='nowhere'", "--gin.VOCABULARY='bytes'"]
    assert "nowhere does not exist" in refused(capsys, *missing)

    task = ["--gin_file=runs/infer_restore_de.gin", "--gin_file=pairs/from_checkpoints.gin", "--output_dir=out"]
    task += [f"--gin.{name}='{trained}'" for name in ("VERIFIER", "DRAFTER")]
    message = refused(capsys, *task, f"--gin.VOCABULARY='{train_sentencepiece(tmp_path)}'")
    assert "of task 'restore_de' has a vocabulary of 384 pieces (byte)" in message


def test_help_lists_what_is_required_and_common(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["infer", "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "required:\n  --task and --output_dir, or --input" in shown
    header = (paths.gin_configs_dir() / "runs" / "infer.gin").read_text("utf-8")
    for macro in re.findall(r"^([A-Z_]+) = ", header, re.MULTILINE):
        assert macro in shown
    from speccascade_t5x.inference import generate

    for field in generate.Settings.__dataclass_fields__:
        assert field in shown, field


def test_a_prediction_is_one_line_whatever_it_holds(capsys):
    """An untrained model at a high temperature writes every byte."""
    small_pair.write(Path("untrained"), table=False, drafter=False)
    Path("lines.txt").write_text("eins\nzwei\ndrei\nvier\nfunf\n", "utf-8")
    argv = ["--pair=untrained", "--input=lines.txt", "--method=verifier", "--num_samples=16", "--temperature=1.5"]
    assert cli.main(["infer", *argv]) == 0
    out = capsys.readouterr().out
    assert [line.count("\t") for line in out.split("\n")] == [15] * 5 + [0]
    assert len(out.splitlines()) == 5
    assert all(code in out for code in ("\\n", "\\t", "\\r"))
