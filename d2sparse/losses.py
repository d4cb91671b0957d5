"""Losses of one example: the task, distillation, agreement of two networks.

No function here reduces over examples: each returns `float[...]` for `float[..., n]`,
and the caller averages. A loss that averages over classes where its paper sums, or the
other way round, is off by a factor of the number of classes, so every docstring says
which of the two it does.

Losses that compare a network with its peer name the peer second. Where the peer is a
teacher it is detached inside, so the gradient of one network's loss with respect to the
other network's parameters is exactly zero.

What is given in half precision is computed and returned in float32, sums over classes
and the mean that the caller takes included; gradients have the type of what they belong
to.
"""

import math

import jax
import jax.numpy as jnp
import optax

from d2sparse.scores.local import widen


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """Cross entropy with integer labels and optional label smoothing.

    `CE = -sum_c t_c log softmax(logits)_c` with the target
    `t = (1 - smoothing) onehot(label) + smoothing / classes`.

    Args:
      logits: `float[..., classes]`.
      labels: `int[...]`, from 0 to classes - 1.
      smoothing: probability mass shared by all classes, the true one included, in
        [0, 1]; may be traced.

    Returns:
      `float[...]`, one loss per example, in nats.

    Raises:
      ValueError: the shapes of logits and labels do not match.

    >>> float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))[0] / math.log(4))
    1.0
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"expected labels of shape {logits.shape[:-1]} for logits of shape "
            f"{logits.shape}, got {labels.shape}; labels are class indices, not one-hot"
        )
    logits = widen(logits)
    onehot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(onehot, smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def distillation(
    logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Divergence of a student's predictions from those of a detached teacher.

    `tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`, summed over classes.
    The factor `tau^2` keeps the size of the gradient about independent of the
    temperature (Hinton et al., arXiv 1503.02531). Used both ways at once, with the
    logits of the same step, this is deep mutual learning (Zhang et al.,
    arXiv 1706.00384); averaging over classes as well makes the coupling weaker by the
    number of classes, the commonest way that method is broken.

    The teacher is detached inside: the gradient with respect to it is zero. For equal
    logits the value and the gradient are 0, up to rounding where XLA fuses the two
    sides differently.

    Args:
      logits: the student's, finite, `float[..., classes]`.
      teacher_logits: the teacher's, finite, of the same shape.
      temperature: positive; larger is softer. May be traced.

    Returns:
      `float[...]`, one loss per example, in nats.

    Raises:
      ValueError: the two shapes differ.

    >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[1e4, 0.0]])
    >>> float(distillation(student, teacher)[0] / math.log(2))
    1.0
    """
    _check_same_shape(logits, teacher_logits)
    logits, teacher_logits = widen((logits, teacher_logits))
    targets = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    predictions = jax.nn.log_softmax(logits / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(predictions, targets)
    return temperature**2 * divergence


def confidence(logits: jax.Array) -> jax.Array:
    """Largest probability, detached: how sure a network is, in [1 / classes, 1].

    A weight for the teaching of a peer: where labels are wrong, an example of which the
    peer is not sure teaches little.

    Args:
      logits: `float[..., classes]`.

    Returns:
      `float[...]`; the gradient with respect to the logits is zero.

    >>> confidence(jnp.zeros((1, 4)))
    Array([0.25], dtype=float32)
    """
    probabilities = jax.nn.softmax(jax.lax.stop_gradient(widen(logits)))
    return jnp.max(probabilities, axis=-1)


def logit_agreement(logits: jax.Array, peer_logits: jax.Array) -> jax.Array:
    """Mean squared difference to the logits of a detached peer.

    `1 / classes sum_c (z_c - z'_c)^2`: the consistency term between a working network
    and its slow averages in CLS-ER (Arani et al., arXiv 2201.12604), averaged over
    classes as there.

    Args:
      logits: `float[..., classes]`.
      peer_logits: of the same shape; the gradient with respect to them is zero.

    Returns:
      `float[...]`, one loss per example.

    Raises:
      ValueError: the two shapes differ.

    >>> logit_agreement(jnp.array([[3.0, 1.0]]), jnp.array([[1.0, 1.0]]))
    Array([2.], dtype=float32)
    """
    _check_same_shape(logits, peer_logits)
    logits, peer_logits = widen((logits, peer_logits))
    errors = optax.squared_error(logits, jax.lax.stop_gradient(peer_logits))
    return jnp.mean(errors, axis=-1)


def feature_agreement(features: jax.Array, peer_features: jax.Array) -> jax.Array:
    """Squared distance between the directions of two feature vectors.

    `| h / |h| - h' / |h'| |^2 = 2 - 2 cos(h, h')`, in [0, 4], with the peer `h'`
    detached. A zero vector, as a layer of dead units emits it, has no direction: it
    counts as the origin and gets a zero gradient. The features of two networks are
    comparable only when they share an initialisation or a projection was learned.

    Args:
      features: `float[..., width]`; flatten spatial axes first.
      peer_features: of the same shape; the gradient with respect to them is zero.

    Returns:
      `float[...]`, one loss per example.

    Raises:
      ValueError: the two shapes differ.

    >>> feature_agreement(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 0.5]]))
    Array([2.], dtype=float32)
    """
    _check_same_shape(features, peer_features)
    features, peer_features = widen((features, peer_features))
    peer_direction = _direction(jax.lax.stop_gradient(peer_features))
    return jnp.sum((_direction(features) - peer_direction) ** 2, axis=-1)


def jensen_shannon(logits_a: jax.Array, logits_b: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence between two predictions: symmetric and bounded.

    `JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2` with `m = (p + q) / 2`, summed over
    classes, in [0, log 2]. Neither side is detached: both networks are pulled together.
    Being bounded, it saturates where `distillation` would grow with the margin of a
    confidently wrong peer.

    Args:
      logits_a: finite, `float[..., classes]`.
      logits_b: finite, of the same shape.

    Returns:
      `float[...]`, one divergence per example, in nats; 0 for equal logits.

    Raises:
      ValueError: the two shapes differ.

    >>> certain = jnp.array([[1e4, 0.0]])
    >>> float(jensen_shannon(certain, -certain)[0] / math.log(2))
    1.0
    """
    _check_same_shape(logits_a, logits_b)
    logits_a, logits_b = widen((logits_a, logits_b))
    log_p, log_q = jax.nn.log_softmax(logits_a), jax.nn.log_softmax(logits_b)
    # log(p / m) written as log 2 - softplus(log q - log p): exactly 0 where p = q.
    log_p_over_m = math.log(2) - jax.nn.softplus(log_q - log_p)
    log_q_over_m = math.log(2) - jax.nn.softplus(log_p - log_q)
    terms = jnp.exp(log_p) * log_p_over_m + jnp.exp(log_q) * log_q_over_m
    return jnp.sum(terms, axis=-1) / 2


def _direction(vectors: jax.Array) -> jax.Array:
    # Dividing by the largest entry first keeps the squares from over- and underflowing.
    # The direction does not depend on this factor, so it takes no
    # part in the gradient.
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    has_direction = largest > jnp.finfo(vectors.dtype).tiny
    scale = jax.lax.stop_gradient(jnp.where(has_direction, largest, 1))
    scaled = jnp.where(has_direction, vectors / scale, 0)
    squares = jnp.sum(scaled**2, axis=-1, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(has_direction, squares, 1))


def _check_same_shape(first: jax.Array, second: jax.Array) -> None:
    if first.shape != second.shape:
        raise ValueError(
            "expected two arrays of one shape, one row per example, got "
            f"{first.shape} and {second.shape}; broadcast them explicitly if that is "
            "what is meant"
        )
