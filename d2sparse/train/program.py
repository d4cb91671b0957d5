"""A training, compiled: its initial state, its steps, its predictions."""

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from d2sparse.data import batch_indices
from d2sparse.scores.local import widen
from d2sparse.train.loops import Runner, make_runner
from d2sparse.train.state import Data, Metrics, TrainState, passes, take
from d2sparse.train.steps import Step, growth_batch, is_finite, step_keys
from d2sparse.train.training import Context, Progress, Settings, Training
from d2sparse.tree import PyTree

_BATCHES = 100  # That statistics of normalisations are taken from.
_take = jax.jit(take)  # One program for the sets of one size, whatever is predicted.


class Program(NamedTuple):
    """A training whose functions are compiled once, for all seeds and settings.

    Attributes:
      training: what is compiled.
      init: `(key, data, settings) -> progress` at step 0; settings that are not given
        are those of the training.
      run: runner of its steps, whose metrics hold "macs".
      predict: `(state, data) -> float[n, classes] by name`, the headline first, on the
        host; of half precision in float32. No data are a ValueError.
      statistics: `(params, model_state, data, key) -> model_state` of normalisations.
      others: programs of the phases that have a training of their own, by number.
    """

    training: Training
    init: Callable[..., Progress]
    run: Runner
    predict: Callable[[TrainState, Data], dict[str, np.ndarray]]
    statistics: Callable[[PyTree, PyTree, Data, jax.Array], PyTree]
    others: "Mapping[int, Program]"

    def of(self, phase: int) -> "Program":
        """The program of the steps of a phase; before the first, of the first."""
        return self.others.get(max(phase, 0), self)

    def form(
        self, phase: int, data: Data, settings: Settings | None = None
    ) -> Progress:
        """Shapes and types of the progress in a phase: what its checkpoints look like.

        A phase of another training than the one before it hands over, which may change
        the structure; its `enter` is traced. That of all others keeps the structure and
        is not looked at, so it may decide on the host.

        Args:
          phase: number of the phase, -1 before the first; after the last, as in it.
          data: training data, or its abstract form.
          settings: as for `init`.

        Returns:
          The progress with a `jax.ShapeDtypeStruct` in place of every array.
        """
        phases = self.training.phases[: phase + 1]
        begin = functools.partial(self.init, settings=settings)
        progress: Progress = jax.eval_shape(begin, jax.random.key(0), data)
        for before, after in itertools.pairwise(phases):
            if after.training is not before.training:
                progress = jax.eval_shape(
                    lambda p, d, enter=after.enter: enter(p, d, self), progress, data
                )
        return progress


def make_program(
    training: Training, mesh: Mesh | None = None, skip_faults: bool = False
) -> Program:
    """Compiles a training; nothing is compiled until it is called.

    Args:
      training: what to compile.
      mesh: the devices that batches are cut up between; None for one.
      skip_faults: whether updates that are not finite are left out, instead of
        stopping the run.
    """

    @functools.cache
    def made(number: int) -> Program:
        phases = training.phases
        own = phases[number].training or training
        for earlier in range(number):
            if phases[earlier].training is own:
                return made(earlier)
        return make_program(own, mesh, skip_faults)

    parts = enumerate(training.phases)
    others = {n: made(n) for n, phase in parts if phase.training is not None}

    init = _initialiser(training, skip_faults)
    run = make_runner(make_step(training), mesh)
    predict, statistics = _predictor(training), _statistics(training)
    return Program(training, init, run, predict, statistics, others)


def starting_as(
    program: Program, training: Training, skip_faults: bool = False
) -> Program:
    """A program whose runs start as those of another training do.

    Args:
      program: of a training that differs from the other in where its runs start alone,
        such as in a trained network's weights; what is compiled serves both.
      training: the other one.
      skip_faults: as for `make_program`.
    """
    return program._replace(init=_initialiser(training, skip_faults))


def _initialiser(training: Training, skip_faults: bool) -> Callable[..., Progress]:
    def init(key: jax.Array, data: Data, settings: Settings | None = None) -> Progress:
        _refuse_settings(settings or {}, training)
        own = {**training.settings, **(settings or {})}
        first = training.phases[0].training or training
        state = first.init(first, key, data, {**first.settings, **own})
        skip = state.faults._replace(skip=jnp.asarray(skip_faults))
        before = Progress(jnp.int32(-1), state._replace(faults=skip), {})
        return training.begin(before, data)

    return init


