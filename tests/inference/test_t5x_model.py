"""The pair as T5X's scripts see it: called with batches of T5X's shape, and by T5X itself where it is installed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core as flax_core
from flax import traverse_util

from speccascade_t5x import decoding
from speccascade_t5x.checkpoints import t5x_pair
from speccascade_t5x.common import paths
from speccascade_t5x.core import rules
from speccascade_t5x.inference import t5x_model
from speccascade_t5x.interfaces import Bound, UserError
from speccascade_t5x.models import T5, DecoderOnly, DecoderOnlyConfig, T5Config, param_shapes

CONFIG = T5Config(
    vocab_size=24, emb_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=4, mlp_dim=8
)
MODELS = {"verifier": T5(CONFIG), "drafter": T5(dataclasses.replace(CONFIG, emb_dim=4))}
ROWS, SOURCE, TARGET = 3, 6, 9


@dataclasses.dataclass(frozen=True)
class Ids:
    """A vocabulary of plain ids, with the attributes of seqio's that are read."""

    vocab_size: int = 20
    eos_id: int | None = 1

    def encode(self, text: str) -> list[int]:
        return [int(part) for part in text.split()]


def make(**settings) -> t5x_model.PairModel:
    named = {"draft_len": 2, **settings}  # few programs to compile
    return t5x_model.PairModel(**MODELS, input_vocabulary=Ids(), output_vocabulary=Ids(), **named)


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = rng.integers(2, 20, (ROWS, TARGET)).astype(np.int32)
    targets[1, 5:] = 0
    return {
        "encoder_input_tokens": rng.integers(2, 20, (ROWS, SOURCE)).astype(np.int32),
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


@pytest.fixture(scope="module")
def params():
    """Both members' parameters in one tree, unlike enough that tokens are rejected."""
    rng = np.random.default_rng(0)
    shapes = {role: param_shapes(model.config) for role, model in MODELS.items()}
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def test_initial_variables_name_the_axes_of_every_parameter(params):
    variables = jax.eval_shape(lambda: make().get_initial_variables(jax.random.PRNGKey(0), {}))
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    assert set(axes) == {f"{name}_axes" for name in flat}
    assert all(len(axes[f"{name}_axes"].names) == len(leaf.shape) for name, leaf in flat.items())
    assert axes["drafter/decoder/layers_0/mlp/wo/kernel_axes"].names == ("mlp", "embed")
    assert flat["drafter/token_embedder/embedding"].shape == (24, 4)
    assert flat["verifier/token_embedder/embedding"].shape == (24, 8)
    assert jax.tree.structure(params) == jax.tree.structure(variables["params"])


def test_greedy_prediction_is_the_verifiers(params):
    predict = jax.jit(make(temperature=0.0).predict_batch_with_aux)
    tokens, aux = predict(params, batch())
    alone = decoding.autoregressive(
        model=Bound(MODELS["verifier"], params["verifier"]),
        inputs={"encoder_input_tokens": batch()["encoder_input_tokens"]},
        config=decoding.DecodeConfig(max_len=TARGET, vocab_size=20),
        sampling=decoding.Sampling(temperature=0.0),
        key=jax.random.key(0),
        example_ids=np.arange(ROWS),
    )
    np.testing.assert_array_equal(tokens, alone.tokens)
    assert aux["scores"].shape == (ROWS,) and aux["drafter_calls"].min() > 0
    np.testing.assert_array_equal(aux["committed"], alone.lengths)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(aux)} == {ROWS}


