"""Registered dataclasses of different classes are different structures, to every cache that looks."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from speccascade_t5x import trees
from speccascade_t5x.core import rules
from speccascade_t5x.decoding import sequential
from speccascade_t5x.drafting import Confidence, Entropy

CLASSES = 300


def numbered(number: int, register) -> type:
    @dataclasses.dataclass(frozen=True)
    class Node:
        value: object

    Node.number = number
    register(Node)
    return Node


def wrong_programs(register) -> int:
    """How often a jitted function runs the program of another class, among CLASSES classes with equal leaves."""
    classes = [numbered(i, register) for i in range(CLASSES)]
    which = jax.jit(lambda node: 0 * node.value + type(node).number)
    return sum(int(which(cls(jnp.int32(0)))) != cls.number for cls in classes)


def test_a_jitted_function_never_runs_the_program_of_another_class():
    """With JAX's own registration a sixth of these calls gave another class's number (jax 0.10.2)."""
    assert wrong_programs(trees.register) == 0


def test_rules_and_stops_are_different_structures():
    leaf = jnp.float32(0.5)
    classes = [rules.get(name) for name in rules.names()]
    nodes = [
        cls(**{f.name: leaf for f in dataclasses.fields(cls) if not f.metadata.get("static") and f.init})
        for cls in classes
        if not any(f.metadata.get("static") and f.default is dataclasses.MISSING for f in dataclasses.fields(cls))
    ]
    nodes += [Confidence(leaf), Entropy(leaf)]
    assert len(nodes) > 15
    for one, other in itertools.combinations(nodes, 2):
        assert jax.tree.structure(one) != jax.tree.structure(other), (one, other)


def test_static_fields_belong_to_the_structure():
    sums, means = (sequential.SequenceCascade(0.5, 0.2, confidence) for confidence in ("sum", "mean"))
    assert jax.tree.structure(sums) != jax.tree.structure(means)
    assert jax.tree.structure(sums) == jax.tree.structure(dataclasses.replace(sums, threshold=0.1))
    assert jax.tree.leaves(sums) == [0.5, 0.2]


def test_paths_name_the_fields():
    node = numbered(0, trees.register)({"a": 1})
    ((path, leaf),) = jax.tree.leaves_with_path(node)
    assert jax.tree_util.keystr(path) == ".value['a']" and leaf == 1
    assert jax.tree.map(lambda x: x + 1, node) == type(node)({"a": 2})


def test_no_class_of_the_package_uses_the_registration_of_jax():
    source = [p for p in Path(trees.__file__).parent.rglob("*.py") if p.name != "trees.py"]
    assert len(source) > 50
    users = [p.name for p in source if "register_dataclass" in p.read_text(encoding="utf-8")]
    assert users == []


@pytest.mark.parametrize("name", ["chow", "chow_log"])
def test_a_rule_round_trips(name):
    rule = rules.get(name)(alpha=jnp.float32(0.5))
    leaves, structure = jax.tree.flatten(rule)
    assert jax.tree.unflatten(structure, leaves) == rule


def test_a_static_name_must_be_a_field():
    @dataclasses.dataclass
    class Node:
        value: object

    with pytest.raises(ValueError, match="Node has no field size"):
        trees.register(Node, static=["size"])
