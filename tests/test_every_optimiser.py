"""Every optimiser and wrapper of the installed Optax, under and over masks."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from d2sparse import rules, tree
from d2sparse.masks import apply_masks
from d2sparse.schedules import every
from d2sparse.transforms import (
    average_weights,
    check_refreshes,
    check_sparse,
    freeze,
    get_masks,
    reset_moments,
    sparsify,
)

SHAPES = {"head": (4, 3), "kernel": (3, 4), "bias": (4,)}
STEPS = 5


def normals(seed):
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()}


def first(params, key):
    def stripes(path, w):
        return jnp.arange(w.size).reshape(w.shape) % (1 if path == "bias" else 2) == 0

    return tree.map_with_path(stripes, params)


def moved(masks, params, grads, step, key):
    return tree.map_with_path(lambda path, m: m if path == "bias" else ~m, masks)


# Every other weight, and at a refresh those that were pruned.
RULE = rules.MaskRule(first, moved)


def schedule(step):
    return 0.1 / (1.0 + step)


def always(step, loss=None, **extra):
    return step >= 0


def sgd():
    return optax.sgd(0.1, momentum=0.9)


def of_rate(maker: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    return lambda: maker(0.1, **options)


def names(maker: Callable[..., Any], text: str) -> dict[str, Callable[[], Any]]:
    """Makers by name, of optimisers that need a learning rate or nothing."""
    return {name: maker(name) for name in text.split()}


# By name, how to make one for the inside of `sparsify` and of `freeze`.
INSIDE: dict[str, Callable[[], Any]] = {
    **names(
        lambda name: of_rate(getattr(optax, name)),
        """adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad
        fromage lamb lars lion nadam nadamw novograd optimistic_adam_v2
        optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3 yogi
        adaptive_grad_clip add_decayed_weights clip clip_by_block_rms
        clip_by_global_norm ema scale scale_by_learning_rate trace""",
    ),
    **names(
        lambda name: of_rate(getattr(optax.contrib, name)),
        """acprop ademamix adopt dog dowg galore madgrad momo momo_adam muon sophia
        schedule_free_adamw schedule_free_sgd simplified_ademamix""",
    ),
    **names(
        lambda name: getattr(optax, name),
        """apply_every centralize identity keep_params_nonnegative lbfgs
        normalize_by_update_norm polyak_sgd scale_by_adadelta scale_by_adam
        scale_by_adamax scale_by_adan scale_by_amsgrad scale_by_belief
        scale_by_distance_over_gradients scale_by_factored_rms scale_by_lbfgs
        scale_by_lion scale_by_novograd scale_by_optimistic_gradient
        scale_by_param_block_norm scale_by_param_block_rms scale_by_polyak
        scale_by_radam scale_by_rms scale_by_rss scale_by_sign scale_by_sm3
        scale_by_stddev scale_by_trust_ratio scale_by_yogi set_to_zero zero_nans""",
    ),
    **names(
        lambda name: getattr(optax.contrib, name),
        """cocob dadapt_adamw normalize prodigy reduce_on_plateau scale_by_acprop
        scale_by_ademamix scale_by_adopt scale_by_cocob scale_by_galore scale_by_muon
        hutchinson_estimator_diag_hessian scale_by_simplified_ademamix""",
    ),
    "noisy_sgd": of_rate(optax.noisy_sgd, key=0),
    "add_noise": lambda: optax.add_noise(0.1, 0.55, 0),
    "optimistic_adam": lambda: optax.optimistic_adam(0.1, 0.1),
    "scale_by_backtracking_linesearch": lambda: optax.chain(
        sgd(), optax.scale_by_backtracking_linesearch(2)
    ),
    "scale_by_zoom_linesearch": lambda: optax.chain(
        sgd(), optax.scale_by_zoom_linesearch(2)
    ),
    "scale_by_madgrad": of_rate(optax.contrib.scale_by_madgrad),
    "scale_by_rprop": of_rate(optax.scale_by_rprop),
    "scale_by_schedule": lambda: optax.scale_by_schedule(schedule),
    "measure_with_ema": lambda: optax.chain(
        sgd(), optax.snapshot("norm", optax.measure_with_ema(optax.tree.norm, 0.9))
    ),
    "monitor": lambda: optax.chain(sgd(), optax.monitor({"n": optax.tree.norm})),
    "snapshot": lambda: optax.chain(
        sgd(), optax.snapshot("norm", lambda *args, **extra: optax.tree.norm(args[0]))
    ),
    "stateless": lambda: optax.stateless(lambda updates, params: updates),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, p: g),
    "average_weights": lambda: average_weights(sgd()),
}
# Wrappers, of a given optimiser.
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, always),
    "flatten": optax.flatten,
    "freeze": lambda tx: optax.chain(
        tx, optax.freeze({"head": False, "kernel": True, "bias": False})
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.scale(rate), tx)
    )(rate=1.0),
    "inject_stateful_hyperparams": lambda tx: optax.inject_stateful_hyperparams(
        lambda rate: optax.chain(optax.scale(rate), tx)
    )(rate=1.0),
    "lookahead": lambda tx: optax.lookahead(tx, 2, 0.5),
    "masked": lambda tx: optax.masked(
        tx, {"head": True, "kernel": True, "bias": False}
    ),
    "mechanize": optax.contrib.mechanize,
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "b": sgd()}, {"head": "a", "kernel": "a", "bias": "b"}
    ),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tx", tx)),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": sgd()}, {"head": "a", "kernel": "a", "bias": "b"}
    ),
    "sam": lambda tx: optax.contrib.sam(tx, optax.sgd(0.1)),
    "sam opaque": lambda tx: optax.contrib.sam(tx, optax.sgd(0.1), opaque_mode=True),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "selective_transform": lambda tx: optax.selective_transform(
        tx, freeze_mask={"head": False, "kernel": False, "bias": True}
    ),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "with_extra_args_support": optax.with_extra_args_support,
}
# What Optax cannot do under masks: the sentence that `init` or `update` says.
REFUSED = {
    "lbfgs": r"maps over its own state with `optax.tree.map_params`",
    "scale_by_backtracking_linesearch": r"maps over its own state with `optax.tree",
    "scale_by_zoom_linesearch": r"maps over its own state with `optax.tree.map_params`",
    "sm3": r"maps over its own state with `optax.tree.map_params`",
    "scale_by_sm3": r"maps over its own state with `optax.tree.map_params`",
    "flatten": r"maps over its own state with `optax.tree.map_params`.*flatten",
    "lookahead": r"expected parameters, got `optax.LookaheadParams`.*average_weights",
}
# Public names that are no optimiser: they need no line below if they live there.
ELSEWHERE = (
    "optax.losses",
    "optax.schedules",
    "optax.second_order",
    "optax.projections",
)
# The last two take gradients of single examples.
NO_OPTIMISERS = """apply_updates bias_correction global_norm incremental_update
    init_empty_state matrix_inverse_pth_root microbatch multi_normal nnls
    periodic_update per_example_global_norm_clip per_example_layer_norm_clip
    power_iteration safe_increment safe_int32_increment safe_norm
    safe_root_mean_squares scale_gradient skip_large_updates skip_not_finite
    tree_map_params unitwise_clip unitwise_norm update_infinity_moment update_moment
    update_moment_per_elem_norm value_and_grad_from_state schedule_free_eval_params
    differentially_private_aggregate dpsgd"""
# Those whose states are unlike those of others are tested by default.
BY_DEFAULT = """adafactor noisy_sgd lbfgs dog galore mechanize prodigy schedule_free sam
    average_weights MultiSteps masked partition flatten lookahead"""
FROZEN_BY_DEFAULT = ("adafactor", "schedule_free", "lbfgs", "lookahead")
# What they are given beside gradients.
NEEDS = {
    "polyak_sgd": ("value",),
    "scale_by_polyak": ("value",),
    "momo": ("value",),
    "momo_adam": ("value",),
    "reduce_on_plateau": ("value",),
    "sophia": ("obj_fn",),
    "hutchinson_estimator_diag_hessian": ("obj_fn",),
    "sam opaque": ("grad_fn",),
    "conditionally_mask": ("loss",),
}


def test_every_name_of_optax_is_classified():
    known = {*INSIDE, *WRAPPERS, *NO_OPTIMISERS.split()}
    for module in (optax, optax.contrib, optax.transforms):
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value) or inspect.isclass(value):
                continue
            home = getattr(value, "__module__", "")
            if home == "typing" or home.startswith(("collections", *ELSEWHERE)):
                continue
            assert name in known, (
                f"{module.__name__}.{name} is new: say in INSIDE or WRAPPERS how to "
                "make one, in REFUSED if it cannot be under masks, or add it to "
                "NO_OPTIMISERS"
            )


def loss(params):
    return sum(jnp.sum((w - 1.0) ** 2) for w in jax.tree.leaves(params))


def plain(leaf):
    """Numbers, of random keys too."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def run(tx, needs=(), masked_first=True, steps=STEPS, inner=None):
    """Parameters before every update and after the last one, and states after each.

    Given an inner optimiser, its last state with fresh moments of pruned weights too.
    """

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        known = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
        known |= {"grad_fn": lambda p, _: jax.grad(loss)(p), "loss": value}
        extra = {need: known[need] for need in needs}
        updates, state = tx.update(grads, state, params, **extra)
        after = optax.apply_updates(params, updates)
        after = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), after, params)
        return (after, state), (params, state)

    @jax.jit
    def program(params):
        state = tx.init(params)
        if masked_first:
            params = apply_masks(params, get_masks(state))
        (last, state), seen = jax.lax.scan(step, (params, state), None, length=steps)
        fresh = inner and reset_moments(inner, state.inner, state.masks, last)
        return jax.tree.map(plain, (fresh, last, *seen))

    fresh, last, befores, states = jax.device_get(program(normals(0)))
    every_step = [jax.tree.map(lambda x, i=i: x[i], befores) for i in range(steps)]
    after_step = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(steps)]
    params = [*every_step, last]
    return (params, after_step, fresh) if inner else (params, after_step)


