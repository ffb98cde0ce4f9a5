"""Parameter trees as flat names, and what to say when one is not the tree that was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from speccascade_t5x.interfaces import PyTree, UserError

_MOST_PROBLEMS = 3


def flatten(tree: PyTree, *, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to {'decoder/layers_0/mlp/wi/kernel': leaf}, in order of name."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        name = f"{prefix}{key}"
        if isinstance(tree[key], Mapping):
            flat.update(flatten(tree[key], prefix=f"{name}/"))
        else:
            flat[name] = tree[key]
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    Raises:
      UserError: one name is the beginning of another, so that no tree exists.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"the parameter names clash: {name!r} lies below a tensor")
        if last in node:
            raise UserError(f"the parameter names clash: {name!r} is both a tensor and a branch")
        node[last] = leaf
    return tree


def problems(expected: PyTree, found: Mapping[str, Any]) -> list[str]:
    """What keeps tensors from being the expected tree, one sentence part each.

    Args:
      expected: nested dict of leaves with `shape`.
      found: flat names to leaves with `shape` and `dtype`; any float dtype will do.
    """
    wanted = flatten(expected)
    report = []
    for name, leaf in wanted.items():
        if name not in found:
            report.append(f"tensor {name!r} of shape {tuple(leaf.shape)} is missing")
        elif tuple(found[name].shape) != tuple(leaf.shape):
            shape = tuple(found[name].shape)
            report.append(f"tensor {name!r} has shape {shape} but the architecture asks for {tuple(leaf.shape)}")
        elif not jnp.issubdtype(found[name].dtype, jnp.floating):
            report.append(f"tensor {name!r} holds {np.dtype(found[name].dtype).name} instead of floats")
    report += [f"tensor {name!r} is not part of the architecture" for name in found if name not in wanted]
    return report


def require_match(expected: PyTree, found: Mapping[str, Any], source: str) -> None:
    """Raises a UserError that names the first tensors in which `found` is not `expected`."""
    report = problems(expected, found)
    if report:
        more = f"; and {len(report) - _MOST_PROBLEMS} more" if len(report) > _MOST_PROBLEMS else ""
        shown = "; ".join(report[:_MOST_PROBLEMS])
        raise UserError(f"{source} does not fit its configuration: {shown}{more}")


def require_finite(name: str, array: np.ndarray, source: str) -> None:
    """Raises a UserError if the tensor holds a NaN or an infinity."""
    if not np.isfinite(array).all():
        raise UserError(f"{source}: tensor {name!r} holds NaN or infinite values; the training run probably diverged")


def count(tree: PyTree) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
