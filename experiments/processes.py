"""Moved."""

from d2sparse.study.processes import Agreed, joined, parse

__all__ = ["Agreed", "joined", "parse"]