def check_under(wrap, inner, name):
    zero = wrap is sparsify
    tx, needs = wrap(inner, RULE, every(2)), NEEDS.get(name, ())
    params, states, fresh = run(tx, needs, masked_first=zero, inner=inner)
    for before, after, state in zip(params, params[1:], states, strict=False):
        for path, mask in get_masks(state).items():
            expected = np.zeros_like(mask, float) if zero else before[path]
            np.testing.assert_array_equal(after[path][~mask], expected[~mask])
    assert all(np.isfinite(leaf).all() for leaf in params[-1].values())
    # In the state too: moments as at the start, copies of weights as the weights.
    last = states[-1]
    jax.tree.map(np.testing.assert_array_equal, fresh, last.inner)
    if "schedule_free" in name:
        evaluated = optax.contrib.schedule_free_eval_params(last.inner, params[-1])
        for path, mask in last.masks.items():
            expected = params[-1][path][~mask]
            np.testing.assert_allclose(evaluated[path][~mask], expected, rtol=1e-5)


def under_masks():
    for wrap, chosen in ((sparsify, BY_DEFAULT.split()), (freeze, FROZEN_BY_DEFAULT)):
        for name in (*INSIDE, *WRAPPERS):
            slow = () if name in chosen else pytest.mark.slow
            yield pytest.param(wrap, name, id=f"{wrap.__name__}-{name}", marks=slow)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("wrap", "name"), list(under_masks()))
