"""Bytes, calls, time and memory of a refresh, and of gathering the scores instead.

All are functions of a method, the leaves and the devices; nothing is compiled here.
"""

from typing import NamedTuple

from d2sparse import distributions, rules
from d2sparse.rules import MaskRule
from experiments.scaling.leaves import (
    Shapes,
    local_weights,
    num_weights,
    sharded_leaves,
)

# A pass counts the scores at seven thresholds, which leaves an eighth of the 2**32 that
# there are: 11 passes find the cut, and 11 more the rank at it where scores tie.
THRESHOLDS, PASSES = 7, 11
COUNTS = 2  # In one call beside the passes: of those at a cut or above, and above.
WORD = 4  # Bytes of a count, a score, a weight and a gradient; a mask has one.


class Method(NamedTuple):
    """A rule, and what its refresh asks of the devices.

    Attributes:
      rule: of which `update` is a refresh.
      searches: number of selections it makes.
      counts_live: whether it first counts the live weights of every leaf.
      each_leaf: whether every leaf has its budget; otherwise all compete for one.
    """

    rule: MaskRule
    searches: int
    counts_live: bool
    each_leaf: bool


METHODS = {
    "magnitude, each leaf": Method(
        rules.one_shot(0.8, distribution=distributions.erk), 1, True, True
    ),
    "magnitude, global": Method(rules.one_shot(0.8), 1, False, False),
    "RigL": Method(rules.rigl(0.8), 2, True, True),
}


class Traffic(NamedTuple):
    """What every device gives to the all-reduces of a refresh.

    Attributes:
      calls_once: number of all-reduces that happen once.
      bytes_once: their bytes.
      calls_a_pass: number of all-reduces at every pass over the scores.
      bytes_a_pass: their bytes.
    """

    calls_once: int
    bytes_once: int
    calls_a_pass: int
    bytes_a_pass: int

    def calls(self, passes: int) -> int:
        """All-reduces of a refresh with a number of passes."""
        return self.calls_once + passes * self.calls_a_pass

    def bytes(self, passes: int) -> int:
        """Bytes of a refresh with a number of passes."""
        return self.bytes_once + passes * self.bytes_a_pass


def is_refused(method: Method, shapes: Shapes) -> bool:
    """Whether more weights compete for one budget than the library can count."""
    return not method.each_leaf and num_weights(shapes) >= 2**31


def once(method: Method) -> tuple[int, int]:
    """Calls beside the passes, and the numbers that they add up for every sharded leaf.

    >>> once(METHODS["RigL"])
    (3, 5)
    """
    calls = method.searches + method.counts_live
    return calls, COUNTS * method.searches + method.counts_live


def traffic(method: Method, shapes: Shapes, devices: int) -> Traffic:
    """What a refresh communicates, all of it by all-reduces.

    At every pass of a search seven counts for every sharded leaf, also where leaves
    compete; once those at a cut and above, and live weights where they are counted.
    XLA joins those of one pass over the same devices in one call.

    >>> traffic(METHODS["RigL"], {"a": (64, 24), "b": (8, 4), "c": (3,)}, 8)
    Traffic(calls_once=3, bytes_once=40, calls_a_pass=2, bytes_a_pass=112)
    """
    groups, (calls_once, counts_once) = sharded_leaves(shapes, devices), once(method)
    calls, leaves = len(groups), sum(map(len, groups.values()))
    return Traffic(
        calls * calls_once,
        WORD * leaves * counts_once,
        calls * method.searches,
        WORD * THRESHOLDS * leaves * method.searches,
    )


def ring_seconds(
    method: Method,
    shapes: Shapes,
    devices: int,
    passes: int,
    latency: float,
    bandwidth: float,
) -> float:
    """Time of the all-reduces of a refresh on a ring, one after another.

    One of B bytes over n devices takes `2 (n - 1) latency + 2 (n - 1) / n B /
    bandwidth`.

    >>> shapes = {"a": (64, 8)}
    >>> ring_seconds(METHODS["magnitude, global"], shapes, 2, 1, 1.0, 36.0)
    5.0
    """
    total, (calls_once, counts_once) = 0.0, once(method)
    for n, leaves in sharded_leaves(shapes, devices).items():
        calls = calls_once + method.searches * passes
        counts = counts_once + THRESHOLDS * method.searches * passes
        sent = WORD * len(leaves) * counts
        total += 2 * (n - 1) * (calls * latency + sent / n / bandwidth)
    return total


def gathered_bytes(method: Method, shapes: Shapes, devices: int) -> int:
    """Bytes of the scores that every device holds after gathering them.

    >>> gathered_bytes(METHODS["RigL"], {"a": (64, 24), "c": (3,)}, 8)
    12288
    """
    leaves = sharded_leaves(shapes, devices).values()
    return WORD * method.searches * sum(map(num_weights, leaves))


def gather_seconds(
    method: Method, shapes: Shapes, devices: int, latency: float, bandwidth: float
) -> float:
    """Time of gathering the scores on a ring, one call for all leaves of a search.

    One of B bytes over n devices takes `(n - 1) latency + (n - 1) / n B / bandwidth`.

    >>> shapes = {"a": (64, 8)}
    >>> gather_seconds(METHODS["magnitude, global"], shapes, 2, 1.0, 1024.0)
    2.0
    """
    total = 0.0
    for n, leaves in sharded_leaves(shapes, devices).items():
        sent = WORD * num_weights(leaves)
        total += method.searches * (n - 1) * (latency + sent / n / bandwidth)
    return total


def temporary_bounds(shapes: Shapes, devices: int) -> tuple[int, int]:
    """Bounds of the bytes that a refresh needs beside its arguments and results.

    At least a key for every weight. The upper bound is fitted to programs compiled for
    the CPU, which write what they add up: 36 bytes a weight, and 4 kB.
    """
    held = local_weights(shapes, devices)
    return WORD * held, 36 * held + 4096
