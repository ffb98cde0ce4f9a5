"""Which T5Config a checkpoint was made with: from config files, from shapes, or from both.

Shapes tell everything but the activations, the dropout and the activation dtype. A config file
beside the checkpoint fills these in; where it and the shapes disagree, loading stops.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models.t5 import T5Config

FIELDS = {field.name: field for field in dataclasses.fields(T5Config)}
_SIZES = tuple(name for name, field in FIELDS.items() if field.type == "int")
_MOST_LAYERS = 1000  # a typing error or an attack, not a model
_LARGEST_FILE = 4 * 2**20


def from_fields(fields: Mapping[str, Any], source: str) -> T5Config:
    """A T5Config from JSON-like values; fields T5Config does not know are left out.

    Raises:
      UserError: a size is missing or not a whole number above 0, or a value is not understood.
    """
    refuse_unsupported(fields, source)
    known = {name: value for name, value in fields.items() if name in FIELDS}
    for name in _SIZES:
        value = known.get(name)
        if value is None:
            raise UserError(f"{source} does not say {name!r}, which the architecture needs.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{source} says {name} = {value!r}; it must be a whole number above 0.")
        if name.endswith("_layers") and value > _MOST_LAYERS:
            raise UserError(
                f"{source} says {name} = {value}; more than {_MOST_LAYERS} layers are not "
                "supported."
            )
    activations = known.setdefault("mlp_activations", ["relu"])
    if not isinstance(activations, list | tuple) or not all(
        isinstance(a, str) for a in activations
    ):
        raise UserError(
            f"{source} says mlp_activations = {activations!r}; it must be a list of names."
        )
    try:
        return T5Config(**{**known, "mlp_activations": tuple(activations)})
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} does not describe a T5 model: {error}") from error


def refuse_unsupported(fields: Mapping[str, Any], source: str) -> None:
    """Raises a UserError for networks of the T5X family that this package does not have."""
    if "num_layers" in fields and "num_encoder_layers" not in fields:
        raise UserError(f"{source} describes a decoder-only model, which is not yet supported.")
    if fields.get("scan_layers"):
        raise UserError(
            f"{source} says scan_layers = True; checkpoints with scanned layers are not supported."
        )


def from_shapes(found: Mapping[str, Any], beside: Mapping[str, Any], source: str) -> T5Config:
    """The architecture a native T5X tree implies, completed by the fields found beside it.

    Args:
      found: flat names to leaves with `shape`.
      beside: fields of a config file, possibly none. Sizes given there win here, so that the
        comparison of shapes that follows names the tensor in which file and checkpoint differ.
      source: the checkpoint, for messages.

    Raises:
      UserError: the tree is not that of an encoder-decoder T5.
    """
    if "decoder/token_embedder/embedding" in found:
        raise UserError(f"{source} is a decoder-only model, which is not yet supported.")
    if any("/layers/" in f"/{name}/" for name in found):
        raise UserError(
            f"{source} has scanned layers (one tensor for all layers), which are not supported."
        )
    embedding = _shape(found, "token_embedder/embedding", 2, source)
    heads = _shape(found, "decoder/relpos_bias/rel_embedding", 2, source)[0]
    query = _shape(found, "decoder/layers_0/self_attention/query/kernel", 2, source)
    gated = "decoder/layers_0/mlp/wi_0/kernel" in found
    wi = _shape(found, f"decoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel", 2, source)
    if heads < 1 or query[1] % heads:
        raise UserError(
            f"{source}: the query kernel of width {query[1]} does not split into {heads} heads."
        )
    fields = {
        "vocab_size": embedding[0],
        "emb_dim": embedding[1],
        "num_heads": heads,
        "num_encoder_layers": _layers(found, "encoder"),
        "num_decoder_layers": _layers(found, "decoder"),
        "head_dim": query[1] // heads,
        "mlp_dim": wi[1],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in found,
    }
    return from_fields({**fields, **beside}, source)


def _shape(found: Mapping[str, Any], name: str, rank: int, source: str) -> tuple[int, ...]:
    if name not in found:
        raise UserError(
            f"{source} is not an encoder-decoder T5 checkpoint: it has no tensor {name!r}."
        )
    shape = tuple(found[name].shape)
    if len(shape) != rank:
        raise UserError(f"{source}: tensor {name!r} has shape {shape}, expected {rank} dimensions.")
    return shape


def _layers(found: Mapping[str, Any], stack: str) -> int:
    return len({name.split("/")[1] for name in found if re.match(rf"{stack}/layers_\d+/", name)})


def beside(folder: Path) -> dict[str, Any]:
    """T5Config fields in a config.json or config.gin of `folder` or its parent; {} without one."""
    for place in (folder, folder.parent):
        if (place / "config.json").is_file():
            fields = read_json_fields(place / "config.json")
            if "num_decoder_layers" in fields or "num_layers" in fields:
                refuse_unsupported(fields, str(place / "config.json"))
                return {name: value for name, value in fields.items() if name in FIELDS}
        if (place / "config.gin").is_file():
            return read_gin_fields(place / "config.gin")
    return {}


def read_text(path: Path) -> str:
    """A small text file, or a UserError naming it."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(
                f"{path} is larger than {_LARGEST_FILE} bytes, which no configuration is."
            )
        return path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a UserError naming the file."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where an object is expected.")
    return value


def read_json_fields(path: Path) -> dict[str, Any]:
    """The fields of a config.json, whether they stand at the top or below "config"."""
    value = read_json(path)
    inner = value.get("config")
    return inner if isinstance(inner, dict) else value


def read_gin_fields(path: Path) -> dict[str, Any]:
    """Literal T5Config bindings of a gin file, macros followed; gin itself is not needed.

    Both forms are read: `network.T5Config.emb_dim = 64` and a `network.T5Config:` block. What is
    not a literal or a macro of one is left out, as nothing is ever evaluated.
    """
    values: dict[str, str] = {}
    block = ""
    for line in _logical_lines(read_text(path)):
        if match := re.fullmatch(r"([\w./]+):", line.rstrip()):
            block = match[1]
        elif match := re.match(r"(\s*)([\w./]+)\s*=\s*(.+)$", line, re.DOTALL):
            indent, name, value = match.groups()
            block = block if indent else ""
            values[f"{block}.{name}" if block else name] = value.strip()
    fields = {}
    for name, value in values.items():
        owner, _, field = name.rpartition(".")
        if owner.rpartition(".")[2].rpartition("/")[2] == "T5Config" and field in FIELDS:
            value = values.get(value[1:], value) if value.startswith("%") else value
            try:
                fields[field] = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return fields


def _logical_lines(text: str) -> list[str]:
    """Lines without comments, joined over backslashes and open brackets."""
    lines: list[str] = []
    joining = False
    for raw in text.splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).rstrip()
        lines[-1:] = [f"{lines[-1]} {line.strip()}"] if joining else [*lines[-1:], line]
        joining = lines[-1].endswith("\\") or sum(map(lines[-1].count, "([{")) > sum(
            map(lines[-1].count, ")]}")
        )
        lines[-1] = lines[-1].removesuffix("\\")
    return [line for line in lines if line.strip()]
