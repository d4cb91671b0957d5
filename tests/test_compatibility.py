"""One and the same call of `sparsify` inside other libraries, wrappers and meshes."""

import functools
import pickle
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import d2sparse
from d2sparse import (
    distributions,
    every,
    get_average,
    get_masks,
    set_masks,
    sparsify,
    tree,
)
from d2sparse.masks import apply_masks, is_gap

SPARSE = sparsify(optax.adamw(1e-2), d2sparse.rigl(sparsity=0.8), when=every(2))
STEPS = 6
REFRESHES = (3, 5)  # Refreshed are the masks of steps 2 and 4, in the next update.


def normals(seed, shapes, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def is_same(tree_of_masks, other):
    same = jax.tree.map(np.array_equal, tree_of_masks, other)
    return all(jax.tree.leaves(same))


def assert_sparse(params, live):
    """Exact zeros off the mask, and exactly as many live weights as the budget has."""
    assert jax.tree.structure(params) == jax.tree.structure(live)
    budget = distributions.erk(tree.shapes(params), 0.8)
    leaves = tree.flatten(params)
    for path, leaf in tree.flatten(live).items():
        assert leaf.dtype == bool
        assert np.sum(leaf) == budget.get(path, leaf.size)
        assert np.all(np.asarray(leaves[path])[~np.asarray(leaf)] == 0)


def check_run(run):
    """Follows a run, which yields parameters and masks at first and after each step."""
    (first, before), *others = run
    assert_sparse(first, before)
    assert len(others) == STEPS
    for update, (params, live) in enumerate(others, start=1):
        assert_sparse(params, live)
        assert is_same(before, live) == (update not in REFRESHES)
        before = live
    assert not any(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(params)))


@functools.partial(jax.jit, static_argnums=0)
def start(tx, params):
    state = tx.init(params)
    return apply_masks(params, get_masks(state)), state


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


# Libraries of networks.


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, 5, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        features = jnp.tanh(self.norm(self.conv(images))).mean(axis=(1, 2))
        return self.head(self.dropout(features))


def test_flax_nnx_models_with_state_besides_parameters():
    model = NNXNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, SPARSE, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, images):
        traces.append(1)
        grads = nnx.grad(lambda model: jnp.mean((model(images) - 1.0) ** 2))(model)
        optimizer.update(model, grads)

    def now():
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return params, nnx.to_pure_dict(get_masks(optimizer.opt_state))

    def run():
        nnx.update(model, apply_masks(*now()))
        yield now()
        for seed in range(STEPS):
            step(model, optimizer, normals(seed, (4, 6, 6, 2)))
            yield now()

    check_run(run())
    assert len(traces) == 1
    assert jnp.all(model.norm.mean[...] != 0)
    assert model.dropout.rngs.count[...] == STEPS


def test_flax_nnx_models_train_a_given_ticket():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    ticket = jax.tree.map(lambda w: jnp.abs(w) > 0.1, nnx.state(model, nnx.Param))
    tx = sparsify(optax.adamw(1e-2), d2sparse.fixed(ticket))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))

    step(model, optimizer)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    live = nnx.to_pure_dict(ticket)
    assert_same(nnx.to_pure_dict(get_masks(optimizer.opt_state)), live)
    assert_same(params, apply_masks(params, live))
    assert jnp.all((params["kernel"] != 0) == live["kernel"])


def test_masks_of_an_nnx_optimizer_say_how_they_are_applied():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, SPARSE, wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"same paths in other nodes.*to_pure_dict"):
        apply_masks(nnx.state(model, nnx.Param), get_masks(optimizer.opt_state))


