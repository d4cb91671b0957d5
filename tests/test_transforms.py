"""`sparsify` keeps the Optax contract for every rule, optimiser and wrapper."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d2sparse import masks, rules, schedules, scores, tree
from d2sparse.masks import apply_masks, is_gap
from d2sparse.transforms import (
    check_refreshes,
    freeze,
    get_masks,
    refreshes_are_sound,
    reset_moments,
    set_masks,
    sparse_states,
    sparsify,
)

SHAPES = {"dense": {"kernel": (6, 4), "bias": (4,)}, "head": {"kernel": (4, 3)}}
KERNELS = 24 + 12
REFRESHES = (1, 3, 4)
STEPS = 6


def normals(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


TICKET = jax.tree.map(lambda w: w > 0.2, normals(9))

# How many weights a rule has live after a number of updates.
RULES = {
    "fixed": (
        rules.fixed(TICKET),
        lambda updates: int(masks.density(TICKET) * KERNELS),
    ),
    "static": (rules.static(0.5), lambda updates: 18),
    "one_shot": (rules.one_shot(0.5), lambda updates: 36 if updates < 2 else 18),
    "gradual": (
        rules.gradual(schedules.linear(0.0, 0.75, 3)),
        lambda updates: [36, 36, 27, 27, 9, 9, 9][updates],
    ),
    "set": (rules.set_(0.5), lambda updates: 18),
    "rigl": (rules.rigl(0.5), lambda updates: 18),
    "sparse_momentum": (rules.sparse_momentum(0.5), lambda updates: 18),
    "movement": (
        rules.movement(schedules.linear(0.0, 0.75, 3)),
        lambda updates: [36, 36, 27, 27, 9, 9, 9][updates],
    ),
    "granet": (
        rules.granet(schedules.linear(0.25, 0.75, 3)),
        lambda updates: [27, 27, 21, 21, 9, 9, 9][updates],
    ),
    "ac_dc": (
        rules.ac_dc(0.5, schedules.at([1, 4])),
        lambda updates: [36, 36, 18, 18, 36, 18, 18][updates],
    ),
    "largest": (rules.largest(0.5), lambda updates: 18),
}
INNERS = {
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9, nesterov=True),
    "adamw": lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.1),
    "lion": lambda learning_rate: optax.lion(learning_rate),
    "adafactor": lambda learning_rate: optax.adafactor(
        learning_rate, min_dim_size_to_factor=4, momentum=0.9
    ),
    "muon": lambda learning_rate: optax.contrib.muon(learning_rate),
}
SPARSE_AND_REST = {"dense": {"kernel": "sparse", "bias": "rest"}, "head": "sparse"}
WRAPPERS = {
    "plain": lambda make: make(0.1),
    "chain": lambda make: optax.chain(optax.clip(1.0), make(0.1)),
    "multi_steps": lambda make: optax.MultiSteps(
        make(0.1), 2
    ).gradient_transformation(),
    "partition": lambda make: optax.partition(
        {"sparse": make(0.1), "rest": optax.sgd(0.1)}, SPARSE_AND_REST
    ),
    "inject": lambda make: optax.inject_hyperparams(make)(learning_rate=0.1),
}


# Without optimisation XLA compiles in half the time, and it does not contract a product
# and a sum into one operation: two programs give the same bits.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Seen(NamedTuple):
    """What an optimiser was given at its last update, and what it returned."""

    inner: Any
    gradient: Any
    change: Any


def spied(inner):
    """The same optimiser, which remembers its last update in its state."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Seen(inner.init(params), zeros, zeros)

    def update(gradient, state, params=None):
        change, moments = inner.update(gradient, state.inner, params)
        return change, Seen(moments, gradient, change)

    return optax.GradientTransformation(init, update)


def masked_by_path(state, masks_of_params):
    """Zeros in every leaf of a state that has the path and shape of a masked leaf."""

    def masked(path, leaf):
        for name, mask in tree.flatten(masks_of_params).items():
            if path.endswith(f"/{name}") and leaf.shape == mask.shape:
                return jnp.where(mask, leaf, 0)
        return leaf

    return tree.map_with_path(masked, state)


def shown_to(branch, params):
    """The parameters as a branch of `optax.partition` sees them."""
    return jax.tree.map(
        lambda node, param: node if is_gap(node) else param,
        branch,
        params,
        is_leaf=is_gap,
    )


