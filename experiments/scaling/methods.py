"""The refreshes that are compared, and what they ask of the devices."""

from typing import NamedTuple

from d2sparse import distributions, rules
from d2sparse.rules import MaskRule


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
