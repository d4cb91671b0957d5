"""Learning on a stream: data arrive in megabatches, and a network learns from each.

    options = StreamOptions(megabatches=8)
    steps = stream_steps(options, labels, batch_size=32)
    training = constrain(
        plain(model, data), lasting(steps), rigl(0.9), stream(options, labels)
    )

Every megabatch is a stage of the training: some epochs on what is visible, of which the
best on held-out examples is kept, evaluated, and resumed from.
"""

import dataclasses
from typing import Any

from d2sparse import rules, tree
from d2sparse.anytime import Stage
from d2sparse.constraints.arrivals import Arrival, make_pruner
from d2sparse.constraints.masked import under_masks
from d2sparse.constraints.pacing import paced
from d2sparse.constraints.quantised import CALIBRATED
from d2sparse.constraints.stages import Parts, begin_stream, phases_of
from d2sparse.constraints.timetables import StreamOptions, plan
from d2sparse.masks import dense_masks
from d2sparse.train import (
    Constraint,
    Data,
    Network,
    Progress,
    Training,
    claim,
    lasting,
    live_weights,
    stay,
)
from d2sparse.tree import PyTree


def stream(
    options: StreamOptions,
    labels: Any,
    arrival: Arrival | None = None,
    anneals: bool = True,
) -> Constraint:
    """The data arrive in megabatches, and the network has to predict well after each.

    Anytime learning at macroscale (ALMA, Caccia et al., arXiv 2106.09563). With the
    megabatches M_1 to M_T, the visible examples R_t (all, or a replay of them) and the
    network f_t after stage t,

        f_t = train(f_{t-1}, R_t),   cumulative error = sum_t error(f_t)

    Anytime progressive pruning (APP, Misra et al., arXiv 2204.01640) prunes f_{t-1} to
    the density `0.8^lambda_t` before it trains on R_t, see `d2sparse.anytime`.

    A stage is one phase per epoch, and a phase without steps, titled "megabatch t", at
    whose end the state is that of the stage's best epoch: the first of equals on the
    held-out examples. Where an epoch's masks have more live weights than those at the
    stage's end, as in gradual pruning, its weights are put under the last masks.

    The training it constrains has one phase, and as many steps as the stream: put
    `lasting(stream_steps(...))` first and this last. It never looks at examples that
    have not arrived; `averaged` would, for its statistics of normalisations.

    A run of it has further settings: "seed", a whole number below 2^24, which decides
    what arrives when; and "density_0" and so on, the parts of the weights that are left
    at the stages that prune. Its memory holds "best", the state of the best epoch;
    "macs", what scoring has cost, per example of a batch.

    Args:
      options: how the data arrive, and what an arrival looks at.
      labels: int[n], of the training examples of one seed. Only the numbers of examples
        matter: all seeds have the stages that these give.
      arrival: what an arrival does to the network; None for nothing.
      anneals: whether the learning rate falls within a stage as the options say; if
        not, it stays.

    Raises:
      ValueError: the data cannot be cut or replayed like that. When applied: the
        training has several phases, another number of steps, growth gradients on
        examples that have not arrived, or, where arrivals prune, masks or several
        networks.

    >>> import numpy as np
    >>> from d2sparse import data, models, train
    >>> split = data.Split(
    ...     np.zeros((16, 4, 4, 1), np.uint8), np.arange(16, dtype=np.int32) % 2
    ... )
    >>> options = StreamOptions(megabatches=2, epochs=1, stream_validation=0.25)
    >>> steps = stream_steps(options, split.labels, batch_size=3)
    >>> training = train.constrain(
    ...     train.plain(
    ...         models.lenet_300_100(num_classes=2),
    ...         train.to_device(split),
    ...         train.Recipe(batch_size=3),
    ...     ),
    ...     lasting(steps),
    ...     stream(options, split.labels, Arrival((0.8, 0.64))),
    ... )
    >>> [(phase.stop, phase.title) for phase in training.phases]
    [(2, ''), (2, 'megabatch 1'), (6, ''), (6, 'megabatch 2')]
    """
    chosen, arrives = options.resolved, arrival or Arrival()
    if not anneals:
        chosen = dataclasses.replace(chosen, schedule="constant")

    def constrained(training: Training) -> Training:
        stages = plan(chosen, labels, training.batch_size)
        _refuse(training, stages, arrives)
        parts = Parts(
            chosen,
            arrives,
            stages,
            training.settings["learning_rate"],
            training.batch_size,
            make_pruner(training, chosen),
        )

        def begin(progress: Progress, data: Data) -> Progress:
            return begin_stream(training.begin(progress, data))

        densities = {
            f"density_{number}": density
            for number, density in enumerate(arrives.densities)
            if density is not None
        }
        settings = {**training.settings, "seed": 0.0, **densities}
        masked = _with_masks(paced("constant")(training), arrives)
        phases = [p for n in range(len(stages)) for p in phases_of(parts, n)]
        return masked._replace(begin=begin, settings=settings, phases=tuple(phases))

    return constrained


