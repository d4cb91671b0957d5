"""What a rule is, and what all rules do with scores."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import tree
from d2sparse.checks import check_function
from d2sparse.distributions import Distribution, uniform
from d2sparse.masks import Pattern, Selection, refuse_other_paths
from d2sparse.schedules import Step
from d2sparse.scores import GRADIENT_SCORES, LOCAL, Score
from d2sparse.tree import Counts, PyTree

_LOWEST = float(np.finfo(np.float32).min)


Nan = dict[str, jax.Array]  # bool[] by path: whether a score of the leaf is NaN.
Noted = Callable[[PyTree, PyTree, PyTree, Step, jax.Array], tuple[PyTree, Nan]]


class MaskRule(NamedTuple):
    """How masks begin and how they change.

    Attributes:
      init: `(params, key) -> masks`.
      update: `(masks, params, grads, step, key) -> masks`, called at a refresh. The
        gradients are dense: pruned weights have theirs too. Where it is a `Noting`, a
        compiled refresh hears of scores that are NaN.
      observe: what `update` is shown as `grads`: the dense gradients of every step,
        transformed by this, such as `optax.ema(0.9)`. None shows the gradient itself.
    """

    init: Callable[[PyTree, jax.Array], PyTree]
    update: Callable[[PyTree, PyTree, PyTree, Step, jax.Array], PyTree]
    observe: optax.GradientTransformation | None = None


@dataclasses.dataclass(frozen=True)
class Noting:
    """The `update` of a rule that can tell, beside the masks, which scores are NaN.

    A compiled function cannot raise; who calls it through `refresh` hears of them.

    Attributes:
      noted: `(masks, params, grads, step, key) -> (masks, nan)`.

    >>> update = Noting(lambda masks, *rest: (masks, {"w": jnp.array(True)}))
    >>> update({"w": 1}, None, None, 0, jax.random.key(0))
    {'w': 1}
    """

    noted: Noted

    def __call__(
        self, masks: PyTree, params: PyTree, grads: PyTree, step: Step, key: jax.Array
    ) -> PyTree:
        """The masks alone."""
        return self.noted(masks, params, grads, step, key)[0]


def refresh(
    rule: MaskRule,
    masks: PyTree,
    params: PyTree,
    grads: PyTree,
    step: Step,
    key: jax.Array,
) -> tuple[PyTree, Nan]:
    """The `update` of a rule, and for which leaves it has met scores that are NaN.

    Of a rule of your own, whose update is a plain function, no scores are known.

    >>> rule = MaskRule(lambda params, key: params, lambda masks, *rest: masks)
    >>> params, masks = {"w": jnp.zeros(1)}, {"w": jnp.array([True])}
    >>> refresh(rule, masks, params, None, 0, jax.random.key(0))
    ({'w': Array([ True], dtype=bool)}, {})
    """
    if isinstance(rule.update, Noting):
        return rule.update.noted(masks, params, grads, step, key)
    chosen = rule.update(masks, params, grads, step, key)
    _check_masks(chosen, params)
    return chosen, {}


def begin(rule: MaskRule, params: PyTree, key: jax.Array) -> PyTree:
    """The first masks of a rule, which may be one of your own.

    Raises:
      ValueError: they are no masks of these parameters, or no weight of any kernel is
        live, as far as that is known.

    >>> rule = MaskRule(lambda params, key: {"w": jnp.array([True])}, lambda *args: {})
    >>> begin(rule, {"w": jnp.zeros(1)}, jax.random.key(0))
    {'w': Array([ True], dtype=bool)}
    """
    tree.check_arrays(params)
    masks = rule.init(params, key)
    _check_masks(masks, params)
    return masks


def check_choices(
    distribution: Distribution | None, selection: Selection, **scores: Score
) -> None:
    """Raises where a rule is given a word, or a function of another kind.

    Raises:
      ValueError: naming the argument and what could stand there.

    >>> from d2sparse.masks import select
    >>> check_choices(uniform, select)
    """
    if distribution is not None:
        check_function("distribution", distribution, "shapes, sparsity", "erk")
    check_function("selection", selection, "scores, counts, key", "masks.n_of_m(4)")
    for name, score in scores.items():
        check_function(name, score, "params, grads, key", "scores.magnitude")


def suited(
    distribution: Distribution | None, selection: Selection, usual: Distribution
) -> Distribution:
    """The distribution that is given, or the one that suits a selection.

    It is the usual one of a rule, and for patterns `uniform`: a pattern rounds the
    share of every leaf to whole groups, which takes small shares to none and large ones
    to all.

    >>> from d2sparse.masks import n_of_m
    >>> suited(None, n_of_m(4), usual=len) is uniform
    True
    """
    if distribution is not None:
        return distribution
    return uniform if isinstance(selection, Pattern) else usual


def plainly(selection: Selection) -> Selection:
    """A selection that rounds counts, down to none as well, and refuses none.

    >>> from d2sparse.masks import select
    >>> plainly(select) is select
    True
    """
    return selection.choose if isinstance(selection, Pattern) else selection


def chosen(
    selection: Selection,
    scores: Mapping[str, jax.Array],
    counts: Counts,
    key: jax.Array | None,
) -> dict[str, jax.Array]:
    """The masks that a selection returns, if they are masks of these leaves.

    Raises:
      ValueError: the selection, which may be one of your own, returns something else.

    >>> from d2sparse.masks import select
    >>> chosen(select, {"w": jnp.array([1.0, 2.0])}, {"w": 1}, None)
    {'w': Array([False,  True], dtype=bool)}
    """
    kept = selection(scores, counts, key)
    shown = {p: (m.shape, m.dtype) for p, m in tree.flatten(kept).items()}
    wanted = {path: (score.shape, bool) for path, score in scores.items()}
    if shown != wanted:
        raise ValueError(
            "expected a selection to return a mask of bool for every leaf, of shapes "
            f"{ {p: shape for p, (shape, _) in wanted.items()} }, got {shown}"
        )
    return kept


def either(first: Nan, second: Nan) -> Nan:
    """What either of two notes of the same leaves tells.

    >>> either({"w": jnp.array(True)}, {"w": jnp.array(False)})
    {'w': Array(True, dtype=bool)}
    """
    return {path: first[path] | second[path] for path in first}


def largest_scores(
    selection: Selection,
    score: Score,
    eligible: Mapping[str, jax.Array],
    params: PyTree,
    grads: PyTree,
    counts: Counts,
    key: jax.Array | None = None,
    tie_key: jax.Array | None = None,
) -> tuple[dict[str, jax.Array], Nan]:
    """Masks of the largest scores among eligible entries.

    A score that is NaN is the lowest of those.

    Args:
      selection: which patterns may be live.
      score: which weights matter.
      eligible: bool[...] by path.
      params: tree of parameters.
      grads: tree like the parameters, or None for scores that look at none.
      counts: how many to keep, by path or of all leaves together.
      key: random key for the score.
      tie_key: random key of the order in which ties are broken; None leaves them to
        the lower index.

    Returns:
      `(masks, nan)`: bool[...] by path, and by path whether an eligible score is NaN.

    Raises:
      ValueError: the score needs gradients and there are none; or, outside of compiled
        functions, an eligible score is NaN.

    >>> from d2sparse.masks import select
    >>> from d2sparse.scores import magnitude
    >>> params, eligible = {"w": jnp.array([-2.0, 1.0])}, {"w": jnp.ones(2, bool)}
    >>> masks, nan = largest_scores(select, magnitude, eligible, params, None, {"w": 1})
    >>> masks["w"].tolist(), bool(nan["w"])
    ([True, False], False)
    """
    values = _values(score, eligible, params, grads, key)
    nan = {path: _has_nan(eligible[path], values[path]) for path in eligible}
    _refuse_nan(nan)
    ranks = {path: _among(eligible[path], values[path]) for path in eligible}
    return chosen(selection, ranks, counts, tie_key), nan


def is_local(score: Score) -> bool:
    """Whether a score of a weight needs no more than it and its gradient.

    >>> from d2sparse import scores
    >>> is_local(scores.magnitude), is_local(scores.random)
    (True, False)
    """
    return any(score is other for other in LOCAL)


def _values(
    score: Score,
    eligible: Mapping[str, jax.Array],
    params: PyTree,
    grads: PyTree,
    key: jax.Array | None,
) -> dict[str, jax.Array]:
    """The scores of all entries, by path."""
    if grads is None and any(score is other for other in GRADIENT_SCORES):
        raise ValueError(
            f"the score {score.__name__!r} needs gradients, got None; pass them to the "
            "rule, or refresh under `sparsify`, which has them"
        )
    if is_local(score):
        params = tree.pick(params, eligible, "parameters")
        if grads is not None:
            grads = _shaped_as(eligible, grads, "gradients")
    values = score(params, grads, cast(jax.Array, key))
    return _shaped_as(eligible, values, "scores")


def _shaped_as(
    eligible: Mapping[str, jax.Array], values: PyTree, what: str
) -> dict[str, jax.Array]:
    """The leaves of the same paths, whose shapes are the same too."""
    found = tree.pick(values, eligible, what)
    for path, value in found.items():
        if jnp.shape(value) != eligible[path].shape:
            raise ValueError(
                f"expected {what} of shape {eligible[path].shape} at {path!r}, got "
                f"{jnp.shape(value)}"
            )
    return {path: jnp.asarray(value) for path, value in found.items()}


def _check_masks(masks: PyTree, params: PyTree) -> None:
    """Raises where masks do not fit, or are known to leave no weight of any kernel."""
    refuse_other_paths(masks, params)
    leaves, shapes = tree.flatten(masks), tree.flatten(params)
    for path, mask in leaves.items():
        like = shapes.get(path, mask)
        if mask.dtype != bool or mask.shape != like.shape:
            raise ValueError(
                f"expected a rule to return a mask of bool{list(like.shape)} at "
                f"{path!r}, got {mask.dtype}{list(mask.shape)}"
            )
    matrices = [m for m in leaves.values() if m.ndim > 1] or list(leaves.values())
    known = not any(isinstance(mask, jax.core.Tracer) for mask in matrices)
    if matrices and known and not any(bool(mask.any()) for mask in matrices):
        raise ValueError(
            "expected masks with a live weight, got none: the rule has emptied "
            f"{sorted(leaves)}; lower its sparsity"
        )


def _among(eligible: jax.Array, score: jax.Array) -> jax.Array:
    """Scores that compare: NaN is the lowest, and `-inf` what is not eligible."""
    if score.dtype == bool:
        return eligible & score
    score = jnp.fmax(score.astype(jnp.float32), _LOWEST)
    return jnp.where(eligible, score, -jnp.inf)


def _has_nan(eligible: jax.Array, score: jax.Array) -> jax.Array:
    """bool[], of eligible scores. A maximum: `any` writes its bools out on a CPU."""
    if not score.size or not jnp.issubdtype(score.dtype, jnp.inexact):
        return jnp.zeros((), bool)
    return jnp.isnan(jnp.max(jnp.where(eligible, score, -jnp.inf)))


def _refuse_nan(nan: Nan) -> None:
    """Raises where it is known which scores are NaN: outside of compiled functions."""
    known = {p: x for p, x in nan.items() if not isinstance(x, jax.core.Tracer)}
    if found := [path for path, has in known.items() if bool(has)]:
        raise ValueError(
            f"expected scores without NaN, got NaN at {found[0]!r}; look for NaN in "
            "the weights and gradients that the rule is given"
        )