@pytest.mark.parametrize("rule", [d2sparse.rigl(0.8), d2sparse.static(0.8)])
def test_unfiltered_equinox_modules_are_named(rule):
    with pytest.raises(ValueError, match=r"expected arrays as parameters.*eqx\.filter"):
        sparsify(optax.adamw(1e-2), rule).init(EquinoxNet(jax.random.key(0)))


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    order: jax.Array
    activation: Callable[[jax.Array], jax.Array]

    def __init__(self, key: jax.Array, use_bias: bool = False) -> None:
        conv_key, head_key = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(2, 8, 3, use_bias=use_bias, key=conv_key)
        self.norm = eqx.nn.LayerNorm(8)
        self.head = eqx.nn.Linear(8, 5, key=head_key)
        self.order = jnp.arange(8)
        self.activation = jnp.tanh

    def __call__(self, image: jax.Array) -> jax.Array:
        features = self.activation(self.conv(image)).mean(axis=(1, 2))
        return self.head(self.norm(features[self.order]))


@eqx.filter_jit
def equinox_step(model, state, images, tx):
    def loss(model):
        return jnp.mean((jax.vmap(model)(images) - 1.0) ** 2)

    grads = eqx.filter_grad(loss)(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state


def test_equinox_modules_with_leaves_that_are_none():
    def run():
        params, static = eqx.partition(
            EquinoxNet(jax.random.key(0)), eqx.is_inexact_array
        )
        assert params.order is params.conv.bias is params.activation is None
        params, state = start(SPARSE, params)
        yield params, get_masks(state)
        model = eqx.combine(params, static)
        for seed in range(STEPS):
            model, state = equinox_step(
                model, state, normals(seed, (4, 2, 6, 6)), SPARSE
            )
            yield eqx.filter(model, eqx.is_inexact_array), get_masks(state)

    check_run(run())


def test_equinox_convolutions_keep_their_biases_by_a_predicate():
    model = EquinoxNet(jax.random.key(0), use_bias=True)
    params = eqx.filter(model, eqx.is_inexact_array)
    rule = d2sparse.rigl(
        0.8,
        distribution=d2sparse.uniform,
        prunable=lambda path, leaf: path in ("conv/weight", "head/weight"),
    )
    live = jax.jit(sparsify(optax.sgd(1e-2), rule).init)(params).masks
    # A bias of shape (channels, 1, 1) has the dimensions of a kernel.
    assert live.conv.bias.shape == (8, 1, 1)
    assert live.conv.bias.all()
    assert live.conv.weight.sum() + live.head.weight.sum() == round(0.2 * (144 + 40))


HAIKU = {
    "conv/~/x": {"w": (3, 3, 6, 4)},
    "conv/~/head": {"w": (36, 5), "b": (5,)},
}


@pytest.mark.slow
def test_haiku_parameters():
    def run():
        params, state = start(SPARSE, normals(9, HAIKU))
        yield params, get_masks(state)
        for seed in range(STEPS):
            params, state = step(SPARSE, params, state, normals(seed, HAIKU))
            yield params, get_masks(state)

    check_run(run())
    assert list(tree.shapes(normals(9, HAIKU))) == [
        "conv/~/head/w",
        "conv/~/x/w",
    ]


# Numbers of 16 bits.


def test_growth_where_most_bfloat16_gradients_are_equal():
    params, state = start(SPARSE, normals(0, {"w": (32, 24)}, jnp.bfloat16))
    update, size, count = jax.jit(SPARSE.update), 768, 154
    for seed in range(STEPS):
        rng = np.random.default_rng(seed)
        sizes = rng.choice([0.5, -0.5, 1.0, -1.0, 2.0], size=(32, 24))
        grads = {"w": jnp.asarray(sizes, jnp.bfloat16)}
        before, weights = np.ravel(get_masks(state)["w"]), np.ravel(params["w"])
        updates, state = update(grads, state, params)
        after = np.ravel(get_masks(state)["w"])
        params = optax.apply_updates(params, updates)
        assert updates["w"].dtype == params["w"].dtype == jnp.bfloat16
        assert_sparse(params, get_masks(state))
        if seed + 1 not in REFRESHES:
            continue
        # What stays is decided by magnitude and index, what grows by the gradient.
        magnitudes = np.where(before, abs(weights.astype(np.float32)), -1)
        stays = np.argsort(-magnitudes, kind="stable")[: count - int(0.3 * count)]
        assert after[stays].all()
        outside = ~np.isin(np.arange(size), stays)
        scores = abs(np.ravel(sizes))
        cut = scores[outside & after].min()
        assert np.sum(outside & (scores == cut)) > np.sum(outside & after) / 2
        assert np.all(after[outside & (scores > cut)])
        assert not np.any(after[outside & (scores < cut)])


# Wrappers.


LAYERS = {"body": {"kernel": (12, 10), "bias": (10,)}, "head": {"kernel": (10, 5)}}


BODY = LAYERS["body"]


def gradients(seed, shapes=LAYERS):
    return normals(seed + 1, shapes)


def test_multi_steps_refreshes_by_real_updates_and_from_the_mean_gradient():
    outer = optax.MultiSteps(SPARSE, 2).gradient_transformation()
    params, state = start(outer, normals(0, BODY))
    alone, alone_state = start(SPARSE, normals(0, BODY))
    first = get_masks(state)
    for update in range(STEPS):
        halves = gradients(2 * update, BODY), gradients(2 * update + 1, BODY)
        # Between two real updates nothing moves, neither weights nor masks.
        waiting, state = step(outer, params, state, halves[0])
        assert_same((waiting, get_masks(state)), (params, get_masks(alone_state)))
        params, state = step(outer, params, state, halves[1])
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *jax.device_get(halves))
        alone, alone_state = step(SPARSE, alone, alone_state, mean)
        assert_same(get_masks(state), get_masks(alone_state))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, alone
        )
    assert not is_same(get_masks(state), first)


