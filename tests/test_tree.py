"""Paths, prunable leaves and sizes of any pytree."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    nnx = pytest.importorskip("flax.nnx")
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


KERNELS = {
    "dense/kernel": (3, 4),
    "conv/kernel": (3, 3, 2, 4),
    "depthwise/kernel": (3, 3, 1, 8),
    "embed/embedding": (50, 8),
    "attention/query/kernel": (8, 2, 4),
    "attention/out/kernel": (2, 4, 8),
    "lstm/hi/kernel": (4, 4),
    "layers/0/weight": (4, 2, 3, 3),  # Equinox, as the next two.
    "cell/weight_ih": (16, 4),
    "embedding/weight": (50, 8),
    "linear_1/w": (3, 4),
    "blocks/dense/kernel": (6, 3, 4),  # Stacked over six layers.
}
OTHERS = {
    "dense/bias": (4,),
    "attention/query/bias": (2, 4),
    "layers/0/bias": (4, 1, 1),
    "keepdims/bias": (1, 4),
    "cell/bias_n": (2, 4),
    "blocks/dense/bias": (6, 4),
    "blocks/LayerNorm_0/scale": (6, 4),
    "blocks/BatchNorm_0/mean": (6, 4),
    "blocks/BatchNorm_0/var": (6, 4),
    "blocks/linear/offset": (6, 4),
    "blocks/norm1/weight": (6, 4),
    "blocks/ln/weight": (6, 4),
    "norm/weight": (8, 4, 4),
    "vit/cls": (1, 1, 8),
    "vit/pos_embedding": (1, 9, 8),
    "per_layer/bias/3": (2, 4),
}


def struct(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("path", [*KERNELS, *OTHERS])
def test_kernels_are_told_by_shape_and_name(path):
    leaf = struct((KERNELS | OTHERS)[path])
    assert tree.is_kernel(path, leaf) == (path in KERNELS)


def test_stacked_leaves_are_judged_by_one_layer():
    prunable = tree.of_layers("blocks/*")
    assert not prunable("blocks/temperature", struct((6, 4)))
    assert prunable("blocks/temperature", struct((6, 4, 4)))
    assert prunable("head/temperature", struct((6, 4)))


def test_a_bias_beside_its_kernel_is_doubted():
    stacked = {"l": {"w": jnp.zeros((6, 3, 4)), "b": jnp.zeros((6, 4))}}
    with pytest.raises(ValueError, match=r"'l/b' of shape \(6, 4\), .* bias of 'l/w'"):
        tree.prunable_leaves(stacked)
    assert list(tree.shapes(stacked, tree.of_layers("l/*"))) == ["l/w"]
    assert list(tree.shapes({"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 2))})) == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("leaf", [jnp.tanh, 0.5, "relu"])
def test_leaves_that_are_no_arrays_are_named(leaf):
    with pytest.raises(ValueError, match=r"arrays as parameters, got .* at 'f'; .*eqx"):
        tree.prunable_leaves({"kernel": jnp.zeros((2, 2)), "f": leaf})


@pytest.mark.parametrize("predicate", ["kernel", None, lambda path: True])
def test_a_predicate_that_is_none_is_refused(predicate):
    with pytest.raises(ValueError, match=r"`prunable`|path, leaf"):
        tree.prunable_leaves(params(), predicate)
