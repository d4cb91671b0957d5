"""Training: one compiled step with donated state, strung together for the backend.

The state is a NamedTuple of arrays and the data lie on the device, so a run is a pure
function of them: the batch and the augmentation of step t follow from the key and t.
"""

from d2sparse.train.cost import (
    forward_macs,
    growth_share,
    live_masks,
    live_weights,
    same_masks,
    step_macs,
)
from d2sparse.train.devices import (
    Placement,
    apart,
    bring,
    check_batch,
    lay,
    make_mesh,
    place,
)
from d2sparse.train.evaluation import accuracy, accuracy_of, evaluate
from d2sparse.train.faults import check_finite, failure, guard, has_failed, last_good
from d2sparse.train.fitting import Watch, fit, fit_together
from d2sparse.train.loops import Indices, Logs, Report, Runner, Save, make_runner
from d2sparse.train.memory import estimate_memory
from d2sparse.train.optimizers import make_optimizer
from d2sparse.train.plain import SCHEDULES, Recipe, describe, init_training, plain
from d2sparse.train.program import Program, make_program, make_step, starting_as
from d2sparse.train.runs import RUNS, is_stacked, stack_runs, unstack_runs
from d2sparse.train.state import (
    Data,
    Faults,
    Metrics,
    TrainState,
    begin_state,
    init_state,
    inputs,
    passes,
    take,
    to_device,
)
from d2sparse.train.steps import (
    Step,
    growth_batch,
    is_finite,
    step_indices,
    step_keys,
)
from d2sparse.train.teaching import (
    Taught,
    Teacher,
    log_mean,
    with_teachers,
)
from d2sparse.train.training import (
    Constraint,
    Context,
    Masks,
    Network,
    Phase,
    Progress,
    Settings,
    Training,
    claim,
    constrain,
    end,
    lasting,
    stay,
)

__all__ = [
    "RUNS",
    "SCHEDULES",
    "Constraint",
    "Context",
    "Data",
    "Faults",
    "Indices",
    "Logs",
    "Masks",
    "Metrics",
    "Network",
    "Phase",
    "Placement",
    "Program",
    "Progress",
    "Recipe",
    "Report",
    "Runner",
    "Save",
    "Settings",
    "Step",
    "Taught",
    "Teacher",
    "TrainState",
    "Training",
    "Watch",
    "accuracy",
    "accuracy_of",
    "apart",
    "begin_state",
    "bring",
    "check_batch",
    "check_finite",
    "claim",
    "constrain",
    "describe",
    "end",
    "estimate_memory",
    "evaluate",
    "failure",
    "fit",
    "fit_together",
    "forward_macs",
    "growth_batch",
    "growth_share",
    "guard",
    "has_failed",
    "init_state",
    "init_training",
    "inputs",
    "is_finite",
    "is_stacked",
    "last_good",
    "lasting",
    "lay",
    "live_masks",
    "live_weights",
    "log_mean",
    "make_mesh",
    "make_optimizer",
    "make_program",
    "make_runner",
    "make_step",
    "passes",
    "place",
    "plain",
    "same_masks",
    "stack_runs",
    "starting_as",
    "stay",
    "step_indices",
    "step_keys",
    "step_macs",
    "take",
    "to_device",
    "unstack_runs",
    "with_teachers",
]
