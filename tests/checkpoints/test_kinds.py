"""What a folder or a name is: Orbax's layouts, folders that are two things, packaged names."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import describe, orbax_tree
from speccascade_t5x.interfaces import UserError

from .tiny import assert_same, make_model, write_native, write_npz


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, make_model().params)


def save_v1(folder, params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        ocp_v1.save_pytree(folder, params)


def save_step(folder, step, item):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=item)
        manager.wait_until_finished()


def test_orbax_layouts_are_told_by_what_they_hold(tmp_path, params):
    """v1 puts a pytree into an item, a CheckpointManager into an item of a step, whatever their names."""
    save_v1(tmp_path / "v1", params)
    item = next((tmp_path / "v1").glob("*/_METADATA")).parent.name
    (tmp_path / "v1" / item).rename(tmp_path / "v1" / "weights")
    save_step(tmp_path / "run", 3, ocp.args.StandardSave(params))
    save_step(tmp_path / "run", 12, ocp.args.StandardSave(params))
    shutil.rmtree(tmp_path / "run" / "3")
    for path, step in [("v1", None), ("run", 12), ("run/12", 12), ("run/12/default", None)]:
        found = checkpoints.identify(tmp_path / path)
        assert found.kind == "orbax" and found.of_steps == (path == "run")
        assert_same(checkpoints.load(tmp_path / path), make_model())
        assert checkpoints.open_model(tmp_path / path).step == step


def test_a_train_state_is_told_by_its_branches(tmp_path, params):
    orbax_tree.save(
        tmp_path / "any" / "name", {"target": params, "state": {"step": np.asarray(7, np.int32)}}, dtype=None
    )
    assert checkpoints.detect(tmp_path / "any") == checkpoints.detect(tmp_path / "any" / "name") == "t5x_orbax"
    assert checkpoints.open_model(tmp_path / "any").step == 7
    assert_same(checkpoints.load(tmp_path / "any"), make_model())


def test_the_variables_of_a_module_are_read(tmp_path, params):
    orbax_tree.save(tmp_path / "variables", {"params": params})
    assert_same(checkpoints.load(tmp_path / "variables"), make_model())


def test_several_items_are_named(tmp_path, params):
    both = ocp.args.Composite(params=ocp.args.StandardSave(params), ema=ocp.args.StandardSave(params))
    save_step(tmp_path, 1, both)
    with pytest.raises(UserError, match=r"1 holds several Orbax checkpoints; name one: .*/1/ema or .*/1/params"):
        checkpoints.load(tmp_path / "1")
    assert_same(checkpoints.load(tmp_path / "1" / "params"), make_model())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_is_not_called_absence(tmp_path, params, damage):
    orbax_tree.save(tmp_path / "a", params)
    for file in (tmp_path / "a").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2) if damage == "cut" else file.unlink()
    with pytest.raises(UserError, match=r"a is damaged: its _METADATA lists 'decoder.*', but .* cut short"):
        checkpoints.load(tmp_path / "a")


def test_a_folder_that_is_two_things_is_refused_unless_the_user_chooses(tmp_path):
    """Two sets of weights, and no way to know which was meant."""
    write_npz(tmp_path / "both", make_model(seed=1))
    write_native(tmp_path / "both", make_model(seed=2))
    with pytest.raises(UserError, match=r"as a npz folder \(params.npz\) or as a native T5X checkpoint \(checkpoint\)"):
        checkpoints.load(tmp_path / "both")
    with pytest.raises(UserError, match="can be read in several ways"):
        describe.describe(tmp_path / "both")
    assert_same(checkpoints.load(tmp_path / "both", kind="npz"), make_model(seed=1))
    assert_same(checkpoints.load(tmp_path / "both", kind="t5x_native"), make_model(seed=2))
    assert describe.describe(tmp_path / "both", kind="npz")["kind"] == "npz"
    with pytest.raises(UserError, match="is not a Hugging Face folder but a npz folder"):
        checkpoints.load(tmp_path / "both", kind="huggingface")
    with pytest.raises(UserError, match="there is no kind of checkpoint 'zip': use one of bundle"):
        checkpoints.load(tmp_path / "both", kind="zip")


def test_a_folder_is_itself_before_it_is_a_folder_of_steps(tmp_path):
    write_npz(tmp_path, make_model(seed=1))
    write_native(tmp_path / "checkpoint_5", make_model(seed=2))
    assert_same(checkpoints.load(tmp_path), make_model(seed=1))
    assert_same(checkpoints.load(tmp_path / "checkpoint_5"), make_model(seed=2))


def test_packaged_names_are_understood():
    assert checkpoints.identify("restore_de_pair").kind == "bundle"
    assert checkpoints.bundle_folder("restore_de_pair").name == "restore_de_pair"
    assert list(describe.describe("restore_de_pair")["models"]) == ["verifier", "drafter"]
    assert checkpoints.open_model("restore_de_pair/drafter").kind == "member"
    with pytest.raises(UserError, match="restore_pair does not exist; did you mean 'restore_de_pair'"):
        checkpoints.identify("restore_pair")


def test_what_is_no_bundle_is_told_with_the_way_out(tmp_path):
    write_npz(tmp_path, make_model())
    with pytest.raises(UserError, match="is not a bundle but a npz folder: make one with `speccascade export"):
        checkpoints.load_bundle(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="a.json is a file; name the folder it lies in"):
        checkpoints.load(tmp_path / "a.json")
