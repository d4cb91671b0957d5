"""Sparse double descent: what is pruned in rounds learns from a trained network.

Where labels are wrong, accuracy against sparsity of iterative pruning falls, rises and
falls again (He et al., arXiv 2206.08684). A student that learns from a teacher's
outputs is meant to lose the first fall (DSD2, Quetu and Tartaglione, arXiv 2303.01213).
"""

from d2sparse.constraints.distilled import (
    begin_student,
    check_teaching,
    one_after_the_other,
    taught,
    with_teacher,
)
from d2sparse.constraints.lottery import Rewinds, iterative_magnitude
from d2sparse.train import (
    Constraint,
    Data,
    Program,
    Progress,
    Teacher,
    Training,
    constrain,
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
            last = len(first.phases) - 1
            known = first.finish(progress, data, program.of(last))
            begun = begin_student(program.training, progress.state, data)
            own = with_teacher(begun, (Teacher(known.params, known.model_state),))
            return student.begin(progress._replace(state=own), data)

        return one_after_the_other(first, student, hand_over)

    return constrained
