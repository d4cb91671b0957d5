"""Smaller networks that compute the same: layers are merged, and their weights gone."""

from d2sparse.surgery.merging import (
    Convolution,
    Dense,
    merge_convolutions,
    merge_dense,
)
from d2sparse.surgery.perceptrons import merge_perceptron

__all__ = [
    "Convolution",
    "Dense",
    "merge_convolutions",
    "merge_dense",
    "merge_perceptron",
]
