"""The cells of the benchmark: a method, and what it learns from."""

from typing import Any, NamedTuple

from experiments.few_labels.options import LowDataOptions
from experiments.variants import exact

BUDGETS = (10, 50)  # Labels of every class, where no flag says how many.


class Setting(NamedTuple):
    """What is learned from.

    Attributes:
      samples: labels of every class, of the largest one in a long tail; 0 for all.
      label_noise: part of them that is wrong.
      imbalance: size of the largest class over that of the smallest.
    """

    samples: int
    label_noise: float = 0.0
    imbalance: float = 1.0

    @property
    def name(self) -> str:
        """Such as "50", "50-noise0.2" or "50-tail10"."""
        noise = f"-noise{exact(self.label_noise)}" if self.label_noise else ""
        tail = f"-tail{exact(self.imbalance)}" if self.imbalance > 1 else ""
        return f"{self.samples}{noise}{tail}"

    @property
    def title(self) -> str:
        """What its column of robustness is called."""
        if self.label_noise:
            return f"{100 * self.label_noise:.12g} % wrong labels"
        return f"imbalance {exact(self.imbalance)}"

    @property
    def fields(self) -> dict[str, Any]:
        """The flags that make it."""
        return {
            "samples_per_class": self.samples,
            "label_noise": self.label_noise,
            "imbalance": self.imbalance,
        }


class Cell(NamedTuple):
    """A method in a setting."""

    method: str
    setting: Setting

    @property
    def name(self) -> str:
        """The name of its units, such as "rigl-50"."""
        return f"{self.method}-{self.setting.name}"


def list_settings(config: LowDataOptions) -> list[Setting]:
    """Every budget as it is, with wrong labels, and with long tails."""
    found, one = [], config.samples_per_class
    budgets = config.budgets or (BUDGETS if one is None else (one,))
    for samples in dict.fromkeys(budgets):
        found += [Setting(samples)]
        found += [Setting(samples, noise) for noise in config.label_noises if noise]
        found += [Setting(samples, 0.0, i) for i in config.imbalances if i != 1]
    return found


def parse_cell(name: str) -> Cell:
    """The cell of a name.

    >>> parse_cell("rigl-50-noise0.2")
    Cell(method='rigl', setting=Setting(samples=50, label_noise=0.2, imbalance=1.0))
    """
    method, samples, *rest = name.split("-")
    noise, imbalance = 0.0, 1.0
    for part in rest:
        if part.startswith("noise"):
            noise = float(part.removeprefix("noise"))
        else:
            imbalance = float(part.removeprefix("tail"))
    return Cell(method, Setting(int(samples), noise, imbalance))
