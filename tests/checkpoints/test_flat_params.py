"""Flat names and messages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speccascade_t5x.checkpoints import flat_params
from speccascade_t5x.interfaces import UserError


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_flatten_and_nest_are_inverse():
    nested = {"decoder": {"b": 1, "a": {"kernel": 2}}, "x": 3}
    assert flat_params.flatten(nested) == {"decoder/a/kernel": 2, "decoder/b": 1, "x": 3}
    assert flat_params.nest(flat_params.flatten(nested)) == nested


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"]])
def test_clashing_names_are_refused(names):
    with pytest.raises(UserError, match="clash"):
        flat_params.nest(dict.fromkeys(names, 0))


def test_every_kind_of_problem_is_named():
    expected = {"a": {"k": leaf(2, 3)}, "b": leaf(4), "c": leaf(1), "d": leaf(5)}
    found = {
        "a/k": leaf(3, 2),
        "b": leaf(4, dtype=jnp.int32),
        "d": leaf(5, dtype=jnp.bfloat16),
        "e": leaf(9),
    }
    assert flat_params.problems(expected, found) == [
        "tensor 'a/k' has shape (3, 2) but the architecture asks for (2, 3)",
        "tensor 'b' holds int32 instead of floats",
        "tensor 'c' of shape (1,) is missing",
        "tensor 'e' is not part of the architecture",
    ]
    with pytest.raises(UserError, match=r"^file does not fit .*'a/k'.*; and 1 more$"):
        flat_params.require_match(expected, found, "file")
    flat_params.require_match({"b": leaf(4)}, {"b": leaf(4)}, "file")


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="file: tensor 'a/k' holds NaN"):
        flat_params.require_finite("a/k", np.array([1.0, np.nan]), "file")
    with pytest.raises(UserError, match="file: tensor 'a/k' holds NaN or infinite"):
        flat_params.require_finite("a/k", np.array([1.0, np.inf], np.float16), "file")
    flat_params.require_finite("a/k", np.array([1.0, 2.0]), "file")