def test_under_masks_every_optimiser_keeps_the_contract_or_is_refused(wrap, name):
    make = INSIDE.get(name) or (lambda: WRAPPERS[name](sgd()))
    if name not in REFUSED:
        check_under(wrap, make(), name)
        return
    params = normals(0)
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    with pytest.raises(ValueError, match=REFUSED[name]):
        wrap(make(), RULE).init(params)


# Over masks.

# They change the updates of what they wrap.
ALTERING = ("freeze", "mechanize", "sam", "schedule_free")

# What comes after `sparsify` in a chain, or around it: whether pruned weights are still
# exactly 0 in the end ("keeps"), or `check_refreshes` and `check_sparse` report that
# they are not ("told"), or the latter alone does ("checked"). `sam` mixes states by
# arithmetic, in which masks become integers; it goes inside. The parameters are not
# masked before the first update.
NESTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "first in a chain": ("keeps", lambda tx: optax.chain(tx, optax.identity())),
    "last in a chain": ("keeps", lambda tx: optax.chain(optax.clip(0.1), tx)),
    "amid a chain": (
        "keeps",
        lambda tx: optax.chain(optax.trace(0.9), tx, optax.zero_nans()),
    ),
    "nonnegative": (
        "keeps",
        lambda tx: optax.chain(tx, optax.keep_params_nonnegative()),
    ),
    **{
        name: ("keeps", wrapper)
        for name, wrapper in WRAPPERS.items()
        if name not in ALTERING and name not in REFUSED
    },
    "average_weights": ("keeps", average_weights),
    "rate after": (
        "told",
        lambda tx: optax.chain(tx, optax.scale_by_learning_rate(1e-3)),
    ),
    "scale after": ("told", lambda tx: optax.chain(tx, optax.scale(0.5))),
    "clip after": ("told", lambda tx: optax.chain(tx, optax.clip(0.01))),
    "norm after": ("told", lambda tx: optax.chain(tx, optax.clip_by_global_norm(0.1))),
    "decay after": ("told", lambda tx: optax.chain(tx, optax.add_decayed_weights(0.1))),
    "noise after": ("told", lambda tx: optax.chain(tx, optax.add_noise(0.1, 0.55, 0))),
    "trace after": ("told", lambda tx: optax.chain(tx, optax.trace(0.9))),
    "average after": ("told", lambda tx: optax.chain(tx, optax.ema(0.9, debias=False))),
    "adam after": ("told", lambda tx: optax.chain(tx, optax.scale_by_adam())),
    "skipped": (
        "checked",
        lambda tx: optax.conditionally_transform(tx, lambda step: step < 0),
    ),
    "schedule_free": ("told", WRAPPERS["schedule_free"]),
    "mechanize": ("told", WRAPPERS["mechanize"]),
}
OVER_BY_DEFAULT = [
    "rate after",
    "schedule_free",
    "MultiSteps",
    "amid a chain",
    "skipped",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in OVER_BY_DEFAULT else pytest.mark.slow)
        for n in NESTINGS
    ],
)
def test_over_masks_a_wrapper_keeps_the_contract_or_it_is_told(name):
    outcome, wrap = NESTINGS[name]
    tx = wrap(sparsify(optax.sgd(0.1), RULE, every(2)))
    params, states = run(tx, NEEDS.get(name, ()), masked_first=False, steps=6)
    if outcome == "keeps":
        check_refreshes(states[-1])
        # The two first updates of MultiSteps are one.
        for after, state in zip(params[2:], states[1:], strict=True):
            check_sparse(after, state)
        return
    if outcome == "told":
        with pytest.raises(ValueError, match=r"got others in \['.*put `sparsify` last"):
            check_refreshes(states[1] if name not in LATER else states[-1])
    reports = [is_reported(p, s) for p, s in zip(params[1:], states, strict=True)]
    assert any(reports)


