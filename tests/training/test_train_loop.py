"""The loop: it learns, resumes with the same bits, shares batches, distils, and stops with clear words."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models.t5 import T5, init_params
from speccascade_t5x.training import losses, optimizers, teacher_forcing, train_loop, train_step
from speccascade_t5x.training.train_loop import TrainConfig
from training.training import FAST, MODEL, Copying, Remembering, quick_compiles

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("programs")):
        yield


def config(steps=8, **changes):
    return TrainConfig(**{"steps": steps, "optimizer": FAST, "log_every": 4, "checkpoint_every": 4} | changes)


def same_bits(a, b):
    ours, theirs = flat_params.flatten(a), flat_params.flatten(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def close(a, b, atol):
    ours, theirs = flat_params.flatten(a), flat_params.flatten(b)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def teacher():
    """A model that copies fairly well."""
    model = dataclasses.replace(MODEL, dropout_rate=0.0)
    return train_loop.train_loop(model, Copying(32, seed=9), config(250, log_every=250)).bound


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run of four steps and its folder."""
    folder = tmp_path_factory.mktemp("four")
    return train_loop.train_loop(MODEL, Copying(), config(4), output_dir=folder), folder


def test_it_learns_and_tells(tmp_path):
    seen, batches = Remembering(), Copying(16)
    held_out = [Copying(16, seed=7)(step) for step in range(2)]
    result = train_loop.train_loop(
        MODEL,
        batches,
        config(60, log_every=20, checkpoint_every=25, eval_every=30, keep=2),
        output_dir=tmp_path,
        eval_batches=held_out,
        observer=seen,
    )
    assert batches.asked == list(range(60))
    assert seen.steps("logged") == [20, 25, 30, 40, 50, 60]
    assert seen.steps("evaluated") == [0, 30, 60] and seen.steps("saved") == [25, 50, 60]
    nll = [row["nll"] for row in result.evaluations]
    assert nll[2] < nll[1] < nll[0] - 1
    assert sorted(p.name for p in tmp_path.glob("checkpoint_*")) == ["checkpoint_50", "checkpoint_60"]
    assert result.tokens == sum(2 * int((Copying(16)(s)["encoder_input_tokens"] > 0).sum()) for s in range(60))
    # What was saved is a model like any other.
    loaded = checkpoints.load(tmp_path)
    assert loaded.model.config == MODEL
    same_bits(loaded.params, result.bound.params)
    again = teacher_forcing.evaluate(loaded, held_out)
    np.testing.assert_allclose(again["nll"], nll[2], rtol=1e-6)
    close(checkpoints.load(tmp_path / "checkpoint_50").params, result.bound.params, 1.0)


def test_reports_are_means_of_the_steps_between(tmp_path):
    every = train_loop.train_loop(MODEL, Copying(), config(4, log_every=1)).history
    (once,) = train_loop.train_loop(MODEL, Copying(), config(4, log_every=4)).history
    weights = [Copying()(step)["decoder_loss_weights"].sum() for step in range(4)]
    np.testing.assert_allclose(once["loss"], np.mean([row["loss"] for row in every]), rtol=1e-6)
    for name in ("cross_entropy", "accuracy"):
        mean = np.average([row[name] for row in every], weights=weights)
        np.testing.assert_allclose(once[name], mean, rtol=1e-5, err_msg=name)


def test_each_shape_compiles_once_and_no_step_waits(monkeypatch):
    traced, fetched = [], []
    step, get = train_step.Update.step, jax.device_get
    monkeypatch.setattr(train_step.Update, "step", lambda *args: traced.append(1) or step(*args))
    monkeypatch.setattr(jax, "device_get", lambda value: fetched.append(1) or get(value))
    train_loop.train_loop(MODEL, Copying(widths=(6, 8)), config(12, log_every=6))
    assert len(traced) == 2 and len(fetched) == 2


def test_rates_are_of_finished_work_however_often_they_are_told():
    """Divided by the time that calls take, frequent reports told dozens of times what the machine made."""
    heavy = dataclasses.replace(MODEL, emb_dim=256, mlp_dim=1024)
    stamps = []

    class Watch(train_loop.Observer):
        def logged(self, step, metrics):
            stamps.append(time.perf_counter())

    result = train_loop.train_loop(heavy, Copying(64), config(7, log_every=1), observer=Watch())
    # From the first report on nothing is compiled, and all that is done beside training is reporting.
    told = sum(1 / row["steps_per_s"] for row in result.history[1:])
    assert 0.7 * (stamps[-1] - stamps[0]) <= told <= stamps[-1] - stamps[0]
    assert result.train_s >= told