@functools.cache
def by_hand(name):
    """The inner optimiser alone, on masked gradients and masked moments."""
    inner = INNERS[name](0.1)

    def update(gradient, moments, params, live):
        return inner.update(
            apply_masks(gradient, live), masked_by_path(moments, live), params
        )

    return jit(update)


def assert_close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )


def assert_same(got, expected):
    def same(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(same, got, expected)


def check_update(before, after, params, updates, inner):
    """What must hold whenever `sparsify` was called."""
    live, seen = after.masks, after.inner
    params = shown_to(live, params)
    # Emitted are the very bits that the inner optimiser returned.
    emitted = jax.tree.map(
        lambda mask, change, param: jnp.where(mask, change, -param),
        *(live, seen.change, params),
    )
    assert_same(shown_to(live, updates), emitted)
    # It was called with masked gradients and masked moments.
    assert_same(seen.gradient, apply_masks(seen.gradient, live))
    change, moments = by_hand(inner)(seen.gradient, before.inner.inner, params, live)
    assert_close(seen.change, apply_masks(change, live))
    assert_close(seen.inner, masked_by_path(moments, live))


# Rules that grow and prune; tests/test_every_optimiser.py has the other optimisers.
BY_DEFAULT = [
    ("rigl", "sgd", "partition"),
    ("movement", "lion", "inject"),
    ("ac_dc", "muon", "plain"),
]


def contract_cases():
    """Every rule in every optimiser in every wrapper."""
    for case in itertools.product(RULES, INNERS, WRAPPERS):
        slow = () if case in BY_DEFAULT else pytest.mark.slow
        yield pytest.param(*case, id="-".join(case), marks=slow)


@pytest.mark.parametrize(("rule", "inner", "wrapper"), list(contract_cases()))
def test_the_optax_contract(rule, inner, wrapper):
    mask_rule, live_after = RULES[rule]

    def make(learning_rate):
        spy = spied(INNERS[inner](learning_rate))
        return sparsify(spy, mask_rule, schedules.at(REFRESHES))

    tx = WRAPPERS[wrapper](make)
    traces = []

    @jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params)
        return updates, optax.apply_updates(params, updates), state

    state = tx.init(normals(0))
    params = apply_masks(normals(0), get_masks(state))
    begin = jax.tree.map(jax.typeof, (params, state))
    for seed in range(1, STEPS + 1):
        (before,), old_params = sparse_states(state), params
        updates, params, state = step(params, state, normals(seed))
        (after,), live = sparse_states(state), get_masks(state)
        assert int(masks.density(live) * KERNELS) == live_after(int(after.step))
        assert_same(params, apply_masks(params, live))
        assert jax.tree.map(jax.typeof, (params, state)) == begin
        if after.step > before.step:
            check_update(before, after, old_params, updates, inner)
    assert len(traces) == 1
    assert after.step == (STEPS // 2 if wrapper == "multi_steps" else STEPS)


# Bits.


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("sgd", "lion", "adafactor")
        ),
    ],
)
def test_live_changes_are_the_bits_of_the_inner_optimiser(name):
    inner = INNERS[name](0.1)
    tx = sparsify(inner, rules.fixed(TICKET))
    params = apply_masks(normals(0), TICKET)
    state, moments = tx.init(params), inner.init(params)

    @jit
    def alone(grads, moments, params):
        return inner.update(apply_masks(grads, TICKET), moments, params)

    update = jit(tx.update)
    for seed in range(2):
        grads = normals(seed)
        updates, state = update(grads, state, params)
        changes, moments = alone(grads, moments, params)
        moments = masked_by_path(moments, TICKET)
        assert_same(apply_masks(updates, TICKET), apply_masks(changes, TICKET))
        assert_same(masked_by_path(state.inner, TICKET), moments)
        params = optax.apply_updates(params, updates)


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_a_scan_gives_the_same_bits_as_a_loop():
    # Every refresh looks at its step and draws from its key.
    rule = rules.gradual(schedules.linear(0.0, 0.75, 3), scores.random)
    tx = sparsify(INNERS["sgd"](0.1), rule, schedules.at(REFRESHES))
    step, state = make_step(tx), tx.init(normals(0))
    start = apply_masks(normals(0), get_masks(state)), state
    grads = [normals(seed) for seed in range(STEPS)]

    def scan(carry, grads):
        return jax.lax.scan(lambda carry, g: (step(*carry, g), None), carry, grads)[0]

    looped, jitted = start, jit(step)
    for g in grads:
        looped = jitted(*looped, g)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    assert_same(jit(scan)(start, stacked), looped)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_zeros_are_exact_where_updates_are_less_precise_than_parameters(dtype):
    tx = sparsify(optax.sgd(0.1), rules.fixed(TICKET))
    params = normals(0)
    updates, _ = jit(tx.update)(normals(1, dtype=dtype), tx.init(params), params)
    updated = optax.apply_updates(params, updates)
    assert_same(updated, apply_masks(updated, TICKET))