def test_prediction_is_that_of_the_loop_under_the_same_rule(params):
    raw = jax.random.PRNGKey(7)
    model = make(rule="opt", alpha=0.3)
    tokens, aux = model.predict_batch_with_aux(flax_core.freeze(params), batch(), raw)
    ours = decoding.speculative(
        drafter=Bound(MODELS["drafter"], params["drafter"]),
        verifier=Bound(MODELS["verifier"], params["verifier"]),
        rule=rules.by_name("opt", 0.3),
        inputs={"encoder_input_tokens": batch()["encoder_input_tokens"]},
        config=decoding.DecodeConfig(max_len=TARGET, vocab_size=20, draft_len=2),
        key=jax.random.wrap_key_data(raw),
        example_ids=np.arange(ROWS),
    )
    np.testing.assert_array_equal(tokens, ours.tokens)
    np.testing.assert_array_equal(tokens, model.predict_batch(params, batch(), raw))
    np.testing.assert_allclose(aux["scores"], ours.log_probs, atol=1e-5)
    np.testing.assert_array_equal(aux["accepted"], ours.counts.accepted)
    other, _ = model.predict_batch_with_aux(params, batch(), decoder_params={"decode_rng": jax.random.key(8)})
    assert (np.asarray(other) != np.asarray(tokens)).any()


@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_rows_of_t5xs_own_generator_are_independent(params, raw):
    """T5X sets unsafe_rbg on TPUs, under which vmapped draws take every row's noise from row 0's key."""
    model, features = make(), batch()
    same = np.repeat(features["encoder_input_tokens"][:1], ROWS, axis=0)
    with jax.default_prng_impl("unsafe_rbg"):
        key = jax.random.PRNGKey(7) if raw else jax.random.key(7)
        tokens = np.asarray(model.predict_batch(params, features | {"encoder_input_tokens": same}, key))
        assert len(np.unique(tokens, axis=0)) == ROWS
        alone = model.predict_batch(params, {name: x[:1] for name, x in features.items()}, key)
        np.testing.assert_array_equal(alone[0], tokens[0])
        assert jax.eval_shape(lambda: model.get_initial_variables(key, {}))["params"].keys() == params.keys()
        seeded = model.predict_batch(params, features)
    np.testing.assert_array_equal(seeded, model.predict_batch(params, features))  # of the settings' seed


def test_samples_come_by_rising_score(params):
    predict = make().predict_batch_with_aux
    tokens, aux = predict(params, batch(), num_decodes=4, return_all_decodes=True)
    assert tokens.shape == (ROWS, 4, TARGET)
    assert (np.diff(aux["scores"], axis=1) >= 0).all() and np.ptp(aux["scores"]) > 0
    best, its = predict(params, batch(), num_decodes=4)
    np.testing.assert_array_equal(best, tokens[:, -1])
    np.testing.assert_array_equal(its["scores"], aux["scores"][:, -1])


def test_scores_are_the_verifiers_log_likelihood(params):
    model = make()
    scores, more = model.score_batch(params, batch(), True)
    features = batch()
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    logits = MODELS["verifier"].module.apply({"params": params["verifier"]}, *(features[n] for n in names))
    logits = np.asarray(logits, float)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = [
        sum(logs[row, at, token] for at, token in enumerate(features["decoder_target_tokens"][row]) if token)
        for row in range(ROWS)
    ]
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
    np.testing.assert_allclose(more["decoder"]["token_scores"][0].sum(-1), scores, atol=1e-5)
    np.testing.assert_array_equal(model.score_batch(params, batch()), scores)


