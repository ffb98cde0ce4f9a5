"""`--topology`: what it configures, what it refuses, and one run on a mesh of simulated devices."""

from __future__ import annotations

import json

import gin
import pytest

from inference import small_pair
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import gin_flags, topology
from speccascade_t5x.common import paths
from speccascade_t5x.distributed import partitioning
from speccascade_t5x.interfaces import UserError

NAMES = sorted(path.stem for path in (paths.gin_configs_dir() / "topologies").glob("*.gin"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working directory of its own, and no configuration left behind."""
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def configured(name: str, *more: str) -> partitioning.Topology:
    """The topology a run file with --topology=name configures for its pair."""
    files, bindings = topology.configured(name)
    gin_flags.load(["runs/infer.gin", *files], [*gin_flags.literal(bindings), *more])
    assert "TOPOLOGY" in str(gin.query_parameter("generate.load.topology"))
    return gin.get_configurable(partitioning.Topology)()


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_topology(name):
    found = configured(name)
    chips = {"v4_8": 4, "v4_16": 8, "v4_32": 16, "v5p_8": 4}  # the clouds count cores here
    expected = chips.get(name, int(name.rpartition("_")[2])) if name[-1].isdigit() else None
    assert (found.devices, found.model) == (expected, 1)
    replicated = name == "drafter_replicated"
    assert found.drafter_rules == (partitioning.replicated_rules() if replicated else None)


def test_sizes_and_bindings():
    assert topology.configured(None) == ([], {})
    found = configured("4x2")
    assert (found.data, found.model, found.devices) == (4, 2, None)
    assert configured("v4_32", "partitioning.Topology.model = 4").model == 4
    gin_flags.load(["runs/train.gin", "models/t5_1_1_small.gin", "topologies/v4_8.gin"], ["OUTPUT_DIR = 'x'"])
    assert "TOPOLOGY" in str(gin.query_parameter("train.train.topology"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v4_9", r"there is no topology 'v4_9': did you mean 'v4_\d'"),
        ("somewhere", r"there is no topology 'somewhere': use DATAxMODEL, such as 4x2, or one of any, cpu_1"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(UserError, match=message):
        topology.configured(name)


@pytest.mark.sharding
def test_a_run_on_a_mesh(devices, tmp_path, capsys):
    small_pair.write(tmp_path / "pair", table=False, drafter=False)
    (tmp_path / "lines.txt").write_text("eins\nzwei\ndrei\nvier\nfunf\n", "utf-8")
    flags = ["infer", "--pair=pair", "--input=lines.txt", "--method=verifier", "--batch_size=4"]
    assert cli.main([*flags, "--output_dir=mesh", "--topology=2x2", "--refill"]) == 0
    assert cli.main([*flags, "--output_dir=one"]) == 0
    outputs = []
    for folder in ("mesh", "one"):
        text = (tmp_path / folder / "lines-predict.jsonl-00000-of-00001").read_text("utf-8")
        outputs.append([json.loads(line)["tokens"] for line in text.splitlines()])
    assert outputs[0] == outputs[1]
    timing = json.loads((tmp_path / "mesh" / "lines-timing.json").read_text("utf-8"))
    assert timing["mesh"] == "data=2 x model=2" and timing["device"].endswith("x 4")
    capsys.readouterr()
    assert cli.main([*flags, "--output_dir=x", "--topology=9x1"]) == 2
    assert "data=9 x model=1 needs 9 devices, and this machine has 8" in capsys.readouterr().err
    assert cli.main([*flags, "--output_dir=x", "--topology=8x1"]) == 2
    assert "a batch of 4 rows cannot be shared by data=8: choose a batch size that 8" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