# Moments.


MOVING = sparsify(optax.sgd(1.0, momentum=0.5), rules.rigl(0.5, 0.5))


@jit
def moving_step(weights, state, gradient, refresh):
    """One step of four weights, two of them live, of which a refresh moves one."""
    params, grads = {"w": weights[None]}, {"w": gradient[None]}
    updates, state = MOVING.update(grads, state, params, refresh=refresh)
    return optax.apply_updates(params, updates)["w"][0], state


def moving_start(*weights):
    state = MOVING.init({"w": jnp.zeros((1, 4))})
    live = {"w": np.array([[True, True, False, False]])}
    return jnp.array(weights), set_masks(state, live)


def test_moments_of_a_grown_weight_start_at_zero():
    weights, state = moving_start(5.0, 1.0, 7.0, 7.0)
    weights, state = moving_step(weights, state, jnp.array([1.0, 0.5, 9.0, 9.0]), False)
    assert weights.tolist() == [4.0, 0.5, 0.0, 0.0]
    # The second weight falls, the last one grows: from 0, by its gradient alone.
    weights, state = moving_step(weights, state, jnp.array([0.0, 0.0, 1.0, 2.0]), True)
    assert get_masks(state)["w"].tolist() == [[True, False, False, True]]
    assert weights.tolist() == [3.5, 0.0, 0.0, -2.0]
    # The second one grows again, and nothing is left of its old momentum.
    weights, state = moving_step(weights, state, jnp.array([0.0, 8.0, 0.0, 0.0]), True)
    assert get_masks(state)["w"].tolist() == [[True, True, False, False]]
    assert weights.tolist() == [3.25, -8.0, 0.0, 0.0]
    assert state.inner[0].trace["w"].tolist() == [[0.25, 8.0, 0.0, 0.0]]


def test_a_weight_that_falls_and_grows_at_once_keeps_value_and_moment():
    weights, state = moving_start(5.0, 1.0, 0.0, 0.0)
    weights, state = moving_step(weights, state, jnp.array([0.0, 0.5, 0.0, 0.0]), False)
    weights, state = moving_step(weights, state, jnp.array([0.0, 2.0, 1.0, 1.0]), True)
    assert weights.tolist() == [5.0, 0.5 - (0.25 + 2.0), 0.0, 0.0]


OPTIMISERS = {
    "amsgrad": optax.amsgrad(0.1),
    "chain": optax.chain(optax.clip(1.0), optax.adam(0.1), optax.ema(0.9)),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "masked": optax.masked(optax.adam(0.1), {"dense": True, "head": False}),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 3),
    "partition": optax.partition(
        {"sparse": optax.adam(0.1), "rest": optax.sgd(0.1, momentum=0.9)},
        SPARSE_AND_REST,
    ),
    "prodigy": optax.contrib.prodigy(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9, centered=True),
    "sam": optax.contrib.sam(optax.sgd(0.1, momentum=0.9), optax.sgd(0.1)),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    **{name: make(0.1) for name, make in INNERS.items()},
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_moments_of_any_optimiser_are_masked(name):
    inner = OPTIMISERS[name]
    state = jax.tree.map(jnp.ones_like, inner.init(normals(0)))
    masked = reset_moments(inner, state, TICKET, apply_masks(normals(0), TICKET))
    assert_same(masked, masked_by_path(state, TICKET))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), masked, state)
    assert any(jax.tree.leaves(changed))


