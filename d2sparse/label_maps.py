"""Label maps: which class of a source stands for which class of a target.

    counts = votes(logits, labels, classes=10)
    mapping = greedy(counts)
    target_logits = map_logits(logits, mapping)

A map is `int32[K]`, the source class of every target class, each at most once. It is
drawn at random, is the identity, or is chosen from votes,

    F[s, k] = number of training examples of class k that the source takes for an s,

as in frequency and iterative label mapping (Chen et al., arXiv 2211.11635). All
functions are jitted and vmapped over seeds; values are looked at where they are known.
Where S is about K, or examples are few, most choices are ties of cells without votes:
`ties` and `unvoted` tell how many.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from d2sparse.checks import check_key, check_whole


def votes(
    logits: jax.Array,
    labels: jax.Array,
    classes: int,
    *,
    soft: bool = False,
    weight: jax.Array | None = None,
) -> jax.Array:
    """How often a source predicts each of its classes for each target class.

        hard:  F[s, k] = sum_i w_i [argmax_s z_i = s] [y_i = k],
        soft:  F[s, k] = sum_i w_i softmax(z_i)_s [y_i = k].

    Votes of batches add up: hard ones exactly, in whole numbers, where the weights are
    whole numbers or bools; soft ones up to the rounding of float32. Of equal logits the
    first is the largest. Labels that are no class do not vote while tracing.

    Args:
      logits: of the source, `float[examples, S]`.
      labels: of the target, `int[examples]`, from 0 to K - 1.
      classes: K, of the target; at most S for a map.
      soft: whether an example shares its vote by the source's probabilities.
      weight: of every vote, such as 0 for examples that fill up a batch; 1 if not
        given.

    Returns:
      `int32[S, K]`; of soft votes or weights that are floats, `float32[S, K]`.

    Raises:
      ValueError: shapes that do not fit, or labels that are no class.

    >>> logits = jnp.array([[0.0, 1.0], [3.0, 0.0], [2.0, 0.0]])
    >>> votes(logits, jnp.array([0, 1, 1]), classes=2).tolist()
    [[0, 2], [1, 0]]
    """
    check_whole("classes", classes, least=1)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "expected logits of shape (examples, source classes) and a label for each "
            f"example, got shapes {logits.shape} and {labels.shape}"
        )
    _check_labels(labels, classes)
    given = jnp.ones(labels.shape, jnp.int32) if weight is None else weight
    if given.shape != labels.shape:
        raise ValueError(
            f"expected a weight for each of {len(labels)} examples, got shape "
            f"{given.shape}"
        )
    if soft:
        of_class = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
        of_class *= given.astype(jnp.float32)[:, None]
        chances = jax.nn.softmax(logits.astype(jnp.float32))
        return jnp.matmul(chances.T, of_class, precision="highest")
    exact = not jnp.issubdtype(given.dtype, jnp.floating)
    given = given.astype(jnp.int32 if exact else jnp.float32)
    inside = (labels >= 0) & (labels < classes)
    empty = jnp.zeros((logits.shape[1], classes), given.dtype)
    cell = jnp.argmax(logits, axis=1), jnp.where(inside, labels, 0)
    return empty.at[cell].add(jnp.where(inside, given, 0))


def random_map(key: jax.Array, sources: int, classes: int) -> jax.Array:
    """The first K of a random permutation of the source classes, int32[K].

    Args:
      key: random key.
      sources: S, classes of the source.
      classes: K, classes of the target, at most S.

    Raises:
      ValueError: there are more target classes than source classes.

    >>> sorted(random_map(jax.random.key(0), sources=3, classes=3).tolist())
    [0, 1, 2]
    """
    check_key(key)
    check_enough(sources, classes)
    return jax.random.permutation(key, sources)[:classes].astype(jnp.int32)


def identity_map(classes: int) -> jax.Array:
    """Every target class stands for the source class of its number, int32[K].

    >>> identity_map(3).tolist()
    [0, 1, 2]
    """
    check_whole("classes", classes, least=1)
    return jnp.arange(classes, dtype=jnp.int32)


def greedy(votes: jax.Array, then: jax.Array | None = None) -> jax.Array:
    """The cell with most votes, without its row and its column the next one, and so on.

    Of cells with as many votes the first counts, row by row: that of the smallest
    source class, then of the smallest target class. Target classes without votes so get
    the source classes with the smallest numbers, whatever these are; `then` lets soft
    votes decide instead.

    Args:
      votes: from `votes`, `[S, K]`, K at most S.
      then: `[S, K]`, what decides between cells with as many votes.

    Returns:
      int32[K].

    Raises:
      ValueError: votes that are no such matrix, or not finite; more target classes than
        source classes.

    >>> greedy(jnp.array([[3, 4], [2, 0], [1, 0]])).tolist()
    [1, 0]
    """
    return _choose(votes, then)[0]


def ties(votes: jax.Array, then: jax.Array | None = None) -> jax.Array:
    """How many choices of `greedy` nothing but the order of the classes decides.

    Args:
      votes: as in `greedy`.
      then: likewise.

    Returns:
      int32[], at most K; the last choice is a tie where unused source classes are left
      that have as many votes.

    >>> print(ties(jnp.array([[3, 0], [0, 0], [0, 0]])))
    1
    """
    return _choose(votes, then)[1]


def unvoted(votes: jax.Array, mapping: jax.Array) -> jax.Array:
    """How many target classes stand for a source class that nobody voted for, int32[].

    Args:
      votes: `[S, K]`.
      mapping: int[K].

    Raises:
      ValueError: the map is not one of this source and this target.

    >>> print(unvoted(jnp.array([[3, 0], [0, 0]]), jnp.array([0, 1])))
    1
    """
    _check_votes(votes)
    check_map(mapping, votes.shape[0])
    if mapping.shape != votes.shape[1:]:
        raise ValueError(
            f"expected a map of {votes.shape[1]} target classes, as the votes have, "
            f"got shape {mapping.shape}"
        )
    chosen = votes[mapping, jnp.arange(votes.shape[1])]
    return jnp.sum(chosen == 0, dtype=jnp.int32)


def hungarian(votes: jax.Array) -> jax.Array:
    """The map with the most votes in total, int32[K].

    By the Hungarian algorithm of `optax.assignment`, in float32: whole numbers of votes
    are exact up to 2^24. Which of several best maps it finds is not said.

    Args:
      votes: from `votes`, `[S, K]`, K at most S.

    Raises:
      ValueError: as in `greedy`.

    >>> hungarian(jnp.array([[3, 4], [2, 0], [1, 0]])).tolist()
    [1, 0]
    """
    _check_votes(votes)
    if not votes.shape[1]:
        return jnp.zeros(0, jnp.int32)
    costs = -votes.astype(jnp.float32)
    rows, columns = optax.assignment.hungarian_algorithm(costs)
    empty = jnp.zeros(votes.shape[1], jnp.int32)
    return empty.at[columns].set(rows.astype(jnp.int32))


def map_logits(logits: jax.Array, mapping: jax.Array) -> jax.Array:
    """The logits of the target classes, `float[..., K]`: `z[..., mapping]`.

    Args:
      logits: of the source, `float[..., S]`.
      mapping: int[K]. A class that the source has not gives NaN while tracing.

    Raises:
      ValueError: the map is known to be one of another source.

    >>> map_logits(jnp.array([[0.1, 0.2, 0.3]]), jnp.array([2, 0])).tolist()
    [[0.30000001192092896, 0.10000000149011612]]
    """
    check_map(mapping, logits.shape[-1])
    safe = jnp.where(mapping < 0, logits.shape[-1], mapping)  # -1 is not the last one.
    return jnp.take(logits, safe, axis=-1, mode="fill")


def check_map(mapping: jax.Array, sources: int) -> None:
    """Raises where a map cannot be one of a source; of traced maps by the shape alone.

    Raises:
      ValueError: it has more classes than the source, one that the source has not, or
        one twice.

    >>> check_map(jnp.array([2, 0]), sources=3)
    """
    if mapping.ndim != 1 or not jnp.issubdtype(mapping.dtype, jnp.integer):
        raise ValueError(
            "expected a source class for each target class, int[K], as the map, got "
            f"{mapping.dtype} of shape {mapping.shape}"
        )
    check_enough(sources, len(mapping))
    if isinstance(mapping, jax.core.Tracer):
        return
    known = jax.device_get(mapping).tolist()
    if known and not 0 <= min(known) <= max(known) < sources:
        raise ValueError(
            f"expected a map to classes 0 to {sources - 1} of the source, got one to "
            f"{min(known)} to {max(known)}; it was made for another source"
        )
    if len(set(known)) < len(known):
        twice = sorted({s for s in known if known.count(s) > 1})
        raise ValueError(
            f"expected a map that takes no source class twice, got {twice} more than "
            "once"
        )


def check_enough(sources: int, classes: int) -> None:
    """Raises where a source has too few classes for a target.

    Raises:
      ValueError: naming both numbers.

    >>> check_enough(sources=10, classes=5)
    """
    if classes > sources:
        raise ValueError(
            f"expected at most {sources} target classes, as many as the source has, "
            f"got {classes}; take a source of more classes, or train a head of your own"
        )


def _choose(votes: jax.Array, then: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The greedy map, and the number of its choices that were ties."""
    for given in (votes, *(() if then is None else (then,))):
        _check_votes(given)
    if then is not None and then.shape != votes.shape:
        raise ValueError(
            f"expected soft votes of shape {votes.shape}, like the hard ones, got "
            f"{then.shape}"
        )
    return _one_by_one(votes, then)


