"""Meshes: which devices share the work, and which part of every array each device holds.

A mesh has two axes: batches are split over 'data', and the weights of each layer over 'model'. Arrays
name their dimensions by T5X's logical axes ('embed', 'heads', 'batch' and so on); a table of rules maps these to mesh
axes, as in T5X, and may differ between verifier and drafters. See docs/pods.md.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.checkpoints.tensors import Placement
from speccascade_t5x.common import checks
from speccascade_t5x.decoding import Program, State, placing
from speccascade_t5x.interfaces import Bound, PyTree, UserError
from speccascade_t5x.models.parameters import logical_axes, param_shapes

# (logical axis, mesh axis or None), the first rule that can be kept wins.
Rules = tuple[tuple[str, str | None], ...]

AXES = ("data", "model")
# T5X's standard table (`t5x.partitioning.standard_logical_axis_rules`, both partitionings one-dimensional).
STANDARD_RULES: Rules = (
    ("batch", "data"),
    ("vocab", "model"),
    ("embed", None),
    ("mlp", "model"),
    ("heads", "model"),
    ("kv", None),
    ("joined_kv", "model"),
    ("relpos_buckets", None),
    ("abspos_buckets", None),
    ("length", None),
    ("layers", None),
    ("stack", None),
    ("mlp_activations", None),
)
_CACHE_AXES = ("batch", "heads", "length", "kv")
_CACHES = ("self", "cross")  # names of keys and values in the caches of models

_warn_once = functools.cache(logging.getLogger(__name__).warning)


def standard_rules() -> Rules:
    """T5X's standard table of logical axis rules."""
    return STANDARD_RULES


def replicated_rules() -> Rules:
    """The standard table with nothing split over 'model': every device of a group holds and runs the whole model.

    This suits a small drafter: its step needs no collective, but every device computes the same step.
    """
    return tuple((name, axis if axis == "data" else None) for name, axis in STANDARD_RULES)


