"""What does a refresh of the masks cost on many devices?

Formulae for the bytes that a refresh sends, the time of a ring and the memory of every
device, as functions of the leaves and the devices; beside gathering the scores to sort
them. Small programs are compiled for 2, 4 and 8 fake CPU devices, and what they
communicate is held against the formulae. Nothing is timed. The whole takes a minute.

    python -m experiments.scaling > docs/scaling.md
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2sparse import distributions, models, rules, tree
from d2sparse.rules import MaskRule
from experiments import cli
from experiments.benchmarks.measure import Table, temporary_bytes, to_markdown

Shapes = Mapping[str, tuple[int, ...]]

# How the library counts scores: a pass for every digit of 32 bits, which are wide where
# there are many more scores than bins, and as many again for the ties.
WIDE, NARROW, WIDE_FROM = 16, 11, 18
COUNT = 4  # bytes of a count, a score and a gradient; a mask has one
CHECKED_ON = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of the scaling tables."""

    # For which the tables are computed.
    devices: tuple[int, ...] = (8, 64, 512, 4096)
    latency_us: float = 10.0  # of one message between two devices, an assumption
    bandwidth_gb: float = 10.0  # 10**9 bytes a second and device, an assumption
    # Compile programs for 2, 4 and 8 fake devices and compare what they communicate.
    check: bool = True