def test_gradients_of_pruned_weights_do_no_harm():
    tx = sparsify(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        rules.fixed(TICKET),
    )
    grads = jax.tree.map(lambda g, m: np.where(m, g, np.nan), normals(1), TICKET)
    grads = jax.tree.map(np.float32, grads)
    updates, state = jit(tx.update)(grads, tx.init(normals(0)), normals(0))
    updated = optax.apply_updates(normals(0), updates)
    assert_same(updated, apply_masks(updated, TICKET))
    assert all(
        np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updated, state.inner))
    )


# Refreshes.


def test_refresh_takes_the_place_of_the_schedule():
    tx = sparsify(optax.sgd(0.1), rules.one_shot(0.5), schedules.at([0]))
    state = tx.init(normals(0))
    for refresh, density in [(False, 1.0), (True, 0.5)]:
        _, after = tx.update(normals(1), state, normals(0), refresh=refresh)
        assert masks.density(get_masks(after)) == density


def test_the_default_is_a_refresh_every_100_steps():
    tx = sparsify(optax.sgd(0.1), rules.one_shot(0.5))
    state, update = tx.init(normals(0)), jit(tx.update)
    for step, density in [(0, 1.0), (99, 1.0), (100, 0.5), (150, 1.0), (200, 0.5)]:
        now = state._replace(step=jnp.int32(step))
        _, after = update(normals(1), now, normals(0))
        assert masks.density(get_masks(after)) == density
        assert after.step == step + 1


def test_growth_gradients_are_computed_at_refreshes_only_and_decide_growth():
    calls = []
    tx = sparsify(optax.sgd(0.5), rules.rigl(0.5, 0.5), schedules.at([2]))
    params = {"w": jnp.array([[4.0, 3.0, 0.0, 0.0]])}
    state = set_masks(tx.init(params), {"w": params["w"] > 0})

    def growth_fn():
        jax.debug.callback(lambda: calls.append(1))
        return {"w": jnp.array([[0.0, 0.0, 9.0, 1.0]])}

    @jit
    def step(params, state):
        grads = {"w": jnp.array([[0.0, 0.0, 0.0, 1.0]])}
        updates, state = tx.update(grads, state, params, growth_fn=growth_fn)
        return optax.apply_updates(params, updates), state

    for count, live in enumerate(
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]
    ):
        params, state = step(params, state)
        jax.effects_barrier()
        assert get_masks(state)["w"].astype(int).tolist() == [live]
        assert len(calls) == (count >= 2)
    # The inner optimiser saw the other gradient, which is 0 there.
    assert params["w"].tolist() == [[4.0, 0.0, 0.0, 0.0]]


def test_an_eager_step_between_refreshes_does_not_touch_the_rule():
    calls = []

    def update(live, params, grads, step, key):
        calls.append(int(step))  # Raises where the step is traced.
        return live

    rule = rules.static(0.5)._replace(update=update)
    tx = sparsify(optax.sgd(0.1), rule, schedules.at([1]))
    state = tx.init(normals(0))
    params = apply_masks(normals(0), get_masks(state))
    for _ in range(3):
        _, state = tx.update(normals(1), state, params)
    assert calls == [1]


def test_a_score_of_nan_is_refused_by_an_eager_step_and_the_leaf_named():
    tx = sparsify(optax.sgd(0.1), rules.one_shot(0.5, nan_in_head), schedules.at([0]))
    with pytest.raises(ValueError, match="without NaN, got NaN at 'head/kernel'"):
        tx.update(normals(1), tx.init(normals(0)), normals(0))


def nan_in_head(params, grads, key):
    """A score that is NaN in one leaf, of weights and gradients that are finite."""
    return tree.map_with_path(
        lambda path, w: jnp.abs(w) + (np.nan if path == "head/kernel" else 0.0), params
    )


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rules.one_shot(0.5, nan_in_head), marks=pytest.mark.slow),
        rules.one_shot(0.5, nan_in_head, iterations=3),
        pytest.param(
            rules.gradual(lambda step: 0.5, nan_in_head), marks=pytest.mark.slow
        ),
        rules.ac_dc(0.5, lambda step: True, nan_in_head),
        rules.prune_and_grow(0.5, nan_in_head),
    ],
)
def test_a_compiled_refresh_notes_scores_of_nan(rule):
    tx = sparsify(optax.sgd(0.1), rule, schedules.at([1]))
    state, update = tx.init(normals(0)), jit(tx.update)
    _, state = update(normals(1), state, normals(0))
    check_refreshes(state)
    _, state = update(normals(1), state, normals(0))
    assert not refreshes_are_sound(state)
    with pytest.raises(ValueError, match=r"NaN in \['head/kernel'\]; lower"):
        check_refreshes(state)