def test_a_second_call_continues_with_the_same_bits(tmp_path):
    whole = train_loop.train_loop(MODEL, Copying(), config(12), output_dir=tmp_path / "whole")
    train_loop.train_loop(MODEL, Copying(), config(8), output_dir=tmp_path / "parts")
    batches, seen = Copying(), Remembering()
    rest = train_loop.train_loop(MODEL, batches, config(12), output_dir=tmp_path / "parts", observer=seen)
    assert rest.resumed_from == 8 and batches.asked == [8, 9, 10, 11]
    assert seen.events[0] == ("started", 8, 12)
    same_bits(rest.bound.params, whole.bound.params)
    done = train_loop.train_loop(MODEL, batches, config(12), output_dir=tmp_path / "parts", eval_batches=[Copying()(0)])
    assert done.step == 12 and len(batches.asked) == 4 and len(done.evaluations) == 1
    same_bits(done.bound.params, whole.bound.params)


KILLED = """
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    from training.training import FAST, MODEL, Copying
    from speccascade_t5x.training import train_loop
    class Slow(train_loop.Observer):
        def logged(self, step, metrics):
            print(step, flush=True)
    train_loop.train_loop(
        MODEL, Copying(), train_loop.TrainConfig(400, optimizer=FAST, log_every=1, checkpoint_every=5),
        output_dir={folder!r}, observer=Slow())
    print("done", flush=True)
"""


def test_a_killed_process_continues_with_the_same_bits(tmp_path):
    """kill -9 at a moment of no significance; what the next process reaches is what no kill would have."""
    code = textwrap.dedent(KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path / "killed")))
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here, or the programs would round differently
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        for line in child.stdout:
            if line.strip() == "done":
                pytest.fail("the run ended before it could be killed")
            if int(line) >= 13:
                break
        time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    survivors = [int(p.name.split("_")[1]) for p in (tmp_path / "killed").glob("checkpoint_*") if "tmp" not in p.name]
    reached = max(survivors)
    assert reached >= 10
    goal = reached + 6
    run = lambda name: train_loop.train_loop(  # noqa: E731
        MODEL,
        Copying(),
        TrainConfig(goal, optimizer=FAST, log_every=1, checkpoint_every=5),
        output_dir=tmp_path / name,
    )
    resumed, whole = run("killed"), run("whole")
    assert resumed.resumed_from == reached and whole.resumed_from is None
    same_bits(resumed.bound.params, whole.bound.params)
    assert not list((tmp_path / "killed").glob("*tmp*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": dataclasses.replace(MODEL, mlp_dim=48)}, "model.mlp_dim is 32 there and 48 here"),
        ({"batches": Copying(seed=1)}, r"data is 'copying 8 0 \(8,\)' there and 'copying 8 1 \(8,\)' here"),
        ({"seed": 3}, "train.seed is 0 there and 3 here"),
        ({"optimizer": optimizers.Adafactor(decay_rate=0.7)}, "optimizer.decay_rate is 0.8 there and 0.7 here"),
        ({"optimizer": optimizers.AdamW()}, r"optimizer.*\(and \d+ more\)"),
        ({"loss": losses.LossConfig(z_loss=0.1)}, "loss.z_loss is 0.0001 there and 0.1 here"),
        ({"start_from": 1}, "start is None there and"),
    ],
)
def test_another_runs_checkpoint_is_refused(four_steps, changes, words):
    first, folder = four_steps
    changes = dict(changes)
    model, batches = changes.pop("model", MODEL), changes.pop("batches", Copying())
    begin = init_params(MODEL, jax.random.key(5)) if changes.pop("start_from", None) else None
    with pytest.raises(UserError, match=words) as raised:
        train_loop.train_loop(model, batches, config(8, **changes), output_dir=folder, start_from=begin)
    assert "belongs to another run" in str(raised.value)
    same_bits(checkpoints.load(folder).params, first.bound.params)  # nothing is lost


def test_what_may_change_on_resume(tmp_path, four_steps):
    shutil.copytree(four_steps[1], tmp_path, dirs_exist_ok=True)
    other = config(6, log_every=1, checkpoint_every=3, keep=1, eval_every=2)
    assert train_loop.train_loop(MODEL, Copying(), other, output_dir=tmp_path).resumed_from == 4


def test_a_cosine_that_follows_the_number_of_steps_belongs_to_the_run(tmp_path):
    cosine = optimizers.Adafactor(optimizers.Schedule("cosine", base=0.01, warmup_steps=1))
    train_loop.train_loop(MODEL, Copying(), config(4, optimizer=cosine), output_dir=tmp_path)
    with pytest.raises(UserError, match="train.steps is 4 there and 6 here"):
        train_loop.train_loop(MODEL, Copying(), config(6, optimizer=cosine), output_dir=tmp_path)


