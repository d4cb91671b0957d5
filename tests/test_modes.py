"""Every rule in every mode of JAX has the masks of a plain run in float32."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import CLASSES, SETTINGS, perceptron, step_of

from d2sparse import masks, rules
from d2sparse.data import Split
from d2sparse.distributions import uniform
from d2sparse.schedules import alternating, cosine, cubic, every
from d2sparse.train import (
    guard,
    init_state,
    make_optimizer,
    to_device,
)
from d2sparse.transforms import average_weights, get_masks, sparsify

SPECS = {"a": P("x", "y"), "b": P(None, "y"), "c": P("y")}
SHAPES = {"a": (8, 8), "b": (8, 4), "c": (4,)}
PATTERNS = {
    "n_of_m": masks.n_of_m(4),
    "blocks": masks.blocks((2, 2)),
    "channels": masks.channels(),
}
RULES = {
    "fixed": lambda: rules.fixed({k: normals(9)[k] > 0 for k in SHAPES}),
    "static": lambda: rules.static(0.5),
    "one_shot": lambda: rules.one_shot(0.5),
    "one_shot_in_iterations": lambda: rules.one_shot(0.5, iterations=3),
    "gradual": lambda: rules.gradual(cubic(0.5, 2)),
    "movement": lambda: rules.movement(cubic(0.5, 2)),
    "largest": lambda: rules.largest(0.5),
    "ac_dc": lambda: rules.ac_dc(0.5, alternating(1, 9)),
    "set": lambda: rules.set_(0.5),
    "rigl": lambda: rules.rigl(0.5, cosine(0.3, 8)),
    "sparse_momentum": lambda: rules.sparse_momentum(0.5),
    "granet": lambda: rules.granet(cubic(0.5, 2)),
} | {
    name: functools.partial(
        rules.rigl, 0.5, 0.5, distribution=uniform, selection=pattern
    )
    for name, pattern in PATTERNS.items()
}


def normals(seed, dtype=np.float32):
    """Numbers that bfloat16 and float16 hold, so that every type has the same ones."""
    rng = np.random.default_rng(seed)
    drawn = {k: rng.normal(size=shape) for k, shape in SHAPES.items()}
    return {
        k: x.astype(jnp.bfloat16).astype(np.float16).astype(dtype)
        for k, x in drawn.items()
    }


def train(name, params, grads):
    """The masks after a step at which they are refreshed; the weights do not move."""
    # Its default epsilon is 0 in float16.
    tx = sparsify(optax.adam(0.0, eps=1e-3), RULES[name](), every(1))

    def step(_, before):
        params, state = before
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # The loop carries one type: what an update returns is what it takes.
    after = jax.lax.fori_loop(0, 2, step, (params, tx.init(params)))
    return after[0], get_masks(after[1])


@functools.cache
def alone(name):
    return jax.device_get(
        jax.jit(train, static_argnums=0)(name, normals(0), normals(1))
    )


def assert_alone(name, found, dtype=np.float32):
    (params, live), (weights, expected) = found, alone(name)
    for path in SHAPES:
        np.testing.assert_array_equal(live[path], expected[path], err_msg=path)
        assert params[path].dtype == dtype
        got = np.asarray(params[path], np.float32)
        np.testing.assert_array_equal(got, weights[path], err_msg=path)


def wide():
    """With `jax_enable_x64`, for a while."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()


def each_rule(**quick):
    """All rules in every mode; quick are those that the others' parts are parts of.

    Between them they prune in steps, keep a score, grow, and choose by pattern.
    """
    return pytest.mark.parametrize(
        ("name", "mode"),
        [
            pytest.param(rule, mode, marks=() if rule in chosen else pytest.mark.slow)
            for mode, chosen in quick.items()
            for rule in RULES
        ],
    )


@each_rule(float32=["one_shot_in_iterations"], float64=["movement"])
def test_64_bits(name, mode):
    dtype = np.dtype(mode)
    with wide():
        found = jax.jit(train, static_argnums=0)(
            name, normals(0, dtype), normals(1, dtype)
        )
        assert_alone(name, found, dtype)


