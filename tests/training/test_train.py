"""The job: shards in, checkpoints, curves and a summary out."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from checkpoints.tiny import write_npz
from corpora import train_sentencepiece
from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import export, flat_params, huggingface
from speccascade_t5x.data import mixing, shards
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models.t5 import T5, init_params
from speccascade_t5x.text.vocabulary import ByteVocabulary
from speccascade_t5x.training import losses, train
from speccascade_t5x.training.train_loop import TrainConfig
from training.training import FAST, MODEL, Remembering, quick_compiles

VOCABULARY = ByteVocabulary(extra_ids=125)
BYTES = dataclasses.replace(MODEL, vocab_size=384)
WORDS = ["Größe", "Menü", "Straße", "über", "Öl", "schön", "Nordküste", "Spiel"]


@pytest.fixture(scope="module", autouse=True)
def _quick_compiles(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("programs")):
        yield


def examples(seed, count=40):
    random = np.random.default_rng(seed)
    for _ in range(count):
        text = " ".join(random.choice(WORDS, random.integers(1, 4)))
        ids = np.array([*VOCABULARY.encode(text), VOCABULARY.eos_id], np.int32)
        yield ids, ids


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for seed, split in enumerate(("train", "validation")):
        shards.write(folder / split, examples(seed), name="copy", split=split, spoken=VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def data(corpora):
    return train.Data(
        cached=str(corpora / "train"),
        eval_cached=str(corpora / "validation"),
        eval_limit=10,
        inputs_len=48,
        targets_len=48,
        batch_size=8,
    )


def config(steps, **changes):
    return TrainConfig(**{"steps": steps, "optimizer": FAST, "log_every": 2, "checkpoint_every": 4} | changes)


def test_a_run_leaves_checkpoints_curves_and_a_summary(tmp_path, data):
    seen = Remembering()
    run = lambda steps: train.train(  # noqa: E731
        BYTES, data, config(steps), tmp_path / "run", devices=1, config_text="# all of it\n", observer=seen
    )
    run(4)
    # A part of a report that a kill cut off, and one beyond the checkpoint.
    with open(tmp_path / "run" / train.METRICS_FILE, "a") as file:
        file.write('{"kind": "train", "step": 6, "loss": 1.0}\n{"kind": "tr')
    summary = run(8)
    assert summary["steps"] == 8 and summary["resumed_from"] == 4
    rows = [json.loads(line) for line in (tmp_path / "run" / train.METRICS_FILE).read_text().splitlines()]
    steps = lambda kind: [row["step"] for row in rows if row["kind"] == kind]  # noqa: E731
    assert steps("train") == [2, 4, 6, 8] and steps("eval") == [0, 4, 8]
    assert summary == json.loads((tmp_path / "run" / "train-summary.json").read_text())
    assert summary["before"]["step"] == 0 and summary["after"]["nll"] < summary["before"]["nll"]
    assert 0 < summary["padding_share"] < 0.5 and summary["cut_share"] == 0
    page = (tmp_path / "run" / "train-summary.md").read_text()
    assert "| padding_share |" in page and "| nll |" in page and "was resumed" in page
    assert (tmp_path / "run" / "config.gin").read_text() == "# all of it\n"
    assert seen.steps("saved") == [4, 8]
    assert checkpoints.load(tmp_path / "run").model.config == BYTES


def test_the_folder_of_a_mixture_is_trained_and_evaluated_on(tmp_path, corpora, data):
    mixing.write(corpora, {"train": 3.0, "validation": 1.0})
    mixed = dataclasses.replace(data, cached=str(corpora), eval_cached=str(corpora), eval_limit=20)
    assert mixed.source(tmp_path).fingerprint == mixing.read(corpora).fingerprint
    seen = mixed.evaluation()
    both = [shards.read(corpora / name) for name in ("train", "validation")]
    texts = [{part.inputs(i).tobytes() for i in range(len(part))} for part in both]
    shares = [sum(seen.inputs(i).tobytes() in part for i in range(len(seen))) for part in texts]
    assert len(seen) == 20 and shares[0] > shares[1] > 0
    assert len(dataclasses.replace(mixed, eval_limit=None).evaluation()) == sum(map(len, both))
    assert train.train(BYTES, mixed, config(2), tmp_path / "run", devices=1)["after"]


def test_a_drafter_is_distilled_from_a_checkpoint_in_buckets(tmp_path, data):
    teacher = Bound(T5(BYTES), init_params(BYTES, jax.random.key(1)))
    checkpoints.save_bundle(
        tmp_path / "teacher", verifier=teacher, vocabulary=VOCABULARY, feature_lengths={"inputs": 48, "targets": 48}
    )
    bucketed = dataclasses.replace(data, batching="bucketed", buckets=2)
    distill = losses.DistillConfig("total_variation", 1.0)
    summary = train.train(
        BYTES, bucketed, config(4, distill=distill), tmp_path / "run", teacher=tmp_path / "teacher", devices=2
    )
    assert summary["after"].keys() >= {"acceptance", "greedy_agreement", "teacher_nll"}
    assert "divergence" in summary["last_report"]
    # What was trained can be trained further, on a mixture.
    mixed = dataclasses.replace(data, cached={data.cached: 2.0, data.eval_cached: 1.0}, eval_cached=None)
    further = train.train(BYTES, mixed, config(2), tmp_path / "further", start_from=tmp_path / "run", devices=1)
    assert further["before"] == {} and further["steps"] == 2


@pytest.mark.parametrize("kind", ["huggingface", "t5x"])
def test_a_run_begins_with_the_weights_of_others(tmp_path, data, kind):
    begin = Bound(T5(BYTES), init_params(BYTES, jax.random.key(3)))
    write_npz(tmp_path / "npz", begin)
    export.export(tmp_path / "npz", tmp_path / kind, kind)
    runs = [
        train.train(BYTES, data, config(2), tmp_path / f"from_{source}", start_from=tmp_path / source, devices=1)
        for source in ("npz", kind)
    ]
    assert runs[0]["before"] == runs[1]["before"] and runs[0]["after"] == runs[1]["after"]
    fresh = train.train(BYTES, data, config(2), tmp_path / "fresh", devices=1)
    assert fresh["before"]["nll"] != runs[0]["before"]["nll"]


def test_a_checkpoint_with_another_vocabulary_beside_it_is_refused(tmp_path, data):
    begin = Bound(T5(BYTES), init_params(BYTES, jax.random.key(3)))
    flat = flat_params.flatten(begin.params)
    (tmp_path / "model").mkdir()
    spoken = train_sentencepiece(tmp_path)
    huggingface.write(tmp_path / "model", begin.model, lambda name: np.asarray(flat[name]), vocabulary_file=spoken)
    with pytest.raises(UserError, match=r"checkpoint .*model .*\(sentencepiece\) .* training data .*\(byte\)"):
        train.train(BYTES, data, config(2), tmp_path / "run", start_from=tmp_path / "model", devices=1)
    assert not (tmp_path / "run").exists()


def test_a_refused_run_changes_nothing(tmp_path, data):
    train.train(BYTES, data, config(2), tmp_path, devices=1, config_text="first")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="belongs to another run: train.seed is 0 there and 1 here"):
        train.train(BYTES, data, config(4, seed=1), tmp_path, devices=1, config_text="second")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_models_and_data_that_do_not_fit(tmp_path, data):
    with pytest.raises(UserError, match="the model has 32 logits and the data 384 pieces"):
        train.train(MODEL, data, config(2), tmp_path / "run")
    other = tmp_path / "other"
    shards.write(other, examples(0), name="copy", split="train", spoken=ByteVocabulary(extra_ids=20))
    with pytest.raises(UserError, match="training data"):
        train.train(BYTES, dataclasses.replace(data, eval_cached=str(other)), config(2), tmp_path / "run")
    small = Bound(T5(MODEL), init_params(MODEL, jax.random.key(1)))
    write_npz(tmp_path / "small", small)
    for role in ("teacher", "start_from"):
        with pytest.raises(UserError, match="has 32 logits and the data 384 pieces"):
            train.train(BYTES, data, config(2), tmp_path / "run", **{role: tmp_path / "small"})
    wide = dataclasses.replace(BYTES, emb_dim=24)
    write_npz(tmp_path / "wide", Bound(T5(wide), init_params(wide, jax.random.key(1))))
    with pytest.raises(UserError, match="wide does not fit its configuration: tensor"):
        train.train(BYTES, data, config(2), tmp_path / "run", start_from=tmp_path / "wide")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cached": None}, "name either tokenised shards or a task"),
        ({"task": "restore_de"}, "name either tokenised shards or a task"),
        ({"batching": "sorted"}, "batching='sorted' is unknown: use packed or bucketed"),
        ({"batch_size": 0}, "batch_size=0 is outside its range"),
    ],
)
def test_bad_options(changes, words):
    with pytest.raises(UserError, match=words):
        train.Data(**{"cached": "somewhere"} | changes)
