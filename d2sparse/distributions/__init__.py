"""Distributions: how a budget of weights is shared between the leaves.

A distribution takes `(shapes, sparsity)` and returns how many weights to keep: a number
for every path, or one number for which all leaves compete. Numbers, not fractions: a
total is exact only in integers. The sparsity may be traced; it is then a float32, and
above some 10^6 weights the total may differ from that of a Python float by rounding.
The total is always met: what a leaf cannot hold goes to the others.
"""

from d2sparse.distributions.budget import (
    Distribution,
    Shapes,
    Sparsity,
    check_sparsity,
    hand_out,
    share_budget,
)
from d2sparse.distributions.shares import er, erk, global_, uniform
from d2sparse.distributions.table import explicit

__all__ = [
    "Distribution",
    "Shapes",
    "Sparsity",
    "check_sparsity",
    "er",
    "erk",
    "explicit",
    "global_",
    "hand_out",
    "share_budget",
    "uniform",
]
