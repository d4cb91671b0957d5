"""The flags of the low-data benchmark that other experiments have not."""

import dataclasses
from typing import Literal, get_args

from experiments.pairs import PairOptions
from experiments.task import TaskConfig, check_effects, check_least

ContenderName = Literal[
    "dense",
    "dense_short",
    "dense_narrow",
    "dense_smoothed",
    "dense_averaged",
    "dense_sharp",
    "self_distilled",
    "one_shot",
    "snip",
    "grasp",
    "synflow",
    "static",
    "set",
    "rigl",
    "rigl_averaged",
    "rigl_half",
    "granet",
    "imp",
    "imp_capped",
    "dense_mutual",
    "uncoupled_annealed",
    "uncoupled_averaged",
    "free_tickets",
    "d2_sparse",
    "d2_annealed",
    "d2_views",
    "d2_confident",
    "d2_sharp",
    "d2_consolidated",
    "d2_distilled",
    "d2_merged",
    "d2_averaged_views",
    "d2_averaged_sharp",
    "d2_averaged_distilled",
]
CONTENDER_NAMES: tuple[ContenderName, ...] = get_args(ContenderName)


def _varied(default: object) -> object:
    """A flag that says which cells to run, and not what they are."""
    return dataclasses.field(default=default, compare=False)


@dataclasses.dataclass(frozen=True)
class LowDataOptions(PairOptions, TaskConfig):
    """Flags of the benchmark.

    Those that are not compared choose cells: the same directory takes them all.
    """

    methods: tuple[ContenderName, ...] = _varied(CONTENDER_NAMES)  # what to compare
    # Labels of every class, one table for each and 0 for all; none: 10 and 50.
    budgets: tuple[int, ...] = _varied(())
    # The same for a single budget, as other experiments have it.
    samples_per_class: int | None = _varied(None)
    # Parts of the labels that are wrong, each for another column of robustness.
    label_noises: tuple[float, ...] = _varied(())
    # Imbalances of long tails, each for another column of robustness.
    imbalances: tuple[float, ...] = _varied(())
    seeds: int = _varied(5)  # runs of every cell: labels, weights and order differ
    sparsity: float = 0.8  # zeros among the prunable weights; a pair shares the rest
    # From 1, slight, to 5: of the corruptions of the test images.
    severities: tuple[int, ...] = (3,)

    # Part of the live weights that set, rigl, granet and free_tickets move at first.
    drop_fraction: float = 0.3
    prune_at: float = 0.5  # part of the run after which one_shot prunes
    start_sparsity: float = 0.5  # of the random pattern that granet begins with
    score_samples: int = 256  # examples that snip and grasp look at
    imp_rounds: int = 5  # prunings of imp; imp_capped has 3
    rewind_fraction: float = 0.1  # part of a round whose weights imp rewinds to
    members: int = 2  # networks of free_tickets
    explore: float = 0.5  # part of the run before free_tickets anneals the first one
    # Part of the run in which d2_distilled and d2_merged train one network.
    finish_part: float = 0.25
    finish_rate: float = 0.1  # its learning rate, as a part of --learning_rate

    # Choose values for every method and budget on a validation part of the labels,
    # --validation_fraction or a fifth, and write them to tuned.json. Later runs in the
    # same directory use them.
    tune: bool = _varied(False)
    trials: int = _varied(8)  # values that are tried, as many for every method
    tuning_seeds: int = _varied(3)  # runs of every trial
    tuned: str = _varied("")  # file of chosen values; empty: tuned.json of the run
    tuning_rates: tuple[float, ...] = (0.01, 0.3)  # learning rates, from and to
    tuning_decays: tuple[float, ...] = (1e-5, 1e-2)  # weight decays, from and to


def list_effects(config: LowDataOptions) -> dict[str, tuple[object, str]]:
    """Flags that would have no effect, see `task.check_effects`.

    Flags of single methods are none of them: they belong to the run directory, which
    any methods can join later.
    """
    grouped, given = config.pattern in ("n_of_m", "blocks"), config.budgets
    return {
        "samples_per_class": (not given, f"since budgets are {given}"),
        "label_noise": (False, "in whose place are label_noises"),
        "imbalance": (False, "in whose place are imbalances"),
        "trials": (config.tune, "which is for --tune"),
        "tuning_seeds": (config.tune, "which is for --tune"),
        "tuned": (not config.tune, "since --tune chooses the values"),
        "group": (grouped, "which is for the patterns n_of_m and blocks"),
    }


def check_low_data(config: LowDataOptions) -> None:
    """Refuses flags that do not fit the benchmark.

    Raises:
      ValueError: naming the flag.
    """
    if not config.methods:
        raise ValueError(f"expected methods of {', '.join(CONTENDER_NAMES)}, got none")
    if config.ticket:
        raise ValueError(
            "expected no ticket, since many methods begin dense, got "
            f"{config.ticket}; go on from it with `python -m experiments.prune`"
        )
    if config.validation_fraction and not config.tune:
        raise ValueError(
            "expected a validation_fraction with --tune alone, got "
            f"{config.validation_fraction}; tables show the test set"
        )
    check_least(config, {"trials": 1, "tuning_seeds": 1})
    check_effects(config, list_effects(config))
    for severity in config.severities:
        if severity not in range(1, 6):
            raise ValueError(f"expected severities from 1 to 5, got {severity}")
    for name in ("tuning_rates", "tuning_decays"):
        ends = getattr(config, name)
        if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
            raise ValueError(f"expected {name} from above 0 to no less, got {ends}")