def test_a_compiled_refresh_notes_a_score_of_zero_times_infinity():
    rule = rules.one_shot(0.5, scores.saliency)
    tx = sparsify(optax.sgd(0.1), rule, schedules.at([0]))
    params = {"kernel": jnp.array([[0.0, 1.0]])}
    grads = {"kernel": jnp.array([[np.inf, 1.0]])}
    _, state = jit(tx.update)(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"NaN in \['kernel'\]"):
        check_refreshes(state)


def test_a_rule_of_ones_own_may_note_nan():
    def noted(live, params, grads, step, key):
        return live, {"head/kernel": jnp.any(step >= 0)}

    rule = rules.static(0.5)._replace(update=rules.Noting(noted))
    tx = sparsify(optax.sgd(0.1), rule, schedules.at([0]))
    _, state = jit(tx.update)(normals(1), tx.init(normals(0)), normals(0))
    assert state.nan.tolist() == [False, False, True]


def test_a_sparsity_out_of_range_is_refused_by_an_eager_step():
    rule = rules.gradual(lambda step: 1.5 * step)
    tx = sparsify(optax.sgd(0.1), rule, schedules.at([1]))
    state = tx.init(normals(0))
    _, state = tx.update(normals(1), state, normals(0))
    with pytest.raises(ValueError, match=r"sparsity in \[0, 1\)"):
        tx.update(normals(1), state, normals(0))


def conditions(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]


def test_an_unbatched_refresh_stays_a_condition_under_vmap():
    tx = sparsify(optax.sgd(0.1), rules.static(0.5))
    one_run = normals(1), tx.init(normals(0)), normals(0)
    runs = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one_run)

    def update(grads, state, params, refresh):
        return tx.update(grads, state, params, refresh=refresh)

    given = jax.vmap(update, in_axes=(0, 0, 0, None))
    assert conditions(jax.make_jaxpr(given)(*runs, True).jaxpr)
    # Without it the condition is lost: each run decides for itself.
    assert not conditions(jax.make_jaxpr(jax.vmap(tx.update))(*runs).jaxpr)


def test_runs_by_vmap_equal_runs_one_by_one():
    def run(key, sparsity):
        tx = sparsify(optax.sgd(0.1), rules.static(sparsity), key=key)
        state = tx.init(normals(0))
        params = apply_masks(normals(0), get_masks(state))
        params, state = make_step(tx)(params, state, normals(1))
        return params, get_masks(state)

    keys, sparsities = jax.random.split(jax.random.key(5), 2), jnp.array([0.5, 0.75])
    swept, alone = jit(jax.vmap(run))(keys, sparsities), jit(run)
    for i in range(2):
        params, live = alone(keys[i], sparsities[i])
        swept_params, swept_live = jax.tree.map(lambda leaf, i=i: leaf[i], swept)
        assert_same(swept_live, live)
        assert_close(swept_params, params)


# The state.


def test_seeds_and_keys_decide_the_pattern():
    def pattern(**options):
        tx = sparsify(optax.sgd(0.1), rules.static(0.5), **options)
        return get_masks(tx.init(normals(0)))

    assert_same(pattern(), pattern(key=0))
    assert_same(pattern(key=3), pattern(key=jax.random.key(3)))
    assert_same(pattern(key=3), pattern(key=np.int64(3)))
    kernels = [pattern(key=seed)["dense"]["kernel"] for seed in range(3)]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])


def test_keys_are_kept_as_plain_numbers_and_drawn_from_by_their_own_algorithm():
    def states(key):
        tx = sparsify(optax.sgd(0.1), rules.set_(0.5, drop_fraction=1.0), key=key)
        state = tx.init(normals(0))
        params = apply_masks(normals(0), get_masks(state))
        return state, tx.update(normals(1), state, params, refresh=True)[1]

    for a, b in zip(states(3), states(jax.random.PRNGKey(3)), strict=True):
        assert a.key.dtype == jnp.uint32
        assert_same(a, b)
    first, second = states(jax.random.key(3, impl="rbg"))
    assert first.key.shape == (4,)
    assert not np.array_equal(
        first.masks["dense"]["kernel"], states(3)[0].masks["dense"]["kernel"]
    )
    assert not np.array_equal(*(s.masks["dense"]["kernel"] for s in (first, second)))


