"""The methods by name: each is a row of constraints, flags that it sets, values to try.

training = constrain(plain(model, data), *METHODS["rigl"].constraints(options))
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from d2sparse import scores
from d2sparse.constraints import equal_costs, latent, pruning, scored, soups
from d2sparse.constraints.averaging import averaged
from d2sparse.constraints.collapsed import layer_collapse
from d2sparse.constraints.coupled import coupled
from d2sparse.constraints.decayed import Sensitivity, decayed
from d2sparse.constraints.depth import easier, egp, tlc
from d2sparse.constraints.descent import distilled_rounds, stopped_by_entropy
from d2sparse.constraints.distilled import distilled, finished
from d2sparse.constraints.ensembles import free_tickets
from d2sparse.constraints.grouped import group_lasso
from d2sparse.constraints.growing import rigl, set_, sparse_momentum, static
from d2sparse.constraints.lottery import iterative_magnitude, kept
from d2sparse.constraints.options import Options
from d2sparse.constraints.paired import Learners, paired
from d2sparse.constraints.quantised import quantised
from d2sparse.constraints.thresholded import threshold_search
from d2sparse.dual import Coupling
from d2sparse.train import Constraint

Constraints = tuple[Constraint, ...]
Tries = Mapping[str, tuple[Any, ...]] | Callable[[Any], Mapping[str, tuple[Any, ...]]]


class Method(NamedTuple):
    """One way to train.

    Attributes:
      constraints: options -> what the plain training is put under; of the methods on a
        stream, `stream_methods.Streamed` -> that.
      sets: flags that it sets, by name; a value may be a function of what is known
        before the training is made, see `equal_costs`.
      tries: values to try when it is tuned, by flag, besides learning rate and weight
        decay; or a function of the flags that returns them.
      ticket: what it does with the masks of a lottery ticket: it "keeps" their number
        of weights, or "prunes" on; empty where it cannot start from one.
      innermost: of a mix, whether it comes before the constraints of the method.
    """

    constraints: Callable[[Any], Constraints]
    sets: Mapping[str, Any] = {}
    tries: Tries = types.MappingProxyType({})
    ticket: str = ""
    innermost: bool = False


_DROPS = {"drop_fraction": (0.1, 0.3, 0.5)}
# Sparse from the start, with masks that move; pruned in training.
_moves = functools.partial(Method, tries=_DROPS, ticket="keeps")
_prunes = functools.partial(Method, ticket="prunes")


def _pruned(score: Any = None) -> Callable[[Options], Constraints]:
    return lambda o: (
        pruning.gradual(o.sparsity, o.refresh_interval, score or o.scored_by, o.masks),
    )


def _thresholded(score: Sensitivity | None = None) -> Callable[[Options], Constraints]:
    def constraints(o: Options) -> Constraints:
        search = threshold_search(o.threshold_interval, o.search)
        if score is None:
            return (search,)
        if score == "constant":
            return (decayed(o.decay_strength, score), search)
        return (decayed(o.decay_strength, score, o.decay_normalise), search)

    return constraints


def _imp(o: Options) -> Constraints:
    return (iterative_magnitude(o.sparsity, o.rounds, o.rewinds),)


def _rigl(o: Options) -> Constraints:
    return (rigl(o.sparsity, o.moves, o.masks),)


def _learners(o: Options, consolidates: bool = False) -> Learners:
    return Learners(
        o.preset,
        o.refresh_interval,
        o.growth_samples,
        o.tail if o.preset == "averaged" else Learners().tail,
        o.horizon if consolidates else None,
        o.pair_rule,
    )


def _pair(o: Options) -> Constraint:
    return paired(o.sparsity, _learners(o), o.teaching, o.masks)


def _consolidated(o: Options) -> Constraint:
    return paired(o.sparsity, _learners(o, consolidates=True), o.teaching, o.masks)


def _uncoupled(o: Options) -> Constraints:
    return (paired(o.sparsity, _learners(o), UNCOUPLED, o.masks),)


def _mutual(o: Options) -> Constraints:
    return (coupled((), (), o.lessons),)


def _finished(o: Options, pair: Constraint, merged: bool = False) -> Constraints:
    lesson = (o.coupling, o.temperature)
    return (finished(pair, o.finish_part, o.finish_rate, lesson, merged),)


def _quantised(o: Options) -> Constraints:
    return (
        quantised(
            o.bits,
            o.activation_bits,
            "channel",
            o.weight_scale,
            o.edge_bits,
            o.activation_scale,
        ),
    )


def _horizons(flags: Any) -> Mapping[str, tuple[Any, ...]]:
    return {"horizon": tuple(max(flags.steps // n, 1) for n in (24, 12, 6, 3))}


UNCOUPLED = Coupling(fast=0.0, slow=0.0, masks=0.0)
_TAILS = {"tail": (0.1, 0.25, 0.5)}
_TEACHING = {"coupling": (0.5, 1.0, 2.0)}
_REWINDS = {"rewind_fraction": (0.0, 0.1, 0.2)}
_DROPPED = {"entropy_drop": (0.1, 0.2, 0.3, 0.5)}
_RADII = {"sharpness": (0.02, 0.05, 0.1)}
_PRUNE_AT = {"prune_at": (0.25, 0.5, 0.75)}
_EGP = {"depth_fraction": (0.2, 0.5, 0.8)}
_STRENGTHS = {"decay_strength": (1e-4, 4e-4, 1.6e-3)}
_FINISH = {"finish_rate": (0.03, 0.1, 0.3)}
_STAYS = {"schedule": "constant"}  # An average needs a learning rate that stays.
_ANNEALED = {"preset": "symmetric"}
_FOLLOWED = {"preset": "fast_slow"}
_CAPPED = {
    "steps": equal_costs.steps_of_rounds,
    # A function, which --rounds of other methods does not contradict.
    "rounds": lambda known: equal_costs.CAPPED_ROUNDS,
}

# What every method can be mixed with.
MIXES: Mapping[str, Method] = {
    "averaged": Method(lambda o: (averaged(o.tail),), _STAYS, _TAILS),
    "quantised": Method(_quantised, tries={"bits": (2, 3, 4, 8)}, innermost=True),
    "sharp": Method(lambda o: (), {"sharpness": 0.05}, _RADII),
    "smoothed": Method(lambda o: (), {"label_smoothing": 0.1}),
}

METHODS: Mapping[str, Method] = {
    "dense": Method(lambda o: ()),
    "dense_short": Method(lambda o: (), {"steps": equal_costs.steps_of_rigl}),
    "dense_narrow": Method(lambda o: (), {"width": equal_costs.width_of_sparse}),
    "dense_smoothed": Method(
        lambda o: (),
        {"label_smoothing": 0.1},
        {"label_smoothing": (0.05, 0.1, 0.2)},
    ),
    "dense_averaged": Method(lambda o: (averaged(o.tail),), _STAYS, _TAILS),
    "dense_sharp": Method(lambda o: (), {"sharpness": 0.05}, _RADII),
    "self_distilled": Method(
        lambda o: (distilled(weight=o.coupling, temperature=o.temperature),),
        tries=_TEACHING,
    ),
    "fixed": Method(lambda o: (kept(),), ticket="keeps"),
    "static": Method(lambda o: (static(o.sparsity, o.masks),)),
    "set": _moves(lambda o: (set_(o.sparsity, o.moves, o.masks),)),
    "rigl": _moves(_rigl),
    "rigl_averaged": _moves(
        lambda o: (*_rigl(o), averaged(o.tail)), _STAYS, tries=_TAILS
    ),
    "rigl_half": Method(
        lambda o: (rigl((1 + o.sparsity) / 2, o.moves, o.masks),), tries=_DROPS
    ),
    "sparse_momentum": _moves(
        lambda o: (sparse_momentum(o.sparsity, o.moves, o.masks),)
    ),
    "random": _prunes(_pruned(scores.random)),
    "gradual": _prunes(_pruned()),
    "one_shot": _prunes(
        lambda o: (pruning.one_shot(o.sparsity, o.prune_at, o.scored_by, o.masks),),
        tries=_PRUNE_AT,
    ),
    "movement": _prunes(
        lambda o: (pruning.movement(o.sparsity, o.refresh_interval, o.masks),)
    ),
    "granet": _prunes(
        lambda o: (pruning.granet(o.sparsity, o.start_sparsity, o.moves, o.masks),),
        tries=_DROPS,
    ),
    "ac_dc": _prunes(lambda o: (pruning.ac_dc(o.sparsity, o.masks),)),
    "top_kast": _prunes(
        lambda o: (latent.top_kast(o.sparsity, o.backward_density, o.masks),)
    ),
    "sr_ste": _prunes(lambda o: (latent.sr_ste(o.sparsity, o.group),)),
    "str": Method(lambda o: (latent.soft_threshold(o.threshold_decay),)),
    "powerprop": _prunes(
        lambda o: (latent.powerprop(o.sparsity, o.prune_at, o.power, o.masks),)
    ),
    "snip": _prunes(lambda o: (scored.snip(o.sparsity, o.score_samples, o.masks),)),
    "grasp": _prunes(lambda o: (scored.grasp(o.sparsity, o.score_samples, o.masks),)),
    "fisher": _prunes(lambda o: (scored.fisher(o.sparsity, o.score_samples, o.masks),)),
    "synflow": _prunes(lambda o: (scored.synflow(o.sparsity, o.masks),)),
    "wanda": _prunes(
        lambda o: (scored.wanda(o.sparsity, o.prune_at, o.score_samples, o.masks),),
        tries=_PRUNE_AT,
    ),
    "thresholded": Method(_thresholded(), tries={"tolerance": (0.02, 0.05, 0.1)}),
    "l2_thresholded": Method(_thresholded("constant"), tries=_STRENGTHS),
    "lobster": Method(_thresholded("gradient"), tries=_STRENGTHS),
    "sensitivity": Method(_thresholded("output"), tries=_STRENGTHS),
    "serene": Method(_thresholded("neurons"), tries=_STRENGTHS),
    "serene_lower": Method(_thresholded("neurons_lower"), tries=_STRENGTHS),
    "neuron_lobster": Method(_thresholded("neuron_gradients"), tries=_STRENGTHS),
    "group_lasso": Method(
        lambda o: (group_lasso(o.group_sparsity, o.group_strength),),
        tries={"group_strength": (3e-4, 1e-3, 3e-3)},
    ),
    "imp": _prunes(_imp, tries=_REWINDS),
    "imp_capped": Method(_imp, _CAPPED, _REWINDS),
    "rise": Method(
        lambda o: (
            iterative_magnitude(o.sparsity, o.rounds, o.rewinds._replace(frozen=True)),
        ),
        tries=_REWINDS,
    ),
    "imp_stopped": Method(
        lambda o: (*_imp(o), stopped_by_entropy(o.entropy_drop)), tries=_DROPPED
    ),
    "imp_distilled": Method(
        lambda o: (
            distilled_rounds(
                sparsity=o.sparsity,
                rounds=o.rounds,
                rewinds=o.rewinds,
                lesson=(o.coupling, o.temperature),
            ),
        ),
        tries=_TEACHING,
    ),
    "soup": Method(lambda o: (soups.souped(o.sparsity, o.rounds, o.members),)),
    "swamp": Method(lambda o: (soups.swamp(o.sparsity, o.rounds, o.members),)),
    "free_tickets": Method(
        lambda o: (free_tickets(o.sparsity, o.members, o.explore, o.moves, o.masks),),
        tries={"explore": (0.3, 0.5, 0.7)},
    ),
    "easier": Method(lambda o: (easier(o.depth_rounds),)),
    "easier_random": Method(lambda o: (easier(o.depth_rounds, "random"),)),
    "egp": Method(lambda o: (egp(o.depth_rounds, o.depth_fraction),), tries=_EGP),
    "nepenthe": Method(
        lambda o: (egp(o.depth_rounds, o.depth_fraction, "nepenthe"),), tries=_EGP
    ),
    "lacoot": Method(
        lambda o: (layer_collapse(o.collapse, o.depth_rounds),),
        tries={"collapse": (0.1, 0.3, 1.0, 5.0)},
    ),
    "tlc": Method(lambda o: (tlc(o.depth_rounds),)),
    "dense_mutual": Method(_mutual, tries=_TEACHING),
    "dense_ensemble": Method(lambda o: (coupled((), (), UNCOUPLED),)),
    "uncoupled_pair": Method(_uncoupled),
    "uncoupled_annealed": Method(_uncoupled, _ANNEALED),
    "uncoupled_averaged": Method(_uncoupled, {"preset": "averaged"}, _TAILS),
    "d2_sparse": Method(lambda o: (_pair(o),), tries=_TAILS),
    "d2_annealed": Method(lambda o: (_pair(o),), _ANNEALED, _TEACHING),
    "d2_views": Method(
        lambda o: (_pair(o),), {**_ANNEALED, "independent_views": True}, _TEACHING
    ),
    "d2_confident": Method(
        lambda o: (_pair(o),),
        {**_ANNEALED, "weighted_coupling": True},
        {"trust_threshold": (0.0, 0.5, 0.8)},
    ),
    "d2_sharp": Method(lambda o: (_pair(o),), {**_ANNEALED, "sharpness": 0.05}, _RADII),
    "d2_consolidated": Method(lambda o: (_consolidated(o),), _FOLLOWED, _horizons),
    "d2_distilled": Method(lambda o: _finished(o, _pair(o)), _ANNEALED, _FINISH),
    "d2_merged": Method(
        lambda o: _finished(o, _consolidated(o), merged=True), _FOLLOWED, _FINISH
    ),
    "d2_averaged_views": Method(
        lambda o: (_pair(o),), {"independent_views": True}, _TAILS
    ),
    "d2_averaged_sharp": Method(lambda o: (_pair(o),), {"sharpness": 0.05}, _TAILS),
    "d2_averaged_distilled": Method(lambda o: _finished(o, _pair(o)), {}, _FINISH),
}
