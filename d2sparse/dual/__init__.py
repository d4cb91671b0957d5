"""D2-Sparse: two coupled sparse networks that learn from few labels.

What is published: the title, "Navigating the low data learning regime with coupled
sparse networks", the authors (Misra, Nolte, Mishra, Yin) and the place, an oral at the
PML4LRS workshop of ICLR 2024. We know of no public code, and nothing here is taken from
the paper's equations or tables. **The formulation below is this project's
reconstruction** from that title and from published neighbours: mutual distillation
between two networks (arXiv 1706.00384), each trained by prune and grow at a fixed
budget (RigL, arXiv 1911.11134), whose masks avoid each other; or, in the consolidated
form, a slow network that is the masked running average of the fast one (after CLS-ER,
arXiv 2201.12604).

    L_fast = CE(z_fast, y) + lambda_fast(t) tau^2 KL(sg q_slow || q_fast)
    L_slow = CE(z_slow, y) + lambda_slow(t) tau^2 KL(sg q_fast || q_slow)

with `q = softmax(z / tau)` and `sg` stopping the gradient. Both terms use the logits of
the same step, before either update. Each network has its own optimiser, so that the
budget of one is never spent by the other.

Here are the pure functions. A pair of any constraints is trained by
`d2sparse.constraints.coupled`; a pair of sparse networks under the budget of one by
`d2sparse.constraints.paired`, whose preset "averaged" is the one to start from: it was
the best in `experiments.low_data`.

`coupling`: how two learners influence each other; where their masks may grow.
`consolidation`: the slow learner as the running average of the fast one.
`joining`: two optimisers as one Optax transformation.
`pair`, `merging`: two learners under one budget, and one network out of the two.
"""

from d2sparse.dual.consolidation import (
    Consolidation,
    Trace,
    begin_trace,
    consolidate,
)
from d2sparse.dual.coupling import Coupling, apart, discourage, trust
from d2sparse.dual.joining import JointState, joint, joint_masks, joint_state
from d2sparse.dual.merging import merge
from d2sparse.dual.pair import Dual, split_sparsity

__all__ = [
    "Consolidation",
    "Coupling",
    "Dual",
    "JointState",
    "Trace",
    "apart",
    "begin_trace",
    "consolidate",
    "discourage",
    "joint",
    "joint_masks",
    "joint_state",
    "merge",
    "split_sparsity",
    "trust",
]