@pytest.mark.parametrize(
    "key", [jax.random.split(jax.random.key(0)), 0.5, jnp.zeros(2)], ids=str
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="expected a seed or one key such as"):
        sparsify(optax.sgd(0.1), rules.static(0.5), key=key).init(normals(0))


@pytest.mark.parametrize("growth", [False, True])
def test_a_gradient_of_none_is_refused_and_its_leaf_named(growth):
    tx, params = sparsify(optax.sgd(0.1), rules.rigl(0.5)), normals(0)
    none = {**normals(1), "head": {"kernel": None}}
    grads, growth_fn = (normals(1), lambda: none) if growth else (none, None)
    with pytest.raises(
        ValueError, match=r"got none or None at \['head/kernel'\]; diff"
    ):
        tx.update(grads, tx.init(params), params, refresh=True, growth_fn=growth_fn)


def test_half_precision_is_observed_in_float32():
    observe = rules.sparse_momentum(0.5).observe
    tx = sparsify(optax.sgd(0.1), rules.static(0.5)._replace(observe=observe))
    params = normals(0, dtype=jnp.bfloat16)
    _, state = jit(tx.update)(params, tx.init(params), params)
    kinds = {x.dtype.name for x in jax.tree.leaves(state.observed) if x.ndim}
    assert kinds == {"float32"}


@pytest.mark.parametrize("outer", [sparsify, freeze])
@pytest.mark.parametrize("inner", [sparsify, freeze])
def test_masks_under_masks_are_refused(outer, inner):
    nest = optax.chain(inner(optax.sgd(0.1), rules.static(0.5)))
    with pytest.raises(ValueError, match="expected an inner optimiser without masks"):
        outer(nest, rules.static(0.5)).init(normals(0))


def test_every_refresh_draws_from_a_key_of_its_own():
    tx = sparsify(optax.sgd(0.1), rules.set_(0.5, drop_fraction=1.0), key=2)
    state = tx.init(normals(0))
    params = apply_masks(normals(0), get_masks(state))

    def refreshed(step):
        now = state._replace(step=jnp.int32(step))
        _, after = tx.update(normals(1), now, params, refresh=True)
        assert jnp.all(after.key == state.key)
        return get_masks(after)["dense"]["kernel"]

    np.testing.assert_array_equal(refreshed(0), refreshed(0))
    drawn = [refreshed(step) for step in range(3)]
    assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(drawn))


def test_state_and_parameters_may_be_donated():
    key, params = jax.random.key(1), normals(0)
    tx = sparsify(INNERS["adamw"](0.1), rules.one_shot(0.5), schedules.every(1), key)
    ticket = jax.tree.map(jnp.copy, TICKET)
    state = set_masks(tx.init(params), ticket)
    again = sparsify(optax.sgd(0.1), rules.fixed(ticket))
    states, params = (
        (state, again.init(params)),
        (params, jax.tree.map(jnp.copy, params)),
    )

    def step(params, states, grads):
        first = make_step(tx)(params[0], states[0], grads)
        second = make_step(again)(params[1], states[1], grads)
        return tuple(zip(first, second, strict=True))

    donating = jit(step, donate_argnums=(0, 1))
    old = params, states
    for seed in range(2):
        params, states = donating(params, states, normals(seed))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    # What the caller gave is still there.
    assert not key.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ticket))


def test_masks_are_found_in_any_nest():
    sparse = sparsify(optax.sgd(0.1), rules.fixed(TICKET))
    nests = [
        sparse,
        optax.chain(optax.clip(1.0), optax.chain(optax.chain(sparse))),
        optax.MultiSteps(optax.chain(sparse), 2),
        optax.apply_if_finite(sparse, 3),
        optax.inject_hyperparams(lambda rate: optax.chain(sparse))(rate=0.1),
    ]
    for tx in nests:
        state = tx.init(normals(0))
        assert_same(get_masks(state), TICKET)
        assert_same(get_masks({"any": [state, None]}), TICKET)
        assert len(sparse_states(state)) == 1


