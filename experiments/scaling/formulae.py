"""Bytes, calls, time and memory of a refresh, and of gathering the scores instead.

All are functions of a method, the leaves and the devices; nothing is compiled here.
"""

import math
from typing import NamedTuple

from d2sparse import distributions, rules
from d2sparse.rules import MaskRule
from experiments.scaling.leaves import (
    Shapes,
    local_weights,
    num_shards,
    num_weights,
    sharded_leaves,
)

# The library counts scores by digits of their 32 bits, wide ones where there are many
# more scores than bins, and again as often where scores tie.
WIDE, NARROW, WIDE_FROM = 16, 11, 18
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


def digit_bits(shapes: Shapes, each_leaf: bool) -> int:
    """Bits of a digit of the search: 16 from 2**18 weights a budget on, else 11.

    >>> digit_bits({"a": (512, 512)}, True), digit_bits({"a": (512, 511)}, True)
    (16, 11)
    """
    budgets = len(shapes) if each_leaf else 1
    return WIDE if num_weights(shapes) >= budgets << WIDE_FROM else NARROW


def is_refused(method: Method, shapes: Shapes) -> bool:
    """Whether more weights compete for one budget than the library can count."""
    return not method.each_leaf and num_weights(shapes) >= 2**31


def fewest_passes(bits: int) -> int:
    """Passes that read all digits of a score; ties take as many again.

    >>> fewest_passes(16), fewest_passes(11)
    (2, 3)
    """
    return -(-32 // bits)


def histogram_bytes(bits: int, leaves: int) -> int:
    """Bytes of a histogram for every leaf.

    >>> histogram_bytes(11, 3)
    24576
    """
    return WORD * leaves << bits


def traffic(method: Method, shapes: Shapes, devices: int) -> Traffic:
    """What a refresh communicates, all of it by all-reduces.

    At every pass of a search one histogram for every sharded leaf, also where leaves
    compete; before it, where live weights are counted, one number. XLA joins those
    over the same devices in one call.

    >>> traffic(METHODS["RigL"], {"a": (64, 24), "b": (8, 4), "c": (3,)}, 8)
    Traffic(calls_once=1, bytes_once=8, calls_a_pass=2, bytes_a_pass=32768)
    """
    groups = sharded_leaves(shapes, devices)
    calls, leaves = len(groups), sum(map(len, groups.values()))
    histograms = histogram_bytes(digit_bits(shapes, method.each_leaf), leaves)
    return Traffic(
        calls * method.counts_live,
        WORD * leaves * method.counts_live,
        calls * method.searches,
        histograms * method.searches,
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
    >>> ring_seconds(METHODS["magnitude, global"], shapes, 2, 1, 1.0, 8192.0)
    3.0
    """
    bits, total = digit_bits(shapes, method.each_leaf), 0.0
    for n, leaves in sharded_leaves(shapes, devices).items():
        calls = method.searches * passes + method.counts_live
        sent = method.searches * passes * histogram_bytes(bits, len(leaves))
        sent += WORD * len(leaves) * method.counts_live
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


def temporary_bounds(method: Method, shapes: Shapes, devices: int) -> tuple[int, int]:
    """Bounds of the bytes that a refresh needs beside its arguments and results.

    At least a histogram of every leaf and a key for every weight. The upper bound is
    fitted to programs compiled for the CPU: 9 bytes a weight, 13 where weights grow, 12
    more in the largest leaf, and five copies of the histograms.
    """
    bits = digit_bits(shapes, method.each_leaf)
    histograms = histogram_bytes(bits, len(shapes))
    held = local_weights(shapes, devices)
    largest = max(math.prod(s) // num_shards(s, devices) for s in shapes.values())
    a_weight = 5 + WORD * method.searches
    return histograms + WORD * held, 5 * histograms + a_weight * held + 12 * largest
