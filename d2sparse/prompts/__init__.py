"""Visual prompts: trained pixels that make a frozen network see another task's images.

    prompt = border(canvas=32, inner=16, channels=3, mean=0.5, std=0.25)
    theta = prompt.init(jax.random.key(0))
    logits = network(prompt.apply(theta, images))  # The gradient goes to theta.

The network never changes: it is reprogrammed at its input (Elsayed et al.,
arXiv 1806.11146). A prompt is the two functions above. `border` puts the image into a
frame of trained pixels; `frame`, `patch` and `random_patch` add trained pixels to it.

Images are `float[batch, height, width, channels]` in [0, 1]: prompts normalise them as
the network wants them. Half precision is computed in float32 and comes back in its own
type; uint8 images are refused, since 200 and 200 / 255 are both numbers that a network
takes. An image of one channel is repeated for a network of several. Images of another
size are resized by `jax.image.resize`, bilinearly and, where they shrink, with its
antialias filter, as PIL does and PyTorch's tensors by default do not.
"""

from d2sparse.prompts.added import frame, patch, random_patch
from d2sparse.prompts.base import Prompt, effective_size
from d2sparse.prompts.borders import border
from d2sparse.prompts.images import check_pixels

__all__ = [
    "Prompt",
    "border",
    "check_pixels",
    "effective_size",
    "frame",
    "patch",
    "random_patch",
]