def test_masks_of_several_branches_are_merged():
    labels = {"dense": {"kernel": "a", "bias": "rest"}, "head": "b"}
    branches = {
        "a": sparsify(optax.sgd(0.1), rules.static(0.75)),
        "b": sparsify(optax.adam(0.1), rules.fixed(TICKET)),
        "rest": optax.sgd(0.1),
    }
    tx = optax.partition(branches, labels)
    state = tx.init(normals(0))
    merged = get_masks(state)
    assert int(merged["dense"]["kernel"].sum()) == 6
    assert is_gap(merged["dense"]["bias"])
    assert_same(merged["head"], TICKET["head"])
    assert len(sparse_states(state)) == 2

    replaced = set_masks(state, TICKET)
    assert is_gap(get_masks(replaced)["dense"]["bias"])
    for path in ("dense/kernel", "head/kernel"):
        got, expected = (tree.flatten(m)[path] for m in (get_masks(replaced), TICKET))
        np.testing.assert_array_equal(got, expected)
    params, _ = jit(make_step(tx))(normals(0), replaced, normals(1))
    assert_same(params, apply_masks(params, get_masks(replaced)))


def test_two_masks_for_one_leaf_are_refused():
    state = sparsify(optax.sgd(0.1), rules.fixed(TICKET)).init(normals(0))
    with pytest.raises(ValueError, match="for every leaf, got two; take the masks"):
        get_masks((state, state))


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.chain(optax.sgd(0.1))])
def test_a_state_without_masks_is_refused(tx):
    state = tx.init(normals(0))
    for ask in (get_masks, lambda state: set_masks(state, TICKET)):
        with pytest.raises(ValueError, match="state without masks; was it made by"):
            ask(state)
    assert sparse_states(state) == []


def test_masks_that_do_not_fit_the_state_are_refused():
    state = sparsify(optax.sgd(0.1), rules.static(0.5)).init(normals(0))
    wrong = {**TICKET, "head": {"kernel": np.ones((3, 4), bool)}}
    with pytest.raises(
        ValueError, match=r"shape \(4, 3\) at 'head/kernel', got \(3, 4\)"
    ):
        set_masks(state, wrong)
    with pytest.raises(ValueError, match=r"none for .*'dense/bias', 'dense/kernel'"):
        set_masks(state, {"head": TICKET["head"]})


def test_set_masks_takes_arrays_of_numpy_and_of_other_types():
    state = sparsify(optax.sgd(0.1), rules.static(0.5)).init(normals(0))
    as_numbers = jax.tree.map(lambda mask: np.asarray(mask, np.uint8), TICKET)
    assert_same(get_masks(set_masks(state, as_numbers)), TICKET)
    assert jax.tree.leaves(get_masks(set_masks(state, as_numbers)))[0].dtype == bool


# The rest of the contract.


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: optax.chain(optax.clip(9.0), tx)]
)
def test_other_arguments_reach_the_inner_optimiser(wrap):
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    tx = wrap(sparsify(inner, rules.fixed(TICKET)))
    arguments = {"refresh": False, "growth_fn": None, "value": 2.0, "name": "loss"}
    tx.update(normals(1), tx.init(normals(0)), normals(0), **arguments)
    assert seen == {"value": 2.0, "name": "loss"}


def test_updates_may_be_named_arguments():
    tx = sparsify(optax.sgd(0.1), rules.fixed(TICKET))
    state = tx.init(params=normals(0))
    by_name = tx.update(updates=normals(1), state=state, params=normals(0))
    assert_same(by_name, tx.update(normals(1), state, normals(0)))


def test_parameters_are_needed():
    tx = sparsify(optax.sgd(0.1), rules.fixed(TICKET))
    with pytest.raises(ValueError, match=r"call `tx.update\(grads, state, params\)`"):
        tx.update(normals(1), tx.init(normals(0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparsify(optax.sgd(0.1), 0.9), r"expected a rule, such as .*got 0\.9"),
        (
            lambda: sparsify(optax.sgd(0.1), rules.rigl(0.9), 100),
            r"pass `every\(100\)`",
        ),
        (lambda: rules.rigl("0.9"), "expected one number as the sparsity, got '0.9'"),
        (lambda: rules.static(jnp.array([0.5, 0.6])), "one number as the sparsity"),
        (lambda: rules.rigl(None), r"sparsity in \[0, 1\), .*got None"),
    ],
)
def test_what_is_no_rule_no_schedule_and_no_sparsity_is_refused(make, message):
    params = {"kernel": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match=message):
        sparsify(optax.sgd(0.1), make()).init(params)
