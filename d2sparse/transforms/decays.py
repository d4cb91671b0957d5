"""Decay of the weights that outputs or loss are insensitive to, for any optimiser."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from d2sparse import tree
from d2sparse.checks import check_choice, check_function, check_number
from d2sparse.masks import is_gap
from d2sparse.schedules import Schedule
from d2sparse.transforms.inputs import is_abstract, refuse_missing, refuse_none
from d2sparse.tree import Prunable, PyTree

Strength = float | jax.Array | Schedule


class DecayState(NamedTuple):
    """State of `sensitivity_decay`.

    Attributes:
      step: int32[], the number of updates so far.
      inner: state of the inner optimiser.
    """

    step: jax.Array
    inner: optax.OptState


def sensitivity_decay(
    inner: optax.GradientTransformation,
    strength: Strength,
    score: str = "gradient",
    normalise: str = "tensor",
    where: Prunable = tree.is_kernel,
) -> optax.GradientTransformationExtraArgs:
    """Decays each weight by how insensitive the outputs or the loss are to it.

    With the update `u` of the inner optimiser and the sensitivity `S >= 0` of a weight,

        w' = w + u
        w <- w' - strength * w' * max(0, 1 - S / norm),

    a decoupled L2 decay of the weights that do not matter now. The strength is *not*
    multiplied by the learning rate. One transformation, four methods and a control:

    * `score="gradient"`: `S = |g|`, the gradient that `update` is given, neither
      momentum nor anything else of `inner`. LOBSTER (Tartaglione et al., arXiv
      2011.09905).
    * `score="given"`: `update(..., scores=S)`. Of every weight, such as
      `scores.output_sensitivity` (Tartaglione et al., arXiv 1810.11764); or of every
      neuron by layer, `float[neurons]`, which decays all weights of the neuron alike,
      as `scores.neuron_sensitivity` (SeReNe, arXiv 2102.03773) and
      `scores.neuron_gradients` (Neuron-LOBSTER). Their absolute values are taken.
    * `score="constant"`: `S = 0`, plain decoupled L2 decay: the control that each of
      them is to be compared with, at the same strength.

    Gradients and sensitivities of a network are often far below 1. With
    `normalise="none"`, which is what was published, `1 - S` is then 1 for almost every
    weight, and the decay cannot be told from the control. The default divides the
    scores of every tensor by their largest.

    Scores by layer are broadcast along the last axis of the leaves directly below it:
    `{"conv1": s}` serves `conv1/kernel` and, if `where` chooses it, `conv1/bias`. A
    leaf without a score does not decay: leave out the output layer, to whose neurons
    the outputs are always equally sensitive.

    Args:
      inner: any Optax optimiser. Inside of `sparsify` the decay keeps pruned weights
        out, around it as well; there it sees dense gradients.
      strength: in [0, 1]; a number, traced or not, or a schedule of the step.
      score: `"gradient"`, `"given"` or `"constant"`.
      normalise: `"tensor"` divides scores by the largest of their tensor, for scores
        by layer of that layer; `"global"` by the largest of all; `"none"` leaves them.
        Scores that are all 0 stay 0.
      where: predicate on (path, leaf), which leaves decay: kernels if not given;
        LOBSTER and Neuron-LOBSTER as published decay all, `lambda path, leaf: True`.

    Returns:
      An Optax optimiser. It needs the parameters in `update`, takes `scores` there, and
      passes further arguments on to `inner`.

    Raises:
      ValueError: an option is out of its range; in `update`, where scores are missing
        or do not fit the parameters.

    >>> tx = sensitivity_decay(optax.sgd(0.0), strength=0.5)
    >>> params = {"kernel": jnp.array([[1.0, 1.0, 1.0]])}
    >>> grads = {"kernel": jnp.array([[0.0, 0.1, -0.2]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[0.5, 0.75, 1.0]]

    Of neurons, by layer:

    >>> tx = sensitivity_decay(optax.sgd(0.0), strength=0.5, score="given")
    >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    >>> scores = {"dense": jnp.array([0.0, 3.0])}
    >>> updates, _ = tx.update(params, tx.init(params), params, scores=scores)
    >>> optax.apply_updates(params, updates)["dense"]["kernel"].tolist()
    [[0.5, 1.0], [0.5, 1.0]]
    """
    check_choice("score", score, ("gradient", "given", "constant"))
    check_choice("normalise", normalise, ("tensor", "global", "none"))
    check_function("where", where, "path, leaf", "tree.is_kernel")
    at = as_schedule("strength", strength, most=1)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> DecayState:
        if is_abstract(params):
            return jax.eval_shape(init, params)
        return DecayState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        scores: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecayState]:
        params = refuse_none(params, "sensitivity_decay")
        refuse_missing(updates, params)
        weights = tree.prunable_leaves(params, where)
        if score == "given":
            found = _fitted(scores, weights, params)
        elif score == "gradient":
            found = {p: jnp.abs(g) for p, g in tree.pick(updates, weights).items()}
        else:
            found = {p: jnp.zeros((1,) * w.ndim, w.dtype) for p, w in weights.items()}
        if scores is not None and score != "given":
            extra_args["scores"] = scores  # Another decay inside may ask for them.
        changes, moments = inner.update(updates, state.inner, params, **extra_args)
        rate, flat = at(state.step), tree.flatten(changes)
        decayed = {
            path: _decayed(flat[path], weights[path], sensitivity, rate)
            for path, sensitivity in _normalised(found, normalise).items()
        }
        step = optax.safe_increment(state.step)
        return tree.replace(changes, decayed), DecayState(step, moments)

    return optax.GradientTransformationExtraArgs(init, update)


def as_schedule(
    name: str, strength: Strength, most: float
) -> Callable[[jax.Array], float | jax.Array]:
    """A strength as a function of the step, which it may be already.

    Raises:
      ValueError: it is known and not in [0, most].

    >>> as_schedule("strength", 0.1, most=1)(100)
    0.1
    """
    if callable(strength):
        check_function(name, strength, "step", "schedules.linear(0.0, 1e-4, 1000)")
        return strength
    check_number(name, strength, 0, most)
    return lambda step: strength


def _decayed(
    change: jax.Array,
    weight: jax.Array,
    sensitivity: jax.Array,
    rate: float | jax.Array,
) -> jax.Array:
    """The update that ends at the decayed weight; without a decay its very bits."""
    decay = rate * (weight + change) * jax.nn.relu(1 - sensitivity)
    return (change - decay).astype(change.dtype)


def _normalised(
    scores: Mapping[str, jax.Array], normalise: str
) -> dict[str, jax.Array]:
    """The scores over the largest of their tensor, or of all; those of 0 stay 0."""
    if normalise == "none":
        return dict(scores)
    largest = {path: jnp.max(s, initial=0) for path, s in scores.items()}
    if normalise == "global" and largest:
        together = jnp.max(jnp.stack(list(largest.values())))
        largest = dict.fromkeys(largest, together)
    return {
        path: s / jnp.where(largest[path] > 0, largest[path], 1)
        for path, s in scores.items()
    }


def _fitted(
    scores: PyTree | None, weights: Mapping[str, Any], params: PyTree
) -> dict[str, jax.Array]:
    """Absolute scores by path of a leaf, of its shape or to be broadcast to it."""
    if scores is None:
        raise ValueError(
            'expected scores where `score="given"`, got none; call `tx.update(grads, '
            "state, params, scores=...)`"
        )
    given = tree.flatten(scores)
    _refuse_unknown(given, params)
    found = {}
    for path, weight in weights.items():
        layer = path.rpartition("/")[0]
        shape = weight.shape if path in given else weight.shape[-1:]
        if path not in given and layer not in given:
            continue
        each = jnp.abs(given[path if path in given else layer])
        if each.shape != shape:
            raise ValueError(
                f"expected scores of shape {shape} for {path!r}, got {each.shape}; "
                "give one number per weight by leaf, or one per neuron by layer"
            )
        found[path] = each.reshape((1,) * (weight.ndim - each.ndim) + each.shape)
    return found


def _refuse_unknown(scores: Mapping[str, Any], params: PyTree) -> None:
    """Raises for a name that is no leaf and no layer directly above one.

    What is below a gap, left to another optimiser by `optax.partition`, is unknown.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_gap)
    paths = {tree.path_name(path): is_gap(leaf) for path, leaf in leaves}
    layers = {path.rpartition("/")[0] for path in paths}
    gaps = [path + "/" for path, gap in paths.items() if gap]
    unknown = [
        name
        for name in scores
        if not (name in paths or name in layers or f"{name}/".startswith(tuple(gaps)))
    ]
    if unknown:
        raise ValueError(
            f"expected scores by the path of a leaf or of a layer, got {unknown}; the "
            f"leaves are {sorted(paths)}"
        )
