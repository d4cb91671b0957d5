"""Two linear layers with nothing between them as one.

Where the rectifier between two layers has become the identity, their composition is
linear, and one layer computes it, up to rounding. It is exact for

- two dense layers;
- two convolutions of which the second pads nothing: the first may pad with zeros, and
  both may have strides. Of 3x3 and 3x3 the merged kernel is 5x5;
- a first convolution of 1x1 without a bias, and any second.

It is not where the second convolution pads what the first has computed: at the border
it sees zeros, and one convolution would see there what the first layer makes of the
pixels inside and of its bias. The inside would agree, the border differs. Nor is it
across the sum of a shortcut, a pooling by the maximum, or a normalisation by the batch,
which must be folded into its layer first, as it is in evaluation.

Merged layers do not have to be cheaper: of c channels throughout, a 5x5 kernel has 25
c^2 weights and two of 3x3 have 18 c^2; a dense layer of n inputs and m outputs has n m,
and two with k units between them k (n + m).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Padding = str | tuple[tuple[int, int], ...]


class Dense(NamedTuple):
    """A dense layer, `x @ kernel + bias`; of Flax, `Dense(**params["dense1"])`.

    Attributes:
      kernel: float[in, out].
      bias: float[out], or None.
    """

    kernel: jax.Array
    bias: jax.Array | None = None


class Convolution(NamedTuple):
    """A convolution of one group without dilation, over any number of axes.

    Of Flax, `Convolution(**params["conv1"], padding="SAME")`.

    Attributes:
      kernel: float[..., in, out]: HWIO of images.
      bias: float[out], or None.
      strides: one for each axis of space; None for 1.
      padding: with zeros, "VALID", "SAME" or (low, high) for each axis of space.
    """

    kernel: jax.Array
    bias: jax.Array | None = None
    strides: tuple[int, ...] | None = None
    padding: Padding = "VALID"


def merge_dense(first: Dense, second: Dense) -> Dense:
    """The dense layer that computes two with nothing between them.

    `(x W1 + b1) W2 + b2 = x (W1 W2) + (b1 W2 + b2)`.

    Args:
      first: the layer nearer to the input.
      second: the layer after it.

    Returns:
      One layer, with a bias if one of both has.

    Raises:
      ValueError: the kernels do not follow one another.

    >>> first = Dense(jnp.array([[1.0, 2.0]]), bias=jnp.array([1.0, 0.0]))
    >>> merged = merge_dense(first, Dense(jnp.array([[3.0], [4.0]])))
    >>> merged.kernel.tolist(), merged.bias.tolist()
    ([[11.0]], [3.0])
    """
    _check_following(first.kernel, second.kernel, axes=2)
    kernel = jnp.matmul(first.kernel, second.kernel, precision="highest")
    return Dense(kernel, _bias(first, second, second.kernel))


def merge_convolutions(first: Convolution, second: Convolution) -> Convolution:
    """The convolution that computes two with nothing between them.

    With strides s1 and s2, kernels of k1 and k2 taps along an axis, and zero padding p1
    and p2, the merged one has `s1 (k2 - 1) + k1` taps, the stride `s1 s2` and the
    padding `p1 + s1 p2`:

        K[c] = sum_{a + s1 b = c} K1[a] K2[b],    bias = b1 sum_b K2[b] + b2.

    Depthwise and grouped convolutions, whose kernels do not tell what they are, and
    dilated ones must not be given.

    Args:
      first: the layer nearer to the input.
      second: the layer after it.

    Returns:
      One layer, with a bias if one of both has and padding in numbers.

    Raises:
      ValueError: the kernels do not follow one another; one convolution cannot compute
        both; or strides and "SAME" leave open how much is padded.

    >>> first = Convolution(jnp.ones((3, 3, 1, 2)), padding="SAME")
    >>> merged = merge_convolutions(first, Convolution(jnp.ones((1, 1, 2, 4))))
    >>> merged.kernel.shape, merged.padding
    ((3, 3, 1, 4), ((1, 1), (1, 1)))
    >>> merge_convolutions(first, first._replace(kernel=jnp.ones((3, 3, 2, 1))))
    Traceback (most recent call last):
    ...
    ValueError: expected a second convolution that pads nothing, got padding ((1, 1),
    (1, 1)) after a first of 3x3: at the border it sees zeros, where one convolution
    would see what the first makes of the pixels inside; keep both
    """
    _check_following(first.kernel, second.kernel, axes=first.kernel.ndim)
    steps, further = _strides(first), _strides(second)
    before, after = _padding(first), _padding(second)
    _check_border(first, after)
    padding = tuple(
        (low + step * more_low, high + step * more_high)
        for step, (low, high), (more_low, more_high) in zip(
            steps, before, after, strict=True
        )
    )
    taps = jnp.sum(second.kernel, axis=tuple(range(second.kernel.ndim - 2)))
    return Convolution(
        _compose(first.kernel, second.kernel, steps),
        _bias(first, second, taps),
        tuple(a * b for a, b in zip(steps, further, strict=True)),
        padding,
    )


def _compose(
    first: jax.Array, second: jax.Array, strides: tuple[int, ...]
) -> jax.Array:
    """The kernel of the composition."""
    space = tuple(range(first.ndim - 2))
    ins, outs = first.ndim - 2, first.ndim - 1
    # The inputs of the first are a batch of images, whose features are its outputs.
    images, kernels = (ins, outs, *space), (outs, ins, *space)
    wide = jnp.promote_types(first.dtype, second.dtype)
    sizes = [second.shape[axis] for axis in space]
    margins = [step * (size - 1) for step, size in zip(strides, sizes, strict=True)]
    # XLA's convolution correlates: the second is turned around.
    return jax.lax.conv_general_dilated(
        first.astype(wide),
        jnp.flip(second.astype(wide), space),
        window_strides=[1] * len(space),
        padding=[(margin, margin) for margin in margins],
        rhs_dilation=strides,
        dimension_numbers=jax.lax.ConvDimensionNumbers(images, kernels, images),
        precision="highest",
    )


def _bias(
    first: Dense | Convolution, second: Dense | Convolution, kernel: jax.Array
) -> jax.Array | None:
    """The first bias through a kernel [between, out], and the second."""
    if first.bias is None:
        return second.bias
    passed = jnp.matmul(first.bias, kernel, precision="highest")
    return passed if second.bias is None else passed + second.bias


def _strides(layer: Convolution) -> tuple[int, ...]:
    """One for each axis of space."""
    axes = layer.kernel.ndim - 2
    strides = (1,) * axes if layer.strides is None else tuple(layer.strides)
    if len(strides) != axes or min(strides, default=1) < 1:
        raise ValueError(
            f"expected a stride of at least 1 for each of the {axes} axes of space of "
            f"a kernel of shape {layer.kernel.shape}, got {layer.strides}"
        )
    return strides


def _padding(layer: Convolution) -> tuple[tuple[int, int], ...]:
    """In numbers, (low, high) for each axis of space."""
    sizes, given = layer.kernel.shape[:-2], layer.padding
    if given == "VALID":
        return ((0, 0),) * len(sizes)
    if given == "SAME":
        # With strides it depends on the size of the image.
        steps = zip(_strides(layer), sizes, strict=True)
        if any(step > 1 and size > 1 for step, size in steps):
            raise ValueError(
                f"expected padding in numbers of a layer of strides {layer.strides}, "
                'got "SAME", which depends on the size of the image; give (low, high) '
                "for each axis, such as ((0, 1), (0, 1))"
            )
        return tuple(((size - 1) // 2, size // 2) for size in sizes)
    pairs = () if isinstance(given, str) else tuple(given)
    if len(pairs) != len(sizes) or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(
            'expected padding "VALID", "SAME" or (low, high) of at least 0 for each of '
            f"the {len(sizes)} axes of space, got {given!r}; one convolution cannot "
            "compute others"
        )
    return pairs


def _is_pair(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and min(pair) >= 0


def _check_border(first: Convolution, padding: tuple[tuple[int, int], ...]) -> None:
    """Raises where a second layer of this padding sees zeros that one would not see."""
    sizes = first.kernel.shape[:-2]
    padded = [size for size, own in zip(sizes, padding, strict=True) if own != (0, 0)]
    if any(size > 1 for size in padded):
        raise ValueError(
            f"expected a second convolution that pads nothing, got padding {padding} "
            f"after a first of {'x'.join(map(str, sizes))}: at the border it sees "
            "zeros, where one convolution would see what the first makes of the pixels "
            "inside; keep both"
        )
    if padded and first.bias is not None:
        raise ValueError(
            f"expected a first convolution without a bias, got one before padding "
            f"{padding}: at the border the second sees zeros, where one convolution "
            "would see the bias; keep both, or give None for a bias of zeros"
        )


def _check_following(first: jax.Array, second: jax.Array, axes: int) -> None:
    """Raises where the outputs of a kernel are not the inputs of the next."""
    same = first.ndim == second.ndim == axes >= 2
    if not same or first.shape[-1] != second.shape[-2]:
        raise ValueError(
            "expected kernels of layers that follow one another, [..., in, between] "
            f"and [..., between, out], got shapes {first.shape} and {second.shape}; "
            "grouped and depthwise convolutions cannot be merged"
        )