@each_rule(bfloat16=["n_of_m"], float16=["movement"])
def test_half_precision(name, mode):
    dtype = jnp.dtype(mode)
    found = jax.jit(train, static_argnums=0)(name, normals(0, dtype), normals(1, dtype))
    assert_alone(name, found, dtype)


@each_rule(outside=["one_shot_in_iterations"], inside=["movement"])
def test_a_mesh_of_explicit_axes(name, mode):
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    put = {path: NamedSharding(mesh, spec) for path, spec in SPECS.items()}
    with jax.set_mesh(mesh) if mode == "inside" else contextlib.nullcontext():
        given = jax.device_put((normals(0), normals(1)), (put, put))
        params, live = jax.jit(train, static_argnums=0)(name, *given)
    assert_alone(name, (params, live))
    for path, sharding in put.items():
        assert live[path].sharding.is_equivalent_to(sharding, live[path].ndim)


@pytest.mark.parametrize(
    "what", ["top_k", pytest.param("rigl", marks=pytest.mark.slow)]
)
def test_no_leaf_is_gathered_on_explicit_axes(what):
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    put = {path: NamedSharding(mesh, spec) for path, spec in SPECS.items()}
    params, grads = jax.device_put((normals(0), normals(1)), (put, put))
    assert jax.typeof(params["a"]).sharding.mesh.axis_types == (AxisType.Explicit,) * 2
    if what == "top_k":
        program = jax.jit(masks.top_k).lower(params, jnp.int32(40)).compile()
    else:
        tx = sparsify(optax.sgd(0.1), RULES["rigl"](), every(1))
        program = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
    assert "all-reduce" in program.as_text()
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in program.as_text()


@each_rule(shard_map=["n_of_m"])
def test_one_network_per_device(name, mode):
    del mode
    mesh = jax.make_mesh((2,), ("run",))
    put = NamedSharding(mesh, P("run"))
    both = jax.device_put(
        [{k: np.stack([x, x]) for k, x in normals(seed).items()} for seed in (0, 1)],
        put,
    )

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("run"), P("run")), out_specs=P("run")
    )
    def each(params, grads):
        own = jax.tree.map(lambda x: x[0], (params, grads))
        return jax.tree.map(lambda x: x[None], train(name, *own))

    found = jax.device_get(each(*both))
    for run in range(2):
        assert_alone(name, jax.tree.map(lambda x, run=run: x[run], found))


@each_rule(abstract=["movement", "n_of_m"])
def test_an_abstract_state_has_the_types_of_a_real_one(name, mode):
    del mode
    tx = sparsify(optax.adam(0.0), RULES[name]())
    abstract = jax.eval_shape(tx.init, normals(0))
    real = tx.init(normals(0))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for shape, leaf in zip(*map(jax.tree.leaves, (abstract, real)), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_numbers_below_all_of_float32_may_be_kept():
    with wide():
        kept = masks.top_k(jnp.array([-1e300, -np.inf, np.nan, -1e301]), 3)
        assert kept.tolist() == [True, False, False, True]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_of_training_returns_the_types_it_takes_in_64_bits(optimizer):
    # On accelerators steps are a scan, whose carry has one type.
    model = perceptron()
    with wide():
        labels = np.arange(8, dtype=np.int32) % CLASSES
        data = to_device(Split(np.zeros((8, 4, 4, 1), np.uint8), labels))

        def make_tx(settings):
            inner = make_optimizer(optimizer, settings["learning_rate"])
            return sparsify(average_weights(inner, 2), rules.rigl(0.5), every(2))

        state = jax.eval_shape(
            lambda key: init_state(model, make_tx(SETTINGS), data, key, SETTINGS),
            jax.random.key(0),
        )
        step = guard(step_of(model, data, make_tx, 4, every(2)))
        after, _ = jax.eval_shape(step, state, data, jnp.zeros(4, jnp.int32))
        assert jax.tree.structure(after) == jax.tree.structure(state)
        for x, y in zip(*map(jax.tree.leaves, (state, after)), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
