"""A question about almost nothing.

It stands for a real experiment in the tests of the command line.
"""

import dataclasses
from typing import Literal

from d2sparse.study import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """What the demo is told."""

    sparsity: float = 0.9  # fraction of zeros, in [0, 1); 0.9 leaves 10% of the weights
    seed: int = 0  # of everything random
    methods: tuple[str, ...] = ("dense", "rigl")  # compared methods
    widths: tuple[int, ...] = ()  # hidden units of every layer
    # slow networks
    modes: tuple[Literal["trained", "consolidated"], ...] = ("trained",)
    preset: Literal["symmetric", "fast_slow"] = "symmetric"  # how the two differ
    progress: bool = dataclasses.field(default=True, compare=False)  # live display
    # where to write; without it
    # nothing is kept
    workdir: str | None = None
    steps: int | None = None  # training steps, by default chosen from the data


def run(config: Config) -> None:
    """Prints the configuration, or refuses it."""
    if not 0 <= config.sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {config.sparsity}; try 0.9")
    if config.steps == 0:
        raise KeyboardInterrupt
    print(config)


if __name__ == "__main__":
    cli.main(run, Config)
