"""From a checkpoint of any kind to bundles, plain Orbax, native T5X and Hugging Face folders."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.checkpoints import (
    architecture,
    bundle,
    export_sources,
    flat_params,
    folders,
    huggingface,
    loading,
    orbax_tree,
    remote,
    scanned,
    t5x_native,
    t5x_pair,
    tensors,
)
from speccascade_t5x.checkpoints.bundle import Bundle
from speccascade_t5x.checkpoints.comparing import compare, compare_tables
from speccascade_t5x.checkpoints.kinds import Found, identify
from speccascade_t5x.checkpoints.opened import Opened
from speccascade_t5x.common import checks, storage
from speccascade_t5x.interfaces import Bound, PyTree, UserError

FORMATS = ("bundle", "orbax", "t5x", "huggingface", "t5x_pair")
DTYPES = ("float32", "bfloat16", "float16")
_MB = 10**6
_STATE_FORMATS = ("orbax", "t5x")  # those that have room for an optimizer state
_STEP_FORMATS = (*_STATE_FORMATS, "t5x_pair")


@dataclasses.dataclass(frozen=True)
class Report:
    """What an export has left behind.

    Attributes:
      target: the folder or address.
      format: one of FORMATS.
      parameters: number of them, of all members.
      files: number of files.
      bytes: of all files.
      largest: (bytes, name) of the largest file.
      step: training steps noted in it, None where the format notes none.
      optimizer_tensors: how many came along.
      drift: largest absolute difference of logits between source and export on fixed inputs, None if not verified. It
        is 0 in float32.
    """

    target: str
    format: str
    parameters: int
    files: int
    bytes: int
    largest: tuple[int, str]
    step: int | None
    optimizer_tensors: int
    drift: float | None


@checks.arguments(
    step=(0,), max_file_mb=(0.01,), max_shard_mb=(0.01,), extra_ids=(0,), max_input_len=(1,), max_len=(1,)
)
def export(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    dtype: str = "float32",
    optimizer_state: bool = False,
    step: int | None = None,
    max_file_mb: float | None = None,
    max_shard_mb: float = 5000,
    verify: bool = False,
    overwrite: bool = False,
    allow_drivers: Collection[str] = (),
    drafter: str | Path | None = None,
    vocabulary: str | Path | None = None,
    extra_ids: int | None = None,
    max_input_len: int = 256,
    max_len: int = 128,
    description: str = "",
    kind: str | None = None,
) -> Report:
    """Writes a checkpoint in another format. It appears whole, with checksums, or not at all.

    Args:
      source: a checkpoint of any kind; a bundle of two models only for a bundle, else name a member of it.
      target: the folder to make, or a gs:// address. T5X looks for `checkpoint_<step>`.
      format: one of FORMATS.
      dtype: what parameters are written as, one of DTYPES.
      optimizer_state: take it along, as it is; from T5X and Orbax to "t5x" and "orbax" only.
      step: training steps to note; the source's if None.
      max_file_mb: no file becomes larger (1 MB = 10^6 bytes), or nothing is written.
      max_shard_mb: largest safetensors file.
      verify: read the result back before it gets its name, and compare parameters and logits.
      overwrite: replace a checkpoint that is already there.
      allow_drivers: see `checkpoints.load`; for source and drafter.
      drafter: of a bundle or T5X pair made of two checkpoints; `source` is the verifier then.
      vocabulary: of a bundle: "bytes" or a SentencePiece model; None takes what comes with the source.
      extra_ids: sentinels after its ordinary pieces; 125 for bytes and 100 otherwise if None.
      max_input_len: longest input of a bundle, in tokens.
      max_len: longest output of a bundle, in tokens.
      description: human-readable description of a bundle.
      kind: of the source, see `checkpoints.load`.

    Raises:
      UserError: a bad argument, a source that cannot be read, a target in the way or that cannot be written, or a
        result that is not what it should be. Nothing is left then.
    """
    _check_options(format, dtype, optimizer_state, step, max_file_mb, max_shard_mb)
    if format != "bundle" and vocabulary is not None:
        raise UserError(f"a vocabulary goes into a bundle; the format {format!r} has no room for it")
    if format not in ("bundle", "t5x_pair") and drafter is not None:
        raise UserError(f"a drafter goes into a bundle or a t5x_pair; the format {format!r} holds one model")
    limit = None if max_file_mb is None else int(max_file_mb * _MB)
    with remote.local_copy(source) as place, _local_target(target, overwrite) as folder:
        job = _Job(format, np.dtype(jnp.dtype(dtype)), limit, int(max_shard_mb * _MB), verify)
        found = identify(place, kind)
        _require_room(found, format)
        if format == "t5x_pair":
            members = export_sources.members_of(found, drafter, allow_drivers)
            return job.write_pair(members, folder, str(target), step or 0)
        if format == "bundle":
            lengths = {"inputs": max_input_len, "targets": max_len}
            made = export_sources.bundle_of(found, drafter, vocabulary, extra_ids, lengths, description, allow_drivers)
            return job.write_bundle(made, folder, str(target))
        opened = loading.open_found(found, allow_drivers=allow_drivers)
        return job.write_model(opened, folder, str(target), step, optimizer_state)


def _check_options(
    format: str, dtype: str, optimizer_state: bool, step: int | None, max_file_mb: float | None, max_shard_mb: float
) -> None:
    if format not in FORMATS:
        raise UserError(f"there is no format {format!r}: use one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"parameters cannot be written as {dtype!r}: use one of {', '.join(DTYPES)}")
    if optimizer_state and format not in _STATE_FORMATS:
        raise UserError(f"the format {format!r} has no room for an optimizer state: use {' or '.join(_STATE_FORMATS)}")
    if step is not None and (type(step) is not int or step < 0 or format not in _STEP_FORMATS):
        raise UserError(f"step = {step!r} is not usable: a whole number from 0 on, for {' or '.join(_STEP_FORMATS)}")
    for name, value in (("max_file_mb", max_file_mb), ("max_shard_mb", max_shard_mb)):
        if value is not None and not (isinstance(value, int | float) and value >= 0.01):
            raise UserError(f"{name} = {value!r} is too small: give at least 0.01")


class _local_target:
    """Context of a local folder to write; a remote target is written to a temporary one and copied when all is well."""

    def __init__(self, target: str | Path, overwrite: bool):
        self._target, self._overwrite = target, overwrite
        self._temporary: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Path:
        if not remote.is_remote(self._target):
            path = Path(self._target)
            _require_free(path, self._overwrite)
            return path
        self._temporary = tempfile.TemporaryDirectory(prefix="speccascade_t5x.")
        return Path(self._temporary.name) / "export"

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._temporary is not None:
            with self._temporary as folder:
                if kind is None:
                    remote.publish(Path(folder) / "export", str(self._target), self._overwrite)


def _require_room(found: Found, format: str) -> None:
    """A table is never left behind in silence: it travels from bundle to bundle; other formats hold models alone."""
    if format != "bundle" and found.kind == "bundle" and "ngrams" in bundle.read_manifest(found.folder):
        raise UserError(
            f"{found.folder} holds an n-gram table, for which the format {format!r} has no room: use 'bundle', or name "
            f"its models ({found.folder / 'verifier'}) to leave the table behind"
        )


def _require_free(path: Path, overwrite: bool) -> None:
    """Only a checkpoint is ever replaced, and only if asked for."""
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} already exists; choose another name, or allow it to be overwritten")
    found = identify(path)
    if found.of_steps or found.kind == "member":
        raise UserError(f"{path} holds more than one checkpoint, or belongs to one; it is not overwritten")


@dataclasses.dataclass(frozen=True)
class _Job:
    """How one export is written."""

    format: str
    dtype: np.dtype
    limit: int | None
    shard_bytes: int
    verify: bool

    def write_bundle(self, made: Bundle, folder: Path, target: str) -> Report:
        drift: list[float] = []
        originals = {"verifier": made.verifier} | ({} if made.drafter is None else {"drafter": made.drafter})
        members = {name: Bound(m.model, self._cast(m.params)) for name, m in originals.items()}
        about = None if made.table is None else bundle.read_manifest(made.path)["ngrams"]

        def check(partial: Path) -> None:
            self._check_sizes(partial)
            if self.verify:
                found = bundle.load_bundle(partial)
                for name, member in members.items():
                    drift.append(compare(originals[name], member, getattr(found, name), target))
                compare_tables(made.table, found.table, target)

        bundle.save_bundle(
            folder,
            verifier=members["verifier"],
            drafter=members.get("drafter"),
            vocabulary=made.vocabulary,
            feature_lengths=made.feature_lengths,
            decode=made.decode,
            description=made.description,
            overwrite=True,
            dtype=self.dtype,
            file_bytes=orbax_tree.FILE_BYTES if self.limit is None else self.limit,
            check=check,
            table=made.table,
            about_table=about,
        )
        count = sum(flat_params.count(member.params) for member in members.values())
        return self._report(folder, target, count, None, 0, max(drift, default=None))

    def write_pair(self, members: Mapping[str, Bound], folder: Path, target: str, step: int) -> Report:
        cast = {role: Bound(member.model, self._cast(member.params)) for role, member in members.items()}
        drift: list[float] = []
        with folders.published(folder, "t5x_pair checkpoint") as partial:
            t5x_pair.write(partial, cast, step=step, dtype=self.dtype.name, chunk_bytes=self._chunk_bytes())
            folders.write_checksums(partial)
            self._check_sizes(partial)
            if self.verify:
                found = t5x_pair.load(partial)
                drift = [compare(members[role], cast[role], found[role], target) for role in cast]
        count = sum(flat_params.count(member.params) for member in cast.values())
        return self._report(folder, target, count, step, 0, max(drift, default=None))

    def _chunk_bytes(self) -> int:
        """Largest chunk of a native T5X array; compression may add a little."""
        return t5x_native.CHUNK_BYTES if self.limit is None else min(t5x_native.CHUNK_BYTES, self.limit * 9 // 10)

    def write_model(self, opened: Opened, folder: Path, target: str, step: int | None, optimizer_state: bool) -> Report:
        if optimizer_state:
            _require_state(opened, self.format)
        step = opened.step or 0 if step is None else step
        original = opened.load()
        bound = Bound(original.model, self._cast(original.params))
        kept = list(opened.state) if optimizer_state else []
        with folders.published(folder, f"{self.format} checkpoint") as partial:
            getattr(self, f"_write_{self.format}")(partial, opened, bound, step, kept)
            folders.write_checksums(partial)
            self._check_sizes(partial)
            drift = compare(original, bound, loading.load(partial), target) if self.verify else None
        noted = step if self.format in _STEP_FORMATS else None
        return self._report(folder, target, flat_params.count(bound.params), noted, len(kept), drift)

    def _write_t5x(self, partial: Path, opened: Opened, bound: Bound, step: int, kept: list[str]) -> None:
        flat = flat_params.flatten(bound.params)
        config = bound.model.config
        tensors_of = scanned.stack(flat, config.num_heads) if _is_scalable(config) else flat.items()
        params = ((name, np.asarray(leaf, self.dtype)) for name, leaf in tensors_of)
        t5x_native.write(partial, params, step=step, state=_state(opened, kept), chunk_bytes=self._chunk_bytes())
        _write_config(partial, bound, step)

    def _write_orbax(self, partial: Path, opened: Opened, bound: Bound, step: int, kept: list[str]) -> None:
        params = jax.tree.map(lambda leaf: np.asarray(leaf, self.dtype), bound.params)
        if kept:
            state = {"step": np.asarray(step, np.int32), "param_states": flat_params.nest(dict(_state(opened, kept)))}
            params = {"target": params, "state": state}
        inner = partial / "written"  # Orbax makes its folder itself
        orbax_tree.save(
            inner, params, dtype=None, file_bytes=orbax_tree.FILE_BYTES if self.limit is None else self.limit
        )
        for child in inner.iterdir():
            child.rename(partial / child.name)
        inner.rmdir()
        _write_config(partial, bound, step)

    def _write_huggingface(self, partial: Path, opened: Opened, bound: Bound, step: int, kept: list[str]) -> None:
        flat = flat_params.flatten(bound.params)
        ids = {}
        if opened.kind == "member":
            decode = bundle.read_manifest(opened.path.parent).get("decode", {})
            ids = {name: decode[name] for name in ("eos_id", "pad_id") if type(decode.get(name)) is int}
        huggingface.write(
            partial,
            bound.model,
            lambda name: np.asarray(flat[name], self.dtype),
            dtype=self.dtype,
            shard_bytes=self.shard_bytes if self.limit is None else min(self.shard_bytes, self.limit),
            vocabulary_file=opened.vocabulary_file,
            **ids,
        )

    def _cast(self, params: PyTree) -> PyTree:
        """What will be read back: float32 values the written dtype can hold."""
        if self.dtype == np.float32:
            return params
        return flat_params.nest({name: self._rounded(name, leaf) for name, leaf in flat_params.flatten(params).items()})

    def _rounded(self, name: str, leaf: jax.Array) -> jax.Array:
        rounded = leaf.astype(self.dtype)
        if not bool(jnp.isfinite(rounded).all()):
            raise UserError(f"tensor {name!r} has values beyond the range of {self.dtype.name}: write it as bfloat16")
        return rounded.astype(jnp.float32)

    def _check_sizes(self, partial: Path) -> None:
        size, name = folders.largest_file(partial)
        if self.limit is not None and size > self.limit:
            raise UserError(
                f"the file {name} would have {size / _MB:.2f} MB, more than the {self.limit / _MB:g} MB of "
                "max_file_mb, and cannot be split further in this format; allow larger files or choose another format"
            )

    def _report(
        self, folder: Path, target: str, parameters: int, step: int | None, kept: int, drift: float | None
    ) -> Report:
        sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
        largest = folders.largest_file(folder)
        return Report(target, self.format, parameters, len(sizes), sum(sizes), largest, step, kept, drift)


def _is_scalable(config: architecture.Config) -> bool:
    """Whether T5X's network for this architecture is its `scalable_t5`, whose layers are stacked."""
    return getattr(config, "table_per_layer", False)


def _require_state(opened: Opened, format: str) -> None:
    if opened.scanned:
        raise UserError(f"the optimizer state of {opened.path} belongs to scanned layers, which are unstacked here")
    if format == "t5x" and _is_scalable(opened.model.config):
        raise UserError(f"the optimizer state of {opened.path} belongs to single layers, which T5X stacks: use 'orbax'")
    if opened.state_others:
        raise UserError(f"the optimizer state of {opened.path} holds {opened.state_others[0]!r}, which is not an array")
    if not opened.state:
        raise UserError(f"{opened.path} ({opened.kind}) has no optimizer state to take along")


def _state(opened: Opened, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The optimizer state, tensor by tensor, in its own dtype."""
    for name in names:
        tensor = opened.state[name]
        yield name, tensors.to_host(name, tensor, str(opened.path), tensor.dtype)


def _write_config(folder: Path, bound: Bound, step: int) -> None:
    """What shapes do not tell: activations, dropout, and the step of parameters that stand alone."""
    config = bound.model.config
    facts = {"network": architecture.network(config), "config": dataclasses.asdict(config), "step": step}
    (folder / "config.json").write_text(storage.to_json(facts, indent=1) + "\n", "utf-8")
