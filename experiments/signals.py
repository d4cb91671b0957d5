"""Moved."""

from d2sparse.study.signals import deferred

__all__ = ["deferred"]