class Method(NamedTuple):
    """A rule, and what its refresh asks of the devices.

    Attributes:
      rule: of which `update` is a refresh.
      searches: how many selections it makes.
      counts_live: it first counts the live weights of every leaf.
      each_leaf: every leaf has a budget of its own, else all compete for one.
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
    """What the all-reduces of a refresh are given, by every device.

    Attributes:
      calls_once: how many happen once.
      bytes_once: their bytes.
      calls_a_pass: how many happen at every pass over the scores.
      bytes_a_pass: their bytes.
    """

    calls_once: int
    bytes_once: int
    calls_a_pass: int
    bytes_a_pass: int

    def calls(self, passes: int) -> int:
        """Those of a refresh of so many passes."""
        return self.calls_once + passes * self.calls_a_pass

    def bytes(self, passes: int) -> int:
        """Those of a refresh of so many passes."""
        return self.bytes_once + passes * self.bytes_a_pass


class Collective(NamedTuple):
    """An operation between devices, as a compiled program has it.

    Attributes:
      kind: such as `"all-reduce"`.
      sizes: bytes of each of its results; an all-reduce has as many operands.
      in_search: it is in a loop whose length is not known to the compiler.
    """

    kind: str
    sizes: tuple[int, ...]
    in_search: bool


# The trees


def resnet50() -> Shapes:
    """Shapes of the kernels of a ResNet-50 for ImageNet."""
    network = models.resnet50(num_classes=1000, stem="imagenet")
    image = jnp.zeros((1, 224, 224, 3))
    return tree.shapes(jax.eval_shape(network.init, jax.random.key(0), image)[0])


def vit_l() -> Shapes:
    """Shapes of the kernels of a ViT-L/16 for images of 224 x 224, 1000 classes.

    With biases, normalisations, class token and position embedding, which stay dense,
    it has 304,326,632 parameters.

    >>> num_weights(vit_l())
    303800320
    """
    width, hidden = 1024, 4096
    attention = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    block = attention | {"mlp_in": (width, hidden), "mlp_out": (hidden, width)}
    ends = {"patch": (16, 16, 3, width), "head": (width, 1000)}
    return ends | repeat(block, 24)


def llama_7b() -> Shapes:
    """Shapes of the kernels of a Llama-like decoder, embedding and head not tied.

    >>> num_weights(llama_7b())
    6738149376
    """
    width, hidden, vocabulary = 4096, 11008, 32000
    attention = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    block = attention | {
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    ends = {"embedding": (vocabulary, width), "head": (width, vocabulary)}
    return ends | repeat(block, 32)


def repeat(block: Shapes, times: int) -> Shapes:
    """The shapes of a block that occurs several times.

    >>> list(repeat({"out": (2, 2)}, 2))
    ['block0/out', 'block1/out']
    """
    return {f"block{i}/{name}": s for i in range(times) for name, s in block.items()}


TREES = {"ResNet-50": resnet50, "ViT-L/16": vit_l, "7 B": llama_7b}


# The formulae


def split_axis(shape: Sequence[int], devices: int) -> int:
    """The axis that divides into the most shards, of several the longest.

    >>> split_axis((3, 3, 64, 128), 8), split_axis((4096, 11008), 4096)
    (3, 0)
    """
    return max(range(len(shape)), key=lambda i: (math.gcd(shape[i], devices), shape[i]))


def ways(shape: Sequence[int], devices: int) -> int:
    """Over how many devices a leaf is sharded: a divisor of their number.

    >>> ways((3, 3, 64, 128), 8), ways((3, 3, 64, 128), 512), ways((3, 5), 8)
    (8, 128, 1)
    """
    return math.gcd(shape[split_axis(shape, devices)], devices)


def num_weights(shapes: Shapes) -> int:
    """Number of weights of all leaves."""
    return sum(map(math.prod, shapes.values()))


def local_weights(shapes: Shapes, devices: int) -> int:
    """Number of weights that a device holds."""
    return sum(math.prod(s) // ways(s, devices) for s in shapes.values())


def digit_bits(shapes: Shapes, each_leaf: bool) -> int:
    """Bits of a digit of the search: 16 from 2**18 weights a budget on, else 11.

    >>> digit_bits({"a": (512, 512)}, True), digit_bits({"a": (512, 511)}, True)
    (16, 11)
    """
    budgets = len(shapes) if each_leaf else 1
    return WIDE if num_weights(shapes) >= budgets << WIDE_FROM else NARROW


def fewest_passes(bits: int) -> int:
    """Passes that find a score by all of its digits; ties take as many again.

    >>> fewest_passes(16), fewest_passes(11)
    (2, 3)
    """
    return -(-32 // bits)


def groups(shapes: Shapes, devices: int) -> dict[int, Shapes]:
    """The sharded leaves, by over how many devices they are.

    >>> groups({"a": (64, 6), "b": (2, 3), "c": (3,)}, 4)
    {4: {'a': (64, 6)}, 2: {'b': (2, 3)}}
    """
    found: dict[int, dict[str, tuple[int, ...]]] = collections.defaultdict(dict)
    for path, shape in shapes.items():
        found[ways(shape, devices)][path] = shape
    return {n: leaves for n, leaves in found.items() if n > 1}


def histogram_bytes(bits: int, leaves: int) -> int:
    """Bytes of a histogram for every leaf.

    >>> histogram_bytes(11, 3)
    24576
    """
    return COUNT * leaves << bits


def traffic(method: Method, shapes: Shapes, devices: int) -> Traffic:
    """What a refresh communicates, all of it by all-reduces.

    At every pass of a search one histogram for every sharded leaf, also where leaves
    compete; before it, where live weights are counted, one number. XLA joins those
    over the same devices in one call.

    >>> traffic(METHODS["RigL"], {"a": (64, 24), "b": (8, 4), "c": (3,)}, 8)
    Traffic(calls_once=1, bytes_once=8, calls_a_pass=2, bytes_a_pass=32768)
    """
    sharded = groups(shapes, devices)
    calls, leaves = len(sharded), sum(map(len, sharded.values()))
    histograms = histogram_bytes(digit_bits(shapes, method.each_leaf), leaves)
    return Traffic(
        calls * method.counts_live,
        COUNT * leaves * method.counts_live,
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
    for n, leaves in groups(shapes, devices).items():
        calls = method.searches * passes + method.counts_live
        sent = method.searches * passes * histogram_bytes(bits, len(leaves))
        sent += COUNT * len(leaves) * method.counts_live
        total += 2 * (n - 1) * (calls * latency + sent / n / bandwidth)
    return total


def gathered_bytes(method: Method, shapes: Shapes, devices: int) -> int:
    """Bytes of the scores that every device is left with where they are gathered.

    >>> gathered_bytes(METHODS["RigL"], {"a": (64, 24), "c": (3,)}, 8)
    12288
    """
    leaves = groups(shapes, devices).values()
    return COUNT * method.searches * sum(map(num_weights, leaves))


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
    for n, leaves in groups(shapes, devices).items():
        sent = COUNT * num_weights(leaves)
        total += method.searches * (n - 1) * (latency + sent / n / bandwidth)
    return total


def argument_bytes(method: Method, shapes: Shapes, devices: int) -> int:
    """Bytes of the masks, weights and, for growth, gradients that a device holds."""
    arrays = method.searches  # Weights; where weights grow, gradients as well.
    return (1 + COUNT * arrays) * local_weights(shapes, devices)


def temporary_bounds(method: Method, shapes: Shapes, devices: int) -> tuple[int, int]:
    """Between how many bytes a refresh needs beside its arguments and results.

    At least a histogram of every leaf and a key for every weight. The most is read off
    programs compiled for the CPU: 9 bytes a weight, 13 where weights grow, 12 more in
    the largest leaf, and five copies of the histograms.
    """
    bits = digit_bits(shapes, method.each_leaf)
    histograms = histogram_bytes(bits, len(shapes))
    held = local_weights(shapes, devices)
    largest = max(math.prod(s) // ways(s, devices) for s in shapes.values())
    a_weight = 5 + COUNT * method.searches
    return histograms + COUNT * held, 5 * histograms + a_weight * held + 12 * largest


# Compiled programs


def make_shardings(shapes: Shapes, devices: int) -> dict[str, NamedSharding]:
    """Every leaf along one axis, over as many devices as divide it.

    Args:
      shapes: of the leaves.
      devices: how many of them to use, a power of two.
    """
    names = tuple(f"half{i}" for i in range(devices.bit_length() - 1))
    grid = np.array(jax.devices()[:devices]).reshape((2,) * len(names))
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    shardings = {}
    for path, shape in shapes.items():
        spec: list[tuple[str, ...] | None] = [None] * len(shape)
        used = names[: ways(shape, devices).bit_length() - 1]
        spec[split_axis(shape, devices)] = used or None
        shardings[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return shardings


def compile_refresh(
    method: Method, shapes: Shapes, shardings: Mapping[str, NamedSharding]
) -> jax.stages.Compiled:
    """The refresh `(masks, params, grads, step, key) -> masks` of sharded leaves."""
    masks, weights = (like(shapes, shardings, x) for x in (jnp.bool, jnp.float32))
    key = jax.eval_shape(lambda: jax.random.key(0))
    refresh = jax.jit(method.rule.update, out_shardings=dict(shardings))
    return refresh.lower(masks, weights, weights, np.int32(0), key).compile()


def compile_runs(method: Method, shapes: Shapes, devices: int) -> jax.stages.Compiled:
    """The refresh of as many runs as devices, one on each."""
    mesh = jax.make_mesh((devices,), ("run",), (AxisType.Auto,))
    by_run = NamedSharding(mesh, PartitionSpec("run"))
    stacked = {path: (devices, *shape) for path, shape in shapes.items()}
    shardings = dict.fromkeys(shapes, by_run)
    masks, weights = (like(stacked, shardings, x) for x in (jnp.bool, jnp.float32))
    keys = jax.device_put(jax.random.split(jax.random.key(0), devices), by_run)
    refresh = jax.jit(jax.vmap(method.rule.update, in_axes=(0, 0, 0, None, 0)))
    return refresh.lower(masks, weights, weights, np.int32(0), keys).compile()


def compile_sort(
    shapes: Shapes, shardings: Mapping[str, NamedSharding]
) -> jax.stages.Compiled:
    """The larger half of every leaf, by sorting it."""

    def masks(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        scores = {path: jnp.abs(w) for path, w in params.items()}
        return {p: s >= jnp.sort(s.reshape(-1))[s.size // 2] for p, s in scores.items()}

    sort = jax.jit(masks, out_shardings=dict(shardings))
    return sort.lower(like(shapes, shardings, jnp.float32)).compile()


def like(
    shapes: Shapes, shardings: Mapping[str, NamedSharding], dtype: type
) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves to compile for, which need no memory."""
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
        for path, shape in shapes.items()
    }