def test_a_folder_of_t5x_is_refused(tmp_path, fixtures):
    shutil.copytree(fixtures / "t5x_orbax" / "checkpoint_3", tmp_path / "checkpoint_3")
    with pytest.raises(UserError, match="checkpoint_3 was not written by `speccascade train`"):
        train_loop.train_loop(MODEL, Copying(), config(8), output_dir=tmp_path)


def test_nan_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, four_steps):
    with pytest.raises(UserError, match="NaN or infinite in step 7; the checkpoint of step 4 is kept: lower"):
        train_loop.train_loop(MODEL, Copying(broken_from=6), config(20, log_every=10), output_dir=tmp_path)
    same_bits(checkpoints.load(tmp_path).params, four_steps[0].bound.params)
    # With sound data the same run goes on.
    assert train_loop.train_loop(MODEL, Copying(), config(8), output_dir=tmp_path).resumed_from == 4


def test_a_diverging_rate_is_noticed_before_it_is_saved(tmp_path):
    wild = optimizers.Adafactor(optimizers.Schedule("constant", base=1e30, warmup_steps=0))
    with pytest.raises(UserError, match="became NaN or infinite in step"):
        train_loop.train_loop(
            MODEL, Copying(), config(4, optimizer=wild, checkpoint_every=1, log_every=4), output_dir=tmp_path
        )
    for folder in tmp_path.glob("checkpoint_*"):
        checkpoints.load(folder)  # refuses what is not finite


def test_microbatches_make_the_same_update():
    model = dataclasses.replace(MODEL, dropout_rate=0.0)
    for normalizer in ("sequences",):
        loss = losses.LossConfig(normalizer=normalizer)
        once, thrice = (
            train_loop.train_loop(model, Copying(12), config(3, microbatches=pieces, loss=loss, log_every=1))
            for pieces in (1, 3)
        )
        close(once.bound.params, thrice.bound.params, 1e-4)
        for ours, theirs in zip(once.history, thrice.history, strict=True):
            for name in ("loss", "cross_entropy", "grad_norm"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)


@pytest.mark.sharding
def test_eight_devices_train_as_one(devices):
    once, eight = (
        train_loop.train_loop(
            MODEL, Copying(16), config(4, log_every=1), mesh=train_loop.data_mesh(n), eval_batches=[Copying(16)(9)]
        )
        for n in (1, 8)
    )
    np.testing.assert_allclose([r["loss"] for r in once.history], [r["loss"] for r in eight.history], rtol=1e-5)
    np.testing.assert_allclose(once.evaluations[-1]["nll"], eight.evaluations[-1]["nll"], rtol=1e-5)
    close(once.bound.params, eight.bound.params, 1e-4)
    assert len(jax.tree.leaves(eight.bound.params)[0].sharding.device_set) == 8


@pytest.mark.slow
@pytest.mark.sharding
def test_microbatches_on_two_devices(devices):
    model = dataclasses.replace(MODEL, dropout_rate=0.0)
    once = train_loop.train_loop(model, Copying(12), config(2, log_every=1))
    cut = train_loop.train_loop(
        model, Copying(12), config(2, log_every=1, microbatches=3), mesh=train_loop.data_mesh(2)
    )
    np.testing.assert_allclose([r["loss"] for r in once.history], [r["loss"] for r in cut.history], rtol=1e-5)


def test_batches_that_cannot_be_shared():
    for mesh, pieces, words in [
        (train_loop.data_mesh(8), 1, "a batch of 12 rows cannot be shared by 8 devices: choose a batch size that 8"),
        (train_loop.data_mesh(1), 5, "cannot be shared by 1 device x 5 microbatches: choose a batch size that 5"),
        (train_loop.data_mesh(2), 4, "cannot be shared by 2 devices x 4 microbatches: choose a batch size that 8"),
    ]:
        with pytest.raises(UserError, match=words):
            train_loop.train_loop(MODEL, Copying(12), config(2, microbatches=pieces), mesh=mesh)
    with pytest.raises(UserError, match="devices=99 was asked for, and this machine has 8"):
        train_loop.data_mesh(99)