def make_step(training: Training) -> Step:
    """One step of a training, pure: `(state, data, indices) -> (state, metrics)`.

    Beside the metrics of the loss there are "finite", bool[], for `guard`, and "macs",
    the cost of the step per example. Optimisers that ask for it are given
    `grad_fn(params, number)`, the gradient on the step's batch at other parameters;
    `growth_fn()`, that of a larger batch; `refresh`, whether it is time; and `scores`
    on the step's batch, as the step's loss sees it.
    """

    def objective(
        params: PyTree, state: TrainState, batch: Data, key: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        x = training.inputs(batch, key)
        outputs, after = training.model.apply(params, state.model_state, x, train=True)
        context = Context(params, state.model_state, state.step, state.settings, x)
        value, logs = training.loss(outputs, batch, context)
        return value, (after, logs)

    gradient = jax.grad(objective, has_aux=True)

    def step(
        state: TrainState, data: Data, indices: jax.Array
    ) -> tuple[TrainState, Metrics]:
        spent = training.cost(training, state, len(data.labels))
        loss_key, order_key, growth_key = step_keys(state)
        batch = take(data, indices)

        def growth_fn() -> PyTree:
            examples = growth_batch(data, training.growth_samples, order_key)
            return gradient(state.params, state, examples, growth_key)[0]

        def grad_fn(params: PyTree, number: int) -> PyTree:
            return gradient(params, state, batch, loss_key)[0]

        extra: dict[str, Any] = {"grad_fn": grad_fn}
        if training.growth_samples:
            extra["growth_fn"] = growth_fn
        if training.when is not None:
            extra["refresh"] = training.when(state.step)
        if training.scores is not None:
            extra["scores"] = training.scores(training, state, batch, loss_key)
        rate = training.rate(state.settings["learning_rate"], training.horizon)
        tx = training.transform(rate, state.settings, 0)
        grads, (model_state, logs) = gradient(state.params, state, batch, loss_key)
        updates, opt_state = optax.with_extra_args_support(tx).update(
            grads, state.opt_state, state.params, **extra
        )
        after = state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            model_state=model_state,
            opt_state=opt_state,
        )
        return after, logs | {"finite": is_finite(grads), "macs": spent}

    return step


def _predictor(training: Training) -> Callable[..., dict[str, np.ndarray]]:
    """Predictions in evaluation mode."""

    @jax.jit
    def forward(params: PyTree, model_state: PyTree, batch: Data) -> Any:
        x = training.inputs(batch, None)
        outputs, _ = training.model.apply(params, model_state, x, train=False)
        # A plain dict would come back in the order of its names.
        return OrderedDict(training.probabilities(widen(outputs)))

    def predict(state: TrainState, data: Data) -> dict[str, np.ndarray]:
        size = len(data.labels)
        if not size:
            raise ValueError("expected at least one example to predict, got none")
        outputs = [
            forward(state.params, state.model_state, _take(data, rows))
            for rows, _ in passes(size)
        ]
        return jax.tree.map(
            lambda *parts: np.concatenate(parts)[:size], *jax.device_get(outputs)
        )

    return predict


def _statistics(training: Training) -> Callable[..., PyTree]:
    """Statistics of normalisations for other weights than they were taken with.

    They are taken as in training, from 100 batches drawn at random, after which 0.003 %
    is left of what was there before at the usual momentum of 0.9. A state that is empty
    comes back as it is.
    """

    @jax.jit
    def forward(
        params: PyTree, model_state: PyTree, batch: Data, key: jax.Array
    ) -> PyTree:
        x = training.inputs(batch, key)
        return training.model.apply(params, model_state, x, train=True)[1]

    def statistics(
        params: PyTree, model_state: PyTree, data: Data, key: jax.Array
    ) -> PyTree:
        if not jax.tree.leaves(model_state):
            return model_state
        size = len(data.labels)
        rows = batch_indices(key, 0, _BATCHES, size, training.batch_size)
        for number, row in enumerate(rows):
            batch, own = take(data, row), jax.random.fold_in(key, number)
            model_state = forward(params, model_state, batch, own)
        return model_state

    return statistics


def _refuse_settings(settings: Mapping[str, Any], training: Training) -> None:
    if unknown := sorted(settings.keys() - training.settings.keys()):
        raise ValueError(
            f"expected settings of {sorted(training.settings)}, got {unknown}; what "
            "changes the program is an argument of the constraint"
        )
