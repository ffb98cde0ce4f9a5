"""`speccascade tables` as a user meets it."""

from __future__ import annotations

import re

import gin
import pytest

from inference import small_pair
from speccascade_t5x.checkpoints import bundle
from speccascade_t5x.cli import __main__ as cli


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def test_a_packaged_task_into_a_bundle(corpus, capsys):
    small_pair.write(bundle.Path("pair"), table=False)
    assert cli.main(["tables", "--task=restore_de", "--pair=pair", "--output_dir=with", "--order=2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    line = r"wrote with: a bigram table of 4 sequences, \d+ tokens \(task restore_de, train\), 0\.0\d MB\n"
    assert re.fullmatch(line, out)
    assert bundle.load_bundle("with").table.pair_shares is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir=new"], "name either a task or a folder of tokenised shards"),
        (["--task=restore_de"], "the configuration needs OUTPUT_DIR: set --gin.OUTPUT_DIR=VALUE"),
        (["--cached=nowhere", "--output_dir=new"], "nowhere"),
        (["--tsk=x"], "unknown flag '--tsk=x': did you mean '--task'?"),
    ],
)
def test_a_mistake_is_one_sentence(flags, message, capsys):
    assert cli.main(["tables", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("speccascade tables: ") and message in err and "Traceback" not in err
