"""What a rule is, and what all rules do with scores."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import tree
from d2sparse.masks import Selection, select
from d2sparse.masks.layout import Lazy
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
    >>> refresh(rule, {"w": 1}, None, None, 0, jax.random.key(0))
    ({'w': 1}, {})
    """
    if isinstance(rule.update, Noting):
        return rule.update.noted(masks, params, grads, step, key)
    return rule.update(masks, params, grads, step, key), {}


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
    ranks = _rank(score, eligible, params, grads, key)
    nan = {path: _has_nan(lazy) for path, lazy in ranks.items()}
    _refuse_nan(nan)
    if selection is select:
        return select(ranks, counts, tie_key), nan
    values = {path: lazy.value() for path, lazy in ranks.items()}
    return selection(values, counts, tie_key), nan


def is_local(score: Score) -> bool:
    """Whether a score of a weight needs no more than it and its gradient.

    >>> from d2sparse import scores
    >>> is_local(scores.magnitude), is_local(scores.random)
    (True, False)
    """
    return any(score is other for other in LOCAL)


def _rank(
    score: Score,
    eligible: Mapping[str, jax.Array],
    params: PyTree,
    grads: PyTree,
    key: jax.Array | None,
) -> dict[str, Lazy]:
    """The scores of eligible entries, of which NaN is the lowest; `-inf` elsewhere."""
    if grads is None and any(score is other for other in GRADIENT_SCORES):
        raise ValueError(
            f"the score {score.__name__!r} needs gradients, got None; pass them to the "
            "rule, or refresh under `sparsify`, which has them"
        )
    if is_local(score):
        weights = tree.pick(params, eligible)
        slopes = weights if grads is None else tree.pick(grads, eligible)
        of = _Among(score)
        return {p: Lazy((m, weights[p], slopes[p]), of) for p, m in eligible.items()}
    values = tree.pick(score(params, grads, cast(jax.Array, key)), eligible)
    return {p: Lazy((m, values[p]), _Among(None)) for p, m in eligible.items()}


@dataclasses.dataclass(frozen=True)
class _Among:
    """`(eligible, score)`, or what a score is computed from, to scores that compare.

    A value, not a closure: compiled functions are found again by it.

    Attributes:
      local: the score, of a weight and its gradient; None where it is given.
    """

    local: Callable[..., jax.Array] | None

    def values(self, *parts: jax.Array) -> jax.Array:
        return parts[0] if self.local is None else self.local(*parts, None)

    def __call__(self, eligible: jax.Array, *parts: jax.Array) -> jax.Array:
        score = self.values(*parts)
        if score.dtype == bool:
            return eligible & score
        score = jnp.fmax(score.astype(jnp.float32), _LOWEST)
        return jnp.where(eligible, score, -jnp.inf)


def _has_nan(scores: Lazy) -> jax.Array:
    """bool[], of eligible scores. A maximum: `any` writes its bools out on a CPU."""
    eligible, *parts = scores.arrays
    values = cast(_Among, scores.of).values(*parts)
    if not scores.size or not jnp.issubdtype(values.dtype, jnp.inexact):
        return jnp.zeros((), bool)
    return jnp.isnan(jnp.max(jnp.where(eligible, values, -jnp.inf)))


def _refuse_nan(nan: Nan) -> None:
    """Raises where it is known which scores are NaN: outside of compiled functions."""
    known = {p: x for p, x in nan.items() if not isinstance(x, jax.core.Tracer)}
    if found := [path for path, has in known.items() if bool(has)]:
        raise ValueError(
            f"expected scores without NaN, got NaN at {found[0]!r}; look for NaN in "
            "the weights and gradients that the rule is given"
        )