@dataclasses.dataclass(frozen=True)
class Topology:
    """The number of devices and how they share the work. `--topology` configures one.

    Attributes:
      devices: total number of devices; None takes `data` x `model`, or all devices.
      data: number of groups, each of which decodes a part of the batch; None makes as many as `devices` allows.
      model: number of devices of a group, which share the weights.
      submesh: on a TPU, the block of the torus that a group fills, as (x, y, z, cores per chip) or less of it; its
        product is `model`. T5X calls it model_parallel_submesh. None leaves the layout to JAX.
      rules: logical axis rules of the verifier, and of the decode itself.
      drafter_rules: logical axis rules of drafters; None takes `rules`.
      strict: reject a model whose axes do not divide, instead of keeping such axes whole on every device.
    """

    devices: int | None = None
    data: int | None = None
    model: int = 1
    submesh: tuple[int, ...] | None = None
    rules: Rules = STANDARD_RULES
    drafter_rules: Rules | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        checks.fields(self, devices=(1,), data=(1,), model=(1,), submesh=(1,))
        _check_rules("rules", self.rules)
        _check_rules("drafter_rules", self.drafter_rules or ())
        if self.submesh is not None:
            sides = self.submesh
            if len(sides) > 4 or math.prod(sides) != self.model:
                raise UserError(f"submesh={sides} is not a block of model={self.model} devices: change its product")

    def mesh(self, among: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh ('data', 'model') of the first of some devices; None takes all devices of all hosts.

        Raises:
          UserError: there are too few devices, or they cannot be laid out in this way.
        """
        data, found = self._data(), among or jax.devices()
        count = data * self.model
        if self.devices is not None and self.devices != count:
            raise UserError(
                f"a mesh of data={data} x model={self.model} has {count} devices, but the topology has {self.devices}: "
                "choose data and model whose product that is"
            )
        if count > len(found):
            simulated = ""
            if found[0].platform == "cpu":
                simulated = f" (on CPU, XLA_FLAGS=--xla_force_host_platform_device_count={count} simulates them)"
            raise UserError(
                f"a mesh of data={data} x model={self.model} needs {count} devices, and this machine has "
                f"{len(found)}{simulated}"
            )
        chosen = found[:count]
        if self.submesh is not None and hasattr(chosen[0], "coords"):
            places = [(*device.coords, device.core_on_chip) for device in chosen]
            order = np.array(chosen, object)[tile(places, self.submesh)]
            return Mesh(order, AXES, axis_types=(AxisType.Auto, AxisType.Auto))
        return jax.make_mesh((data, self.model), AXES, axis_types=(AxisType.Auto,) * 2, devices=chosen)

    def _data(self) -> int:
        if self.data is not None:
            return self.data
        devices = jax.device_count() if self.devices is None else self.devices
        if devices % self.model:
            raise UserError(f"model={self.model} does not divide the {devices} devices of the topology")
        return devices // self.model

    def partitioning(self, among: Sequence[jax.Device] | None = None) -> Partitioning:
        """The mesh with its rules. Arguments and errors are those of `mesh`."""
        drafter = self.rules if self.drafter_rules is None else with_batch_of(self.drafter_rules, self.rules)
        return Partitioning(self.mesh(among), self.rules, drafter, self.strict)


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """A mesh and the rules of both roles: the placement of parameters, inputs and decode state.

    Attributes:
      mesh: the mesh, with the axes 'data' and 'model'.
      rules: rules of the verifier and of everything that belongs to no model.
      drafter_rules: rules of drafters; they split batches as `rules` does.
      strict: see `Topology`.
    """

    mesh: Mesh | AbstractMesh
    rules: Rules = STANDARD_RULES
    drafter_rules: Rules = STANDARD_RULES
    strict: bool = False

    def described(self) -> str:
        """Human-readable description of the mesh, and of the rules if they are not T5X's."""
        sizes = " x ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        own = {"rules": self.rules, "drafter_rules": self.drafter_rules}
        return sizes + "".join(f", {name} {rules}" for name, rules in own.items() if rules != STANDARD_RULES)

    @property
    def whole(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Axis 0 split as the rules split batches, the rest whole."""
        return NamedSharding(self.mesh, PartitionSpec(dict(reversed(self.rules)).get("batch")))

    def check_batch(self, rows: int) -> None:
        """Checks that a batch can be divided evenly.

        Raises:
          UserError: it cannot.
        """
        axis = self.rows.spec[0]
        share = self.mesh.shape[axis] if axis else 1
        if rows % share:
            raise UserError(
                f"a batch of {rows} rows cannot be shared by {axis}={share}: choose a batch size that {share} divides"
            )

    def params(self, model: Any, drafter: bool = False) -> PyTree:
        """The sharding of every parameter of a model.

        A dimension that its mesh axis does not divide stays whole on every device, which is logged; attention is split
        by whole heads only.

        Args:
          model: a LanguageModel with a `config` of `models`.
          drafter: whether the drafters' rules apply.

        Raises:
          UserError: a logical axis without a rule; with `strict`, a dimension that does not divide.
        """
        config = model.config
        names, shapes = logical_axes(config), param_shapes(config)
        rules, units = self.drafter_rules if drafter else self.rules, {"joined_kv": config.num_heads}
        fallen: dict[tuple[str, int, str], None] = {}

        def place(axes: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            sizes = [units.get(name, size) for name, size in zip(axes, leaf.shape, strict=True)]
            return NamedSharding(self.mesh, self._spec(axes, sizes, rules, fallen))

        found = jax.tree.map(place, names, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        for name, size, axis in fallen:
            self._fall_back("drafter" if drafter else "verifier", name, size, axis)
        return found

    def placement(self, model: Any, drafter: bool = False) -> Placement:
        """The same for `checkpoints.load`, by flat name. It raises the errors of `params`."""
        flat = flat_params.flatten(self.params(model, drafter))
        return lambda name, shape: flat[name]

    def put(self, bound: Bound, drafter: bool = False) -> Bound:
        """Moves the parameters of a model to their shardings; those that have them already stay."""
        if not hasattr(bound.model, "config"):  # tables and other drafters without a network
            return Bound(bound.model, placing.put(bound.params, self.whole))
        return Bound(bound.model, placing.put(bound.params, self.params(bound.model, drafter)))

    def program(self, program: Program) -> Program:
        """A program whose leaves that are not on the mesh yet (options, tables) are copied to every device."""
        here = lambda leaf: isinstance(getattr(leaf, "sharding", None), NamedSharding)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf if here(leaf) else placing.put(leaf, self.whole), program)

    def state(self, state: State) -> State:
        """The sharding of every leaf of a decode state (or of its shapes): batch, and the heads of caches.

        Raises:
          UserError: the batch does not divide.
        """
        self.check_batch(state.done.shape[0])

        def place(path: tuple, leaf: Any) -> NamedSharding:
            keys = [getattr(entry, "name", getattr(entry, "key", None)) for entry in path]
            rules = self.drafter_rules if keys[0] == "drafter_state" else self.rules
            cached = leaf.ndim == len(_CACHE_AXES) and any(name in keys for name in _CACHES)
            axes = _CACHE_AXES if cached else ("batch",)
            return NamedSharding(self.mesh, self._spec(axes, leaf.shape[: len(axes)], rules, {}))

        return jax.tree_util.tree_map_with_path(place, state)

    def like_params(self, model: Any, state: PyTree) -> PyTree:
        """The sharding of every leaf of a training state, given as arrays or shapes.

        A leaf whose name ends in a parameter's name and that has its shape (the parameter itself, a moment) has the
        sharding of the parameter; all others (counters, factored moments) are whole on every device.
        """
        flat = jax.tree_util.tree_leaves_with_path(param_shapes(model.config))
        places = jax.tree.leaves(self.params(model))
        known = {jax.tree_util.keystr(path): (leaf.shape, at) for (path, leaf), at in zip(flat, places, strict=True)}

        def place(path: tuple, leaf: Any) -> NamedSharding:
            for begin in range(len(path)):
                shape, at = known.get(jax.tree_util.keystr(path[begin:]), (None, None))
                if shape == leaf.shape:
                    return at
            return self.whole

        return jax.tree_util.tree_map_with_path(place, state)

    def _spec(
        self, names: Sequence[str], sizes: Sequence[int], rules: Rules, fallen: dict[tuple[str, int, str], None]
    ) -> PartitionSpec:
        """The mesh axis of each dimension: that of the first rule of its name whose axis is free and divides it.

        Adds (name, size, mesh axis) to `fallen` if a rule was skipped because its axis does not divide the dimension.
        """
        found: dict[int, str | None] = {}
        for name, axis in rules:
            place = names.index(name) if name in names else None
            if place is None or place in found or (axis is not None and axis in found.values()):
                continue
            if axis is not None and sizes[place] % self.mesh.shape[axis]:
                fallen[name, sizes[place], axis] = None
                continue
            found[place] = axis
        ruled = {name for name, _ in rules}
        for name in names:
            if name not in ruled:
                raise UserError(f"no rule names the logical axis {name!r}: add ({name!r}, None) to keep it whole")
        return PartitionSpec(*(found.get(place) for place in range(len(names))))

    def _fall_back(self, role: str, name: str, size: int, axis: str) -> None:
        """Logs that an axis stays whole. Raises UserError if the topology is strict."""
        what = f"{size} heads" if name in ("joined_kv", "heads") else f"axis {name!r} of size {size}"
        where = f"{axis}={self.mesh.shape[axis]}"
        if self.strict:
            raise UserError(f"the {role} has {what}, which {where} does not divide: use another, or strict=False")
        _warn_once(f"the {role} has {what}, which {where} does not divide: kept whole on every device")


def with_batch_of(rules: Rules, other: Rules) -> Rules:
    """`rules`, but with batches split as in `other`, because the rows of both roles must be on the same devices."""
    batch = tuple(rule for rule in other if rule[0] == "batch")
    return batch + tuple(rule for rule in rules if rule[0] != "batch")


def tile(places: Sequence[Sequence[int]], submesh: Sequence[int]) -> np.ndarray:
    """Groups devices on a torus into equal blocks, so that a group communicates over short links.

    Args:
      places: coordinates of each device, which together fill a box.
      submesh: sides of a block; missing ones are 1.

    Returns:
      [data, model] indices into `places`, a block in each row.

    Raises:
      UserError: the devices fill no box, or the blocks do not fill it.
    """
    coordinates = np.asarray(places)
    coordinates = coordinates - coordinates.min(axis=0)
    box = coordinates.max(axis=0) + 1
    sides = np.array([*submesh, *[1] * (len(box) - len(submesh))])
    if len({tuple(place) for place in coordinates.tolist()}) != np.prod(box):
        raise UserError(f"{len(coordinates)} devices do not fill {' x '.join(map(str, box))}: leave out submesh")
    if (box % sides).any():
        raise UserError(f"blocks of {' x '.join(map(str, sides))} devices do not fill {' x '.join(map(str, box))}")
    order = np.empty(box, int)
    order[tuple(coordinates.T)] = np.arange(len(coordinates))
    split = [size for pair in zip(box // sides, sides, strict=True) for size in pair]
    outer, inner = range(0, len(split), 2), range(1, len(split), 2)
    return order.reshape(split).transpose(*outer, *inner).reshape(-1, int(np.prod(sides)))


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` local devices (all if None), over which batches are split.

    Raises:
      UserError: there are fewer devices.
    """
    found = jax.devices()
    if devices is not None:
        checks.whole("devices", devices, 1)
        if devices > len(found):
            raise UserError(f"devices={devices} was asked for, and this machine has {len(found)}")
    count = len(found) if devices is None else devices
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=found[:count])


def _check_rules(option: str, rules: Rules) -> None:
    """Refuses rules that name no axis of a mesh.

    Raises:
      UserError: an entry is not a pair (logical axis, mesh axis).
    """
    for rule in rules:
        if rule[1] is not None and rule[1] not in AXES:
            raise UserError(f"{option} holds {rule!r}: a rule is (logical axis, 'data', 'model' or None)")