def stream_steps(options: StreamOptions, labels: Any, batch_size: int) -> int:
    """The number of steps of a training on a stream.

    Args:
      options: how the data arrive, and for how long a stage trains.
      labels: int[n], of the training examples of one seed.
      batch_size: examples per step.
    """
    return plan(options, labels, batch_size)[-1].end


def as_long_as_stream(options: StreamOptions, labels: Any) -> Constraint:
    """A training with as many steps as a stream, in one phase; put it first.

    Args:
      options: how the data arrive, and for how long a stage trains.
      labels: int[n], of the training examples of one seed.
    """

    def constrained(training: Training) -> Training:
        steps = stream_steps(options, labels, training.batch_size)
        return lasting(steps)(training)

    return constrained


def layer_densities(network: Network, masks: tuple[PyTree, ...]) -> dict[str, float]:
    """Part of the weights of every prunable leaf that is live, over all networks.

    Args:
      network: whose leaves they are.
      masks: of each network.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> shapes = {"kernel": jax.ShapeDtypeStruct((2, 2), "float32")}
    >>> layer_densities(Network(shapes, {}), ({"kernel": jnp.eye(2, dtype=bool)},))
    {'kernel': 0.5}
    """
    leaves = tree.prunable_leaves(network.params, network.prunable)
    live = live_weights(network, masks)
    return {path: live[path] / leaf.size for path, leaf in leaves.items()}


def _with_masks(training: Training, arrival: Arrival) -> Training:
    """A training whose network arrivals can prune; without any, as the others are."""
    if arrival.densities:
        training = claim(training, "the networks", "stream")
    elif "the masks" in training.claims or "the networks" in training.claims:
        return training
    dense = dense_masks(training.network.params)
    return under_masks(training, "stream", lambda s: rules.fixed(dense))


def _refuse(training: Training, stages: list[Stage], arrival: Arrival) -> None:
    first, *others = training.phases
    if training.claims.get("the precision") == CALIBRATED:
        raise ValueError(
            "expected nothing that looks at examples before they arrive, got scales of "
            "inputs that training images calibrate; take --activation_scale=dynamic"
        )
    if others or first.enter is not stay or first.batches or first.training:
        raise ValueError(
            "expected a training in one phase that nothing precedes, to put on a "
            f"stream, got {len(training.phases)} phases with pruning or rewinding "
            "before or between them; prune at arrivals instead"
        )
    steps = stages[-1].end
    if training.horizon != steps:
        raise ValueError(
            f"expected a training of {steps} steps, as its stream has, got "
            f"{training.horizon}; put lasting({steps}) first"
        )
    if training.growth_samples:
        raise ValueError(
            "expected growth gradients of the step's examples, since others may not "
            f"have arrived, got growth_samples={training.growth_samples}; give 0"
        )
    if arrival.densities and len(arrival.densities) != len(stages):
        raise ValueError(
            f"expected a density for each of {len(stages)} stages, got "
            f"{len(arrival.densities)}; give None where nothing is pruned"
        )
