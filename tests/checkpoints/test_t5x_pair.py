"""A pair as one T5X checkpoint: there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import describe, flat_params, t5x_native, t5x_pair
from speccascade_t5x.checkpoints.export import export
from speccascade_t5x.interfaces import UserError

from .tiny import TINY, assert_same, make_model, write_native

SMALL = dataclasses.replace(TINY, emb_dim=4, relative_position_tables="per_layer")


def write_pair(source, target, **more):
    export(source, target, "t5x_pair", verify=True, **more)
    return target


@pytest.fixture
def written(tmp_path):
    """(folder of the pair, verifier, drafter)."""
    verifier, drafter = make_model(), make_model(SMALL, seed=1)
    sources = [write_native(tmp_path / name, m) for name, m in (("verifier", verifier), ("drafter", drafter))]
    folder = write_pair(sources[0], tmp_path / "pair" / "checkpoint_5", drafter=sources[1], step=5)
    return folder, verifier, drafter


def test_it_reads_back(written):
    folder, verifier, drafter = written
    found = t5x_pair.load(folder)
    assert_same(found["verifier"], verifier)
    assert_same(found["drafter"], drafter)
    names = set(t5x_native.read_tensors(folder))
    assert {name.partition("/")[0] for name in names} == {"drafter", "verifier"}
    assert "drafter/decoder/layers_0/relpos_bias/rel_embedding" in names


def test_a_pair_is_not_taken_for_a_model(written):
    with pytest.raises(UserError, match="holds a pair of models: export it as a bundle"):
        checkpoints.load(written[0])


def test_it_becomes_a_bundle_and_a_pair_again(written, tmp_path):
    export(written[0], tmp_path / "bundle", "bundle", vocabulary="bytes")
    export(tmp_path / "bundle", tmp_path / "again", "t5x_pair")
    export(written[0], tmp_path / "copy", "t5x_pair")
    ours = t5x_pair.load(written[0])
    for folder in ("again", "copy"):
        for role, found in t5x_pair.load(tmp_path / folder).items():
            assert_same(found, ours[role])
    with pytest.raises(UserError, match="has its own members; leave the drafter out"):
        export(written[0], tmp_path / "x", "t5x_pair", drafter=tmp_path / "bundle")


def test_it_is_described(written):
    folder, verifier, drafter = written
    found = describe.describe(folder, verify=True)
    assert (found["what"], found["step"]) == ("native T5X checkpoint of a pair", 5)
    sizes = {role: about["parameters"] for role, about in found["models"].items()}
    assert sizes == {"verifier": flat_params.count(verifier.params), "drafter": flat_params.count(drafter.params)}
    assert describe.in_words(found).count("parameters") == 2
    (folder / "checkpoint").write_bytes((folder / "checkpoint").read_bytes()[:-1])
    with pytest.raises(UserError, match="checksum|truncated|damaged"):
        describe.describe(folder, verify=True)


def test_what_is_in_the_way_stays(written, tmp_path):
    folder = written[0]
    before = sorted((file, file.read_bytes()) for file in folder.rglob("*") if file.is_file())
    source = tmp_path / "verifier"
    with pytest.raises(UserError, match="already exists"):
        write_pair(source, folder, drafter=tmp_path / "drafter")
    with pytest.raises(UserError, match="name the drafter's checkpoint too"):
        write_pair(source, tmp_path / "other")
    with pytest.raises(UserError, match="cannot be written as 'int8'"):
        write_pair(source, tmp_path / "other", drafter=source, dtype="int8")
    with pytest.raises(UserError, match="step=-1 is outside"):
        write_pair(source, tmp_path / "other", drafter=source, step=-1)
    assert sorted((file, file.read_bytes()) for file in folder.rglob("*") if file.is_file()) == before
    assert not (tmp_path / "other").exists()
    write_pair(source, folder, drafter=source, overwrite=True)
    assert_same(t5x_pair.load(folder)["drafter"], written[1])


def test_bfloat16_reads_back_rounded(written, tmp_path):
    folder = write_pair(tmp_path / "verifier", tmp_path / "half", drafter=tmp_path / "drafter", dtype="bfloat16")
    assert {tensor.dtype.name for tensor in t5x_native.read_tensors(folder).values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda facts: facts.pop("members"), "does not describe a drafter and a verifier"),
        (lambda facts: facts["members"].pop("drafter"), "does not describe a drafter and a verifier"),
        (lambda facts: facts["members"]["drafter"].update(network="rnn"), r"\(drafter\) names no architecture"),
        (lambda facts: facts["members"]["drafter"].update(start_id=-1), r"\(drafter\) says start_id = -1"),
        (lambda facts: facts["members"]["verifier"]["config"].update(mlp_dim=17), "verifier/.*mlp"),
        (lambda facts: facts["members"]["verifier"]["config"].pop("emb_dim"), "does not say 'emb_dim'"),
    ],
)
def test_a_damaged_description_is_named(written, edit, message):
    folder = written[0]
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))
    (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match=message):
        t5x_pair.load(folder)


def test_a_missing_tensor_is_named(written):
    folder = written[0]
    (folder / "checksums.json").unlink()
    (folder / "target.drafter.encoder.encoder_norm.scale" / ".zarray").unlink()
    with pytest.raises(UserError, match="drafter/encoder/encoder_norm/scale"):
        t5x_pair.load(folder)
