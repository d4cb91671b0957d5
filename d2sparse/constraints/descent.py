"""Sparse double descent: pruning in rounds, taught, or stopped by entropy.

Where labels are wrong, accuracy against sparsity of iterative pruning falls, rises and
falls again (He et al., arXiv 2206.08684). A student that learns from a teacher's
outputs is meant to lose the first fall, and the entropy of its units to say when it is
over (DSD2, arXiv 2303.01213).
"""

import functools

import jax.numpy as jnp
import numpy as np

from d2sparse.checks import check_number
from d2sparse.constraints.distilled import (
    begin_taught,
    check_teaching,
    one_after_the_other,
    taught,
)
from d2sparse.constraints.gating import count_states_on, entropies_of
from d2sparse.constraints.lottery import Rewinds, iterative_magnitude
from d2sparse.train import (
    Constraint,
    Data,
    Phase,
    Program,
    Progress,
    Training,
    constrain,
    end,
)


def distilled_rounds(
    *teacher: Constraint,
    sparsity: float,
    rounds: int = 5,
    rewinds: Rewinds | None = None,
    lesson: tuple[float, float] = (4.0, 10.0),
) -> Constraint:
    """A network is trained, and teaches another one that is pruned in rounds.

    The loss of every round is `CE(z, y) + weight tau^2 KL(q || softmax(z / tau))` with
    the teacher's softened probabilities q. DSD2 writes `(1 - a) CE + a tau^2 KL` with
    a = 0.8 and tau = 10: the weight a / (1 - a) = 4, at 1 / (1 - a) of its learning
    rate. Every round is a titled phase of its own.

    Args:
      *teacher: constraints of the teacher's training; none for the plain one.
      sparsity: fraction of zeros after the last pruning, in [0, 1).
      rounds: prunings; each is followed by a whole training.
      rewinds: what goes back between two rounds.
      lesson: weight and temperature of the teaching.

    Raises:
      ValueError: a number is out of its range.
    """
    check_teaching(*lesson)
    pruned = iterative_magnitude(sparsity, rounds, rewinds)

    def constrained(training: Training) -> Training:
        first = constrain(training, *teacher)
        student = taught(constrain(training, pruned), 1, *lesson)

        def hand_over(progress: Progress, data: Data, program: Program) -> Progress:
            state = begin_taught(first, progress, data, program)
            return student.begin(progress._replace(state=state), data)

        return one_after_the_other(first, student, hand_over)

    return constrained


def stopped_by_entropy(drop: float = 0.3) -> Constraint:
    """Pruning in rounds ends where units have become less undecided than they were.

    After every titled phase the mean ON/OFF entropy of the activation functions is
    taken over the training data. While a network learns wrong labels by heart it does
    not fall, however accuracy on validation data develops; the training ends at the
    first round in which it is below `1 - drop` times its largest value so far. What is
    published tells the two regimes apart by this entropy; the rule is ours. The memory
    has "entropies", float[phases], of the rounds that were looked at.

    Put it after the constraint that prunes in rounds, such as `iterative_magnitude`.

    Args:
      drop: part of the largest entropy that has to be gone, above 0 and below 1.

    Raises:
      ValueError: the drop is out of its range; when applied, no phase has a title; when
        a round ends, the network has no activation functions that are Linen modules.
    """
    check_number("drop", drop, 0, 1)
    if not 0 < drop < 1:
        raise ValueError(f"expected a drop above 0 and below 1, got {drop}")

    def constrained(training: Training) -> Training:
        titled = [n for n, phase in enumerate(training.phases) if phase.title]
        if len(titled) < 2:
            raise ValueError(
                "expected a training in rounds to be stopped by entropy, got "
                f"{len(titled)} titled phases; put it after iterative_magnitude"
            )

        def begin(progress: Progress, data: Data) -> Progress:
            progress = training.begin(progress, data)
            unknown = jnp.full(len(training.phases), jnp.nan, jnp.float32)
            return progress._replace(memory={**progress.memory, "entropies": unknown})

        def enter(
            progress: Progress, data: Data, program: Program, number: int
        ) -> Progress:
            own = program.of(number - 1)
            state = own.training.finish(progress, data, own)
            bits = entropies_of(count_states_on(own, state, data), "off", False)
            mean = np.float32(np.mean(list(bits.values())))
            found = progress.memory["entropies"].at[number - 1].set(mean)
            memory = {**progress.memory, "entropies": found}
            noted = progress._replace(memory=memory)
            if mean < (1 - drop) * np.nanmax(np.asarray(found)):
                return end(noted)
            return training.phases[number].enter(noted, data, program)

        phases: list[Phase] = list(training.phases)
        for number in titled[1:]:
            entered = functools.partial(enter, number=number)
            phases[number] = phases[number]._replace(enter=entered)
        return training._replace(begin=begin, phases=tuple(phases))

    return constrained
