"""Training: one compiled step with donated state, strung together for the backend.

The state is a NamedTuple of arrays and the data lie on the device, so a run is a pure
function of them: the batch and the augmentation of step t follow from the key and t.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d2sparse import losses, metrics, tree
from d2sparse.data import (
    Augment,
    Split,
    batch_indices,
    channel_statistics,
    standardize,
)
from d2sparse.masks import apply_masks
from d2sparse.models import Model
from d2sparse.transforms import check_refreshes, get_masks, sparse_states
from d2sparse.tree import PyTree

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that changes in a run; a copy of it is the run.

    Attributes:
      step: int32[], the number of steps taken.
      params: trained parameters.
      model_state: what a forward pass changes, such as BatchNorm statistics.
      opt_state: the optimiser's state, masks included.
      key: random key of the run, never changed: order and augmentation follow from it
        and the step.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: jax.Array


class Data(NamedTuple):
    """Labelled images on the device, and how to standardise them.

    Attributes:
      images: uint8[n, height, width, channels].
      labels: int32[n].
      mean: float[channels], subtracted from images scaled to [0, 1].
      std: float[channels], divided by.
    """

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array


Loss = Callable[[PyTree, PyTree, Data, jax.Array], tuple[jax.Array, Any]]
Step = Callable[[TrainState, Data, jax.Array], tuple[TrainState, Metrics]]
Report = Callable[[int, TrainState, dict[str, float]], None]


def to_device(split: Split, like: Data | None = None) -> Data:
    """Labelled images on the default device.

    Args:
      split: images and labels.
      like: data whose channel statistics are used, the training data for a test set;
        if not given, those of the images themselves.

    >>> split = Split(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype=np.int32))
    >>> to_device(split).images.shape
    (4, 8, 8, 1)
    """
    if like is not None:
        return like._replace(
            images=jnp.asarray(split.images), labels=jnp.asarray(split.labels)
        )
    return Data(*map(jnp.asarray, (*split, *channel_statistics(split.images))))


def take(data: Data, indices: jax.Array) -> Data:
    """The examples at the given indices.

    >>> split = Split(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4, dtype=np.int32))
    >>> take(to_device(split), jnp.array([3, 1])).labels.tolist()
    [3, 1]
    """
    return data._replace(images=data.images[indices], labels=data.labels[indices])


def inputs(data: Data) -> jax.Array:
    """What a network sees: standardised images, float[n, height, width, channels]."""
    return standardize(data.images, data.mean, data.std)


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """An optimiser by name. Weight decay acts on kernels only.

    * `"sgd"`: momentum, decay coupled: added to the gradient, so that it enters the
      momentum and scales with the learning rate.
    * `"sgdw"`: momentum, decay decoupled from it (arXiv 1711.05101).
    * `"adamw"`: Adam with decoupled decay; `momentum` is its first moment's decay.

    Inside `sparsify` momentum and decay act on live weights alone.

    Raises:
      ValueError: unknown name.

    >>> tx = make_optimizer("sgd", 0.1, weight_decay=0.5, momentum=0.0)
    >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params),
    ...                        params)
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([[-0.05000000074505806]], [-0.0])
    """
    decay = optax.add_decayed_weights(weight_decay, mask=_kernels)
    trace = optax.trace(momentum)
    rate = optax.scale_by_learning_rate(learning_rate)
    if name == "sgd":
        return optax.chain(decay, trace, rate)
    if name == "sgdw":
        return optax.chain(trace, decay, rate)
    if name == "adamw":
        return optax.chain(optax.scale_by_adam(b1=momentum), decay, rate)
    raise ValueError(f"expected optimizer 'sgd', 'sgdw' or 'adamw', got {name!r}")


def make_loss(
    model: Model, augment: Augment | None = None, smoothing: float = 0.0
) -> Loss:
    """Mean cross-entropy of a classifier on a batch.

    Args:
      model: maps images to logits.
      augment: `(key, images) -> images`, applied to standardised images.
      smoothing: label smoothing in [0, 1).

    Returns:
      `(params, model_state, batch, key) -> (loss, (model_state, metrics))`.
    """

    def loss(
        params: PyTree, model_state: PyTree, batch: Data, key: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        x = inputs(batch) if augment is None else augment(key, inputs(batch))
        logits, model_state = model.apply(params, model_state, x, train=True)
        value = jnp.mean(losses.cross_entropy(logits, batch.labels, smoothing))
        correct = metrics.accuracy(logits, batch.labels)
        return value, (model_state, {"loss": value, "train_accuracy": correct})

    return loss


def init_state(
    model: Model, tx: optax.GradientTransformation, data: Data, key: jax.Array
) -> TrainState:
    """The state at step 0, with the masks of the optimiser applied to the parameters.

    Args:
      model: the network.
      tx: its optimiser, with or without `sparsify`.
      data: examples whose shape the network is built for.
      key: random key of the run.
    """
    init_key, run_key = jax.random.split(key)
    params, model_state = model.init(init_key, inputs(take(data, jnp.arange(1))))
    opt_state = tx.init(params)
    if sparse_states(opt_state):
        params = apply_masks(params, get_masks(opt_state))
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, run_key)


def make_train_step(
    loss: Loss, tx: optax.GradientTransformation, growth_samples: int = 0
) -> Step:
    """One step of gradient descent, pure: `(state, data, indices) -> (state, metrics)`.

    Args:
      loss: `(params, model_state, batch, key) -> (loss, (model_state, metrics))`.
      tx: any Optax optimiser.
      growth_samples: where `tx` is sparse, the gradient its rule sees at a refresh is
        that of this many examples (at most all), drawn anew each time; 0 means the
        gradient of the step's own batch.
    """
    tx = optax.with_extra_args_support(tx)
    gradient = jax.grad(loss, has_aux=True)

    def step(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        loss_key, order_key, growth_key = step_keys(state)

        def growth_fn() -> PyTree:
            batch = growth_batch(data, growth_samples, order_key)
            return gradient(state.params, state.model_state, batch, growth_key)[0]

        extra = {"growth_fn": growth_fn} if growth_samples else {}
        grads, (model_state, logs) = gradient(
            state.params, state.model_state, take(data, indices), loss_key
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        return (
            TrainState(state.step + 1, params, model_state, opt_state, state.key),
            logs,
        )

    return step


def step_keys(state: TrainState) -> jax.Array:
    """Keys of the step to come: for its loss, the growth batch, and the loss on that.

    Returns:
      key[3].
    """
    _, key = jax.random.split(state.key)
    return jax.random.split(jax.random.fold_in(key, state.step), 3)


def growth_batch(data: Data, samples: int, key: jax.Array) -> Data:
    """Up to `samples` examples in random order, for a growth gradient."""
    order = jax.random.permutation(key, len(data.labels))
    return take(data, order[:samples])


def step_indices(state: TrainState, data: Data, steps: int, batch_size: int) -> Any:
    """Which examples the next steps are trained on: int32[steps, batch]."""
    key, _ = jax.random.split(state.key)
    return batch_indices(key, state.step, steps, len(data.labels), batch_size)


def make_runner(step: Step) -> Step:
    """Strings steps together: `(state, data, indices[steps, batch])`.

    On accelerators the steps are one `lax.scan`. On CPU they are a loop over the
    compiled step, since XLA runs convolutions in a loop body without its threads. Both
    give the same numbers. The state is donated: the one passed in is used up.

    Returns:
      A function like `step`, whose metrics are those of every step, float[steps].
    """
    return _loop(step) if jax.default_backend() == "cpu" else _scan(step)


def fit(
    run: Step,
    state: TrainState,
    data: Data,
    steps: int,
    batch_size: int,
    every: int | None = None,
    report: Report | None = None,
) -> TrainState:
    """Trains up to step number `steps`, from wherever the state stands.

    Args:
      run: a runner from `make_runner`.
      state: where to start; it is used up.
      data: training data.
      steps: number of the step to stop before.
      batch_size: examples per step.
      every: steps between two reports; at their multiples metrics leave the device.
        If not given, there is one report at the end.
      report: called with the step, the state and the mean metrics since the last call.
        It must not keep the state, which the next step uses up.

    Returns:
      The state after the last step.

    Raises:
      ValueError: a refresh of the masks has met a NaN since the last report; it names
        the leaves.
    """
    every = every or steps
    position = int(state.step)
    while position < steps:
        stop = min(steps, position - position % every + every)
        indices = step_indices(state, data, stop - position, batch_size)
        state, logs = run(state, data, indices)
        check_refreshes(state.opt_state)
        if report is not None:
            means = {
                name: float(np.mean(v)) for name, v in jax.device_get(logs).items()
            }
            report(stop, state, means)
        position = stop
    return state


def make_predict(model: Model, batch_size: int = 512) -> Callable[..., np.ndarray]:
    """Class probabilities of a data set in evaluation mode.

    Args:
      model: the network.
      batch_size: examples per forward pass; the last pass is filled up.

    Returns:
      `(params, model_state, data) -> float[n, classes]`, on the host.
    """

    @jax.jit
    def forward(params: PyTree, model_state: PyTree, batch: Data) -> jax.Array:
        logits, _ = model.apply(params, model_state, inputs(batch), train=False)
        return jax.nn.softmax(logits)

    def predict(params: PyTree, model_state: PyTree, data: Data) -> np.ndarray:
        size = len(data.labels)
        width = min(batch_size, size)
        passes = -(-size // width)
        rows = np.arange(passes * width).reshape(passes, width) % size
        outputs = [
            forward(params, model_state, take(data, jnp.asarray(row))) for row in rows
        ]
        return np.concatenate(jax.device_get(outputs))[:size]

    return predict


def evaluate(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, negative log likelihood and calibration error over a whole set.

    Args:
      probabilities: float[n, classes].
      labels: int[n].

    >>> scores = evaluate(np.array([[0.75, 0.25]]), np.array([0]))
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'accuracy': 1.0, 'nll': 0.288, 'ece': 0.25}
    """
    measures = {"accuracy": metrics.accuracy, "nll": metrics.nll, "ece": metrics.ece}
    return {
        name: float(f(jnp.asarray(probabilities), jnp.asarray(labels)))
        for name, f in measures.items()
    }


def _loop(step: Step) -> Step:
    compiled = jax.jit(step, donate_argnums=0)

    def run(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        logs = []
        for row in np.asarray(indices):
            state, log = compiled(state, data, row)
            logs.append(log)
        return state, jax.tree.map(lambda *values: np.stack(values), *logs)

    return run


def _scan(step: Step) -> Step:
    def run(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda s, row: step(s, data, row), state, indices)

    return jax.jit(run, donate_argnums=0)


def _kernels(params: PyTree) -> PyTree:
    kernels = set(tree.prunable_leaves(params))
    return tree.map_with_path(lambda path, leaf: path in kernels, params)
