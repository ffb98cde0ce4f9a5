"""`--topology`: what it configures, what it refuses, and one run on a mesh of simulated devices."""

from __future__ import annotations

import json

import gin
import pytest

from inference import small_pair
from speccascade_t5x.cli import __main__ as cli
from speccascade_t5x.cli import gin_flags, topology
from speccascade_t5x.distributed import partitioning
from speccascade_t5x.interfaces import UserError


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


# The clouds count cores in some names; a v3 chip is two devices.
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        *(("v4-8", 4), ("v4_8", 4), ("v4:2x2x1", 4), ("v4_32", 16), ("v3-8", 8), ("v5p-8", 4), ("v5e_16", 16)),
        *(("v5litepod-16", 16), ("v5e:4x4", 16), ("v6e-1", 1), ("cpu_8", 8), ("gpu_1", 1), ("gpu-8", 8)),
        *(("any", None), ("drafter_replicated", None)),
    ],
)
def test_a_topology(name, devices):
    found = configured(name)
    assert (found.devices, found.data, found.model) == (devices, None, 1)
    replicated = name == "drafter_replicated"
    assert found.drafter_rules == (partitioning.replicated_rules() if replicated else None)


def test_sizes_and_bindings():
    assert topology.configured(None) == ([], {})
    found = configured("4x2")
    assert (found.data, found.model, found.devices) == (4, 2, None)
    assert configured("v4-32", "partitioning.Topology.model = 4").model == 4
    files, bindings = topology.configured("v4-8")
    given = ["OUTPUT_DIR = 'x'", *gin_flags.literal(bindings)]
    gin_flags.load(["runs/train.gin", "models/t5_1_1_small.gin", *files], given)
    assert "TOPOLOGY" in str(gin.query_parameter("train.train.topology"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v4_9", r"there is no TPU slice 'v4_9': did you mean 'v4-\d+'\? \(or give the sizes of the mesh, DATAxMODEL"),
        ("somewhere", r"there is no TPU slice 'somewhere': known are v2-128, .* \(or give the sizes of the mesh"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(UserError, match=message):
        topology.configured(name)


@pytest.mark.parametrize(
    ("file", "instead"),
    [
        ("topologies/v4_8.gin", "topologies/any.gin --gin.partitioning.Topology.devices=4, or --topology=v4_8 instead"),
        ("topologies/cpu_8.gin", "topologies/any.gin --gin.partitioning.Topology.devices=8, or --topology=cpu_8 inst"),
        ("runs/infer_wmt14_en_de.gin", "runs/infer_text_task.gin --task=wmt14_en_de instead"),
    ],
)
def test_files_of_an_earlier_release(file, instead, tmp_path):
    with pytest.raises(UserError, match=f"was not found in .*: use --gin_file={instead}"):
        gin_flags.load(["runs/infer.gin", file], [])
    (tmp_path / "own.gin").write_text(f"include '{file}'\n")
    with pytest.raises(UserError, match=f"it includes {file}, which is not there: use --gin_file={instead}"):
        gin_flags.load(["own.gin"], [], str(tmp_path))
    with pytest.raises(UserError, match="was not found in [^:]*$"):
        gin_flags.load(["topologies/v4_9.gin"], [])


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