def test_parameters_in_bfloat16_decode(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens, aux = make(temperature=0.0).predict_batch_with_aux(half, batch())
    assert tokens.shape == (ROWS, TARGET) and np.isfinite(aux["scores"]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_len": 8}, "max_len cannot be set for T5X's scripts"),
        ({"draft_len": "auto"}, "draft_len='auto' needs a plan"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"output_vocabulary": Ids(25)}, "has 24 logits but the vocabulary 25 pieces"),
        ({"drafter": DecoderOnly(DecoderOnlyConfig(vocab_size=24))}, "only encoder-decoders run inside T5X"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    named = {**MODELS, "input_vocabulary": Ids(), "output_vocabulary": Ids(), **settings}
    with pytest.raises(UserError, match=message):
        t5x_model.PairModel(**named)


def test_wishes_the_loop_cannot_grant(params):
    model = make()
    with pytest.raises(UserError, match="prompt_with_targets"):
        model.predict_batch_with_aux(params, batch(), prompt_with_targets=True)
    with pytest.raises(UserError, match="names 'topk'"):
        model.predict_batch_with_aux(params, batch(), decoder_params={"topk": 3})
    with pytest.raises(UserError, match="give one"):
        key = jax.random.key(0)
        model.predict_batch_with_aux(params, batch(), key, {"decode_rng": key})
    with pytest.raises(UserError, match="not trained as one model"):
        model.loss_fn(params, batch(), None)


def test_a_model_from_an_exported_pair(params, tmp_path):
    members = {role: Bound(model, params[role]) for role, model in MODELS.items()}
    t5x_pair.write(tmp_path, members, step=3)
    model = t5x_model.from_checkpoint(tmp_path, input_vocabulary=Ids(), temperature=0.0)
    assert model.models == MODELS and model.output_vocabulary == Ids()
    read = {role: bound.params for role, bound in t5x_pair.load(tmp_path).items()}
    wanted = make(temperature=0.0).predict_batch(params, batch())
    np.testing.assert_array_equal(model.predict_batch(read, batch()), wanted)
    with pytest.raises(UserError, match="holds no pair"):
        t5x_model.from_checkpoint(tmp_path / "nothing", input_vocabulary=Ids())


def test_the_gin_file_makes_the_model(params, tmp_path):
    gin, seqio = pytest.importorskip("gin"), pytest.importorskip("seqio")
    t5x_pair.write(tmp_path, {role: Bound(model, params[role]) for role, model in MODELS.items()})
    chosen = tmp_path / "chosen.gin"
    chosen.write_text(
        "from __gin__ import dynamic_registration\nimport seqio\n"
        "from speccascade_t5x.inference import t5x_model\n"
        f"CHECKPOINT_PATH = {str(tmp_path)!r}\nVOCABULARY_FILE = None\n"
        "VOCABULARY = @seqio.PassThroughVocabulary()\nseqio.PassThroughVocabulary.size = 20\n"
        "t5x_model.from_checkpoint:\n  rule = 'opt'\n  alpha = 0.3\n"
    )
    try:
        gin.parse_config_files_and_bindings([str(paths.gin_configs_dir() / "t5x" / "pair.gin"), str(chosen)], [])
        model = gin.query_parameter("%MODEL").scoped_configurable_fn()
    finally:
        gin.clear_config()
    assert (model.settings.rule, model.settings.alpha, model.models) == ("opt", 0.3, MODELS)
    assert model.input_vocabulary is model.output_vocabulary and model.input_vocabulary.vocab_size == 20
    assert model.FEATURE_CONVERTER_CLS is seqio.EncDecFeatureConverter


def test_t5x_restores_and_drives_it(params, tmp_path):
    """T5X's own state initialiser, checkpointer and partitioner on an exported pair."""
    utils = pytest.importorskip("t5x.utils", reason="T5X is not installed", exc_type=ImportError)
    from t5x import partitioning

    folder = tmp_path / "checkpoint_3"
    folder.mkdir()
    t5x_pair.write(folder, {role: Bound(model, params[role]) for role, model in MODELS.items()}, step=3)
    model = make(temperature=0.0)
    # On a CPU T5X spreads a model over all devices whatever it is told, and these sizes do not divide.
    axes = ("batch", "embed", "heads", "joined_kv", "mlp", "relpos_buckets", "vocab")
    partitioner = partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=[(name, None) for name in axes])
    initializer = utils.TrainStateInitializer(
        optimizer_def=None,
        init_fn=model.get_initial_variables,
        input_shapes={name: value.shape for name, value in batch().items()},
        partitioner=partitioner,
    )
    restored = utils.RestoreCheckpointConfig(path=str(folder), mode="specific", dtype="float32", strict=False)
    state = initializer.from_checkpoint([restored])
    assert int(state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, flax_core.unfreeze(state.params), params)
    step = partitioner.partition(
        lambda p, b: model.predict_batch_with_aux(p, b),
        in_axis_resources=(initializer.train_state_axes.params, None),
        out_axis_resources=None,
    )
    tokens, _ = step(state.params, batch())
    np.testing.assert_array_equal(tokens, model.predict_batch(params, batch()))
