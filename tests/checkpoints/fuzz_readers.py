"""Mutates files of every format and reads them. Run as a program to try many: fuzz_readers.py FORMAT COUNT [SEED]

A file that was mutated gives a UserError of one line, or is read; never a traceback, a wait, or memory.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import msgpack
import numpy as np

from speccascade_t5x import checkpoints
from speccascade_t5x.checkpoints import (
    bundle,
    deferral_files,
    describe,
    export_sources,
    flat_params,
    huggingface,
    t5x_pair,
    tensors,
)
from speccascade_t5x.checkpoints.export import export
from speccascade_t5x.deferral import calibration
from speccascade_t5x.deferral import head as heads
from speccascade_t5x.deferral.fitted import Fitted
from speccascade_t5x.drafting import build_table
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.text.vocabulary import ByteVocabulary

if __package__:
    from .tiny import TINY, make_model, write_npz
else:
    sys.path[0] = str(Path(__file__).parents[1])
    from checkpoints.tiny import TINY, make_model, write_npz

FORMATS = ("npz", "t5x", "orbax", "huggingface", "bundle", "t5x_pair")
MOST_SECONDS = 10.0
MOST_BYTES = 256 * 2**20  # beyond what the process held; the folders have less than a megabyte
SMALL = dataclasses.replace(TINY, num_decoder_layers=1, head_dim=2, mlp_dim=8)
HOSTILE = [
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    2**63,
    10**30,
    1e300,
    "",
    "x",
    "9" * 400,
    "../x",
    "/etc/passwd",
    [],
    {},
    [[]],
    [-1],
    [2**40, 2**40],
]
RAW_JSON = ["9" * 5000, "[" * 3000, "NaN", "1e999", '"\\ud800"', '{"a": 1, "a": 2}', "\ufeff", "-"]


def make(folder: Path, form: str) -> Path:
    """A small checkpoint of a format, with everything a reader of it looks at."""
    model = make_model(SMALL)
    if form == "npz":
        write_npz(folder, model)
    elif form == "huggingface":
        flat = flat_params.flatten(model.params)
        folder.mkdir()
        huggingface.write(folder, model.model, lambda name: np.asarray(flat[name]))
        _pieces(folder / huggingface.PIECES_FILE)
        (folder / "added_tokens.json").write_text(json.dumps({"<extra_id_0>": 4}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 1}))
    elif form == "bundle":
        plain = folder.with_name("plain")
        checkpoints.save_bundle(
            plain, verifier=model, vocabulary=ByteVocabulary(), feature_lengths={"inputs": 8, "targets": 8}
        )
        bundle.store_table(plain, plain, build_table([[5, 6, 7, 1], [5, 6, 8, 1]], 384, order=3), {})
        bundle.store_deferral(plain, folder, _fitted(plain))
    else:
        write_npz(folder.with_name("source"), model)
        more = {"drafter": folder.with_name("source")} if form == "t5x_pair" else {}
        export(folder.with_name("source"), folder, form, **more)
        if form == "t5x":
            (folder / "config.json").unlink()
            (folder / "config.gin").write_text("network.T5Config:\n  mlp_activations = ('gelu',\n   'linear')\n")
    (folder / "checksums.json").unlink(missing_ok=True)
    return folder


def _pieces(path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for piece, kind in (("<pad>", 3), ("</s>", 3), ("<unk>", 2), ("\u2581a", 1)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    spec = model.trainer_spec
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
    path.write_bytes(model.SerializeToString())


def _fitted(folder: Path) -> Fitted:
    manifest = bundle.read_manifest(folder)
    config = heads.HeadConfig(width=4, layers=1)
    head = heads.from_tree(config, dict(heads.fresh(config, jax.random.key(0))))
    both = calibration.PairCalibration(*(calibration.Calibration("temperature", {"temperature": np.float32(2)}),) * 2)
    members = [deferral_files.member_fingerprint(manifest, name) for name in ("drafter", "verifier")]
    return Fitted({"prefix": head}, {"temperature": both}, *members, ByteVocabulary().fingerprint(), {"loss": 1.0})


def read(folder: Path, form: str) -> None:
    """Describes a checkpoint and reads all of it, down to the host's memory."""
    describe.describe(folder)
    if form == "bundle":
        checkpoints.load_bundle(folder, verify=False)
        return
    opened = list(t5x_pair.open_members(folder).values()) if form == "t5x_pair" else [checkpoints.open_model(folder)]
    for one in opened:
        wholes = {id(whole): whole for whole in (getattr(leaf, "whole", leaf) for leaf in one.leaves.values())}
        for whole in wholes.values():
            tensors.to_host("x", whole, str(folder))
    if form == "huggingface":
        export_sources._vocabulary(opened[0], None, None)


