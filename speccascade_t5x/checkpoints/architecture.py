"""Which architecture a checkpoint was made with: from config files, from shapes, or from both.

Shapes tell everything but the activations, the dropout and the activation dtype. A config file
beside the checkpoint fills these in; where it and the shapes disagree, loading stops.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.checkpoints import folders
from speccascade_t5x.common import schema
from speccascade_t5x.interfaces import PyTree, UserError
from speccascade_t5x.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from speccascade_t5x.models.parameters import param_shapes
from speccascade_t5x.models.t5 import T5, T5Config

Config = T5Config | DecoderOnlyConfig
Model = T5 | DecoderOnly
NETWORKS: dict[str, tuple[type, type]] = {"t5": (T5Config, T5), "decoder_only": (DecoderOnlyConfig, DecoderOnly)}
FIELDS = {name: frozenset(field.name for field in dataclasses.fields(of)) for name, (of, _) in NETWORKS.items()}
# Which field counts the layers of which stack of a network.
STACKS = {
    "t5": {"num_encoder_layers": "encoder", "num_decoder_layers": "decoder"},
    "decoder_only": {"num_layers": "decoder"},
}
ALL_FIELDS = frozenset().union(*FIELDS.values())
# Whose gin bindings tell something of an architecture, and what.
_GIN_OWNERS = {
    "T5Config": FIELDS["t5"],
    "TransformerConfig": FIELDS["decoder_only"],
    "DecoderOnlyModel": frozenset({"inputs_bidirectional_attention"}),
}
SCAN_AXIS = "param_scan_axis"  # of a scalable_t5: not part of the architecture, but of how it is stored
_ONE_STACK = "decoder/token_embedder/embedding"  # a decoder-only network's; others have it at the root
LAYER_TABLE = "{stack}/layers_{layer}/relpos_bias/rel_embedding"  # where every layer has one of its own
# Beyond these it is a typing error or an attack, not a model.
_MOST_LAYERS = 1000
_LARGEST_SIZE = 2**24
_MOST_ACTIVATIONS = 8
_DTYPES = ("float32", "bfloat16", "float16")


@functools.lru_cache(maxsize=32)
def shapes(config: Config) -> PyTree:
    """The parameter tree of an architecture; see `models.param_shapes`. Kept, as every check asks for it.

    The layers of a stack are alike, so a network of one layer a stack tells the shapes of a thousand.
    """
    heights = {field: getattr(config, field) for field in STACKS[network(config)]}
    one_each: dict[str, Any] = dict.fromkeys(heights, 1)
    tree = dict(param_shapes(dataclasses.replace(config, **one_each)))
    for field, stack in STACKS[network(config)].items():
        layers = {f"layers_{i}": tree[stack]["layers_0"] for i in range(heights[field])}
        tree[stack] = {**tree[stack], **layers}
    return tree


def network(config: Config) -> str:
    """The name of a configuration's network, a key of NETWORKS."""
    return next(name for name, (of, _) in NETWORKS.items() if isinstance(config, of))


def model(config: Config, start_id: int = 0) -> Model:
    """The LanguageModel of a configuration."""
    return NETWORKS[network(config)][1](config, start_id=start_id)


def from_fields(fields: Mapping[str, Any], source: str, network: str | None = None) -> Config:
    """A configuration from JSON-like values; fields it does not know are left out.

    Args:
      fields: the values.
      source: where they stand, for messages.
      network: a key of NETWORKS; None tells by the fields, as T5X's networks count their layers in other words.

    Raises:
      UserError: a size is missing or not a whole number above 0, or a value is not understood.
    """
    if network is None:
        network = "decoder_only" if _counts_one_stack(fields) else "t5"
    config = NETWORKS[network][0]
    known = {name: value for name, value in fields.items() if name in FIELDS[network]}
    known.setdefault("mlp_activations", ["relu"])
    for field in dataclasses.fields(config):
        if field.type == "int" and known.get(field.name) is None:
            raise UserError(f"{source} does not say {field.name!r}, which the architecture needs")
        if field.name in known:
            _check_field(field.name, str(field.type), known[field.name], source)
    try:
        return config(**{**known, "mlp_activations": tuple(known["mlp_activations"])})
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} does not describe a T5 model: {error}") from error


def _check_field(name: str, kind: str, value: Any, source: str) -> None:
    """Rejects a value no architecture has, before anything is made of it."""
    most = _MOST_LAYERS if name.endswith("_layers") else _LARGEST_SIZE
    texts = isinstance(value, list | tuple) and 1 <= len(value) <= _MOST_ACTIVATIONS
    fits, wanted = {
        "int": (
            type(value) is int and 1 <= value <= most,
            f"a whole number from 1 to {most}",
        ),
        "float": (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
            "0 or more, below 1",
        ),
        "bool": (isinstance(value, bool), "true or false"),
        "str": (isinstance(value, str), "a name"),
    }.get(kind, (texts and all(isinstance(text, str) for text in value), "a list of names"))
    if name == "dtype" and value not in _DTYPES:
        fits, wanted = False, f"one of {', '.join(_DTYPES)}"
    if not fits:
        raise UserError(f"{source} says {name} = {schema.shown(value)}; it must be {wanted}")


def _counts_one_stack(fields: Mapping[str, Any]) -> bool:
    return "num_layers" in fields and not {"num_encoder_layers", "num_decoder_layers"} & set(fields)


