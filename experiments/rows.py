"""Constraints on the training of a task, as a method that the experiments run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse.constraints import averaged, from_ticket
from d2sparse.train import (
    Constraint,
    Data,
    Progress,
    Recipe,
    Training,
    TrainState,
    Watch,
    constrain,
    fit_together,
    forward_macs,
    make_program,
    plain,
)
from experiments.session import Session
from experiments.singles import NO_SETTINGS, Method, Settings
from experiments.task import Task


def make_method(task: Task, constraints: Sequence[Constraint]) -> Method:
    """A training under constraints, as what the experiments can run.

    Raises:
      ValueError: two constraints claim the same thing, or the training hands over from
        one network to another, which a run cannot be resumed from yet.
    """
    training = constrain(plain_training(task), *constraints)
    if any(phase.training is not None for phase in training.phases):
        raise ValueError(
            "expected trainings of one network or pair, got one that hands over to a "
            "student; `python -m experiments.low_data` runs self_distilled, "
            "d2_distilled and d2_merged"
        )
    program = make_program(training, task.mesh, task.skip_faults)

    def init(key: jax.Array, data: Data, settings: Settings = NO_SETTINGS) -> Progress:
        return program.init(key, data, settings)

    def fit(
        sessions: Sequence[Session], runs: Sequence[Progress], data: Sequence[Data]
    ) -> list[TrainState]:
        ends = fit_together(program, runs, data, [watch(s) for s in sessions])
        each = zip(ends, data, strict=True)
        return [training.finish(end, own, program) for end, own in each]

    def costs(state: TrainState, data: Data) -> tuple[int, float]:
        del data
        masks = training.masks(state)
        stored = sum(int(np.sum(m)) for m in jax.tree.leaves(masks.stored))
        return stored, float(forward_macs(training.network, masks.used))

    def settle(state: TrainState, data: Data) -> TrainState:
        if len(training.phases) > 1:  # What counts depends on what phases keep.
            return state
        return training.finish(Progress(jnp.int32(0), state, {}), data, program)

    return Method(
        init,
        fit,
        program.predict,
        costs,
        lambda state: training.masks(state).used[0],
        state=lambda progress: progress.state,
        free=frozenset(training.settings),
        run=program.run if len(training.phases) == 1 else None,
        settle=settle,
    )


def average_of(task: Task) -> tuple[Constraint, ...]:
    """The average of the weights, where the task asks for one."""
    return (averaged(task.averaging),) if task.average_from is not None else ()


def plain_training(task: Task) -> Training:
    """The plain training of a task."""
    recipe = Recipe(
        steps=task.steps,
        batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        schedule="cosine" if task.anneals else "constant",
        weight_decay=task.weight_decay,
        sharpness=task.sharpness,
        label_smoothing=task.smoothing,
        augment=task.augment,
        prunable=task.prunable,
    )
    training = plain(task.model, _like(task), recipe)._replace(
        transform=lambda rate, settings, key: task.optimizer(
            rate, settings["weight_decay"]
        )
    )
    return training if task.ticket is None else from_ticket(task.ticket)(training)


def _like(task: Task) -> Data:
    """The form of the task's data."""
    form = jax.ShapeDtypeStruct
    channels = form(task.image_shape[-1:], "float32")
    images, labels = form((1, *task.image_shape), "uint8"), form((1,), "int32")
    return Data(images, labels, channels, channels)


def watch(session: Session) -> Watch:
    """What a session is told of a run."""
    config = session.config

    def report(progress: Progress, logs: dict[str, float]) -> None:
        session.report(int(progress.state.step), progress.state, logs)

    def save(progress: Progress, logs: Mapping[str, list[Any]]) -> None:
        session.save(progress.state, lambda s: progress._replace(state=s), dict(logs))

    def begun(progress: Progress) -> None:
        if not session.ledger.logs:
            session.ledger.last = int(progress.state.step)

    return Watch(
        every=config.report_every,
        report=report,
        save_every=config.checkpoint_every or config.report_every,
        save=save,
        begun=begun,
        interrupted=session.interrupted,
        logs=session.ledger.logs,
    )