def compiled_traffic(found: Sequence[Collective]) -> Traffic:
    """The all-reduces among the collectives of a compiled refresh."""
    reduces = [c for c in found if c.kind == "all-reduce"]
    once = [sum(c.sizes) for c in reduces if not c.in_search]
    a_pass = [sum(c.sizes) for c in reduces if c.in_search]
    return Traffic(len(once), sum(once), len(a_pass), sum(a_pass))


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*-> .*\{$")
_COLLECTIVE = re.compile(
    r"= (.+?) (all-gather|all-reduce|all-to-all|collective-broadcast|"
    r"collective-permute|ragged-all-to-all|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"(pred|[a-z]+(\d+))\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)|"
    r"branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


def collectives(text: str) -> list[Collective]:
    """The operations between devices of a compiled program, as often as they happen.

    Those of a loop count as often as it runs, if the compiler knows; else once, and are
    marked.

    Args:
      text: of the program, as `compiled.as_text()` returns it.
    """
    entry, bodies = "", collections.defaultdict[str, list[str]](list)
    name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
        else:
            bodies[name].append(line)
    return list(_collectives(bodies, entry, in_search=False))


def _collectives(
    bodies: Mapping[str, Sequence[str]], name: str, in_search: bool
) -> Iterator[Collective]:
    for line in bodies[name]:
        if found := _COLLECTIVE.search(line):
            yield Collective(found[2], _sizes(found[1]), in_search)
        trips = _TRIPS.search(line)
        inside = in_search or (" while(" in line and trips is None)
        for one, several in _CALLED.findall(line):
            for called in [one] if one else re.findall(r"[\w.-]+", several):
                for _ in range(int(trips[1]) if trips else 1):
                    yield from _collectives(bodies, called, inside)


def _sizes(result: str) -> tuple[int, ...]:
    """Bytes of the arrays of a type, such as `(s32[2048]{0}, pred[])`."""
    return tuple(
        int(bits or 8) // 8 * math.prod(map(int, filter(None, shape.split(","))))
        for _, bits, shape in _ARRAY.findall(result)
    )


# The tables

CHECKED = {
    "a": (64, 24),
    "b": (12, 10),  # Over 4 devices at most.
    "c": (2, 3, 5),  # Over 2.
    "d": (3, 3),  # On every device whole.
}
CHECKED_WIDE = {"a": (512, 1024)}

FORMULAE = """\
Of P devices a leaf is sharded over w, along the axis with the largest w = gcd(axis, P).
S of the L leaves have w > 1. A leaf of the ResNet is spread over 2048 devices at most,
one of the ViT over 4096 or 1024.

    bits a digit   b = 16 if weights >= budgets * 2^18, else 11
                   budgets: L where every leaf has its own, 1 where all compete
    passes         ceil(32 / b), and up to as many again where scores tie at a cut:
                   2 to 4 of 16 bits, 3 to 6 of 11; fewer where all are decided early
    a pass         all-reduce of 4 * 2^b * S bytes, a histogram of every sharded leaf
    once           all-reduce of 4 * S bytes, the live weights of every leaf,
                   where every leaf has its own budget, else nothing
    searches       1 by magnitude, 2 by RigL: what stays, what grows
    bytes          once + searches * passes * a pass
    calls          (distinct w > 1) * (searches * passes + 1 if there is a once)
    gathering      4 * searches * (weights of the S leaves), instead of all this

A call of B bytes over w devices takes, on a ring with latency a and bandwidth v,

    all-reduce     2 (w - 1) a + 2 (w - 1) / w * B / v
    all-gather       (w - 1) a +   (w - 1) / w * B / v

Replicated weights (data parallel) have w = 1: every device searches alone and nothing
is sent. Runs that are vmapped, each on a device of its own, send 1 byte a search and
check of the loop, which ends with the last of them."""

LIMITS = """\
## What this is worth

- Measured are the collectives and the memory of programs compiled for 2, 4 and 8 fake
  CPU devices; tests/test_scaling.py holds the formulae to them, also for replicated
  leaves and for runs. All larger numbers, and other backends, are extrapolated.
- Nothing was timed. Latency and bandwidth are round numbers to compare rows by, not
  those of any network; give yours with `--latency_us` and `--bandwidth_gb`. On
  thousands of devices a ring is mostly latency; reducing along a tree has less. Other
  backends may join fewer all-reduces in one call, which adds to it.
- What is sent depends on the leaves, hardly on the weights or the devices: the search
  is far ahead of gathering for 7 B, and by these numbers behind it for ResNet-50.
  Gathering is given its best case, one call a search and nothing for the sort, and it
  needs the memory for what it gathers.
- Digits of 11 bits would send 2^16 * 2 / (2^11 * 3) = 21 times less than those of 16,
  and read the scores three times instead of twice. Histograms of leaves that compete
  for one budget are reduced one by one and added afterwards, S times the bytes of their
  sum. Every pass reduces those of all leaves, also where the cut is found. All
  three could be saved.
- The upper bound of the temporary memory is fitted to the CPU programs, of one to eight
  leaves. Other backends may need less or more.
- A budget of 2^31 weights or more is refused: for 7 B every leaf needs its own, and
  the sparsity has to be a Python float, which leaves out schedules."""


def run(config: Config) -> dict[str, Table]:
    """Prints the document and returns its tables by name.

    Raises:
      ValueError: a flag is out of its range, or there are too few devices to check on.
    """
    check_config(config)
    trees = {name: make() for name, make in TREES.items()}
    tables = {
        "bytes": bytes_table(trees),
        "time": time_table(trees, config),
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


def is_refused(method: Method, shapes: Shapes) -> bool:
    """Whether more weights compete for one budget than the library can count."""
    return not method.each_leaf and num_weights(shapes) >= 2**31


def bytes_table(trees: Mapping[str, Shapes]) -> Table:
    """Bytes of a refresh, on any number of devices that all sharded leaves divide."""
    devices, rows = 8, []
    for model, shapes in trees.items():
        for what, method in METHODS.items():
            row = {
                "what": what,
                "model": model,
                "weights": num_weights(shapes) / 1e6,
                "leaves": len(shapes),
            }
            if is_refused(method, shapes):
                rows.append(row | {"most": "refused"})
                continue
            bits = digit_bits(shapes, method.each_leaf)
            passes, sent = fewest_passes(bits), traffic(method, shapes, devices)
            numbers = {
                "bits": bits,
                "calls": sent.calls(2 * passes),
                "fewest": sent.bytes(passes) / 1e6,
                "most": sent.bytes(2 * passes) / 1e6,
                "gathered": gathered_bytes(method, shapes, devices) / 1e6,
            }
            rows.append(row | numbers)
    columns = {
        "what": "refresh",
        "model": "model",
        "weights": "weights (M)",
        "leaves": "leaves",
        "bits": "bits a digit",
        "fewest": "MB, no ties",
        "most": "MB, at most",
        "gathered": "MB of scores gathered",
        "calls": "calls on 8 devices, at most",
    }
    note = (
        "Weights: those of leaves with two axes or more, class token and position "
        "embedding left out. MB: 10^6 bytes that every device gives to the "
        "all-reduces of a refresh; the same from 8 devices to 4096. On more devices "
        "leaves differ in how far they divide, which adds calls."
    )
    return Table("Bytes of a refresh", note, columns, rows)


def time_table(trees: Mapping[str, Shapes], config: Config) -> Table:
    """Time of a refresh on a ring, beside that of gathering the scores."""
    latency, bandwidth = config.latency_us * 1e-6, config.bandwidth_gb * 1e9
    rows = []
    for model, shapes in trees.items():
        for what, method in METHODS.items():
            if is_refused(method, shapes):
                continue
            passes = 2 * fewest_passes(digit_bits(shapes, method.each_leaf))
            searched, gathered = (
                {"what": name, "model": model}
                for name in (what, f"{what}, scores gathered")
            )
            for n in config.devices:
                link = (latency, bandwidth)
                seconds = ring_seconds(method, shapes, n, passes, *link)
                searched[f"{n}"] = 1e3 * seconds
                gathered[f"{n}"] = 1e3 * gather_seconds(method, shapes, n, *link)
            rows += [searched, gathered]
    columns = {"what": "refresh", "model": "model"}
    columns |= {f"{n}": f"{n} devices" for n in config.devices}
    note = (
        f"ms of communication on a ring, by the formula, with {config.latency_us:g} µs "
        f"a message and {config.bandwidth_gb:g} * 10^9 bytes a second, both assumed; "
        "of as many passes as there can be, whose calls do not overlap."
    )
    return Table("Time on a ring", note, columns, rows)


def memory_table(trees: Mapping[str, Shapes], devices: Sequence[int]) -> Table:
    """Memory of a refresh by RigL on every device."""
    method, rows = METHODS["RigL"], []
    for model, shapes in trees.items():
        bits = digit_bits(shapes, method.each_leaf)
        for n in devices:
            held = local_weights(shapes, n)
            least, most = temporary_bounds(method, shapes, n)
            numbers = {
                "params": COUNT * held,
                "masks": held,
                "histograms": histogram_bytes(bits, len(shapes)),
                "least": least,
                "most": most,
                "gathered": COUNT * max(map(math.prod, shapes.values())),
            }
            row = {"what": model, "devices": n}
            rows.append(row | {key: size / 1e6 for key, size in numbers.items()})
    columns = {
        "what": "model",
        "devices": "devices",
        "params": "weights",
        "masks": "masks",
        "histograms": "histograms",
        "least": "temporary, at least",
        "most": "temporary, at most",
        "gathered": "largest leaf gathered",
    }
    note = (
        "MB on each device, under RigL; the gradients take as much as the weights. "
        "Temporary: at least a histogram of every leaf and a key of 4 bytes for each "
        "local weight; at most 13 bytes a local weight (9 by magnitude), 12 more in "
        "the largest leaf and five copies of the histograms, which bounds the programs "
        "that were compiled. The masks are the only state, 1 byte a weight. Replicated "
        "weights are those of one device. Largest leaf gathered: its scores, the "
        "least that sorting leaf by leaf needs."
    )
    return Table("Memory of a refresh", note, columns, rows)


def check_table(devices: Sequence[int]) -> Table:
    """What compiled programs communicate, beside the formulae."""
    trees = {"small": CHECKED, "wide": CHECKED_WIDE}
    rows = []
    for model, shapes in trees.items():
        for n in devices:
            shardings = make_shardings(shapes, n)
            for what, method in METHODS.items():
                compiled = compile_refresh(method, shapes, shardings)
                expected = traffic(method, shapes, n)
                least, most = temporary_bounds(method, shapes, n)
                row = {"what": what, "model": model, "devices": n}
                row |= check_cells(expected, collectives(compiled.as_text()))
                row |= {"temporary": temporary_bytes(compiled) / 1e3}
                rows.append(row | {"least": least / 1e3, "most": most / 1e3})
            row = {"what": "jnp.sort, each leaf", "model": model, "devices": n}
            found = collectives(compile_sort(shapes, shardings).as_text())
            scores = gathered_bytes(METHODS["magnitude, each leaf"], shapes, n)
            rows.append(row | check_gathers(scores, found))
    columns = {
        "what": "refresh",
        "model": "tree",
        "devices": "devices",
        "formula": "bytes, formula",
        "compiled": "bytes, compiled",
        "calls_formula": "calls, formula",
        "calls_compiled": "calls, compiled",
        "others": "other collectives",
        "temporary": "temporary, kB",
        "least": "at least",
        "most": "at most",
    }
    note = (
        f"small: leaves {', '.join(map(str, CHECKED.values()))}; wide: "
        f"{CHECKED_WIDE['a']}. Bytes: once + those of every pass of all searches, read "
        "off the compiled program; the number of passes depends on the scores and is "
        "not in it. Of the sort: bytes that it gathers. Temporary: of the compiled "
        "program, between the bounds by the formula."
    )
    title = "Formulae against compiled programs"
    return Table(title, note, columns, rows)


def check_cells(expected: Traffic, found: Sequence[Collective]) -> dict[str, object]:
    """Bytes and calls by the formula and of a program, once + a pass."""
    cells: dict[str, object] = {}
    for suffix, sent in (("formula", expected), ("compiled", compiled_traffic(found))):
        cells[f"calls_{suffix}"] = f"{sent.calls_once} + {sent.calls_a_pass}"
        cells[suffix] = f"{sent.bytes_once} + {sent.bytes_a_pass:,}"
    others = {c.kind for c in found} - {"all-reduce"}
    return cells | {"others": ", ".join(sorted(others)) or "none"}


def check_gathers(expected: int, found: Sequence[Collective]) -> dict[str, object]:
    """Bytes that a program gathers, by the formula and as compiled."""
    gathers = [c for c in found if c.kind == "all-gather"]
    return {
        "formula": f"{expected:,}",
        "compiled": f"{sum(sum(c.sizes) for c in gathers):,}",
        "calls_compiled": len(gathers),
        "others": ", ".join(sorted({c.kind for c in found})),
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(CHECKED_ON))
    cli.main(run, Config)
