"""LeNet-300-100, the multilayer perceptron of the pruning literature."""

import jax
from flax import linen as nn

from d2sparse.models.base import Model, from_linen
from d2sparse.models.layers import ReLU, dense, positive_int, scaled_size


class MLP(nn.Module):
    """ReLU perceptron on the flattened input.

    Attributes:
      hidden: sizes of the hidden layers `dense1`, `dense2`, ..., followed by `relu1`,
        `relu2`, ...
      num_classes: size of the linear layer `head`.
    """

    hidden: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits float[batch, classes] of an input float[batch, ...]."""
        del train
        if x.ndim < 2:
            raise ValueError(
                f"expected an input [batch, ...], got shape {x.shape}; "
                "add a batch axis with x[None]"
            )
        x = x.reshape(x.shape[0], -1)
        for index, size in enumerate(self.hidden, start=1):
            x = dense(size, name=f"dense{index}")(x)
            x = ReLU(name=f"relu{index}")(x)
        return dense(self.num_classes, name="head")(x)


def lenet_300_100(num_classes: int = 10, width: float = 1.0) -> Model:
    """LeNet-300-100: dense layers of 300 and 100 ReLU units and a linear head.

    The fully connected network of LeCun et al., "Gradient-based learning applied to
    document recognition" (1998); 266,610 parameters on 28x28x1 images, 10 classes.

    Args:
      num_classes: number of logits.
      width: multiplier of the two hidden sizes, above 0.

    Returns:
      A model for inputs of any shape [batch, ...], with layers `dense1`, `dense2`,
      `head` and an empty state.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> x = jnp.zeros((1, 28, 28, 1))
      >>> params, _ = jax.eval_shape(lenet_300_100().init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      266610
    """
    hidden = (scaled_size(300, width), scaled_size(100, width))
    return from_linen(MLP(hidden, positive_int("num_classes", num_classes)))
