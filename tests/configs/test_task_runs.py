"""Runs of the paper's tasks and pairs of published sizes: what they configure, down to an end-to-end decode."""

from __future__ import annotations

import re

import gin
import pytest

from raw_examples import mocked
from speccascade_t5x.cli import gin_flags
from speccascade_t5x.common import paths
from speccascade_t5x.data import seqio_tasks
from speccascade_t5x.inference.settings import Settings
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import lengths, vocabularies

TASKS = [name for name in lengths.LENGTHS if not name.endswith("_few_shot")]
PAIRS = ["pairs/t5_1_1_small_large.gin", "pairs/t5_1_1_small_xl.gin", "pairs/t5_1_1_base_xxl.gin"]


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def load(task: str, *files: str, **bindings: str) -> str:
    """What `speccascade infer --task=...` loads."""
    given = {"PAIR": "'somewhere'", "TASK": repr(task)}
    given |= ({"DATA": "'somewhere'"} if task.startswith("mbpp") else {}) | bindings
    file = gin_flags.default_file("infer", task)
    return gin_flags.load([file, *files], [f"{name} = {value}" for name, value in given.items()])


def settings() -> Settings:
    from speccascade_t5x.inference import generate

    return gin.get_configurable(generate.Settings)()


@pytest.mark.parametrize("task", lengths.LENGTHS)
def test_a_run_has_its_tasks_lengths_and_a_split_of_it(task):
    text = load(task)
    assert gin.query_parameter("TASK/gin.macro.value") == task
    found = settings()
    assert (found.max_input_len, found.max_len) == lengths.LENGTHS[task]
    assert found.truncate == (not task.endswith("_few_shot"))
    text = gin_flags.settled("SPLIT", "infer.infer.split", text)
    split = re.search(r"^SPLIT = '(\w+)'$", text, re.MULTILINE)[1]  # `cache` reads it in the config beside records
    assert split == gin_flags.configured("infer.infer.split")
    assert split in seqio_tasks.seqio.TaskRegistry.get(task).splits
    assert split == ("validation" if task.startswith(("wmt", "xsum", "cnn", "squad")) else "test")


def test_the_header_names_every_task_the_file_serves():
    header = (paths.gin_configs_dir() / "runs/infer_text_task.gin").read_text("utf-8").partition("from __gin__")[0]
    served = [task for task in TASKS if gin_flags.default_file("infer", task) == "runs/infer_text_task.gin"]
    assert len(served) == 11 and all(task in header for task in served)
    assert {gin_flags.default_file("infer", task) for task in ("mbpp", "mbpp_few_shot")} == {"runs/infer_mbpp.gin"}
    assert gin_flags.default_file("infer", None) == gin_flags.default_file("infer", "other") == "runs/infer.gin"
    assert gin_flags.default_file("sweep", "xsum") == "runs/sweep.gin"


@pytest.mark.parametrize("task", TASKS)
def test_vocabulary_and_pair_are_the_users(task):
    load(task, VOCABULARY="'bytes'")
    assert seqio_tasks.task_vocabularies(task)["inputs"].vocab_size == 384
    with pytest.raises(UserError, match="needs PAIR"):
        given = ["DATA = 'x'"] if task == "mbpp" else []
        gin_flags.load([gin_flags.default_file("infer", task)], [*given, f"TASK = {task!r}"])


def test_code_runs_only_where_the_flag_says_so():
    from speccascade_t5x.tasks import mbpp
    from speccascade_t5x.tasks.late import configured

    load("mbpp")
    assert configured(mbpp.execution)().allow_code_execution is False
    load("mbpp", ALLOW_CODE_EXECUTION="True")
    assert configured(mbpp.execution)().allow_code_execution is True


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_file_keeps_the_lengths_of_the_run(pair):
    given = ["TASK = 'xsum'", "DRAFTER = 'a'", "VERIFIER = 'b'"]
    gin_flags.load(["runs/infer_text_task.gin", pair], given)
    assert (settings().max_input_len, settings().max_len) == lengths.LENGTHS["xsum"]
    assert str(gin.query_parameter("infer.infer.pair")) == "@generate.from_checkpoints"
    with pytest.raises(UserError, match="needs VERIFIER: set"):
        gin_flags.load(["runs/infer_text_task.gin", pair], given[:2])


@pytest.mark.parametrize("pair", PAIRS)
def test_the_models_a_pair_file_names_have_files(pair):
    text = (paths.gin_configs_dir() / pair).read_text("utf-8")
    drafter, verifier = pair.removeprefix("pairs/t5_1_1_").removesuffix(".gin").split("_")
    for size in (drafter, verifier):
        assert f"models/t5_1_1_{size}.gin" in text
        assert (paths.gin_configs_dir() / f"models/t5_1_1_{size}.gin").is_file()


def test_a_pair_of_checkpoints_takes_vocabulary_and_sentinels_by_name(monkeypatch, tmp_path):
    """The pair's bindings are resolved when it is loaded: the missing checkpoint is what stops it here."""
    from corpora import train_sentencepiece
    from speccascade_t5x.inference import generate

    model = train_sentencepiece(tmp_path)
    pieces = seqio_tasks.seqio.SentencePieceVocabulary(str(model)).vocab_size
    monkeypatch.setitem(vocabularies.PUBLISHED, "t5", vocabularies.Published("file:///none", pieces + 2, 2))
    gin_flags.load([PAIRS[0]], ["DRAFTER = 'a'", "VERIFIER = 'no_such_checkpoint'", f"VOCABULARY = {str(model)!r}"])
    assert gin.get_configurable(vocabularies.model_file)() == str(model)
    assert gin.get_configurable(vocabularies.extra_ids)() == 2
    with pytest.raises(UserError, match="no_such_checkpoint"):
        gin.get_configurable(generate.from_checkpoints)()


def test_gin_can_ask_for_a_tasks_lengths():
    gin.parse_config(
        """
        from __gin__ import dynamic_registration
        from speccascade_t5x.inference import generate
        from speccascade_t5x.tasks import lengths

        generate.Settings.max_input_len = @lengths.inputs()
        generate.Settings.max_len = @lengths.targets()
        lengths.inputs.task = 'gsm8k_few_shot'
        lengths.targets.task = 'gsm8k_few_shot'
        """
    )
    assert (settings().max_input_len, settings().max_len) == (1024, 320)


def test_infer_decodes_and_scores_a_task_with_the_packaged_pair(tmp_path):
    """The whole way: run file, mocked dataset, a real model over bytes, records and metrics."""
    import json

    from speccascade_t5x.cli import infer

    rows = [{"question": "wer", "answers": ["Bern", "Zug"]}, {"question": "wo", "answers": ["hier"]}]
    with mocked(rows):
        code = infer.main(
            ["--task=web_questions", f"--output_dir={tmp_path}", "--gin.VOCABULARY='bytes'",
             "--gin.PAIR='restore_de_pair'", "--gin.generate.Settings.max_len=8", "--method=drafter"]
        )  # fmt: skip
    assert code == 0
    metrics = json.loads((tmp_path / "web_questions-metrics.json").read_text())
    assert metrics["examples"] == 2
    assert {"exact_match", "f1"} <= set(metrics)
    for config in ("config.gin", "web_questions-predict.config.txt"):
        assert "\nSPLIT = 'test'\n" in (tmp_path / config).read_text("utf-8")
    (records,) = tmp_path.glob("web_questions-predict.jsonl-*")
    first = json.loads(records.read_text().splitlines()[0])
    assert first["inputs"] == "wq question: wer"
    assert json.loads(first["targets"]) == ["Bern", "Zug"]
