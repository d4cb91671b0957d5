"""The forward pass sees other weights than those that are trained."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from d2sparse import distributions, masks, reparam, rules, tree
from d2sparse.constraints.growing import with_dense_gradient
from d2sparse.constraints.masked import Structure, shared, under_masks, with_sparsity
from d2sparse.models import Model
from d2sparse.rules import MaskRule
from d2sparse.schedules import at, every
from d2sparse.train import Constraint, Masks, Settings, Training, TrainState, claim
from d2sparse.transforms import freeze, get_masks
from d2sparse.tree import PyTree

_THRESHOLD_START = -10.0  # Its sigmoid is 0.000045, which prunes next to nothing.

Effective = Callable[[PyTree], PyTree]


def reparametrised(effective: Effective, latent: Effective | None = None) -> Constraint:
    """The network sees a function of the trained weights.

    Args:
      effective: trained parameters -> weights of the forward pass.
      latent: weights -> trained parameters at step 0; None where they are the same.
    """

    def constrained(training: Training) -> Training:
        model = training.model

        def init(key: jax.Array, x: Any) -> tuple[PyTree, PyTree]:
            params, model_state = model.init(key, x)
            return (params if latent is None else latent(params)), model_state

        def apply(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
            return model.apply(effective(params), *args, **kwargs)

        return training._replace(model=Model(init, apply))

    return constrained


def sparse_by_value(effective: Effective) -> Constraint:
    """A network whose pruned weights are the zeros of what its forward pass sees."""

    def constrained(training: Training) -> Training:
        def masks_of(state: TrainState) -> Masks:
            weights = effective(state.params)
            live = reparam.nonzero_masks(weights, training.network.prunable)
            return Masks((live,), (live,), (live,))

        claimed = claim(training, "the masks", "the latent weights")
        return reparametrised(effective)(claimed)._replace(masks=masks_of)

    return constrained


def top_kast(
    sparsity: float, backward_density: float = 2.0, structure: Structure | None = None
) -> Constraint:
    """Top-KAST: the largest weights are used, and some more of them are trained.

    Both sets are chosen anew at every step. The exploration penalty of the paper is
    left out. From Jayakumar et al. (arXiv 2106.03517).

    Args:
      sparsity: fraction of zeros that the forward pass sees, in [0, 1).
      backward_density: weights that are trained for each one that is used, at least 1.
      structure: which masks are possible; all leaves compete if it names no
        distribution.
    """

    def constrained(training: Training) -> Training:
        own = shared(training, structure)
        forward = rules.largest(sparsity, **own)
        density = min(backward_density * (1 - sparsity), 1.0)

        def effective(params: PyTree) -> PyTree:
            return reparam.straight_through(params, _chosen(forward, params))

        def masks_of(state: TrainState) -> Masks:
            found = sparse.masks(state)
            return found._replace(trained=(get_masks(state.opt_state),))

        sparse = sparse_by_value(effective)(training)
        frozen = under_masks(
            sparse._replace(claims=training.claims),
            "top_kast",
            lambda s: rules.largest(1 - density, **own),
            every(1),
            freeze,
        )
        return frozen._replace(masks=masks_of)

    return constrained


def sr_ste(sparsity: float, group: int = 4) -> Constraint:
    """SR-STE: n:m sparsity of the forward pass, dense weights behind it.

    From Zhou et al. (arXiv 2102.04010), see `d2sparse.reparam.sr_ste`.

    Args:
      sparsity: fraction of zeros, `1 - n / m`.
      group: m, the number of neighbours of which n are used.
    """

    def constrained(training: Training) -> Training:
        largest = rules.largest(
            sparsity,
            distribution=distributions.uniform,
            prunable=training.network.prunable,
            selection=masks.n_of_m(group),
        )

        def effective(params: PyTree) -> PyTree:
            return reparam.sr_ste(params, _chosen(largest, params))

        return with_dense_gradient(sparse_by_value(effective)(training))

    return constrained


def soft_threshold(threshold_decay: float = 0.03) -> Constraint:
    """STR: thresholds that are trained, one a leaf, decide how many weights are left.

    From Kusupati et al. (arXiv 2002.03231), see `d2sparse.reparam.soft_threshold`.

    Args:
      threshold_decay: weight decay on the thresholds: the larger it is, and the longer
        the training, the sparser the network, until no weight is left.
    """

    def constrained(training: Training) -> Training:
        prunable = training.network.prunable
        decay = optax.add_decayed_weights(threshold_decay, mask=_thresholds)

        def latent(params: PyTree) -> PyTree:
            start = reparam.init_thresholds(params, _THRESHOLD_START, prunable)
            return {"params": params, "thresholds": start}

        def effective(params: PyTree) -> PyTree:
            return reparam.soft_threshold(**params)

        def transform(
            rate: optax.Schedule, settings: Settings, key: Any
        ) -> optax.GradientTransformation:
            return optax.chain(decay, training.transform(rate, settings, key))

        def masks_of(state: TrainState) -> Masks:
            live = reparam.nonzero_masks(effective(state.params), prunable)
            return Masks((live,), (live,), (live,))

        claimed = claim(training, "the masks", "str")
        latent_weights = reparametrised(effective, latent)(claimed)
        return latent_weights._replace(transform=transform, masks=masks_of)

    return constrained


def powerprop(
    sparsity: float,
    prune_at: float = 0.5,
    power: float = 2.0,
    structure: Structure | None = None,
) -> Constraint:
    """Powerpropagation: weights are powers of what is trained, and are pruned once.

    From Schwarz et al. (arXiv 2110.00296), see `d2sparse.reparam.powerprop`.

    Args:
      sparsity: fraction of zeros among the prunable weights, in [0, 1).
      prune_at: part of the training before the pruning, in [0, 1).
      power: alpha of `w = theta |theta|^(alpha - 1)`, at least 1.
      structure: which masks are possible; all leaves compete if it names no
        distribution.
    """

    def constrained(training: Training) -> Training:
        prunable = training.network.prunable
        own = shared(training, structure)
        powers = reparametrised(
            lambda params: reparam.powerprop(params, power, prunable),
            lambda params: reparam.powerprop_inverse(params, power, prunable),
        )(training)
        return under_masks(
            with_sparsity(powers, sparsity),
            "powerprop",
            lambda s: rules.one_shot(s["sparsity"], **own),
            at([int(prune_at * training.horizon)]),
        )

    return constrained


def _thresholds(params: PyTree) -> PyTree:
    return tree.map_with_path(lambda path, leaf: path.startswith("thresholds/"), params)


def _chosen(rule: MaskRule, params: PyTree) -> PyTree:
    return rule.update(None, params, None, 0, jax.random.key(0))