@pytest.mark.parametrize(
    "divergence",
    [pytest.param(d, marks=() if d == "forward_kl" else pytest.mark.slow) for d in losses.DIVERGENCES],
)
def test_distillation_brings_a_drafter_near_its_teacher(teacher, divergence):
    held_out = [Copying(32, seed=8)(step) for step in range(2)]
    distill = losses.DistillConfig(divergence, weight=1.0)
    steps = 240 if divergence == "total_variation" else 120  # its gradient is small where the laws hardly overlap
    before = [np.array(leaf) for leaf in jax.tree.leaves(teacher.params)]
    result = train_loop.train_loop(
        dataclasses.replace(MODEL, dropout_rate=0.0),
        Copying(16, seed=3),
        config(steps, distill=distill, log_every=60),
        teacher=teacher,
        eval_batches=held_out,
    )
    first, last = result.evaluations[0], result.evaluations[-1]
    assert last["acceptance"] > first["acceptance"] + 0.2 and last["greedy_agreement"] > first["greedy_agreement"]
    assert result.history[-1]["divergence"] < result.history[0]["divergence"]
    for kept, leaf in zip(before, jax.tree.leaves(teacher.params), strict=True):
        np.testing.assert_array_equal(kept, leaf)


def test_a_teacher_is_needed_and_is_part_of_the_run(tmp_path, teacher):
    distilled = config(4, distill=losses.DistillConfig())
    with pytest.raises(UserError, match="a distillation loss needs a teacher"):
        train_loop.train_loop(MODEL, Copying(), distilled)
    train_loop.train_loop(MODEL, Copying(), distilled, teacher=teacher, output_dir=tmp_path)
    other = Bound(teacher.model, jax.tree.map(lambda leaf: leaf * 1.01, teacher.params))
    with pytest.raises(UserError, match="teacher is '.*' there and '.*' here"):
        train_loop.train_loop(MODEL, Copying(), distilled, teacher=other, output_dir=tmp_path)


@pytest.mark.slow
def test_bfloat16_activations_learn_with_float32_parameters():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    result = train_loop.train_loop(model, Copying(16), config(40, log_every=20))
    assert {leaf.dtype for leaf in jax.tree.leaves(result.bound.params)} == {jnp.dtype("float32")}
    assert result.history[1]["cross_entropy"] < result.history[0]["cross_entropy"] - 0.1


def test_dropout_follows_the_seed():
    begin = init_params(MODEL, jax.random.key(0))
    zero, again, one = (
        train_loop.train_loop(MODEL, Copying(), config(2, seed=seed), start_from=begin).bound.params
        for seed in (0, 0, 1)
    )
    same_bits(zero, again)
    with pytest.raises(AssertionError):
        close(zero, one, 1e-4)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(begin))  # the loop trains a copy


@pytest.mark.slow
def test_adamw_learns():
    adamw = optimizers.AdamW(optimizers.Schedule("cosine", base=0.01, warmup_steps=5))
    result = train_loop.train_loop(
        MODEL, Copying(16), config(60, optimizer=adamw, loss=losses.LossConfig(normalizer="real_tokens"), log_every=30)
    )
    assert result.history[1]["cross_entropy"] < result.history[0]["cross_entropy"] - 0.3
    assert result.history[1]["learning_rate"] < 1e-4  # the cosine ends


FULL = """
    import os, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    from training.training import FAST, MODEL, Copying
    from speccascade_t5x.interfaces import UserError
    from speccascade_t5x.training import train_loop
    class Filling(train_loop.Observer):
        def saved(self, step, path):
            file = os.open({filler!r}, os.O_WRONLY | os.O_CREAT)
            try:
                while True:
                    os.write(file, b"x" * 4096)
            except OSError:
                os.close(file)
    try:
        train_loop.train_loop(
            MODEL, Copying(), train_loop.TrainConfig(8, optimizer=FAST, log_every=4, checkpoint_every=4),
            output_dir={folder!r}, observer=Filling())
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, four_steps):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        fill = {"filler": str(small / "filler"), "folder": str(small / "run")}
        code = textwrap.dedent(FULL.format(root=str(ROOT), tests=str(ROOT / "tests"), **fill))
        env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
        assert "the checkpoint of step 8 cannot be written" in done.stdout, done.stderr[-2000:]
        assert "the disk is full" in done.stdout and "the checkpoint of step 4 is kept" in done.stdout
        assert "Traceback" not in done.stdout
        (small / "filler").unlink()
        assert [p.name for p in (small / "run").glob("checkpoint_*")] == ["checkpoint_4"]
        same_bits(checkpoints.load(small / "run").params, four_steps[0].bound.params)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_observer_of_another_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be used for checkpoints"):
        train_loop.train_loop(MODEL, Copying(), config(2), output_dir=tmp_path / "file")


@pytest.mark.parametrize("field", ["steps", "microbatches", "log_every", "checkpoint_every", "keep"])
def test_bad_numbers(field):
    with pytest.raises(UserError, match=f"{field}=0 is outside its range"):
        TrainConfig(**{"steps": 1, field: 0})


def test_nothing_to_evaluate_on():
    bound = Bound(T5(MODEL), init_params(MODEL, jax.random.key(0)))
    with pytest.raises(UserError, match="no batch to evaluate on"):
        teacher_forcing.evaluate(bound, [])