def mutate(raw: bytes, name: str, draw: np.random.Generator) -> bytes:
    """Bytes changed blindly, or a value of JSON or msgpack replaced by one that is not expected."""
    if draw.random() < 0.5:
        try:
            if raw[:1] == b"{":
                return _mutate_json(json.loads(raw), draw)
            if name == "checkpoint":
                tree = msgpack.unpackb(raw, strict_map_key=False)
                return msgpack.packb(_replaced(tree, _msgpack_value(draw), draw), default=lambda _: "x")
        except (ValueError, RecursionError, OverflowError):
            pass
    at, size = int(draw.integers(len(raw))), int(draw.integers(1, 9))
    filler = [bytes(size), b"\xff" * size, draw.bytes(size), b""][draw.integers(4)]
    kinds = [
        lambda: raw[:at],
        lambda: raw[:at] + bytes([raw[at] ^ (1 << int(draw.integers(8)))]) + raw[at + 1 :],
        lambda: raw[:at] + filler + raw[at + size :],
        lambda: raw[:at] + filler + raw[at:],
        lambda: raw[:at] + raw[at // 2 :],
    ]
    return kinds[draw.integers(len(kinds))]()


def _mutate_json(value, draw) -> bytes:
    if draw.random() < 0.25:
        text = json.dumps(_replaced(value, "@HERE@", draw))
        return text.replace('"@HERE@"', RAW_JSON[draw.integers(len(RAW_JSON))]).encode("utf-8", "surrogatepass")
    return json.dumps(_replaced(value, HOSTILE[draw.integers(len(HOSTILE))], draw)).encode()


def _msgpack_value(draw):
    value = HOSTILE[draw.integers(len(HOSTILE))]
    return "x" if isinstance(value, int) and abs(value) >= 2**63 else value


def _replaced(value, new, draw):
    """A copy with one value, at any depth, replaced, removed or given another name."""
    if not value or not isinstance(value, dict | list) or draw.random() < 0.15:
        return new
    if isinstance(value, list):
        at = int(draw.integers(len(value)))
        return [_replaced(x, new, draw) if i == at else x for i, x in enumerate(value)]
    key = list(value)[draw.integers(len(value))]
    if draw.random() < 0.1:
        return {k: x for k, x in value.items() if k != key}
    if draw.random() < 0.05:
        return {(str(new)[:40] if k == key else k): x for k, x in value.items()}
    return {k: _replaced(x, new, draw) if k == key else x for k, x in value.items()}


def run(folder: Path, form: str, count: int, seed: int) -> dict[str, float]:
    """Mutates one file after another and reads the folder; see the module. Returns what was seen.

    Raises:
      AssertionError: naming the file and the seed's round, after leaving the mutated file's bytes in the message.
    """
    draw = np.random.default_rng(seed)
    read(folder, form)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, slowest = 0, 0.0
    for i in range(count):
        file = files[draw.integers(len(files))]
        raw = file.read_bytes()
        changed = mutate(raw, file.name, draw)
        file.write_bytes(changed)
        where = f"{form} {file.relative_to(folder)}, seed {seed}, round {i}"
        begin = time.monotonic()
        try:
            read(folder, form)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000, f"{where}: {error}"
        except Exception as error:
            kept = Path(tempfile.mkdtemp(prefix="fuzz.")) / file.name
            kept.write_bytes(changed)
            raise AssertionError(f"{where}: {type(error).__name__}: {error} ({kept})") from error
        finally:
            file.write_bytes(raw)
        slowest = max(slowest, time.monotonic() - begin)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert slowest < MOST_SECONDS, f"{where}: {slowest:.1f} s"
        assert grown < MOST_BYTES, f"{where}: {grown / 1e6:.0f} MB"
    return {"count": count, "refused": refused, "slowest_s": round(slowest, 2), "grown_mb": round(grown / 1e6, 1)}


def main() -> None:
    form, count, seed = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["0"])[0])
    place = Path(tempfile.mkdtemp(prefix="fuzz."))
    try:
        print(form, json.dumps(run(make(place / "checkpoint_3", form), form, count, seed)), flush=True)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
