"""The ways to another task by name: prompts with a label map, a probe, fine-tuning.

given = Transferred(network, classes=5, steps=300, options=TransferOptions())
training = constrain(plain(model, data), *TRANSFER_METHODS["probed"].constraints(given))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from d2sparse import prompts
from d2sparse.checks import check_choice, check_least
from d2sparse.constraints.label_mapped import label_mapped
from d2sparse.constraints.methods import Constraints, Method
from d2sparse.constraints.prompted import prompted
from d2sparse.constraints.quantised import quantised
from d2sparse.constraints.transferred import (
    fine_tuned,
    frozen,
    probed,
    sees,
    started_from,
)
from d2sparse.models.pretrained import Pretrained
from d2sparse.prompts import Prompt

PromptName = Literal["border", "frame", "patch", "random_patch"]


@dataclasses.dataclass(frozen=True)
class TransferOptions:
    """Transfer."""

    # Where the prompt is: a border around the smaller image, or added to the image on a
    # frame, a patch in its corner, or one at a random place.
    prompt: PromptName = "border"
    # Side of the image within a border; of others, the width of the frame or the side
    # of the patch. 0: half of what the network sees, and of a frame an eighth.
    prompt_size: int = 0
    map_every: int = 0  # steps between two choices of an iterative map; 0: a tenth
    votes: Literal["hard", "soft"] = "hard"  # of an example: one class, or shares
    solver: Literal["greedy", "hungarian"] = "greedy"  # of the map with most votes
    # Whether the map is chosen once more at the end, of an iterative map.
    final_refresh: bool = True

    prompt_rate: float = 0.05  # learning rate of prompts at the first step
    probe_rate: float = 0.01  # of a linear probe
    tuning_rate: float = 0.001  # of fine-tuning

    def __post_init__(self) -> None:
        """Refuses values out of their ranges.

        Raises:
          ValueError: naming the flag.
        """
        rates = ("prompt_rate", "probe_rate", "tuning_rate")
        check_least(self, {"prompt_size": 0, "map_every": 0, **dict.fromkeys(rates, 0)})
        check_choice("prompt", self.prompt, get_args(PromptName))
        check_choice("votes", self.votes, ("hard", "soft"))
        check_choice("solver", self.solver, ("greedy", "hungarian"))


class Transferred(NamedTuple):
    """What the ways to another task are made from.

    Attributes:
      network: that is transferred.
      classes: of the target.
      steps: of the training on it.
      options: of prompts and maps.
      bits: of the network's weights, which fine-tuning keeps; 0 for floats.
    """

    network: Pretrained
    classes: int
    steps: int
    options: TransferOptions = TransferOptions()
    bits: int = 0


def make_prompt(network: Pretrained, options: TransferOptions) -> Prompt:
    """The prompt of a network, which normalises images as its source was.

    Args:
      network: whose images it makes.
      options: its kind and size.

    Raises:
      ValueError: it is larger than the images of the network.
    """
    height, width, channels = network.shape
    size, least = (height, width), min(height, width)
    look: Any = {"channels": channels, "mean": network.mean, "std": network.std}
    own = options.prompt_size
    if options.prompt == "border":
        return prompts.border(size, own or (height // 2, width // 2), **look)
    if options.prompt == "frame":
        return prompts.frame(size, own or max(1, least // 8), **look)
    maker = prompts.patch if options.prompt == "patch" else prompts.random_patch
    return maker(size, own or max(1, least // 2), **look)


def _prompted(kind: str) -> Callable[[Transferred], Constraints]:
    def constraints(t: Transferred) -> Constraints:
        o, every = t.options, None
        if kind == "iterative":
            every = o.map_every or max(1, t.steps // 10)
        mapped = label_mapped(
            *(t.classes, kind, every),
            soft=o.votes == "soft",
            solver=o.solver,
            final_refresh=o.final_refresh,
        )
        shown = prompted(make_prompt(t.network, o))
        return (started_from(t.network), shown, frozen(["prompt"]), mapped)

    return constraints


def _probed(t: Transferred) -> Constraints:
    return (started_from(t.network), sees(t.network), probed(t.classes))


def _fine_tuned(t: Transferred) -> Constraints:
    coarse = (quantised(t.bits, 0),) if t.bits else ()
    # The new last layer has few bits too.
    tuned = (started_from(t.network), sees(t.network), fine_tuned(t.classes))
    return (*tuned, *coarse)


def _at(rate: str) -> Mapping[str, Any]:
    """Flags of training under Adam, without weight decay."""
    return {
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "learning_rate": lambda known: getattr(known.flags, rate),
    }


_PROMPT = _at("prompt_rate")

# The ways to another task; their constraints are made from `Transferred`.
TRANSFER_METHODS: Mapping[str, Method] = {
    "prompted_random": Method(_prompted("random"), _PROMPT),
    "prompted_identity": Method(_prompted("identity"), _PROMPT),
    "prompted_frequency": Method(_prompted("frequency"), _PROMPT),
    "prompted_iterative": Method(_prompted("iterative"), _PROMPT),
    "probed": Method(_probed, _at("probe_rate")),
    "fine_tuned": Method(_fine_tuned, _at("tuning_rate")),
}
