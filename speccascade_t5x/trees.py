"""Dataclasses as pytrees that no compiled program mistakes for one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import jax

_Class = TypeVar("_Class")


def register(cls: type[_Class], static: Sequence[str] | None = None) -> type[_Class]:
    """Makes a dataclass a pytree node, as `jax.tree_util.register_dataclass` does. Returns the class.

    JAX's own registration (seen with 0.10) finds the structures of two dataclasses equal where only the class differs.
    Their hashes differ, so a jitted function mostly tells them apart; where the few bits of the hash that its cache
    looks at agree by chance, it runs the program compiled for the other class. Many rules differ by their class alone.
    Nodes registered here compare unequal.

    Args:
      cls: a dataclass whose constructor takes its fields by name.
      static: fields that are compared and hashed as part of the structure; by default those with the metadata
        {"static": True}. All others are children.

    Raises:
      ValueError: `static` names what is not a field.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # raises itself where `cls` is no dataclass
    unknown = set(static or ()) - {f.name for f in fields}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    meta = tuple(f.name for f in fields if f.metadata.get("static")) if static is None else tuple(static)
    data = tuple(f.name for f in fields if f.name not in meta)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(node: _Class) -> tuple[tuple, tuple]:
        return tuple(getattr(node, name) for name in data), tuple(getattr(node, name) for name in meta)

    def flatten_with_keys(node: _Class) -> tuple[tuple, tuple]:
        children, static = flatten(node)
        return tuple(zip(keys, children, strict=True)), static

    def unflatten(static: tuple, children: Iterable) -> _Class:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(meta, static, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
