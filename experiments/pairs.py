"""Two networks that are trained together, and the flags that they can be varied by."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from d2sparse import data, distributions, dual, rules, train, tree
from d2sparse.dual import Coupling, Dual
from d2sparse.masks import Selection, select
from d2sparse.schedules import at
from d2sparse.train import Data, TrainState
from d2sparse.transforms import sparsify
from experiments import pair_account, pair_presets, pair_step
from experiments.pair_presets import MakeRule
from experiments.recipes.arguments import make_shared, rehearse
from experiments.recipes.options import MaskOptions, check_masks
from experiments.singles import (
    NO_SETTINGS,
    Method,
    Settings,
    train_through,
    with_cost,
)
from experiments.task import Task, TaskConfig, check_choice, check_least

PairRule = Literal["rigl", "set", "static"]

_UNCOUPLED = Coupling(fast=0.0, slow=0.0, masks=0.0)


@dataclasses.dataclass(frozen=True)
class PairOptions(MaskOptions):
    """Flags of experiments with pairs."""

    # How the masks of a pair of sparse networks move; without rigl, which grows by
    # gradients, --mask_coupling sets where they start alone.
    pair_rule: PairRule = "rigl"
    # How D2-Sparse's slow learner learns: by gradient, or as the fast one's average.
    mode: Literal["trained", "consolidated"] = "trained"
    # Pace of the two learners, see pair_presets.make_plans; auto is fast_slow where
    # the slow one consolidates, since a fast learner that anneals leaves nothing to
    # average, and elsewhere averaged.
    preset: Literal["auto", "averaged", "symmetric", "fast_slow", "constant"] = "auto"
    coupling: float = 1.0  # weight of the peer's teaching, in both learners
    temperature: float = 1.0  # of the softened outputs that are taught
    coupling_ramp: int = 0  # steps over which the teaching grows to its weight
    # Teaching counts as much as the peer is confident in it, between 0 and 1.
    weighted_coupling: bool = False
    trust_threshold: float = 0.0  # confidence below which a peer does not teach
    mask_coupling: float = 1.0  # 1: masks avoid each other, 0: independent, -1: attract
    independent_views: bool = False  # augment the batch for each learner anew
    horizon: int = 0  # steps the slow average reaches back; 0: a sixth of the run


def pair_effects(options: PairOptions) -> dict[str, tuple[object, str]]:
    """Flags of pairs that are of no use without another, see `task.check_effects`."""
    grouped = options.pattern in ("n_of_m", "blocks")
    follows = options.mode == "consolidated"
    return {
        "group": (grouped, "which is for the patterns n_of_m and blocks"),
        "horizon": (follows, "which is for mode consolidated"),
    }


class Choices(NamedTuple):
    """What a pair is asked to be.

    Attributes:
      coupling: how the learners influence each other.
      preset: of their paces.
      mode: how the slow one learns.
      horizon: steps the slow learner's average reaches back, in mode "consolidated".
      rule: how the masks move.
      masks: what is pruned, and in which pattern.
    """

    coupling: Coupling
    preset: str
    mode: str
    horizon: float
    rule: PairRule = "rigl"
    masks: MaskOptions = MaskOptions()


def make_choices(options: PairOptions, config: TaskConfig, samples: int) -> Choices:
    """What the flags ask for.

    Args:
      options: the flags.
      config: the task.
      samples: number of training examples.

    Raises:
      ValueError: a flag is out of its range.
    """
    check_least(options, {"horizon": 0})
    check_choice("pair_rule", options.pair_rule, get_args(PairRule))
    check_masks(options)
    epoch = data.steps_per_epoch(samples, config.batch_size)
    suited = "fast_slow" if options.mode == "consolidated" else "averaged"
    return Choices(
        coupling=Coupling(
            fast=options.coupling,
            slow=options.coupling,
            temperature=options.temperature,
            ramp=options.coupling_ramp,
            masks=options.mask_coupling,
            independent_views=options.independent_views,
            weighted=options.weighted_coupling,
            threshold=options.trust_threshold,
        ),
        preset=suited if options.preset == "auto" else options.preset,
        mode=options.mode,
        horizon=options.horizon or max(config.steps / 6, epoch),
        rule=options.pair_rule,
        masks=options,
    )


def pair(
    task: Task,
    tx: Callable[[Settings, jax.Array], Dual],
    coupling: Coupling,
    intervals: Dual,
    when: Dual | None = None,
    average_from: int | None = None,
    selection: Selection = select,
) -> Method:
    """Two networks, coupled or not.

    Args:
      task: what every method is given.
      tx: (settings, key) -> transformations of the two networks.
      coupling: how they influence each other; equal weights may differ between units.
      intervals: mean steps between the refreshes of each mask, None for none.
      when: step -> bool of each, when its mask is refreshed.
      average_from: step from which averages of the weights are kept, which then are
        what counts; None for none.
      selection: which patterns may be live.
    """
    models, own = Dual(task.model, task.model), _defaults(task, coupling)
    tx(own, jax.random.key(0))  # Complains now, not when the step is traced.
    step = pair_step.make_dual_step(
        models,
        lambda settings: tx(settings, jax.random.key(0)),
        coupling,
        task.augment,
        task.smoothing,
        task.growth_samples,
        task.prunable,
        when,
    )

    def costs(state: TrainState, data: Data) -> dict[str, Any]:
        return _costs(task, intervals, state, len(data.labels))

    def spent(state: TrainState, data: Data) -> Any:
        return costs(state, data)["training"]

    run = train.make_runner(with_cost(step, spent), task.mesh)
    forward = train.make_predict(task.model)

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Any:
        mask_key, key = jax.random.split(key)
        chosen = own | dict(settings)
        return pair_step.init_pair(
            models,
            tx(chosen, mask_key),
            data,
            key,
            coupling,
            task.prunable,
            chosen,
            task.skip_faults,
            selection,
        )

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        return pair_account.pair_predictions(Dual(forward, forward), state, data)

    def stored_and_inference(state: TrainState, data: Data) -> tuple[int, float]:
        inference = costs(state, data)[pair_account.headline(state)]
        return pair_account.stored_numbers(state), float(inference)

    settle = _as_it_is if average_from is None else _settle(task, average_from)
    return Method(
        init,
        train_through(run, task.steps, settle),
        predict,
        stored_and_inference,
        free=frozenset(own),
        run=run,
        settle=settle,
    )


def sparse_pair(task: Task, choices: Choices) -> Method:
    """Two sparse networks with the budget of one between them.

    Raises:
      ValueError: an average is asked for of learners that average already, or a pattern
        does not fit the network.
    """
    halves = split_budget(task)
    shared = make_shared(task, choices.masks, distributions.erk)
    for sparsity in halves:
        rehearse(task._replace(sparsity=sparsity), choices.masks, shared)
    plans = make_plans(task, choices.preset)
    begin = plans.fast.average_from
    if begin is not None and choices.mode == "consolidated":
        raise ValueError(
            "expected no averaging of a pair that consolidates, which is an average "
            "already, got --averaging or preset averaged; choose --mode=trained"
        )

    def tx(settings: Settings, key: jax.Array) -> Dual:
        return pair_presets.make_transforms(
            make_plans(task, choices.preset, settings["learning_rate"]),
            halves,
            lambda rate: task.optimizer(rate, settings["weight_decay"]),
            choices.mode,
            choices.horizon,
            key,
            _RULES[choices.rule],
            **shared,
        )

    intervals = Dual(*(task.mean_interval(plan.interval) for plan in plans))
    if choices.rule != "rigl":  # The others need no growth gradients.
        intervals = Dual(None, None)
    when = Dual(*(plan.when for plan in plans))
    selection = shared["selection"]
    return pair(task, tx, choices.coupling, intervals, when, begin, selection)


def uncoupled_pair(task: Task, choices: Choices) -> Method:
    """The same two sparse networks, both trained, with nothing between them."""
    return sparse_pair(task, choices._replace(coupling=_UNCOUPLED, mode="trained"))


def dense_pair(task: Task, coupling: Coupling | None = None) -> Method:
    """Two dense networks that teach each other: deep mutual learning.

    Args:
      task: what every method is given.
      coupling: how they do; masks have no part in it.
    """

    def tx(settings: Settings, key: jax.Array) -> Dual:
        rate = task.schedule(settings["learning_rate"])
        inner = task.optimizer(rate, settings["weight_decay"])
        network = task.averaged(sparsify(inner, rules.static(0.0), at([]), key))
        return Dual(network, network)

    never, begin = at([]), task.average_from
    coupling = dataclasses.replace(coupling or Coupling(), masks=0.0)
    return pair(task, tx, coupling, Dual(None, None), Dual(never, never), begin)


def split_budget(task: Task) -> Dual:
    """Sparsities of two networks that have the weights of one between them."""
    size = tree.size(tree.prunable_leaves(task.params, task.prunable))
    return dual.split_sparsity(size, task.sparsity)


def make_plans(task: Task, preset: str, learning_rate: Any = None) -> Dual:
    """How the learners of a pair move, see `pair_presets.make_plans`.

    The task's averaging is that of every preset, where it is asked for.
    """
    rate = task.learning_rate if learning_rate is None else learning_rate
    plans = pair_presets.make_plans(preset, rate, task.steps, task.interval)
    if task.average_from is None:
        return plans
    return Dual(*(plan._replace(average_from=task.average_from) for plan in plans))


def _static(sparsity: Any, drop_fraction: Any, **own: Any) -> rules.MaskRule:
    del drop_fraction
    return rules.static(sparsity, **own)


_RULES: Mapping[PairRule, MakeRule] = {
    "rigl": rules.rigl,
    "set": rules.set_,
    "static": _static,
}


def _defaults(task: Task, coupling: Coupling) -> dict[str, float]:
    own = {"learning_rate": task.learning_rate, "weight_decay": task.weight_decay}
    if coupling.fast and coupling.fast == coupling.slow:
        own["coupling"] = coupling.fast
    return own


def _costs(task: Task, intervals: Dual, state: TrainState, size: int) -> dict[str, Any]:
    """MACs per example, on a data set of a size."""
    spent = pair_account.pair_macs(
        state,
        Dual(task.macs, task.macs),
        intervals,
        growth_samples=min(task.growth_samples, size),
        batch_size=min(task.batch_size, size),
    )
    if task.sharpness:
        consolidated = pair_account.headline(state) == "slow"
        uphill = spent["fast"] if consolidated else spent["ensemble"]
        spent["training"] += 3 * uphill
    return spent


def _settle(task: Task, average_from: int) -> Callable[[TrainState, Data], TrainState]:
    """Both learners with the averages of their weights, and the statistics of these."""
    statistics = train.make_statistics(task.model, task.augment, task.batch_size)

    def settle(state: TrainState, data: Data) -> TrainState:
        if int(state.step) <= average_from:
            return state
        return pair_account.settle_pair(state, data, Dual(statistics, statistics))

    return settle


def _as_it_is(state: TrainState, data: Data) -> TrainState:
    del data
    return state
