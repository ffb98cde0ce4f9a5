"""What a checkpoint holds, told without reading its tensors."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from speccascade_t5x.checkpoints import bundle, loading, remote, t5x_pair, tensors
from speccascade_t5x.checkpoints.kinds import KINDS, identify
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.checkpoints.tensors import Part
from speccascade_t5x.models.decoder_only import DecoderOnlyConfig


def describe(
    path: str | Path, *, verify: bool = False, allow_drivers: Collection[str] = (), kind: str | None = None
) -> dict[str, Any]:
    """Kind, step, architecture, parameters, dtypes and vocabulary of a checkpoint of any kind, as JSON types.

    Args:
      path: see `checkpoints.load`.
      verify: compare every file with its checksum where there are any.
      allow_drivers: see `checkpoints.load`.
      kind: see `checkpoints.load`.

    Raises:
      UserError: see `checkpoints.load`; nothing is told of a checkpoint that could not be loaded.
    """
    with remote.local_copy(path) as local:
        place = identify(local, kind)
        if place.kind == "bundle":
            found = _describe_bundle(place.folder, verify)
        elif place.kind == "t5x_pair":
            members = t5x_pair.open_members(place.folder, verify=verify)
            found = {"kind": "t5x_pair", "step": members["verifier"].step, "vocabulary": None}
            found["models"] = {role: _describe_model(members[role]) for role in bundle.MEMBERS}
        else:
            opened = loading.open_found(place, verify=verify, allow_drivers=allow_drivers)
            found = {"kind": opened.kind, "step": opened.step, "models": {"model": _describe_model(opened)}}
            found["vocabulary"] = _vocabulary(opened)
    return {"path": str(path), "what": KINDS[found["kind"]], **found}


def _describe_bundle(path: Path, verify: bool) -> dict[str, Any]:
    manifest = bundle.read_manifest(path)
    if verify:
        bundle.check_files(path, manifest)
    names = [name for name in bundle.MEMBERS if name in manifest["members"]]
    return {
        "kind": "bundle",
        "step": None,
        "description": manifest.get("description", ""),
        "models": {name: _describe_model(bundle.open_member(path, name, manifest)) for name in names},
        "vocabulary": manifest.get("vocabulary"),
        "feature_lengths": manifest.get("feature_lengths"),
        "decode": manifest.get("decode"),
    }


def _describe_model(opened: Opened) -> dict[str, Any]:
    config = opened.model.config
    wholes = {id(leaf): leaf for leaf in (x.whole if isinstance(x, Part) else x for x in opened.leaves.values())}
    parameters = sum(tensors.count(leaf.shape) for leaf in opened.leaves.values())
    dtypes = collections.Counter(leaf.dtype.name for leaf in wholes.values())
    return {
        "family": family(config),
        "architecture": dataclasses.asdict(config),
        "parameters": parameters,
        "tensors": len(opened.leaves),
        "dtypes": dict(dtypes),
        "float32_bytes": 4 * parameters,
        "scanned_layers": opened.scanned,
        "optimizer_tensors": len(opened.state),
    }


def family(config: Any) -> str:
    """The generation of T5 an architecture belongs to, or which kind of decoder-only model it is."""
    gated = len(config.mlp_activations) > 1
    if isinstance(config, DecoderOnlyConfig):
        kind = f"decoder-only T5X, {'prefix' if config.inputs_bidirectional_attention else 'causal'} LM"
    else:
        kind = {(False, True): "T5 1.0", (True, False): "T5 1.1"}.get((gated, config.logits_via_embedding), "T5")
    logits = "tied" if config.logits_via_embedding else "own"
    return f"{kind} ({' x '.join(config.mlp_activations)} MLP, {logits} logits)"


def _vocabulary(opened: Opened) -> dict[str, Any] | None:
    """What is known of the vocabulary beside a single model."""
    if opened.kind == "member":
        return bundle.read_manifest(opened.path.parent).get("vocabulary")
    if opened.vocabulary_file is None:
        return None
    return {"kind": "sentencepiece", "file": opened.vocabulary_file.name}


def in_words(found: dict[str, Any]) -> str:
    """A human-readable description of a few lines."""
    rows = [("path", found["path"]), ("kind", found["what"])]
    if found.get("description"):
        rows.append(("description", found["description"]))
    rows.append(("step", "not recorded" if found["step"] is None else f"{found['step']:,}"))
    for name, model in found["models"].items():
        sizes = model["architecture"]
        dtypes = ", ".join(f"{dtype} ({number} tensors)" for dtype, number in sorted(model["dtypes"].items()))
        stacks = [sizes[name] for name in sizes if name.startswith("num_") and name.endswith("layers")]
        layers = f"{' + '.join(map(str, stacks))} layers"
        scanned = ", scanned" if model["scanned_layers"] else ""
        heads = f"{sizes['num_heads']} heads of {sizes['head_dim']}"
        rows += [
            (name, model["family"]),
            ("  layers", f"{layers}{scanned}, width {sizes['emb_dim']}, {heads}, MLP {sizes['mlp_dim']}"),
            ("  parameters", f"{model['parameters']:,} ({model['float32_bytes'] / 1e6:,.1f} MB in float32)"),
            ("  stored as", dtypes),
            ("  logits", f"{sizes['vocab_size']:,}"),
        ]
        if model["optimizer_tensors"]:
            rows.append(("  optimizer", f"{model['optimizer_tensors']} tensors"))
    vocabulary = found.get("vocabulary")
    rows.append(("vocabulary", _vocabulary_in_words(vocabulary) if vocabulary else "not stored with the checkpoint"))
    if found.get("feature_lengths"):
        rows.append(("lengths", ", ".join(f"{name} {length}" for name, length in found["feature_lengths"].items())))
    return "\n".join(f"{label:<14}{value}" for label, value in rows)


def _vocabulary_in_words(vocabulary: dict[str, Any]) -> str:
    if "file" in vocabulary:
        return f"{vocabulary['kind']}, {vocabulary['file']}"
    return f"{vocabulary.get('kind')}, {vocabulary.get('size')} pieces ({vocabulary.get('extra_ids')} extra ids)"