def test_optax_masked_leaves_the_rest_to_another_optimiser():
    in_body = {"body": True, "head": False}
    in_head = {"body": False, "head": True}
    tx = optax.chain(
        optax.masked(SPARSE, in_body), optax.masked(optax.sgd(0.5), in_head)
    )
    params, state = start(tx, normals(0, LAYERS))
    body, alone = start(SPARSE, normals(0, LAYERS)["body"])
    for seed in range(STEPS):
        grads = normals(seed + 1, LAYERS)
        head, slope = params["head"]["kernel"], grads["head"]["kernel"]
        head = np.asarray(head) - np.float32(0.5) * np.asarray(slope)
        params, state = step(tx, params, state, grads)
        body, alone = step(SPARSE, body, alone, grads["body"])
        live = get_masks(state)
        assert is_gap(live["head"])
        assert_same((params["body"], live["body"]), (body, get_masks(alone)))
        assert_same(params["head"]["kernel"], head)
        assert_same(params, apply_masks(params, live))


def test_a_norm_is_clipped_with_pruned_gradients_before_and_without_them_inside():
    sgd, clip = optax.sgd(1.0), optax.clip_by_global_norm(1.0)
    live = jax.tree.map(lambda w: w > 0, normals(0, LAYERS))
    rule = d2sparse.fixed(live)
    before = optax.chain(clip, sparsify(sgd, rule))
    inside = sparsify(optax.chain(clip, sgd), rule)
    params, grads = apply_masks(normals(0, LAYERS), live), gradients(0)
    norms = optax.tree.norm(apply_masks(grads, live)), optax.tree.norm(grads)
    for tx, expected in [(inside, 1.0), (before, norms[0] / norms[1])]:
        update = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p)[0])
        norm = optax.tree.norm(apply_masks(update(grads, params), live))
        np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_hyperparameters_of_inner_optimiser_and_rule_are_injected():
    @optax.inject_hyperparams
    def make(learning_rate, sparsity):
        rule = d2sparse.rigl(sparsity=sparsity)
        return sparsify(optax.adamw(learning_rate), rule, when=every(2))

    # A rate of 0 in the last step: the weights stay, the masks are those of before.
    rate = optax.piecewise_constant_schedule(1e-2, {STEPS - 1: 0.0})
    injected = make(learning_rate=rate, sparsity=0.8)
    params, state = start(injected, normals(0, BODY))
    alone, alone_state = start(SPARSE, normals(0, BODY))
    for seed in range(STEPS):
        last, alone_last = params, alone
        params, state = step(injected, params, state, gradients(seed, BODY))
        alone, alone_state = step(SPARSE, alone, alone_state, gradients(seed, BODY))
        assert_same(get_masks(state), get_masks(alone_state))
        assert_sparse(params, get_masks(state))
    assert_same(params, last)
    assert not is_same(alone, alone_last)