@jax.jit
def _one_by_one(
    votes: jax.Array, then: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    classes = votes.shape[1]

    def choose(number: jax.Array, carry: Any) -> Any:
        mapping, tied, candidates = carry
        best = _largest(votes, candidates)
        best = best if then is None else _largest(then, best)
        cell = jnp.argmax(best)  # Row by row, the first that is true.
        row, column = cell // classes, cell % classes
        left = candidates.at[row, :].set(False).at[:, column].set(False)
        tied += jnp.sum(best, dtype=jnp.int32) > 1
        return mapping.at[column].set(row.astype(jnp.int32)), tied, left

    start = jnp.zeros(classes, jnp.int32), jnp.int32(0), jnp.ones(votes.shape, bool)
    mapping, tied, _ = jax.lax.fori_loop(0, classes, choose, start)
    return mapping, tied


def _largest(values: jax.Array, candidates: jax.Array) -> jax.Array:
    """Which of the candidates have the largest value."""
    whole = jnp.issubdtype(values.dtype, jnp.integer)
    least = jnp.iinfo(values.dtype).min if whole else -jnp.inf
    among = jnp.where(candidates, values, jnp.asarray(least, values.dtype))
    return candidates & (among == jnp.max(among))


def _check_votes(votes: jax.Array) -> None:
    if votes.ndim != 2:
        raise ValueError(
            "expected votes of shape (source classes, target classes), got shape "
            f"{votes.shape}"
        )
    check_enough(*votes.shape)
    known = not isinstance(votes, jax.core.Tracer)
    if known and not bool(jnp.all(jnp.isfinite(votes))):
        raise ValueError(
            "expected votes that are finite, got a NaN or an infinity; the source's "
            "logits are not finite"
        )


def _check_labels(labels: jax.Array, classes: int) -> None:
    if isinstance(labels, jax.core.Tracer) or not labels.size:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"expected labels from 0 to {classes - 1}, got {low} to {high}; `classes` "
            "counts those of the target"
        )
