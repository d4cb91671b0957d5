"""Constraints: each is a function from a training to a training.

    training = constrain(plain(model, data), rigl(sparsity=0.9), averaged(tail=0.25))

`pruning`: dense at first, pruned while it trains.
`growing`: sparse from the start, with masks that move.
`latent`: the forward pass sees other weights than those that are trained.
`scored`: pruned by scores on the training data.
`decayed`: weights decay by how insensitive the loss or the outputs are to them.
`grouped`: whole neurons become 0 by group lasso.
`thresholded`: pruned by a threshold whenever the validation loss has stopped falling;
`bisection`, `held_out`: the search for it, the examples that it is validated on.
`lottery`: train, prune, rewind, repeat. `soups`: retrain several times and average.
`ensembles`: several networks out of one training.
`distilled`: a network learns from one that was trained before it; `descent`: while it
is pruned in rounds, or until its units are decided.
`coupled`: two networks teach each other (D2-Sparse); `paired`: under one budget.
`depth`: activation functions become linear; `collapsed`: blocks are left out.
`quantised`: weights and activations of few bits.
`averaging`, `pacing`: the average of the weights, the learning-rate schedule.
`prompted`: a visual prompt in front of the network; `label_mapped`: its classes stand
for those of another task.
`transferred`: a trained network on another task, frozen, probed or fine-tuned.
`streams`: data arrive in megabatches (anytime learning);
`timetables`, `arrivals`, `stages`: what arrives when, pruning by it, the phases.
`stream_methods`: STREAM_METHODS, all that is compared on streams, by name.
`transfer_methods`: TRANSFER_METHODS, the ways to another task, by name.
`methods`: METHODS, all of these by name, built from `options.Options`.
"""

from d2sparse.constraints.arrivals import Arrival
from d2sparse.constraints.averaging import averaged
from d2sparse.constraints.bisection import Threshold, bisect_threshold
from d2sparse.constraints.collapsed import layer_collapse
from d2sparse.constraints.coupled import coupled, pair_masks
from d2sparse.constraints.decayed import decayed
from d2sparse.constraints.depth import easier, egp, tlc
from d2sparse.constraints.descent import distilled_rounds, stopped_by_entropy
from d2sparse.constraints.distilled import distilled, finished
from d2sparse.constraints.ensembles import free_tickets
from d2sparse.constraints.gating import count_states_on, entropies_of, layers_of
from d2sparse.constraints.grouped import group_lasso
from d2sparse.constraints.growing import (
    Moves,
    rigl,
    set_,
    sparse_momentum,
    static,
)
from d2sparse.constraints.label_mapped import (
    label_mapped,
    maps_of,
    remapped,
    vote_counter,
)
from d2sparse.constraints.latent import (
    powerprop,
    reparametrised,
    soft_threshold,
    sr_ste,
    top_kast,
)
from d2sparse.constraints.lottery import (
    Rewinds,
    from_ticket,
    iterative_magnitude,
    kept,
)
from d2sparse.constraints.masked import Structure, last_refresh
from d2sparse.constraints.methods import METHODS, MIXES, Method
from d2sparse.constraints.options import Options
from d2sparse.constraints.pacing import paced
from d2sparse.constraints.paired import Learners, consolidated, paired
from d2sparse.constraints.prompted import prompted
from d2sparse.constraints.pruning import ac_dc, gradual, granet, movement, one_shot
from d2sparse.constraints.quantised import quantised
from d2sparse.constraints.scored import fisher, grasp, snip, synflow, wanda
from d2sparse.constraints.soups import souped, swamp
from d2sparse.constraints.stream_methods import STREAM_METHODS, Streamed
from d2sparse.constraints.streams import (
    as_long_as_stream,
    layer_densities,
    stream,
    stream_steps,
)
from d2sparse.constraints.thresholded import Search, threshold_search
from d2sparse.constraints.timetables import StreamOptions, make_timetable, timetable_of
from d2sparse.constraints.transfer_methods import (
    TRANSFER_METHODS,
    TransferOptions,
    Transferred,
    make_prompt,
)
from d2sparse.constraints.transferred import (
    fine_tuned,
    frozen,
    probed,
    sees,
    started_from,
    with_head,
)

__all__ = [
    "METHODS",
    "MIXES",
    "STREAM_METHODS",
    "TRANSFER_METHODS",
    "Arrival",
    "Learners",
    "Method",
    "Moves",
    "Options",
    "Rewinds",
    "Search",
    "StreamOptions",
    "Streamed",
    "Structure",
    "Threshold",
    "TransferOptions",
    "Transferred",
    "ac_dc",
    "as_long_as_stream",
    "averaged",
    "bisect_threshold",
    "consolidated",
    "count_states_on",
    "coupled",
    "decayed",
    "distilled",
    "distilled_rounds",
    "easier",
    "egp",
    "entropies_of",
    "fine_tuned",
    "finished",
    "fisher",
    "free_tickets",
    "from_ticket",
    "frozen",
    "gradual",
    "granet",
    "grasp",
    "group_lasso",
    "iterative_magnitude",
    "kept",
    "label_mapped",
    "last_refresh",
    "layer_collapse",
    "layer_densities",
    "layers_of",
    "make_prompt",
    "make_timetable",
    "maps_of",
    "movement",
    "one_shot",
    "paced",
    "pair_masks",
    "paired",
    "powerprop",
    "probed",
    "prompted",
    "quantised",
    "remapped",
    "reparametrised",
    "rigl",
    "sees",
    "set_",
    "snip",
    "soft_threshold",
    "souped",
    "sparse_momentum",
    "sr_ste",
    "started_from",
    "static",
    "stopped_by_entropy",
    "stream",
    "stream_steps",
    "swamp",
    "synflow",
    "threshold_search",
    "timetable_of",
    "tlc",
    "top_kast",
    "vote_counter",
    "wanda",
    "with_head",
]