# Tools that save, cast and shard states.


def with_flax_bytes(state, directory):
    return serialization.from_bytes(state, serialization.to_bytes(state))


def with_flax_dicts(state, directory):
    return serialization.from_state_dict(state, serialization.to_state_dict(state))


def with_numpy(state, directory):
    leaves, structure = jax.tree.flatten(state)
    np.savez(directory / "state.npz", *leaves)
    with np.load(directory / "state.npz") as saved:
        return jax.tree.unflatten(structure, [saved[name] for name in saved.files])


def with_equinox(state, directory):
    eqx.tree_serialise_leaves(directory / "state.eqx", state)
    return eqx.tree_deserialise_leaves(directory / "state.eqx", state)


def with_orbax(state, directory):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "state", state)


def with_pickle(state, directory):
    return pickle.loads(pickle.dumps(state))


TOOLS = [with_flax_bytes, with_flax_dicts, with_numpy]
TOOLS += [with_equinox, with_orbax, with_pickle]


@functools.cache
def trained_state():
    """An optimiser with masks, frozen weights and an average, in the middle."""
    frozen = d2sparse.freeze(optax.sgd(0.1), d2sparse.static(0.5))
    tx = d2sparse.average_weights(
        optax.partition(
            {"sparse": SPARSE, "frozen": frozen}, {"body": "sparse", "head": "frozen"}
        )
    )
    params, state = normals(0, LAYERS), jax.jit(tx.init)(normals(0, LAYERS))
    for seed in range(3):
        params, state = step(tx, params, state, gradients(seed))
    return tx, params, state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_states_are_saved_and_restored_by_the_tools_that_users_have(tool, tmp_path):
    tx, params, state = trained_state()
    restored = tool(state, tmp_path)
    assert_same(restored, state)
    kinds = [[x.dtype for x in jax.tree.leaves(s)] for s in (restored, state)]
    assert kinds[0] == kinds[1]
    restored = jax.tree.map(jnp.asarray, restored)
    after = step(tx, params, state, gradients(3))
    assert_same(step(tx, params, restored, gradients(3)), after)


def test_states_go_through_the_arithmetic_of_optax():
    _, _, state = trained_state()

    @jax.jit
    def arithmetic(state):
        zeros, doubled = optax.tree.zeros_like(state), optax.tree.scale(2, state)
        moments = state.inner.inner_states["sparse"].inner_state.inner
        return (
            *(zeros, optax.tree.add(state, zeros), get_average(doubled)),
            optax.tree.scale(2, get_average(state)),
            get_masks(optax.tree.cast(state, jnp.float32)),
            optax.tree.norm(moments),
        )

    zeros, same, of_doubled, doubled, live, norm = arithmetic(state)
    assert_same(same, state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))
    assert_same(of_doubled, doubled)
    assert_same(live, get_masks(state))
    assert norm > 0


def make_branches(rate=0.1):
    return optax.partition(
        {
            "sparse": sparsify(optax.adam(rate), d2sparse.rigl(0.5)),
            "rest": optax.sgd(1),
        },
        {"body": "sparse", "head": "rest"},
    )


NESTS = {
    "sparsify": lambda: SPARSE,
    "freeze": lambda: d2sparse.freeze(optax.adam(0.1), d2sparse.static(0.5)),
    "average": lambda: d2sparse.average_weights(SPARSE),
    "movement": lambda: sparsify(optax.adam(0.1), d2sparse.movement(every(1))),
    "chain": lambda: optax.chain(optax.clip(1.0), SPARSE),
    "multi_steps": lambda: optax.MultiSteps(SPARSE, 2),
    "partition": make_branches,
    "inject": lambda: optax.inject_hyperparams(make_branches)(rate=0.1),
}


