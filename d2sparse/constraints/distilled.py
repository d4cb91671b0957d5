"""Two trainings, one after the other: what was trained first teaches the second."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from d2sparse import dual, losses, lottery
from d2sparse.constraints.coupled import pair_masks
from d2sparse.constraints.lottery import kept
from d2sparse.dual import Dual
from d2sparse.reparam import nonzero_masks
from d2sparse.train import (
    Constraint,
    Context,
    Data,
    Metrics,
    Program,
    Progress,
    Settings,
    Teacher,
    Training,
    TrainState,
    claim,
    constrain,
    forward_macs,
    lasting,
    log_mean,
    with_teachers,
)


def distilled(
    *teacher: Constraint, weight: float = 1.0, temperature: float = 1.0
) -> Constraint:
    """A student learns from the labels and from a network that was trained before it.

    `CE(z, y) + weight tau^2 KL(q || softmax(z / tau))` with q the teacher's softened
    probabilities on the images that the student sees. Where teacher and student are
    alike it is a born-again network (Furlanello et al., arXiv 1805.04770).

    Args:
      *teacher: constraints of the teacher's training; none for the plain one.
      weight: of the teaching, at least 0.
      temperature: tau, above 0.

    Raises:
      ValueError: the weight or the temperature is out of its range.
    """
    check_teaching(weight, temperature)

    def constrained(training: Training) -> Training:
        first = constrain(training, *teacher)
        student = taught(training, 1, weight, temperature)

        def hand_over(progress: Progress, data: Data, program: Program) -> Progress:
            return progress._replace(state=begin_taught(first, progress, data, program))

        return one_after_the_other(first, student, hand_over)

    return constrained


def finished(
    pair: Constraint,
    part: float = 0.25,
    rate: float = 0.1,
    lesson: tuple[float, float] = (1.0, 1.0),
    merged: bool = False,
) -> Constraint:
    """A pair whose ensemble teaches one network at the end: inference is that of one.

    Args:
      pair: made by `coupled`; it has the first part of the training.
      part: of the steps, those that the one network is trained, in (0, 1).
      rate: its learning rate at first, as a part of the pair's.
      lesson: weight and temperature of the teaching.
      merged: whether the network starts from the merger of both, instead of from the
        slow learner.

    Raises:
      ValueError: when applied, where a training would have no steps.
    """
    check_teaching(*lesson)

    def constrained(training: Training) -> Training:
        last = round(part * training.horizon)
        if not 0 < last < training.horizon:
            raise ValueError(
                f"expected finish_part to leave both trainings steps, got {part} of "
                f"{training.horizon}"
            )
        first = constrain(training, lasting(training.horizon - last), pair)
        whole = constrain(training, lasting(last), kept())
        slower = whole._replace(rate=lambda lr, steps: whole.rate(rate * lr, steps))
        student = taught(slower, 2, *lesson)

        def hand_over(progress: Progress, data: Data, program: Program) -> Progress:
            number = len(first.phases) - 1
            state = first.finish(progress, data, program.of(number))
            masks = pair_masks(progress.state)
            params, own, live = state.params.slow, state.model_state.slow, masks.slow
            if merged:
                params, live = dual.merge(state.params, masks)
                own = (
                    program.of(number)
                    .statistics(Dual(params, params), Dual(own, own), data, state.key)
                    .slow
                )
            begun = _begin_student(program.training, progress.state, data)
            teachers = zip(state.params, state.model_state, strict=True)
            taught_by = with_teacher(begun, tuple(Teacher(*t) for t in teachers))
            start = taught_by._replace(
                params=params,
                model_state=taught_by.model_state._replace(own=own),
            )
            return progress._replace(state=lottery.rewind(start, live))

        return one_after_the_other(first, student, hand_over)

    return constrained


def taught(
    training: Training, teachers: int, weight: float, temperature: float
) -> Training:
    """A training whose model state holds teachers, and whose loss listens to them."""
    model = training.model
    student = claim(training, "the teachers", "distilled")

    def loss(outputs: Any, batch: Data, context: Context) -> tuple[jax.Array, Metrics]:
        inside = context._replace(model_state=context.model_state.own)
        value, logs = training.loss(outputs, batch, inside)
        said = [
            model.apply(*own, context.x, train=False)[0]
            for own in context.model_state.teachers
        ]
        lesson = losses.distillation(outputs, log_mean(said), temperature)
        lesson = jnp.mean(lesson)
        return value + weight * lesson, logs | {"taught": lesson}

    def cost(outer: Training, state: TrainState, size: int) -> Any:
        inside = state._replace(model_state=state.model_state.own)
        known = [own.params for own in state.model_state.teachers]
        live = [nonzero_masks(own, training.network.prunable) for own in known]
        spent = training.cost(outer, inside, size)
        return spent + forward_macs(training.network, live)

    return student._replace(model=with_teachers(model, teachers), loss=loss, cost=cost)


def one_after_the_other(
    first: Training,
    second: Training,
    hand_over: Callable[[Progress, Data, Program], Progress],
) -> Training:
    """The phases of a training, then those of another one that it hands over to."""
    before = tuple(
        phase._replace(training=phase.training or first, title="")
        for phase in first.phases
    )
    entered, *rest = second.phases
    return second._replace(
        phases=(*before, entered._replace(enter=hand_over), *rest),
        begin=first.begin,
    )


def with_teacher(state: TrainState, teachers: tuple[Teacher, ...]) -> TrainState:
    """A student's state with its teachers."""
    copied = jax.tree.map(jnp.copy, teachers)
    return state._replace(model_state=state.model_state._replace(teachers=copied))


def check_teaching(weight: float, temperature: float) -> None:
    """Refuses values out of their ranges.

    Raises:
      ValueError: naming both.
    """
    if not weight >= 0 or not temperature > 0:
        raise ValueError(
            "expected a weight of at least 0 and a temperature above 0, got "
            f"weight={weight}, temperature={temperature}"
        )


def begin_taught(
    first: Training, progress: Progress, data: Data, program: Program
) -> TrainState:
    """A new network whose teacher is the one that was trained first, at its end."""
    last = len(first.phases) - 1
    state = first.finish(progress, data, program.of(last))
    begun = _begin_student(program.training, progress.state, data)
    return with_teacher(begun, (Teacher(state.params, state.model_state),))


def _begin_student(training: Training, teacher: TrainState, data: Data) -> TrainState:
    """A new network, whose randomness follows from that of the first."""
    key = jax.random.fold_in(teacher.key, 1)
    own: Settings = {name: teacher.settings[name] for name in training.settings}
    state = training.init(training, key, data, own)
    return state._replace(faults=teacher.faults)