def from_shapes(found: Mapping[str, Any], beside: Mapping[str, Any], source: str) -> Config:
    """The architecture a native T5X tree implies, completed by the fields found beside it.

    Args:
      found: flat names to leaves with `shape`.
      beside: fields of a config file, possibly none. Sizes given there win here, so that the
        comparison of shapes that follows names the tensor in which file and checkpoint differ.
      source: the checkpoint, for messages.

    Raises:
      UserError: the tree is not that of a T5.
    """
    kind = "decoder_only" if _ONE_STACK in found else "t5"
    embedding = _shape(found, _ONE_STACK if kind == "decoder_only" else "token_embedder/embedding", 2, source)
    per_layer = kind == "t5" and LAYER_TABLE.format(stack="decoder", layer=0) in found
    table = LAYER_TABLE.format(stack="decoder", layer=0) if per_layer else "decoder/relpos_bias/rel_embedding"
    heads = _shape(found, table, 2, source)[0]
    query = _shape(found, "decoder/layers_0/self_attention/query/kernel", 2, source)
    gated = "decoder/layers_0/mlp/wi_0/kernel" in found
    wi = _shape(found, f"decoder/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel", 2, source)
    if heads < 1 or query[1] % heads:
        raise UserError(f"{source}: the query kernel of width {query[1]} does not split into {heads} heads")
    fields = {
        "vocab_size": embedding[0],
        "emb_dim": embedding[1],
        "num_heads": heads,
        "num_layers": _layers(found, "decoder"),
        "num_encoder_layers": _layers(found, "encoder"),
        "num_decoder_layers": _layers(found, "decoder"),
        "head_dim": query[1] // heads,
        "mlp_dim": wi[1],
        "mlp_activations": ("gelu", "linear") if gated else ("relu",),
        "logits_via_embedding": "decoder/logits_dense/kernel" not in found,
        "relative_position_tables": "per_layer" if per_layer else "shared",
    }
    return from_fields({**fields, **beside}, source, kind)


def _shape(found: Mapping[str, Any], name: str, rank: int, source: str) -> tuple[int, ...]:
    if name not in found:
        raise UserError(f"{source} is not a T5 checkpoint: it has no tensor {name!r}")
    shape = tuple(found[name].shape)
    if len(shape) != rank:
        raise UserError(f"{source}: tensor {name!r} has shape {shape}, expected {rank} dimensions")
    return shape


def _layers(found: Mapping[str, Any], stack: str) -> int:
    return len({name.split("/")[1] for name in found if re.match(rf"{stack}/layers_\d+/", name)})


def beside(folder: Path) -> dict[str, Any]:
    """Fields of the architecture in a config.json or config.gin of `folder` or its parent; {} without one."""
    for place in (folder, folder.parent):
        folders.require_inside(place, ("config.json", "config.gin"))
        if (place / "config.json").is_file():
            fields = read_json_fields(place / "config.json")
            if "num_decoder_layers" in fields or "num_layers" in fields:
                return {name: value for name, value in fields.items() if name in ALL_FIELDS or name == SCAN_AXIS}
        if (place / "config.gin").is_file():
            return read_gin_fields(place / "config.gin")
    return {}


def read_json_fields(path: Path) -> dict[str, Any]:
    """The fields of a config.json, whether they stand at the top or below "config"."""
    value = schema.read(path)
    inner = value.get("config")
    return inner if isinstance(inner, dict) else value


def read_gin_fields(path: Path) -> dict[str, Any]:
    """Literal bindings of an architecture in a gin file, macros followed; gin itself is not needed.

    Both forms are read: `network.T5Config.emb_dim = 64` and a `network.T5Config:` block, and likewise the
    TransformerConfig of decoder-only networks and what their DecoderOnlyModel says of the inputs. What is not a
    literal or a macro of one is left out, as nothing is ever evaluated.
    """
    values: dict[str, str] = {}
    block = ""
    for line in _logical_lines(schema.read_text(path)):
        if match := re.fullmatch(r"([\w./]+):", line.rstrip()):
            block = match[1]
        elif match := re.match(r"(\s*)([\w./]+)\s*=\s*(.+)$", line, re.DOTALL):
            indent, name, value = match.groups()
            block = block if indent else ""
            values[f"{block}.{name}" if block else name] = value.strip()
    fields = {}
    for name, value in values.items():
        owner, _, field = name.rpartition(".")
        owner = owner.rpartition(".")[2].rpartition("/")[2]
        if owner in _GIN_OWNERS and (field in _GIN_OWNERS[owner] or field == SCAN_AXIS):
            value = values.get(value[1:], value) if value.startswith("%") else value
            try:
                fields[field] = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return fields


def _logical_lines(text: str) -> list[str]:
    """Lines without comments, joined over backslashes and open brackets."""
    lines: list[str] = []
    parts: list[str] = []
    depth = 0
    for raw in text.splitlines():
        line = re.sub(r"(^|\s)#.*$", "", raw).rstrip()
        parts.append((line.strip() if parts else line).removesuffix("\\"))
        depth += sum(map(line.count, "([{")) - sum(map(line.count, ")]}"))
        if depth <= 0 and not line.endswith("\\"):
            lines.append(" ".join(parts))
            parts, depth = [], 0
    return [line for line in [*lines, " ".join(parts)] if line.strip()]