@pytest.mark.parametrize("name", NESTS)
def test_states_are_mapped_and_made_abstract_by_the_tools_of_optax(name):
    tx, params = NESTS[name](), normals(0, LAYERS)
    state = tx.init(params)
    assert_same(optax.tree.map_params(tx, lambda x: x, state), state)
    # Everything that is shaped like the parameters is found, the masks among it.
    marked = optax.tree.map_params(
        *(tx, lambda x: "param", state), transform_non_params=lambda _: "other"
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    for leaf, mark in zip(
        jax.tree.leaves(state), flat_like(marked, state), strict=True
    ):
        assert (mark == "param") == (leaf.shape in shapes and leaf.shape != ())
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(jax.typeof, abstract) == jax.tree.map(jax.typeof, state)
    if name in ("sparsify", "freeze", "average"):
        assert tx.init(jax.eval_shape(lambda: params)) == abstract


def flat_like(prefix, full):
    """The leaves of a prefix of a tree, each as often as the tree has leaves there."""
    spread = jax.tree.map(
        lambda mark, part: jax.tree.map(lambda _: mark, part), *(prefix, full)
    )
    return jax.tree.leaves(spread)


def test_states_are_cast_and_sharded_by_the_tools_of_optax():
    tx, params = d2sparse.average_weights(SPARSE), normals(0, BODY)
    grads, state = gradients(0, BODY), jax.jit(tx.init)(params)

    def cast(leaf):
        return leaf if leaf.dtype == bool else leaf.astype(jnp.bfloat16)

    half = optax.tree.map_params(tx, cast, state)
    assert half.inner.inner[0].mu["kernel"].dtype == jnp.bfloat16
    step(tx, params, half, grads)

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    over = jax.tree.map(lambda w: NamedSharding(mesh, P("x")), params)
    placed = optax.tree.map_params(
        tx,
        jax.device_put,
        state,
        over,
        transform_non_params=lambda x: jax.device_put(x, NamedSharding(mesh, P())),
    )
    assert_same(placed, state)
    for kept in (get_masks(placed), placed.inner.inner[0].nu, placed.average):
        assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(kept))
    expected = step(tx, params, state, grads)
    assert_same(get_masks(step(tx, params, placed, grads)[1]), get_masks(expected[1]))


# Many devices.


@pytest.mark.slow
def test_sharded_parameters_train_as_unsharded_ones_and_no_score_is_gathered():
    shapes = {"a": (32, 8), "b": (8, 6), "bias": (16,), "replicated": (10, 6)}
    over = {
        "a": P("data", "model"),
        "b": P(None, "model"),
        "bias": P("model"),
        "replicated": P(),
    }
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    put = {path: NamedSharding(mesh, spec) for path, spec in over.items()}
    alone, alone_state = start(SPARSE, normals(0, shapes))
    params = jax.device_put(alone, put)
    state = jax.jit(SPARSE.init)(params)
    assert_same(get_masks(state), get_masks(alone_state))
    # The first masks are drawn where no parameter is looked at.
    state = set_masks(state, jax.device_put(get_masks(state), put))

    compiled = step.lower(SPARSE, params, state, params).compile()
    assert "all-reduce" in compiled.as_text()
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in compiled.as_text()

    for seed in range(1, STEPS + 1):
        grads = normals(seed, shapes)
        alone, alone_state = step(SPARSE, alone, alone_state, grads)
        params, state = compiled(params, state, jax.device_put(grads, put))
        assert_sparse(params, get_masks(state))
        assert_same(get_masks(state), get_masks(alone_state))
        for kept in (params, get_masks(state), state.inner[0].mu):
            for path, leaf in kept.items():
                assert leaf.sharding.is_equivalent_to(put[path], leaf.ndim)
    assert_same(params, alone)
