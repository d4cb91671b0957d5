"""Penalties and their proximal operators against numpy and against their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d2sparse import regularizers as reg
from d2sparse.tree import flatten

SHAPES = {
    "conv": {"kernel": (2, 2, 1, 3), "bias": (3,)},
    "dense": {"kernel": (12, 4), "bias": (4,)},  # Of 2 x 2 positions of 3 channels.
}
CHANNELS = {"conv": {"conv/kernel": -1, "conv/bias": 0, "dense/kernel": 0}}
UNITS = {"dense": {"dense/kernel": 1, "dense/bias": -1}}
STRENGTH = 0.3


def normals(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(scale * rng.normal(size=shape)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def some_zeros():
    """Weights with a silent channel, a silent neuron and a silent kernel of rank 2."""
    params = normals(0)
    for j in (0, 3, 6, 9):
        params["dense"]["kernel"][j] = 0
    params["dense"]["kernel"][:, 1] = 0
    params["conv"]["kernel"][..., 0] = 0
    params["conv"]["bias"][0] = 0
    return params


PARAMS, HOLED = normals(0), some_zeros()
ZERO = jax.tree.map(np.zeros_like, PARAMS)


def groups_of(params, channels=False, bias=False):
    """Every group as a list of (path, index) of its weights; loops alone."""
    leaves, found = flatten(params), []
    for layer in SHAPES:
        for j in range(SHAPES[layer]["kernel"][-1]):
            kernel = leaves[f"{layer}/kernel"]
            group = [(f"{layer}/kernel", i) for i in np.ndindex(kernel.shape)]
            group = [(path, i) for path, i in group if i[-1] == j]
            if bias or (channels and layer == "conv"):
                group.append((f"{layer}/bias", (j,)))
            if channels and layer == "conv":
                rows = [r for r in range(12) if r % 3 == j]
                group += [("dense/kernel", (r, c)) for r in rows for c in range(4)]
            if not channels or layer == "conv":
                found.append(group)
    return found


def values(params, group):
    leaves = flatten(params)
    return np.array([leaves[path][i] for path, i in group], float)


def lasso(params, groups):
    each = [values(params, group) for group in groups]
    return sum(np.sqrt(v.size) * np.sqrt((v**2).sum()) for v in each)


def kernels(params):
    return [np.asarray(params[layer]["kernel"], float) for layer in SHAPES]


def hoyer(sizes):
    return sizes.sum() ** 2 / (sizes**2).sum() if sizes.any() else 0.0


def norms(kernel):
    return np.sqrt((kernel.reshape(-1, kernel.shape[-1]) ** 2).sum(axis=0))


def singular(kernel):
    return np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), compute_uv=False)


UNITS_AND_BIAS = {"conv": {"conv/kernel": -1, "conv/bias": -1}, **UNITS}
PENALTIES = {
    "l1": (reg.l1, lambda p: sum(np.abs(k).sum() for k in kernels(p))),
    "l2": (reg.l2, lambda p: sum((k**2).sum() / 2 for k in kernels(p))),
    "hoyer": (reg.hoyer_square, lambda p: sum(hoyer(abs(k)) for k in kernels(p))),
    "lasso": (reg.group_lasso, lambda p: lasso(p, groups_of(p))),
    "lasso with biases": (
        functools.partial(reg.group_lasso, groups=UNITS_AND_BIAS),
        lambda p: lasso(p, groups_of(p, bias=True)),
    ),
    "lasso of channels": (
        functools.partial(reg.group_lasso, groups=CHANNELS),
        lambda p: lasso(p, groups_of(p, channels=True)),
    ),
    "group hoyer": (
        reg.group_hoyer_square,
        lambda p: sum(hoyer(norms(k)) for k in kernels(p)),
    ),
    "nuclear": (reg.nuclear_norm, lambda p: sum(singular(k).sum() for k in kernels(p))),
}
POINTS = {"anywhere": PARAMS, "with holes": HOLED, "at zero": ZERO}


@functools.cache
def penalties():
    """Values and gradients of every penalty at every point, in one program."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *POINTS.values())
    grads = {n: jax.value_and_grad(penalty) for n, (penalty, _) in PENALTIES.items()}

    @jax.jit
    @jax.vmap
    def evaluate(params):
        return {name: grad(params) for name, grad in grads.items()}

    found = jax.device_get(evaluate(stacked))
    return {
        point: jax.tree.map(lambda x, i=i: x[i], found)
        for i, point in enumerate(POINTS)
    }


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("point", POINTS)
def test_penalties_are_those_of_numpy(name, point):
    found, _ = penalties()[point][name]
    expected = PENALTIES[name][1](POINTS[point])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def along(name, params, path, i, step=1e-4):
    """Slope of the penalty of numpy along one weight."""

    def at(change):
        moved = jax.tree.map(lambda w: w.astype(float), params)
        flatten(moved)[path][i] += change
        return PENALTIES[name][1](moved)

    return (at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_are_those_of_differences(name):
    _, gradient = penalties()["anywhere"][name]
    for path in flatten(PARAMS):
        shape = flatten(PARAMS)[path].shape
        i = tuple(n // 2 for n in shape)
        expected = along(name, PARAMS, path, i)
        np.testing.assert_allclose(
            flatten(gradient)[path][i], expected, rtol=1e-3, atol=1e-4, err_msg=path
        )


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_are_finite_and_zero_at_zero(name):
    for point in ("with holes", "at zero"):
        for leaf in jax.tree.leaves(penalties()[point][name][1]):
            assert np.isfinite(leaf).all()
    assert not any(g.any() for g in jax.tree.leaves(penalties()["at zero"][name][1]))
    if "channels" in name:
        holes = penalties()["with holes"][name][1]["dense"]["kernel"]
        assert (holes[::3] == 0).all()
        assert holes[1:3].any()
    else:
        holes = penalties()["with holes"][name][1]["dense"]["kernel"]
        np.testing.assert_allclose(holes[:, 1], 0, atol=1e-6)


def test_deep_hoyer_counts_at_any_scale():
    kernel = np.float32([[1, -1, 0, 1]])
    counts = jax.jit(
        jax.vmap(lambda scale: reg.hoyer_square({"kernel": scale * kernel}))
    )
    np.testing.assert_allclose(counts(np.float32([1e-25, 1.0, 1e25])), 3.0, rtol=1e-5)


# Proximal operators


PROXIMAL = {
    "soft": (reg.soft_threshold, "l1"),
    "shrink": (reg.shrink, "l2"),
    "neurons": (reg.group_soft_threshold, "lasso"),
    "with biases": (
        functools.partial(reg.group_soft_threshold, groups=UNITS_AND_BIAS),
        "lasso with biases",
    ),
    "channels": (
        functools.partial(reg.group_soft_threshold, groups=CHANNELS),
        "lasso of channels",
    ),
    "singular": (reg.singular_value_threshold, "nuclear"),
}


@functools.cache
def steps():
    """Every operator at every point, at two strengths and 0, in one program."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *POINTS.values())
    strengths = np.float32([STRENGTH, 0.0, 100.0])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    @functools.partial(jax.vmap, in_axes=(0, None))
    def evaluate(params, strength):
        return {name: prox(params, strength) for name, (prox, _) in PROXIMAL.items()}

    return jax.device_get(evaluate(stacked, strengths))


def stepped(name, strength=0, point=0):
    return jax.tree.map(lambda x: x[strength, point], steps()[name])


@pytest.mark.parametrize("name", PROXIMAL)
@pytest.mark.parametrize("point", [0, 1])
def test_proximal_operators_minimise_what_defines_them(name, point):
    penalty = PENALTIES[PROXIMAL[name][1]][1]
    begin = list(POINTS.values())[point]

    def objective(params):
        each = zip(jax.tree.leaves(params), jax.tree.leaves(begin), strict=True)
        distance = sum(((a.astype(float) - b) ** 2).sum() for a, b in each)
        return distance / 2 + STRENGTH * penalty(params)

    found = jax.tree.map(lambda w: w.astype(float), stepped(name, point=point))
    least, rng = objective(found), np.random.default_rng(0)
    assert least < objective(begin) - 1e-3
    for scale in (0.3, 0.03, 0.003):
        for _ in range(4):
            noise = jax.tree.map(lambda w: rng.normal(size=w.shape), found)
            moved = jax.tree.map(lambda w, n, scale=scale: w + scale * n, found, noise)
            assert objective(moved) > least - 1e-6


def test_proximal_operators_in_closed_form():
    kernel = PARAMS["dense"]["kernel"].astype(float)
    soft = np.sign(kernel) * np.maximum(np.abs(kernel) - STRENGTH, 0)
    np.testing.assert_allclose(stepped("soft")["dense"]["kernel"], soft, atol=1e-6)
    found = stepped("shrink")["dense"]["kernel"]
    np.testing.assert_allclose(found, kernel / 1.3, rtol=1e-5)
    u, values, v = np.linalg.svd(kernel, full_matrices=False)
    low = (u * np.maximum(values - STRENGTH, 0)) @ v
    np.testing.assert_allclose(stepped("singular")["dense"]["kernel"], low, atol=1e-5)
    scale = np.maximum(1 - STRENGTH * np.sqrt(12) / norms(kernel), 0)
    np.testing.assert_allclose(
        stepped("neurons")["dense"]["kernel"], kernel * scale, atol=1e-6
    )


def test_channels_are_scaled_in_all_their_leaves():
    found = stepped("channels")
    for group in groups_of(PARAMS, channels=True):
        before, after = values(PARAMS, group), values(found, group)
        factor = max(0, 1 - STRENGTH * np.sqrt(before.size / (before**2).sum()))
        np.testing.assert_allclose(after, before * factor, atol=1e-6)
    np.testing.assert_array_equal(found["dense"]["bias"], PARAMS["dense"]["bias"])


@pytest.mark.parametrize("name", PROXIMAL)
def test_no_strength_changes_nothing_and_a_large_one_ends_at_exact_zeros(name):
    rounding = 1e-5 if name == "singular" else 0
    for a, b in zip(
        jax.tree.leaves(stepped(name, 1)), jax.tree.leaves(PARAMS), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=rounding)
    if name != "shrink":
        assert not stepped(name, 2)["conv"]["kernel"].any()
    if name not in ("with biases", "channels"):
        np.testing.assert_array_equal(
            stepped(name, 2)["conv"]["bias"], PARAMS["conv"]["bias"]
        )


def test_groups_and_their_sizes():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert reg.neurons(shapes, bias=True) == {
        "conv/kernel": {"conv/kernel": -1, "conv/bias": -1},
        "dense/kernel": {"dense/kernel": -1, "dense/bias": -1},
    }
    assert reg.group_sizes(shapes, reg.neurons(shapes)) == {
        "conv/kernel": 4,
        "dense/kernel": 12,
    }
    assert reg.group_sizes(shapes, CHANNELS) == {"conv": 4 + 1 + 16}


def test_half_precision_is_penalised_in_float32_and_stays_what_it_is():
    half = jax.eval_shape(lambda: jax.tree.map(jnp.bfloat16, PARAMS))
    for penalty, _ in PENALTIES.values():
        assert jax.eval_shape(penalty, half).dtype == jnp.float32
    for prox, _ in PROXIMAL.values():
        found = jax.eval_shape(prox, half, jnp.float32(0.1))
        assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, half)


def test_types_are_those_of_the_weights_also_where_64_bits_are_on():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: w.astype(np.float64), PARAMS)
        for params, dtype in [(PARAMS, np.float32), (wide, np.float64)]:
            for penalty, _ in PENALTIES.values():
                assert jax.eval_shape(penalty, params).dtype == dtype
            for prox, _ in PROXIMAL.values():
                for leaf in jax.tree.leaves(jax.eval_shape(prox, params, 0.1)):
                    assert leaf.dtype == dtype


# Refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reg.l1({"bias": np.ones(3)}), "at least one prunable leaf, got none"),
        (
            lambda: reg.nuclear_norm(PARAMS, lambda path, leaf: True),
            r"kernels of at least two dimensions, got shape \(3,\) at 'conv/bias'",
        ),
        (
            lambda: reg.singular_value_threshold(PARAMS, 1.0, lambda path, leaf: True),
            r"kernels of at least two dimensions, got shape \(3,\) at 'conv/bias'",
        ),
        (
            lambda: reg.group_lasso(PARAMS, groups=["conv/kernel"]),
            "expected sets of axes by path as `groups`, .* got list",
        ),
        (
            lambda: reg.group_lasso(PARAMS, groups={"conv": "conv/kernel"}),
            r"expected axes by path as `groups\['conv'\]`, .* got str",
        ),
        (
            lambda: reg.group_lasso(PARAMS, groups={"conv": {"convolution": 0}}),
            r"got none for \['convolution'\] among",
        ),
        (
            lambda: reg.group_lasso(PARAMS, groups={"a": {"conv/kernel": 4}}),
            "a multiple of some entries along axis 4 of 'conv/kernel', one of every",
        ),
        (
            lambda: reg.group_lasso(
                PARAMS, groups={"a": {"dense/kernel": 0, "conv/kernel": -1}}
            ),
            r"multiple of 12 entries along axis -1 of 'conv/kernel', .*\(2, 2, 1, 3\)",
        ),
        (
            lambda: reg.group_soft_threshold(PARAMS, 1.0, groups=CHANNELS | UNITS),
            r"that share no weights, got \['dense/kernel'\] in several sets",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)
