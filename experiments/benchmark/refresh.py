"""Cost of a refresh of the masks, beside sorting, NumPy and PyTorch."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d2sparse import distributions, rules, tree
from d2sparse.masks import apply_masks
from d2sparse.rules import MaskRule
from d2sparse.schedules import alternating, cubic
from d2sparse.tree import PyTree
from experiments.benchmark.measure import (
    Candidate,
    Timing,
    num_bytes,
    repeated,
    temporary_bytes,
    time_in_turns,
)
from experiments.benchmark.tables import Table
from experiments.benchmark.workload import (
    LENET,
    Sizes,
    make_params,
    num_cores,
    random_masks,
)

# The step that is refreshed, and the end of the schedules: AC/DC begins a compressed
# phase there.
STEP, END = 50, 100
RULES: Mapping[str, Callable[[float], MaskRule]] = {
    "magnitude, each leaf (ERK)": functools.partial(
        rules.one_shot, distribution=distributions.erk
    ),
    "magnitude, global": rules.one_shot,
    "gradual, global": lambda sparsity: rules.gradual(cubic(sparsity, END)),
    "movement, global": lambda sparsity: rules.movement(cubic(sparsity, END)),
    "Top-KAST's set (largest), global": rules.largest,
    "AC/DC, global": lambda sparsity: rules.ac_dc(sparsity, alternating(STEP, END)),
    "SET": rules.set_,
    "RigL": rules.rigl,
    "sparse momentum": rules.sparse_momentum,
    "GraNet": lambda sparsity: rules.granet(cubic(sparsity, END, start=sparsity / 2)),
}
# Sparsity of the masks before the refresh, over the final one; of the others 0.
START: Mapping[str, float] = {
    "SET": 1.0,
    "RigL": 1.0,
    "sparse momentum": 1.0,
    "GraNet": 0.5,  # So that it has something to prune.
}
# The others do the same work as one of these, and would take minutes to compile.
LARGE = ("magnitude, each leaf (ERK)", "magnitude, global", "RigL")
PASS = "one pass, threshold known"
SORT, SORT_GLOBAL = "jnp.sort, each leaf", "jnp.sort, global"
PARTITION, TORCH = "numpy.partition, each leaf", "torch.nn.utils.prune"

Weights = dict[str, Any]
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # A function and its arguments.


def refresh_table(sizes: Sizes) -> Table:
    """One refresh by every rule, in passes over the weights and in CPU time."""
    rows: list[dict[str, Any]] = []
    for i, model in enumerate(sizes.models):
        every_rule = i == 0 and sizes.all_rules
        names = tuple(RULES) if every_rule else LARGE
        rows += refresh_rows(model, sizes.image, names, sizes)
    if LENET[0] not in sizes.models:
        rows += refresh_rows(*LENET, LARGE, sizes)
    scanned = (
        f" A program makes {sizes.repeats} refreshes, and its time is divided by that; "
        "numpy and torch work on the host."
    )
    return Table(
        "One refresh of the masks",
        "A pass reads the prunable weights once and writes `abs(w) >= t`. Saving: CPU "
        "time of jnp.sort over that of the row; of all weights together where the row "
        "is global, else of each leaf. Temporary: bytes the compiled program needs "
        "beside its arguments and results, over those of the parameters. Every rule "
        f"is timed on the first model, on others (and on accelerators) only "
        f"{'; '.join(LARGE)}: the rest does the same work as one of these. GraNet "
        "begins at half of the sparsity." + (scanned if sizes.repeats > 1 else ""),
        rows,
    )


def refresh_rows(
    model: str, image: tuple[int, int, int], names: tuple[str, ...], sizes: Sizes
) -> Iterator[dict[str, Any]]:
    """The rows of one model: a refresh by the named rules, and its alternatives."""
    params = make_params(model, image)
    weights = tree.prunable_leaves(params)
    counts = distributions.erk(tree.shapes(params), sizes.sparsity)
    kept = {path: max(int(count), 1) for path, count in counts.items()}
    calls = _alternatives(weights, kept, sizes.sparsity)
    calls |= {name: refresh_call(name, params, sizes.sparsity) for name in names}
    programs = {
        name: jax.jit(repeated(function, sizes.repeats)).lower(*args).compile()
        for name, (function, args) in calls.items()
    }
    candidates = {
        name: Candidate(functools.partial(program, *calls[name][1]), "sort" in name)
        for name, program in programs.items()
    }
    host = {path: np.array(w) for path, w in weights.items()}
    candidates[PARTITION] = Candidate(lambda: partition_masks(host, kept), slow=True)
    candidates |= torch_candidates(host, kept, sizes.sparsity)
    timings = time_in_turns(candidates, sizes.rounds, sizes.slow_rounds)
    timings |= {name: timings[name].over(sizes.repeats) for name in programs}
    for name in timings:
        row = {"refresh": name, "model": model} | _costs(name, timings)
        if name in programs:
            row["temporary"] = temporary_bytes(programs[name]) / num_bytes(params)
        yield row
    if not any(name.startswith(TORCH) for name in candidates):
        yield {"refresh": TORCH, "model": model, "ms": "not installed"}


def _costs(name: str, timings: Mapping[str, Timing]) -> dict[str, float]:
    timing = timings[name]
    sort = timings[SORT_GLOBAL if name.endswith("global") else SORT]
    return timing.cells() | {
        "passes": timing.wall / timings[PASS].wall,
        "saving": sort.cpu / timing.cpu,
    }


def _alternatives(
    weights: Weights, kept: Mapping[str, int], sparsity: float
) -> dict[str, Call]:
    """Other programs that make masks, which a refresh is compared with."""
    together = distributions.global_({p: w.shape for p, w in weights.items()}, sparsity)
    sort = functools.partial(sort_masks, kept=kept)
    sort_global = functools.partial(sort_masks_global, kept=int(together))
    return {
        PASS: (threshold_masks, (weights, jnp.float32(1))),
        SORT: (sort, (weights,)),
        SORT_GLOBAL: (sort_global, (weights,)),
    }


def refresh_call(name: str, params: PyTree, sparsity: float) -> Call:
    """One refresh by a rule, of the masks that it meets in the middle of a run."""
    masks = random_masks(params, START.get(name, 0.0) * sparsity)
    # Movement and sparse momentum take the gradient for what they have observed.
    grads = jax.tree.map(lambda w: w[..., ::-1], params)
    rule, key = RULES[name](sparsity), jax.random.key(0)
    params = apply_masks(params, masks)
    return rule.update, (masks, params, grads, jnp.int32(STEP), key)


def threshold_masks(weights: Weights, threshold: jax.Array) -> Weights:
    """Which weights are at least a known threshold: the least a refresh can cost."""
    return {path: jnp.abs(w) >= threshold for path, w in weights.items()}


def sort_masks(weights: Weights, kept: Mapping[str, int]) -> Weights:
    """The largest magnitudes of every leaf, by sorting.

    Args:
      weights: leaves by path.
      kept: how many of each, at least 1; more are kept where magnitudes are equal.
    """
    magnitudes = {path: jnp.abs(w) for path, w in weights.items()}
    return {
        path: m >= jnp.sort(m, axis=None)[m.size - kept[path]]
        for path, m in magnitudes.items()
    }


def sort_masks_global(weights: Weights, kept: int) -> Weights:
    """The largest magnitudes of all leaves together, by sorting.

    Args:
      weights: leaves by path.
      kept: how many of all, at least 1; more are kept where magnitudes are equal.
    """
    magnitudes = jnp.concatenate([jnp.abs(w).ravel() for w in weights.values()])
    return threshold_masks(weights, jnp.sort(magnitudes)[magnitudes.size - kept])


def partition_masks(weights: Weights, kept: Mapping[str, int]) -> Weights:
    """`sort_masks` on the host, by a partial sort."""
    magnitudes = {path: np.abs(w) for path, w in weights.items()}
    cuts = {path: m.size - kept[path] for path, m in magnitudes.items()}
    return {
        path: m >= np.partition(m, cuts[path], axis=None)[cuts[path]]
        for path, m in magnitudes.items()
    }


def torch_candidates(
    weights: Weights, kept: Mapping[str, int], sparsity: float
) -> dict[str, Candidate]:
    """Pruning by PyTorch on as many threads as there are cores; none without it.

    Args:
      weights: leaves by path, on the host.
      kept: weights that each leaf keeps where leaves are pruned one by one.
      sparsity: zeros among all weights where leaves are pruned together.
    """
    try:
        import torch
        from torch.nn.utils import prune
    except ImportError:
        return {}
    torch.set_num_threads(num_cores())
    tensors = {path: torch.from_numpy(w) for path, w in weights.items()}

    # New modules for every call: one that is pruned again would lose further weights.
    def modules() -> dict[str, Any]:
        made = {path: torch.nn.Module() for path in tensors}
        for path, module in made.items():
            module.weight = torch.nn.Parameter(tensors[path])
        return made

    def one_by_one() -> None:
        for path, module in modules().items():
            pruned = tensors[path].numel() - kept[path]
            prune.l1_unstructured(module, "weight", amount=pruned)

    def together() -> None:
        pairs = [(module, "weight") for module in modules().values()]
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=sparsity)

    return {
        f"{TORCH}, each leaf": Candidate(one_by_one, slow=True),
        f"{TORCH}, global": Candidate(together, slow=True),
    }
