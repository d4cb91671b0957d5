"""Paths, prunable leaves and sizes of any pytree."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2sparse import tree


class Pair(NamedTuple):
    left: object
    right: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A class registered as a pytree, as the modules of Equinox are."""

    kernel: object
    bias: object


TREES = [
    ({"b": {"w": 1, "a": 2}, "a": 3}, {"a": 3, "b/a": 2, "b/w": 1}),
    ([1, (2, {"w": 3})], {"0": 1, "1/0": 2, "1/1/w": 3}),
    (Pair(1, Pair(2, [3])), {"left": 1, "right/left": 2, "right/right/0": 3}),
    ({"layer": Layer(1, 2)}, {"layer/kernel": 1, "layer/bias": 2}),
    ({"a": None, "b": 1, "c": {}}, {"b": 1}),
    (5, {"": 5}),
]


@pytest.mark.parametrize(("nested", "flat"), TREES)
def test_flatten_names_every_leaf_in_the_order_of_the_tree(nested, flat):
    assert tree.flatten(nested) == flat
    assert list(tree.flatten(nested).values()) == jax.tree.leaves(nested)


@pytest.mark.parametrize(("nested", "flat"), TREES)
def test_replace_changes_the_named_leaves_alone(nested, flat):
    *_, last = flat
    replaced = tree.replace(nested, {last: "new"})
    assert jax.tree.structure(replaced) == jax.tree.structure(nested)
    assert tree.flatten(replaced) == {**flat, last: "new"}
    assert tree.flatten(tree.replace(nested, {})) == flat
    assert tree.flatten(nested) == flat


def test_replace_refuses_unknown_paths_and_names_those_there_are():
    with pytest.raises(ValueError, match=r"got \['a/c', 'd'\]; the tree has \['a/b'\]"):
        tree.replace({"a": {"b": 1}}, {"a/c": 2, "a/b": 3, "d": 4})


@pytest.mark.parametrize(("nested", "flat"), TREES)
def test_map_with_path_gives_each_leaf_with_its_name(nested, flat):
    named = tree.map_with_path(lambda path, leaf: f"{path}={leaf}", nested)
    assert jax.tree.structure(named) == jax.tree.structure(nested)
    assert jax.tree.leaves(named) == [f"{path}={leaf}" for path, leaf in flat.items()]


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (np.zeros((3, 2), np.float32), True),
        (jnp.zeros((3, 3, 2, 4), jnp.bfloat16), True),
        (jax.ShapeDtypeStruct((3, 2), jnp.float16), True),
        (jnp.zeros(3), False),
        (jnp.zeros(()), False),
        (jnp.zeros((3, 2), jnp.int32), False),
        (jnp.zeros((3, 2), bool), False),
        (jax.random.split(jax.random.key(0), (2, 2)), False),
    ],
)
def test_kernels_are_floating_with_two_dimensions_or_more(leaf, expected):
    assert tree.is_kernel("any/path", leaf) == expected


def params():
    return {
        "conv": {"kernel": jnp.zeros((3, 3, 1, 4)), "bias": jnp.zeros(4)},
        "head": {"kernel": jnp.zeros((4, 2)), "steps": jnp.zeros((1, 1), jnp.int32)},
    }


def test_prunable_leaves_by_default_and_by_a_predicate():
    assert list(tree.prunable_leaves(params())) == ["conv/kernel", "head/kernel"]
    chosen = tree.prunable_leaves(params(), lambda path, leaf: path.startswith("conv"))
    assert list(chosen) == ["conv/bias", "conv/kernel"]
    assert chosen["conv/kernel"].shape == (3, 3, 1, 4)


def test_no_prunable_leaf_is_an_error_that_names_the_leaves():
    with pytest.raises(ValueError, match=r"none among \['b', 'w'\]; widen"):
        tree.prunable_leaves({"w": jnp.zeros(3), "b": jnp.zeros(())})


def test_shapes_need_no_arrays_and_work_while_tracing():
    expected = {"conv/kernel": (3, 3, 1, 4), "head/kernel": (4, 2)}
    assert tree.shapes(jax.eval_shape(params)) == expected
    seen = []
    jax.eval_shape(lambda p: seen.append(tree.shapes(p)), params())
    assert seen == [expected]


def test_size_counts_every_entry():
    assert tree.size(params()) == 36 + 4 + 8 + 1
    assert tree.size({"scalar": jnp.zeros(()), "empty": jnp.zeros((0, 3))}) == 1
    assert tree.size({}) == 0


def test_states_of_flax_nnx_are_trees_too():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert list(tree.shapes(state).values()) == [(3, 2)]
    (path,) = tree.shapes(state)
    assert path.startswith("kernel")
    doubled = tree.replace(state, {path: 2 * tree.flatten(state)[path]})
    np.testing.assert_array_equal(doubled["kernel"][...], 2 * state["kernel"][...])
    np.testing.assert_array_equal(doubled["bias"][...], state["bias"][...])


def test_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match=r"got \['a/b/c'\] more than once; rename"):
        tree.flatten({"a": {"b/c": 1}, "a/b": {"c": 2}, "d": 3})


def test_the_value_of_a_variable_is_named_as_the_variable():
    class Variable(NamedTuple):
        value: int

    assert list(tree.flatten({"kernel": Variable(1)})) == ["kernel"]
    assert list(tree.flatten(Variable(1))) == ["value"]
