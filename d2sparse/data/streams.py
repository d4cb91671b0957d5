"""Data that arrive in pieces: megabatches, and what a learner may still look at.

Index arithmetic alone, on the raw words of PCG64 as the budgets are: a seed names the
same stream on every machine. The setting is that of ALMA (Caccia et al.,
arXiv 2106.09563): a data set comes as T disjoint megabatches without a shift between
them, and the learner has to predict well after each.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from d2sparse.data.budgets import check_labels, shuffled

Replay = Literal["none", "last", "full", "buffer", "fraction"]
REPLAYS: tuple[Replay, ...] = get_args(Replay)

# Parts of the seed of a stream of words; 1 to 4 are those of budgets and wrong labels,
# 10 is that of the examples that arrivals are scored on.
_ORDER, _DEAL, _BUFFER, _FRACTION, _EPOCH, _HELD_OUT = 5, 6, 7, 8, 9, 11


class Megabatch(NamedTuple):
    """Examples that arrive together, or that are visible together.

    Attributes:
      train: int64[n] indices to train on.
      validation: int64[m] indices to choose by, never trained on; may be empty.
    """

    train: np.ndarray
    validation: np.ndarray


Stream = tuple[Megabatch, ...]


def cut_stream(
    labels: np.ndarray,
    megabatches: int,
    seed: int,
    validation_fraction: float = 0.1,
    stratified: bool = False,
    permuted: bool = True,
) -> Stream:
    """Cuts a data set into megabatches of nearly equal size.

    Of the n examples of a megabatch `floor(validation_fraction n)` are held out for
    validation. They are drawn at random, whatever the order of the examples; where the
    stream is stratified, every class gives its share, rounded up or down at random.
    A class whose examples would all be held out keeps its first one for training.
    Every example is in exactly one place.

    Args:
      labels: int[n] class of every example.
      megabatches: number T of pieces, at least 1.
      seed: seed of the order, at least 0.
      validation_fraction: part of every megabatch that is never trained on, in [0, 1).
      stratified: deals the examples of every class evenly to the megabatches.
      permuted: whether the order is drawn; if not, it is that of the data set, which
        may come sorted by class; where stratified, the classes take turns in it.

    Raises:
      ValueError: there are more megabatches than examples, or, where stratified, a
        class has too few examples to be in every megabatch.

    >>> stream = cut_stream(np.arange(10) % 2, megabatches=2, seed=0,
    ...                     validation_fraction=0.2, stratified=True)
    >>> [(len(own.train), len(own.validation)) for own in stream]
    [(4, 1), (4, 1)]
    """
    labels = check_labels(labels)
    if not 1 <= megabatches <= len(labels):
        raise ValueError(
            f"expected from 1 to {len(labels)} megabatches, as there are examples, got "
            f"{megabatches}"
        )
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"expected a validation_fraction in [0, 1), got {validation_fraction}"
        )
    if stratified:
        pieces = _deal(labels, megabatches, seed, permuted)
    else:
        order = np.arange(len(labels))
        if permuted:
            order = shuffled(order, (seed, _ORDER, 0))
        pieces = np.array_split(order, megabatches)
    held_out = np.zeros(len(labels), bool)
    for t, piece in enumerate(pieces):
        number = int(validation_fraction * len(piece))
        if stratified:
            chosen = _of_every_class(piece, labels, number, (seed, _HELD_OUT, t))
        else:
            # A drawn order has drawn its tail already.
            drawn = piece if permuted else shuffled(piece, (seed, _HELD_OUT, t))
            chosen = drawn[len(piece) - number :]
        held_out[chosen] = True
    order = np.concatenate(pieces)
    for label in np.setdiff1d(labels, labels[~held_out]):
        held_out[order[labels[order] == label][0]] = False
    return tuple(Megabatch(own[~held_out[own]], own[held_out[own]]) for own in pieces)


def visible(
    stream: Sequence[Megabatch],
    replay: Replay,
    seed: int,
    size: int = 0,
    fraction: float = 1.0,
) -> Stream:
    """What a learner may look at after each arrival.

    With M_t the t-th megabatch, R_t is

    * `"none"`: M_t.
    * `"last"`: M_{t-1} and M_t.
    * `"full"`: M_1 to M_t.
    * `"buffer"`: M_t and a reservoir, `size` examples that are uniform among all that
      came before; it never holds one twice.
    * `"fraction"`: M_t and a random part of R_{t-1}, `round(fraction n)` of its n: an
      example of M_{t-j} is left with probability `fraction^j`.

    Training and validation examples replay alike; the reservoir of the latter has the
    size that is in proportion.

    Args:
      stream: megabatches, as `cut_stream` gives them.
      replay: one of the above.
      seed: of what is kept.
      size: training examples of the reservoir, at least 1; for "buffer" alone.
      fraction: what is kept of the past, in [0, 1]; for "fraction" alone.

    Returns:
      R_1 to R_T; the newest examples come last.

    Raises:
      ValueError: no such mode, a reservoir without room, or a fraction out of range.

    >>> stream = cut_stream(np.zeros(12, int), 3, seed=0, validation_fraction=0.0)
    >>> for replay in ("none", "last", "full"):
    ...     print([len(own.train) for own in visible(stream, replay, seed=0)])
    [4, 4, 4]
    [4, 8, 8]
    [4, 8, 12]
    >>> [len(own.train) for own in visible(stream, "buffer", seed=0, size=3)]
    [4, 7, 7]
    """
    if replay not in REPLAYS:
        raise ValueError(f"expected a replay of {', '.join(REPLAYS)}, got {replay!r}")
    if replay == "buffer" and size < 1:
        raise ValueError(
            f"expected a replay buffer of at least 1 example, got {size}; for none "
            "choose the replay 'none'"
        )
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected a replay fraction in [0, 1], got {fraction}")
    train = [own.train for own in stream]
    held_out = [own.validation for own in stream]
    room = round(size * sum(map(len, held_out)) / max(sum(map(len, train)), 1))
    return tuple(
        Megabatch(*both)
        for both in zip(
            _replayed(train, replay, (seed, 0), size, fraction),
            _replayed(held_out, replay, (seed, 1), room, fraction),
            strict=True,
        )
    )


def accumulate(stream: Sequence[Megabatch], waited: int) -> Stream:
    """The stream of a learner that waits for several megabatches before it trains.

    It trains on their union; those at the end that fill no union are never trained on.

    Args:
      stream: the finest grid.
      waited: how many it waits for, from 1 to the length of the stream.

    Raises:
      ValueError: it would never train.

    >>> stream = cut_stream(np.zeros(5, int), 5, seed=0, validation_fraction=0.0)
    >>> [len(own.train) for own in accumulate(stream, 2)]
    [2, 2]
    """
    if not 1 <= waited <= len(stream):
        raise ValueError(
            f"expected to wait for 1 to {len(stream)} megabatches, as there are, got "
            f"{waited}"
        )
    unions = (
        stream[last - waited : last] for last in range(waited, len(stream) + 1, waited)
    )
    return tuple(
        Megabatch(
            np.concatenate([own.train for own in union]),
            np.concatenate([own.validation for own in union]),
        )
        for union in unions
    )


def on_finest_grid(
    values: Sequence[float], waited: int, megabatches: int, before: float
) -> list[float]:
    """What a waiting learner is measured at after every megabatch.

    Between two trainings its last model stands; before the first there is none.

    Args:
      values: after each of its trainings.
      waited: megabatches it waits for.
      megabatches: length of the finest grid.
      before: of a learner that has not been trained, such as the error of chance.

    >>> on_finest_grid([0.5, 0.25], waited=2, megabatches=5, before=0.9)
    [0.9, 0.5, 0.5, 0.25, 0.25]
    """
    held = [before, *values]
    return [held[min(t // waited, len(values))] for t in range(1, megabatches + 1)]


def epoch_batches(
    examples: np.ndarray, start: int, steps: int, batch_size: int, seed: tuple[int, ...]
) -> np.ndarray:
    """Which examples the steps of a learner are trained on, in endless epochs.

    Epoch e visits the examples in a random order of its own, cut into whole batches; a
    ragged tail is left out. Step t has the same batch whatever `start` is. The rows are
    indices into the whole data set, so that a step that is compiled once serves all
    megabatches, however much is visible.

    Args:
      examples: int[n] indices that are visible.
      start: first step, counted from when they became visible.
      steps: number of steps.
      batch_size: examples of a step, at most n.
      seed: numbers that name the order.

    Returns:
      int32[steps, batch_size].

    Raises:
      ValueError: the examples do not fill one batch.

    >>> epoch_batches(np.array([7, 8, 9]), 0, steps=2, batch_size=3, seed=(0,)).shape
    (2, 3)
    """
    if len(examples) < batch_size:
        raise ValueError(
            "expected a megabatch to fill a batch of "
            f"{batch_size}, got {len(examples)} "
            "examples to train on; cut the stream into fewer megabatches or lower the "
            "batch size"
        )
    per_epoch = len(examples) // batch_size
    epochs = range(start // per_epoch, (start + steps - 1) // per_epoch + 1)
    rows = [
        shuffled(examples, (*seed, _EPOCH, epoch))[: per_epoch * batch_size]
        for epoch in epochs
    ]
    stream = np.concatenate(rows).reshape(-1, batch_size).astype(np.int32)
    first = start - epochs[0] * per_epoch
    return stream[first : first + steps]


def _deal(
    labels: np.ndarray, megabatches: int, seed: int, permuted: bool
) -> list[np.ndarray]:
    """Every class in turn goes round the table, starting where the last one ended."""
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < megabatches:
        raise ValueError(
            f"expected every class in each of {megabatches} megabatches, got "
            f"{counts.min()} examples of class {classes[counts.argmin()]}; lower the "
            "number of megabatches, or do not stratify"
        )
    members = [np.flatnonzero(labels == label) for label in classes]
    if permuted:
        members = [shuffled(m, (seed, _DEAL, rank)) for rank, m in enumerate(members)]
    order = np.concatenate(members)
    pieces = [order[first::megabatches] for first in range(megabatches)]
    if permuted:
        return [shuffled(p, (seed, _ORDER, 1 + t)) for t, p in enumerate(pieces)]
    turns = np.concatenate([np.arange(len(m)) // megabatches for m in members])
    return [
        piece[np.argsort(turns[first::megabatches], kind="stable")]
        for first, piece in enumerate(pieces)
    ]


def _of_every_class(
    piece: np.ndarray, labels: np.ndarray, number: int, seed: tuple[int, ...]
) -> np.ndarray:
    """Random examples in which every class has its share.

    Class c with n_c of n examples gives `number n_c / n`, rounded down, and one more
    for the largest remainders until the number is reached; equal ones are drawn. No
    class is used up, unless there are too many classes for that.
    """
    classes, counts = np.unique(labels[piece], return_counts=True)
    most = counts - 1 if number <= (counts - 1).sum() else counts
    shares = counts * number // len(piece)
    drawn = shuffled(np.arange(len(classes)), (*seed, 0))
    remainders = counts * number % len(piece)
    order = drawn[np.argsort(-remainders[drawn], kind="stable")]
    while (rest := number - shares.sum()) > 0:
        room = order[shares[order] < most[order]]
        shares[room[:rest]] += 1
    held_out = [
        shuffled(piece[labels[piece] == label], (*seed, 1 + rank))[:share]
        for rank, (label, share) in enumerate(zip(classes, shares, strict=True))
    ]
    return np.concatenate(held_out)


def _replayed(
    pieces: Sequence[np.ndarray],
    replay: Replay,
    seed: tuple[int, int],
    size: int,
    fraction: float,
) -> list[np.ndarray]:
    nothing = np.zeros(0, np.int64)
    if replay == "none":
        return list(pieces)
    if replay == "last":
        before = itertools.chain([nothing], pieces)
        return [np.concatenate(both) for both in zip(before, pieces, strict=False)]
    if replay == "full":
        return [np.concatenate(pieces[: t + 1]) for t in range(len(pieces))]
    found: list[np.ndarray] = []
    for t, piece in enumerate(pieces):
        if replay == "buffer":
            past = np.concatenate([nothing, *pieces[:t]])
            kept = _reservoir(past, size, (*seed, _BUFFER))
        else:
            past = found[-1] if found else nothing
            number = round(fraction * len(past))
            kept = shuffled(past, (*seed, _FRACTION, t))[:number]
        found.append(np.concatenate([kept, piece]))
    return found


def _reservoir(past: np.ndarray, size: int, seed: tuple[int, ...]) -> np.ndarray:
    """The examples of the smallest words: each keeps its word, so none comes back."""
    words = np.random.PCG64(seed).random_raw(len(past))
    return past[np.sort(np.argsort(words, kind="stable")[:size])]
