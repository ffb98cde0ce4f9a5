"""Hugging Face folders of T5 1.0, T5 1.1, FLAN-T5, mT5 and ByT5: config.json and safetensors files.

Their weights are `[out, in]` and carry other names; what T5X divides by sqrt(emb_dim) before tied logits, they multiply
into the decoder's output. Whether they do, `_is_scaled` tells; whether logits have a matrix of their own is told by the
tensors.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speccascade_t5x.checkpoints import architecture, flat_params, folders, huggingface_sidecars, safetensors_files
from speccascade_t5x.checkpoints.huggingface_sidecars import PIECES_FILE
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Leaf, Part, Tensor
from speccascade_t5x.common import schema, storage
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models.t5 import T5, T5Config

CONFIG_FILE = "config.json"
_MODEL_TYPES = ("t5", "mt5")
# Their names of sizes -> ours.
_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "emb_dim",
    "num_heads": "num_heads",
    "num_layers": "num_encoder_layers",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
}
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
# What the network fixes: other values would be other models.
_FIXED = {
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "is_encoder_decoder": True,
}
_SHARED, _HEAD = "shared.weight", "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A table that early conversions hold and no network reads.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_TABLE, _LOGITS = "relpos_bias/rel_embedding", "decoder/logits_dense/kernel"
_EMBEDDING = "token_embedder/embedding"
_PARTS = {
    "encoder": {
        "attention": "0.SelfAttention",
        "pre_attention_layer_norm": "0.layer_norm",
        "mlp": "1.DenseReluDense",
        "pre_mlp_layer_norm": "1.layer_norm",
    },
    "decoder": {
        "self_attention": "0.SelfAttention",
        "pre_self_attention_layer_norm": "0.layer_norm",
        "encoder_decoder_attention": "1.EncDecAttention",
        "pre_cross_attention_layer_norm": "1.layer_norm",
        "mlp": "2.DenseReluDense",
        "pre_mlp_layer_norm": "2.layer_norm",
    },
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def their_name(name: str) -> tuple[str, bool]:
    """(their name of one of our parameters, whether theirs is the transpose)."""
    if name == _EMBEDDING:
        return _SHARED, False
    if name == _LOGITS:
        return _HEAD, True
    stack, _, rest = name.partition("/")
    if rest == _TABLE:
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", True
    if rest == f"{stack}_norm/scale":
        return f"{stack}.final_layer_norm.weight", False
    layer, part, *inner = rest.split("/")
    place = f"{stack}.block.{layer.removeprefix('layers_')}.layer.{_PARTS[stack][part]}"
    if inner == ["scale"]:
        return f"{place}.weight", False
    return f"{place}.{_PROJECTIONS.get(inner[0], inner[0])}.weight", True


def open_model(folder: Path) -> Opened:
    """Checks a folder without reading a tensor, but for the comparison of embeddings that are there twice.

    Raises:
      UserError: a file is missing or damaged, or the model is not a supported T5.
    """
    if not any(folder.glob(f"*{safetensors_files.SUFFIX}")):
        raise UserError(
            f"{folder} holds no safetensors file; weights in other formats are pickles, which are never opened: "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    folders.require_inside(folder, os.listdir(folder))
    path = folder / CONFIG_FILE
    fields = schema.read(path)
    found = safetensors_files.open_folder(folder)
    config, scaled = _read_config(fields, str(path), _HEAD in found)
    found.pop(_UNUSED, None)
    _drop_copies(found, folder)
    tied, head = _logits(found, config, scaled, folder)
    config = dataclasses.replace(config, logits_via_embedding=tied)
    leaves = _rename(found, config, head, folder)
    ids = huggingface_sidecars.ids(folder, fields, config.vocab_size)
    pieces = folder / PIECES_FILE
    vocabulary = pieces if pieces.is_file() else None
    model = T5(config, start_id=ids.start)
    return Opened("huggingface", folder, model, leaves, vocabulary_file=vocabulary, ends=ids.ends, pad_id=ids.pad)


def _read_config(fields: Mapping[str, Any], source: str, has_head: bool) -> tuple[T5Config, bool]:
    """(architecture, whether the decoder's output is scaled before the logits) of a config.json."""
    kind = fields.get("model_type")
    if kind not in _MODEL_TYPES:
        raise UserError(f"{source} describes a {kind!r} model; of Hugging Face's, only T5 and mT5 are read")
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise UserError(f"{source} says {name} = {fields[name]!r}; only {value!r} is supported")
    ours = {name: fields[theirs] for theirs, name in _SIZES.items() if theirs in fields}
    ours["num_decoder_layers"] = fields.get("num_decoder_layers") or fields.get("num_layers")
    activation = fields.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(f"{source} says feed_forward_proj = {activation!r}; supported are {', '.join(_ACTIVATIONS)}")
    ours["mlp_activations"] = _ACTIVATIONS[activation]
    dropout = fields.get("dropout_rate", 0.1)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{source} says dropout_rate = {dropout!r}; it must be at least 0 and below 1")
    ours["dropout_rate"] = float(dropout)
    ours["logits_via_embedding"] = not has_head
    config: Any = architecture.from_fields(ours, source)  # an encoder-decoder's, as `_MODEL_TYPES` are
    return config, _is_scaled(fields, kind, source, has_head)


def _is_scaled(fields: Mapping[str, Any], kind: str, source: str, has_head: bool) -> bool:
    """Whether Transformers multiplies the decoder's output by 1 / sqrt(d_model), by model type and by writer.

    A T5 says it in `scale_decoder_outputs` since Transformers 5, whose `tie_word_embeddings` is always true; before, it
    was `tie_word_embeddings`. Transformers 5 never scales an mT5 and has no such flag for it; Transformers 4 scaled one
    with tied embeddings.
    """
    for name in ("scale_decoder_outputs", "tie_word_embeddings"):
        if type(fields.get(name)) not in (bool, type(None)):
            raise UserError(f"{source} says {name} = {schema.shown(fields[name])}; it must be true or false")
    flag, tied = fields.get("scale_decoder_outputs"), bool(fields.get("tie_word_embeddings", kind == "t5"))
    if kind == "t5":
        return tied if flag is None else flag
    if flag:
        raise UserError(f"{source} says scale_decoder_outputs = True, which Transformers does not read for an mT5")
    writer = re.match(r"(\d{1,4})\.", str(fields.get("transformers_version", "")))
    # Without a writer's version: tied embeddings come without a head, and Transformers 5 saves the head it ties.
    return tied and (int(writer[1]) < 5 if writer else not has_head)


def _drop_copies(found: dict[str, Tensor], folder: Path) -> None:
    """Some folders hold the one embedding under each of its users' names."""
    for name in _COPIES:
        copy = found.pop(name, None)
        if copy is not None and _SHARED not in found:
            found[_SHARED] = copy
        elif copy is not None and not _equal(copy, found[_SHARED]):
            raise UserError(f"{folder}: tensor {name!r} differs from {_SHARED!r}; T5 has one embedding for both stacks")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two stored tensors hold the same values, compared block by block."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(np.array_equal(x, y) for (_, x), (_, y) in zip(a.blocks(), b.blocks(), strict=True))


def _logits(found: dict[str, Tensor], config: T5Config, scaled: bool, folder: Path) -> tuple[bool, Leaf | None]:
    """(whether logits are tied as T5X ties them, the matrix of its own otherwise)."""
    head, shared = found.get(_HEAD), found.get(_SHARED)
    if shared is None:
        raise UserError(f"{folder} is not a T5 checkpoint: it has no tensor {_SHARED!r}")
    if head is None:
        # Tied without the scale: as a matrix of its own, since T5X scales whatever it ties.
        return scaled, None if scaled else Part(shared, shared.shape[::-1], np.transpose)
    if scaled and _equal(head, shared):
        del found[_HEAD]
        return True, None
    turned = dataclasses.replace(head, shape=head.shape[::-1], transposed=True)
    if not scaled:
        return False, turned
    factor = np.float32(config.emb_dim**-0.5)
    return False, Part(turned, turned.shape, lambda values: values * factor)


def _rename(found: Mapping[str, Tensor], config: T5Config, head: Leaf | None, folder: Path) -> dict[str, Leaf]:
    """Our names to tensors, once theirs are exactly those of the architecture."""
    wanted = flat_params.flatten(architecture.shapes(config))
    names = {name: their_name(name) for name in wanted}
    if _HEAD not in found:  # it is there only as a view of the embedding, if at all
        names.pop(_LOGITS, None)

    def as_stored(name: str) -> Tensor:
        shape = wanted[name].shape
        return Tensor(shape[::-1] if names[name][1] else shape, np.dtype(np.float32), lambda: iter(()))

    flat_params.require_match({theirs: as_stored(name) for name, (theirs, _) in names.items()}, found, str(folder))
    leaves: dict[str, Leaf] = {
        name: dataclasses.replace(found[theirs], shape=wanted[name].shape, transposed=True) if turned else found[theirs]
        for name, (theirs, turned) in names.items()
    }
    return leaves | ({} if head is None else {_LOGITS: head})


def write(
    folder: Path,
    model: T5,
    values: Callable[[str], np.ndarray],
    *,
    dtype: Any = np.float32,
    shard_bytes: int = 5 * 10**9,
    eos_id: int = 1,
    pad_id: int = 0,
    vocabulary_file: Path | None = None,
) -> None:
    """Writes what Transformers' `from_pretrained` reads.

    Args:
      folder: an empty folder.
      model: the architecture.
      values: gives the values of one of our parameters; asked for one at a time.
      dtype: float32, float16 or bfloat16.
      shard_bytes: largest file, unless a single tensor is larger.
      eos_id: what ends a text.
      pad_id: what fills it up.
      vocabulary_file: a SentencePiece model to lay beside it.

    Raises:
      UserError: their format has no word for this architecture.
      OSError: it cannot be written.
    """
    if not isinstance(model, T5):
        raise UserError("Hugging Face's T5 has no decoder-only model: export this one as a bundle, t5x or orbax")
    if model.config.table_per_layer:
        raise UserError(
            "Hugging Face's T5 has one relative position table per stack, but this model one per layer: export it as "
            "a bundle, t5x or orbax"
        )
    dtype = np.dtype(dtype)
    names = {theirs: (name, turned) for name, (theirs, turned) in _their_names(model.config).items()}
    shapes = {name: tuple(leaf.shape) for name, leaf in flat_params.flatten(architecture.shapes(model.config)).items()}
    their_shapes = {theirs: shapes[n][::-1] if turned else shapes[n] for theirs, (n, turned) in names.items()}

    def their_values(theirs: str) -> np.ndarray:
        name, turned = names[theirs]
        return values(name).T if turned else values(name)

    config = their_config(model, dtype.name, eos_id, pad_id)
    safetensors_files.write(folder, their_shapes, their_values, dtype, shard_bytes)
    (folder / CONFIG_FILE).write_text(storage.to_json(config, indent=2) + "\n", "utf-8")
    generation = {"decoder_start_token_id": model.start_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    (folder / "generation_config.json").write_text(storage.to_json(generation, indent=2) + "\n", "utf-8")
    if vocabulary_file is not None:
        (folder / PIECES_FILE).write_bytes(vocabulary_file.read_bytes())


def _their_names(config: T5Config) -> dict[str, tuple[str, bool]]:
    """Ours to theirs, in the order of layers."""
    digits = re.compile(r"(\d+)")
    flat = flat_params.flatten(architecture.shapes(config))
    order = sorted(flat, key=lambda name: [int(part) if part.isdigit() else part for part in digits.split(name)])
    return {name: their_name(name) for name in order}


def their_config(model: T5, dtype: str, eos_id: int, pad_id: int) -> dict[str, Any]:
    """config.json of a model.

    Raises:
      UserError: they have no name for its activations.
    """
    config = model.config
    known = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if config.mlp_activations not in known:
        raise UserError(
            f"Hugging Face's T5 has no name for mlp_activations = {list(config.mlp_activations)}; it knows "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "num_decoder_layers": config.num_decoder_layers,
        **_FIXED,
        "feed_forward_proj": known[config.mlp_activations],
        "dropout_rate": config.dropout_rate,
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.logits_via_embedding,
        "decoder_start_token_id": model.start_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
