"""What does a refresh of the masks cost on many devices?

Formulae for the bytes that a refresh sends, the time of a ring and the memory of every
device, as functions of the leaves and the devices; beside gathering the scores to sort
them. Small programs are compiled for 2, 4 and 8 fake CPU devices, and what they
communicate is compared with the formulae. Nothing is timed. The whole takes a minute.

    python -m experiments.scaling > docs/scaling.md

`experiments.scaling.weak` measures a training on more and more devices.
"""

import dataclasses

import jax

from experiments.benchmark.tables import Table, to_markdown
from experiments.scaling.leaves import NETWORKS
from experiments.scaling.tables import (
    CHECKED_ON,
    bytes_table,
    check_table,
    memory_table,
    time_table,
)

FORMULAE = """\
Of P devices a leaf is sharded over w, along the axis with the largest w = gcd(axis, P).
S of the L leaves have w > 1. A leaf of the ResNet is spread over 2048 devices at most,
one of the ViT over 4096 or 1024.

    passes         at most 11, and up to 11 more where scores tie at a cut; fewer where
                   all are decided early
    a pass         all-reduce of 28 * S bytes, seven counts of every sharded leaf
    once           an all-reduce of 8 * S bytes a search, how many are at the cut or
                   above and how many above; and of 4 * S bytes, the live weights of
                   every leaf, where every leaf has its own budget
    searches       1 by magnitude, 2 by RigL: what stays, what grows
    bytes          once + searches * passes * a pass
    calls          (distinct w > 1) * (searches * (passes + 1) + 1 if live are counted)
    gathering      4 * searches * (weights of the S leaves), instead of all this

A call of B bytes over w devices takes, on a ring with latency a and bandwidth v,

    all-reduce     2 (w - 1) a + 2 (w - 1) / w * B / v
    all-gather       (w - 1) a +   (w - 1) / w * B / v

Replicated weights (data parallel) have w = 1: every device searches alone and nothing
is sent. Runs that are vmapped, each on a device of its own, send 1 byte a pass, since
the loop ends with the last of them."""

LIMITS = """\
## What this is worth

- Measured are the collectives and the memory of programs compiled for 2, 4 and 8 fake
  CPU devices; tests/test_scaling.py holds the formulae to them, also for replicated
  leaves and for runs. All larger numbers, and other backends, are extrapolated.
- Nothing was timed. Latency and bandwidth are round numbers to compare rows by, not
  those of any network; give yours with `--latency_us` and `--bandwidth_gb`. On
  thousands of devices a ring is mostly latency; reducing along a tree has less. Other
  backends may join fewer all-reduces in one call, which adds to it.
- What is sent depends on the leaves alone: some kilobytes. On a ring that is all
  latency, of up to 32 passes one after another: gathering the scores has fewer calls,
  and the search is ahead of it where the weights are many.
- Counts of leaves that compete for one budget are reduced one by one and added
  afterwards. Every pass reduces those of all leaves, also where the cut is known.
- The upper bound of the temporary memory is fitted to the CPU programs, of one to four
  leaves. Other backends may need less or more.
- A budget of 2^31 weights or more is refused: for 7 B every leaf needs its own, and
  the sparsity has to be a Python float, which leaves out schedules."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the scaling tables."""

    devices: tuple[int, ...] = (8, 64, 512, 4096)  # numbers of devices, one a column
    latency_us: float = 10.0  # microseconds of one message between two devices, assumed
    bandwidth_gb: float = 10.0  # 10**9 bytes a second and device, assumed
    # Compile programs for 2, 4 and 8 fake devices and compare what they communicate.
    check: bool = True


def run(config: Config) -> dict[str, Table]:
    """Prints the document and returns its tables by name.

    Raises:
      ValueError: a flag is out of its range, or there are too few devices to check on.
    """
    check_config(config)
    trees = {name: shapes() for name, shapes in NETWORKS.items()}
    ring = (config.latency_us * 1e-6, config.bandwidth_gb * 1e9)
    tables = {
        "bytes": bytes_table(trees),
        "time": time_table(trees, config.devices, *ring),
        "memory": memory_table(trees, config.devices),
    }
    if config.check:
        tables["check"] = check_table(CHECKED_ON)
    title = "# What a refresh costs on many devices"
    command = "    python -m experiments.scaling > docs/scaling.md"
    parts = [title, command, FORMULAE, *map(to_markdown, tables.values()), LIMITS]
    print("\n\n".join(parts))
    return tables


def check_config(config: Config) -> None:
    """Refuses what cannot be computed.

    Raises:
      ValueError: a flag is out of its range, or there are too few devices to check on.
    """
    if not config.devices or min(config.devices) < 1:
        raise ValueError(f"expected at least 1 device, got {config.devices}")
    if config.latency_us < 0 or config.bandwidth_gb <= 0:
        raise ValueError(
            "expected a latency of at least 0 and a bandwidth above 0, got "
            f"{config.latency_us} and {config.bandwidth_gb}"
        )
    if config.check and jax.device_count() < max(CHECKED_ON):
        raise ValueError(
            f"expected {max(CHECKED_ON)} devices to compile for, got "
            f"{jax.device_count()}; set jax_num_cpu_devices, or pass --nocheck"
        )
