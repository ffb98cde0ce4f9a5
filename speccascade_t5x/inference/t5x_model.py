"""A drafter and a verifier as one model for T5X's own `infer` and `eval`, which then decode through our loop.

T5X is not imported here: `PairModel` has the methods that T5X's scripts call on a model, with T5X's names and shapes
(after `t5x.models.EncoderDecoderModel`). Both parameter trees are in one, below `drafter/` and `verifier/`, which is
how `checkpoints.t5x_pair` writes a pair.

    # pair.gin, for t5x.infer and t5x.eval; see gin_configs/t5x/pair.gin
    MODEL = @t5x_model.from_checkpoint()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import partitioning

from speccascade_t5x import decoding
from speccascade_t5x.checkpoints import t5x_pair
from speccascade_t5x.core import noise
from speccascade_t5x.inference import methods
from speccascade_t5x.inference.settings import Settings, make_settings
from speccascade_t5x.interfaces import Array, Bound, PyTree, UserError
from speccascade_t5x.models import T5, init_params, logical_axes
from speccascade_t5x.text.vocabulary import stop_ids

# Settings that the configuration of a T5X script decides: batches, lengths and their features.
_T5X_DECIDES = ("max_len", "max_input_len", "batch_size", "buckets", "truncate", "trace", "plan")
_PAD_ID = 0
_DRAFT_LEN = 5  # used if the settings and the method name none


class PairModel:
    """A pair of encoder-decoders with the methods that T5X's scripts call on a model.

    Args:
      verifier: architecture and start token of the verifier.
      drafter: architecture and start token of the drafter.
      input_vocabulary: seqio vocabulary of the task's inputs; T5X compares it with the task's.
      output_vocabulary: seqio vocabulary of the task's targets.
      feature_converter_cls: seqio feature converter; None takes the encoder-decoder's.
      **settings: fields of `inference.settings.Settings`: method, rule, alpha, temperature and so on.

    Raises:
      UserError: an option that is unknown, or that T5X decides; a model that is not an encoder-decoder; logits narrower
        than the vocabulary.
    """

    optimizer_def = None  # a pair is not trained as one model

    def __init__(
        self,
        *,
        verifier: T5,
        drafter: T5,
        input_vocabulary: Any,
        output_vocabulary: Any,
        feature_converter_cls: Callable[..., Any] | None = None,
        **settings: Any,
    ):
        self.models = {"drafter": drafter, "verifier": verifier}
        self.input_vocabulary, self.output_vocabulary = input_vocabulary, output_vocabulary
        self.settings: Settings = make_settings(**settings)
        self._feature_converter_cls = feature_converter_cls
        self._check()

    def _check(self) -> None:
        for name in _T5X_DECIDES:
            if getattr(self.settings, name) != getattr(Settings(), name):
                raise UserError(f"{name} cannot be set for T5X's scripts: their configuration sets lengths and batches")
        if self.settings.draft_len == "auto":
            raise UserError("draft_len='auto' needs a plan of `speccascade plan`: give a whole number here")
        for role, model in self.models.items():
            if not isinstance(model, T5):
                raise UserError(f"the {role} is a {type(model).__name__}: only encoder-decoders run inside T5X")
            if model.vocab_size < self.output_vocabulary.vocab_size:
                raise UserError(
                    f"the {role} has {model.vocab_size} logits but the vocabulary "
                    f"{self.output_vocabulary.vocab_size} pieces: give the vocabulary it was trained with"
                )

    @property
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:
        """seqio's converter from task features to a batch."""
        if self._feature_converter_cls is not None:
            return self._feature_converter_cls
        import seqio

        return seqio.EncDecFeatureConverter

    def get_initial_variables(
        self, rng: Array, input_shapes: Mapping[str, Any], input_types: Mapping[str, Any] | None = None
    ) -> dict[str, PyTree]:
        """Fresh parameters of both models in one tree, and T5X's axis names of each.

        Args:
          rng: random key, raw or typed.
          input_shapes: not read; parameters do not depend on the shapes of batches.
          input_types: not read.

        Returns:
          {"params": {"drafter": ..., "verifier": ...}, "params_axes": the same tree of AxisMetadata}.
        """
        keys = dict(zip(self.models, jax.random.split(noise.threefry(rng)), strict=True))
        configs = {role: model.config for role, model in self.models.items()}
        return {
            "params": {role: init_params(config, keys[role]) for role, config in configs.items()},
            "params_axes": {role: _axes(logical_axes(config)) for role, config in configs.items()},
        }

    def predict_batch(self, params: PyTree, batch: Mapping[str, Array], rng: Array | None = None) -> Array:
        """Decoded ids [B, T]; see `predict_batch_with_aux`."""
        return self.predict_batch_with_aux(params, batch, rng)[0]

    def predict_batch_with_aux(
        self,
        params: PyTree,
        batch: Mapping[str, Array],
        rng: Array | None = None,
        decoder_params: Mapping[str, Any] | None = None,
        return_all_decodes: bool = False,
        num_decodes: int | None = None,
        prompt_with_targets: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Decodes a batch through the loop.

        Args:
          params: {"drafter": ..., "verifier": ...}.
          batch: "encoder_input_tokens" [B, S]; "decoder_input_tokens" [B, T], of which only T is read.
          rng: random key, raw or typed, of any generator (T5X may set `unsafe_rbg`); None takes the settings' seed.
          decoder_params: may hold "decode_rng", in the place of `rng`; all else is in the settings.
          return_all_decodes: all samples of an input, by rising log-probability, instead of the best.
          num_decodes: samples per input; None takes the settings' `num_samples`.
          prompt_with_targets: must be False.

        Returns:
          (ids [B, T], {"scores": [B] log-probability under the target distribution, and every counter of
          `core.accounting.Counts` as [B]}); with return_all_decodes, axis 1 of each holds the N samples.

        Raises:
          UserError: an option that the loop does not support.
        """
        if prompt_with_targets:
            raise UserError("prompt_with_targets is not supported: the loop begins every output at the start token")
        key = self._key(rng, dict(decoder_params or {}))
        tokens = jnp.asarray(batch["encoder_input_tokens"]).astype(jnp.int32)
        rows, samples = tokens.shape[0], num_decodes or self.settings.num_samples
        program = self._program(params, batch["decoder_input_tokens"].shape[1], samples)
        inputs = self.models["verifier"].inputs(tokens)
        output = decoding.finish(program.config, decoding.run(program, *self._begin(program, inputs, key, rows)))
        by_sample = lambda x: x.reshape(rows, samples, *x.shape[1:])  # noqa: E731
        scores = by_sample(output.log_probs)
        counts = {name: by_sample(x) for name, x in vars(output.counts).items() if x is not None}
        found = {"tokens": by_sample(output.tokens), "scores": scores, **counts}
        order = jnp.argsort(scores, axis=1)
        order = order if return_all_decodes else order[:, -1]
        take = jax.vmap(lambda x, at: x[at])
        found = {name: take(x, order) for name, x in found.items()}
        return found.pop("tokens"), found

    def score_batch(
        self, params: PyTree, batch: Mapping[str, Array], return_intermediates: bool = False
    ) -> Array | tuple[Array, dict[str, Any]]:
        """The verifier's log-probability [B] of the targets.

        Args:
          params: {"drafter": ..., "verifier": ...}; only the verifier's are read.
          batch: T5X's features of an encoder-decoder, packed or not.
          return_intermediates: also {"decoder": {"token_scores": ([B, T],), ...}} as T5X returns it.
        """
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        logits = self.models["verifier"].module.apply(
            {"params": _float32(params["verifier"])},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            targets,
            batch.get("encoder_segment_ids"),
            batch.get("decoder_segment_ids"),
        )
        logs = jax.nn.log_softmax(logits)
        token_scores = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0] * weights
        scores = token_scores.sum(-1)
        if not return_intermediates:
            return scores
        values = {"target_tokens": targets, "loss_weights": weights, "token_scores": token_scores}
        return scores, {"decoder": {name: (value,) for name, value in values.items()}}

    def loss_fn(self, params: PyTree, batch: Mapping[str, Array], dropout_rng: Array | None) -> Any:
        """Raises UserError, because a pair is not trained as one model."""
        raise UserError("a pair is not trained as one model: train its members, with T5X or `speccascade train`")

    def eval_fn(self, params: PyTree, batch: Mapping[str, Array]) -> Any:
        """Raises UserError as `loss_fn` does; `score_batch` gives likelihoods."""
        raise UserError("a pair has no training loss: use score_batch for the verifier's log-likelihood")

    def _key(self, rng: Array | None, decoder_params: dict[str, Any]) -> Array:
        named = decoder_params.pop("decode_rng", None)
        if decoder_params:
            raise UserError(
                f"decoder_params names {sorted(decoder_params)[0]!r}: set it as an option of the model, such as "
                "temperature or top_k"
            )
        if rng is not None and named is not None:
            raise UserError("a random key comes as rng and as decoder_params['decode_rng']: give one")
        rng = named if rng is None else rng
        return noise.from_seed(self.settings.seed) if rng is None else noise.threefry(rng)

    def _program(self, params: PyTree, max_len: int, samples: int) -> decoding.Program:
        bound = {role: Bound(model, _float32(params[role])) for role, model in self.models.items()}
        vocabulary = self.output_vocabulary
        config = decoding.DecodeConfig(
            max_len=max_len,
            eos_id=1 if vocabulary.eos_id is None else vocabulary.eos_id,
            pad_id=_PAD_ID,
            start_id=self.models["verifier"].start_id,
            vocab_size=vocabulary.vocab_size,
            verification=self.settings.verification,
            stop_sequences=stop_ids(vocabulary, self.settings.stop_sequences),
            num_samples=samples,
        )
        return methods.program(self.settings, bound["verifier"], [bound["drafter"]], config, _DRAFT_LEN)

    @staticmethod
    def _begin(program: decoding.Program, inputs: PyTree, key: Array, rows: int) -> tuple[decoding.State, int]:
        # T5X passes no ids of examples, but a key of its own for every batch.
        return decoding.start(program, inputs, key, jnp.arange(rows)), program.max_rounds


def from_checkpoint(
    path: str | Path,
    *,
    input_vocabulary: Any,
    output_vocabulary: Any | None = None,
    feature_converter_cls: Callable[..., Any] | None = None,
    **settings: Any,
) -> PairModel:
    """The model for a pair that `speccascade export --format=t5x_pair` wrote; T5X itself restores the parameters.

    Args:
      path: the checkpoint, a local folder; only its config.json is read here.
      input_vocabulary: see `PairModel`.
      output_vocabulary: the input's if None.
      feature_converter_cls: see `PairModel`.
      **settings: see `PairModel`.

    Raises:
      UserError: no pair is there, or an error of `PairModel`.
    """
    found: dict[str, Any] = dict(t5x_pair.models(path))  # PairModel rejects what is not an encoder-decoder
    return PairModel(
        **found,
        input_vocabulary=input_vocabulary,
        output_vocabulary=input_vocabulary if output_vocabulary is None else output_vocabulary,
        feature_converter_cls=feature_converter_cls,
        **settings,
    )


def _axes(names: PyTree) -> PyTree:
    """T5X's `params_axes` of a tree of axis names: 'kernel' becomes 'kernel_axes', an AxisMetadata."""
    return {
        (f"{name}_axes" if isinstance(below, tuple) else name): (
            partitioning.AxisMetadata(below) if isinstance(below, tuple) else _axes(below)
        )
        for name, below in names.items()
    }


def _float32(params: PyTree) -> PyTree:
    """Parameters in float32 and not frozen: T5X may restore them in bfloat16, and passes them frozen."""
    plain = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return plain.unfreeze() if hasattr(plain, "unfreeze") else plain
