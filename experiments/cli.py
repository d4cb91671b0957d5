"""Moved."""

from d2sparse.study.cli import main, parse_flags, run_or_exit, use_compilation_cache

__all__ = ["main", "parse_flags", "run_or_exit", "use_compilation_cache"]