def is_reported(params, state):
    try:
        check_sparse(params, state)
    except ValueError as error:
        return "expected pruned weights to be 0, got others in" in str(error)
    return False


# They change updates in later steps than the first one.
LATER = ("trace after", "schedule_free")


def test_eager_updates_say_it_at_the_second_step():
    tx = optax.chain(
        sparsify(optax.scale_by_adam(), rules.rigl(0.5)),
        optax.scale_by_learning_rate(1e-3),
    )
    params, state = normals(0), tx.init(normals(0))
    updates, state = tx.update(params, state, params)
    params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"got others in \['head', 'kernel'\]; put"):
        tx.update(params, state, params)
    # Masked first, nothing is revived while the masks rest.
    params = apply_masks(params, get_masks(state))
    updates, state = tx.update(params, state, params)
    check_sparse(optax.apply_updates(params, updates), state)


def test_weights_that_lookahead_revives_are_told():
    tx = optax.lookahead(sparsify(optax.sgd(0.1), RULE, every(2)), 2, 0.5)
    params = optax.LookaheadParams.init_synced(normals(0))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(params.fast, state, params)
        params = optax.apply_updates(params, updates)
    with pytest.raises(ValueError, match="put `sparsify` last"):
        check_refreshes(state)
    with pytest.raises(ValueError, match="got others in"):
        check_sparse(params.slow, state)


def test_a_check_needs_masks_and_their_parameters():
    params, state = normals(0), sparsify(sgd(), rules.static(0.5)).init(normals(0))
    with pytest.raises(ValueError, match="expected the state of an optimiser made by"):
        check_sparse(params, freeze(sgd(), rules.static(0.5)).init(params))
    with pytest.raises(ValueError, match=r"got none at \['bias', 'head'\]; pass the"):
        check_sparse({"kernel": params["kernel"]}, state)
